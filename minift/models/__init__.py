"""A model: the body of a family and, for a task, its head. Each family is one file, read top to bottom.

A family is a file here and a line in tables.FAMILIES, under config.json's model_type. It is made of what layers/ and
ops/ have, and is given a Batch (data/batch.py); bert.py shows them all. The file defines

    Config         a frozen dataclass: the fields of config.json that change what is computed, with transformers'
                   defaults; its __post_init__ raises ValueError for a kind of model that the file does not compute
                   (check_config, below).
                   checkpoints/loading.py judges the values in a file by a field's type and by how its name ends: whole
                   numbers are 1 or more (..._layers 1,024 at most, ..._token_id 0 or more), ...dropout is below 1.
                   The rows of the word embedding are the field vocab_size, which changes where they are added to.
                   Also these attributes, properties or fields:
                   longest         the most tokens that a sequence can have
                   token_types     rows of the token type embedding, 0 where the family has none
                   with_dropout(p) -> the changes of fields that set every dropout rate to p
    Body           nn.Module, Body(config); forward(batch, noise) -> hidden states at batch.rows, (M, C). Its layers are
                   an nn.ModuleList; one that is used several times, as ALBERT's, is there once. It has the attributes
                   `dtype` (of activations) and `recompute` (whether a layer saves only its input). One that can
                   generate has new_cache() -> list, and forward takes it as `cache`.
                   Its parameters and those of its parts are called weight and bias. A Linear is called with the
                   noise of its rows, for an adapter may be around it. Every place of dropout has a number of its own,
                   `site`, from 0; the head's come after the body's. A layer that is used several times is told its
                   sites at each use (an adapter in it drops the same each time). Parts of other families may be used
                   again, where Config has the fields that they read
    HEADS          what can be put on the body: "sequence" scores the labels of a sequence, "vocabulary" every token
                   that may come next, "masked" every token that may stand behind a mask
    ARCHITECTURE   what transformers calls the body without a head
    ASKED          "first" or "last": the token of a sequence that a "sequence" head is asked about
    RENAME         pairs (part of our name, part of the hub's), replaced from top to bottom in "body.layers.0...weight"
    PREFIX         what the hub's names of the body begin with
    EMBEDDING      our name of the word embedding
    ALIASES        {other name in config.json: field of Config}, as transformers' attribute_map
    TRANSPOSED     ends of the hub's names of weights that its files keep as (in, out)
    IGNORED        a regular expression: tensors of old files that are computed here
    OTHER_HEADS    a regular expression: tensors of heads for other tasks
    ROLES          what the hub calls the layers that make "query", "key", "value" and lead "down" from the MLP, from
                   which adapters choose their default targets: the end of a name, as PEFT's target_modules
    TOKENIZER      the rules of its tokenizer (data/tokenizer.py: WordPiece or byte-level BPE), where a checkpoint names
                   no tokenizer_class; any other kind of tokenizer is read from a tokenizer.json alone
    SHARDED        modules whose weights are gathered together where they are split over processes
    init_scale(config, name) -> standard deviation of a freshly drawn weight
    sized(vocab, width, layers, heads, positions) -> what stands in config.json of a new model of this size

A head is an nn.Module, Head(config, n_labels). What a checkpoint lacks of it is drawn at random in the order of its
layers, so they are in transformers' order. It has

    out                the last linear layer
    features(h, noise) -> what that layer sees, (M, C) from hidden states h (M, C); a small head computes in float32
    architecture       what transformers calls the body with this head
    rename             pairs as in RENAME, for the head's own names
    learns             whether an adapter run trains it, in full, beside the adapters
    tied               (its parameter, the body's parameter) if the two may be one; only a head over all tokens has it
    bias_twin          a second name that files have for the bias of `out`, by which transformers reads it first, and
                       alone where the head is not tied; "" or absent where there is none
"""

import importlib
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError
from ..ops.dropout import SILENT, Noise
from ..ops.gelu import ACTIVATIONS
from ..tables import FAMILIES

LAST = "head.out"  # the name of a head's last linear layer


def check_config(config, accepted: dict[str, object], act: str, width: str, heads: str, layers: str) -> None:
    """Raises ValueError for a Config whose family computes nothing like it.

    accepted: the one value that a field may have. act, width, heads, layers: what the family calls these fields.
    """
    for name, only in accepted.items():
        if getattr(config, name) != only:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected {only!r}")
    activation = getattr(config, act)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{act} is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if getattr(config, layers) < 1 or getattr(config, width) % getattr(config, heads):
        shape = ", ".join(f"{name} {getattr(config, name)}" for name in (width, heads, layers))
        raise ValueError(f"{shape}; expected a layer or more, and heads that divide the width")


def family_named(model_type: str) -> ModuleType:
    """The file of a family."""
    assert model_type in FAMILIES, model_type
    return importlib.import_module(f"{__name__}.{model_type.replace('-', '_')}")


class Model(nn.Module):
    """body(batch, noise) -> (M, C); head.features(h) -> (M, C) into the last layer, head.out.

    The rest is what a checkpoint says of itself: `settings` is its config.json, `labels` the names of its classes.
    """

    def __init__(self, settings: dict, config, head: nn.Module | None, task: str | None, labels: list[str]):
        super().__init__()
        self.family = family_named(settings["model_type"])
        self.settings = settings
        self.config = config
        self.body = self.family.Body(config)
        self.head = head
        self.task = task  # what the head is for, by its name in tables.TASKS; None without a head
        self.labels = list(labels)
        self.max_length = 0  # tokens that it was fine-tuned with at most; 0 where nothing says it
        self.source = ""  # where its weights came from: a folder's whole path, or a hub id
        self.report = None  # what loading met (checkpoints/weights.py)
        self.fresh: list[str] = []  # modules of the head, by the hub's names, that loading drew at random
        self.adapter = None  # the configuration of what adapters/ put around its layers
        self.tie()

    def compute_in(self, dtype: torch.dtype, recompute: bool = False) -> None:
        """Sets the dtype of activations, and whether a layer saves only its input and is computed again in backward."""
        self.body.dtype = dtype
        self.body.recompute = recompute

    @property
    def last(self) -> nn.Module:
        """The last linear layer of the head."""
        return self.head.out

    def set_last(self, layer: nn.Module) -> None:
        """Puts another layer there. (No setter of `last`: to nn.Module, that would be one more layer.)"""
        self.head.out = layer

    @property
    def scores_vocabulary(self) -> bool:
        """Whether the head scores every token of the vocabulary."""
        return hasattr(self.head, "tied")

    @property
    def bias_twin(self) -> str:
        """The second name that files have for the bias of the head's last layer, or ""."""
        return getattr(self.head, "bias_twin", "")

    @property
    def generates(self) -> bool:
        """Whether it can go on with a text, token after token."""
        return self.scores_vocabulary and hasattr(self.body, "new_cache")

    @property
    def tied(self) -> bool:
        """Whether the head has no weight of its own."""
        return self.scores_vocabulary and self.config.tie_word_embeddings

    def tie(self) -> None:
        """Makes a tied head share the embedding's parameter; again after parameters were replaced."""
        if self.tied:
            self.last.weight = self.get_parameter(self.head.tied[1])

    def untie(self) -> None:
        """Gives a tied head a weight of its own, equal to the embedding's."""
        self.config = replace(self.config, tie_word_embeddings=False)
        self.settings = self.settings | {"tie_word_embeddings": False}
        self.last.weight = nn.Parameter(self.last.weight.detach().clone())

    def resize(self, rows: int) -> None:
        """Makes the vocabulary `rows` long; new rows are zero."""
        resized = [(self.get_submodule(self.family.EMBEDDING), "weight")]
        if self.scores_vocabulary:
            self.last.out_features = rows
        if self.scores_vocabulary and not self.tied:
            resized.append((self.last, "weight"))
        if self.scores_vocabulary and self.last.bias is not None:
            resized.append((self.last, "bias"))
        for module, leaf in resized:
            old = getattr(module, leaf)
            new = old.new_zeros(rows, *old.shape[1:])
            new[: len(old)] = old.detach()[:rows]
            setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        self.config = replace(self.config, vocab_size=rows)
        self.settings = self.settings | {"vocab_size": rows}
        self.tie()

    def hub_name(self, name: str) -> str:
        """What the hub calls the parameter or module that is called `name` here."""
        name += "."  # the tables end in dots
        for mine, theirs in (*getattr(self.head, "rename", ()), *self.family.RENAME):
            name = name.replace(mine, theirs)
        return name[:-1]

    def size(self) -> int:
        """The number of weights, packed ones too."""
        count = sum(p.numel() for p in self.parameters())
        for module in self.modules():
            if "weight" in dict(module.named_buffers(recurse=False)):  # packed: codes, and no parameter
                count += module.in_features * module.out_features
        return count

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, batch: Batch, noise: Noise = SILENT) -> Tensor:
        """Hidden states at batch.rows, (M, C)."""
        return self.body(batch, noise)

    def logits(self, batch: Batch) -> Tensor:
        """What the head says of each row, without dropout: (M, V)."""
        return self.last(self.head.features(self(batch)))


def is_last(name: str) -> bool:
    """Whether a parameter or module of a model is its last layer, or in it."""
    return name == LAST or name.startswith(LAST + ".")


def check_length(model: Model, max_length: int) -> int:
    """`--max-length` in tokens: 0 stands for the length the model was fine-tuned with, else 512 or its limit."""
    longest = model.config.longest
    if max_length > longest:
        raise InputError(f"--max-length is {max_length}; expected at most {longest}, the positions that the model has")
    return max_length or model.max_length or min(512, longest)
