"""A model: the body of a family (bert.py, gpt2.py) and, for a task, its head.

A family's TOKENIZER is the rules of its tokenizer (data/tokenizer.py), where the checkpoint names no tokenizer_class.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError
from ..ops.dropout import SILENT, Noise
from . import bert, gpt2

FAMILIES = {"bert": bert, "gpt2": gpt2}  # by config.json's model_type


class Model(nn.Module):
    """body(batch, noise) -> (M, C); head.features(h) -> (M, C) into the linear layer head.out.

    The rest is what a checkpoint says of itself: `settings` is its config.json, `labels` the names of its classes.
    """

    def __init__(self, settings: dict, config, task: str | None, labels: list[str]):
        super().__init__()
        self.family = FAMILIES[settings["model_type"]]
        self.settings, self.config, self.task, self.labels = settings, config, task, labels
        self.body = self.family.Body(config)
        self.head = self.family.HEADS[task](config, len(labels)) if task else None
        self.source = ""  # where its weights came from: a folder's whole path, or a hub id
        self.adapter = None  # the LoRAConfig of what adapters/ put around its layers
        self.tie()

    def tie(self) -> None:
        """Makes a tied head share the embedding's parameter; again after parameters were replaced."""
        if self.tied:
            self.head.out.weight = self.get_parameter(self.head.tied[1])

    def untie(self) -> None:
        """Gives a tied head a weight of its own, equal to the embedding's."""
        self.config = replace(self.config, tie_word_embeddings=False)
        self.settings = self.settings | {"tie_word_embeddings": False}
        self.head.out.weight = nn.Parameter(self.head.out.weight.detach().clone())

    def resize(self, rows: int) -> None:
        """Makes the vocabulary `rows` long; new rows are zero."""
        resized = [self.get_submodule(self.family.EMBEDDING)]
        if hasattr(self.head, "tied"):  # it says a token too
            self.head.out.out_features = rows
            resized += [] if self.tied else [self.head.out]
        for module in resized:
            old = module.weight
            new = old.new_zeros(rows, old.shape[1])
            new[: len(old)] = old.detach()[:rows]
            module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        self.config = replace(self.config, vocab_size=rows)
        self.settings = self.settings | {"vocab_size": rows}
        self.tie()

    @property
    def tied(self) -> bool:
        """Whether the head has no weight of its own."""
        return hasattr(self.head, "tied") and self.config.tie_word_embeddings

    def hub_name(self, name: str) -> str:
        """What the hub calls the parameter or module that is called `name` here."""
        name += "."  # the tables end in dots
        for mine, theirs in (*getattr(self.head, "rename", ()), *self.family.RENAME):
            name = name.replace(mine, theirs)
        return name[:-1]

    def size(self) -> int:
        """The number of weights, packed ones too."""
        packed = (
            m.in_features * m.out_features for m in self.modules() if "weight" in dict(m.named_buffers(recurse=False))
        )
        return sum(p.numel() for p in self.parameters()) + sum(packed)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, batch: Batch, noise: Noise = SILENT) -> Tensor:
        """Hidden states at batch.rows, (M, C)."""
        return self.body(batch, noise)

    def logits(self, batch: Batch) -> Tensor:
        """What the head says of each row, without dropout: (M, V)."""
        return self.head.out(self.head.features(self(batch)))


def check_length(model: Model, max_length: int) -> int:
    """`--max-length` in tokens: 0 stands for the length the model was fine-tuned with, else 512 or its limit."""
    longest = model.config.longest
    if max_length > longest:
        raise InputError(f"--max-length is {max_length}; expected at most {longest}, the positions that the model has")
    return max_length or model.settings.get("minift", {}).get("max_length") or min(512, longest)
