"""ELECTRA (Clark et al., https://arxiv.org/abs/2003.10555): BERT, with narrow embeddings and a head of its own.

    e = drop(norm(word[id] + type[t] + position[i]))        (N, E)
    x = e P^T + b                                           (N, C); x = e where E = C
    BERT's layers on x                                      (M, C)
    s = out drop(gelu(dense drop(x)))                       scores of the labels

Pretraining finds the words that another model has replaced, and leaves no head for a sequence: `dense` and `out` are
new. This file is a fork's: it stands in minift/models/, and tables.FAMILIES has the line `"electra": "ELECTRA"`. What
each name is for: minift/models/__init__.py. N tokens, M rows, C width, E width of the embeddings.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data import tokenizer
from ..data.batch import Batch
from ..layers import Linear
from ..ops.dropout import SILENT, Noise, dropout
from ..ops.gelu import gelu_erf
from . import bert, check_config


@dataclass(frozen=True)
class Config:
    """The fields of an ELECTRA config.json that change what is computed. Those of bert.Config mean the same here."""

    vocab_size: int = 30522
    embedding_size: int = 128
    hidden_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False

    def __post_init__(self):
        """Raises ValueError for a kind of ELECTRA that this file does not compute."""
        accepted = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
        check_config(self, accepted, "hidden_act", "hidden_size", "num_attention_heads", "num_hidden_layers")

    @property
    def longest(self) -> int:
        """The longest sequence there are positions for, in tokens."""
        return self.max_position_embeddings

    @property
    def token_types(self) -> int:
        """Rows of the token type embedding."""
        return self.type_vocab_size

    def with_dropout(self, p: float) -> dict:
        """The changes that set every dropout rate to p."""
        return dict(hidden_dropout_prob=p, attention_probs_dropout_prob=p, classifier_dropout=None)


class Body(nn.Module):
    """The encoder. Dropout places: 0 after the embeddings, then three a layer; the head's two follow."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # embeddings have no heads, whose number need not divide E
        self.embeddings = bert.Embeddings(replace(config, hidden_size=config.embedding_size, num_attention_heads=1))
        self.project = None
        if config.embedding_size != config.hidden_size:
            self.project = Linear(config.embedding_size, config.hidden_size)
        self.layers = nn.ModuleList(bert.Layer(config, 1 + 3 * i) for i in range(config.num_hidden_layers))
        self.dtype = torch.float32  # of activations
        self.recompute = False  # whether a layer saves only its input

    def forward(self, batch: Batch, noise: Noise = SILENT) -> Tensor:
        """Hidden states at batch.rows, (M, C)."""
        x = self.embeddings(batch).to(self.dtype)
        x = dropout(x, self.config.hidden_dropout_prob, noise, 0)  # (N, E)
        if self.project is not None:
            x = self.project(x, noise)  # (N, C)
        return bert.run_layers(self, x, batch, noise)  # (M, C)


class ClassifyHead(nn.Module):
    """One label a sequence, from its [CLS] token: dropout, a GELU layer, dropout, a linear layer."""

    architecture = "ElectraForSequenceClassification"
    rename = (("head.dense.", "classifier.dense."), ("head.out.", "classifier.out_proj."))
    learns = True

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.out = Linear(config.hidden_size, n_labels)
        self.p = config.hidden_dropout_prob
        if config.classifier_dropout is not None:
            self.p = config.classifier_dropout
        self.site = 1 + 3 * config.num_hidden_layers

    def features(self, h: Tensor, noise: Noise = SILENT) -> Tensor:
        """What the last linear layer sees, in float32. h (M, C) -> (M, C)."""
        h = dropout(h.float(), self.p, noise, self.site)
        h = gelu_erf(self.dense(h, noise))
        return dropout(h, self.p, noise, self.site + 1)


HEADS = {"sequence": ClassifyHead}
SHARDED = (bert.Layer,)  # what is gathered as one where the weights are split over processes
ARCHITECTURE = "ElectraModel"  # of a body without a head
ASKED = "first"  # the token of a sequence that classification asks about
TOKENIZER = tokenizer.BERT  # how its tokenizer splits a text, and joins two

# our name -> the hub's, replaced from top to bottom: BERT's, but for what the body is called
RENAME = (("body.project.", "electra.embeddings_project."), ("body.", "electra."), *bert.RENAME[1:])
PREFIX = "electra."
EMBEDDING = "body.embeddings.word"  # which has a row for each token of the vocabulary
ALIASES = {}  # other names that a config.json may give a field of Config
TRANSPOSED = ()
ROLES = bert.ROLES
IGNORED = r"(.*\.)?(position_ids|token_type_ids)"  # buffers of old files, computed here
OTHER_HEADS = (  # in the file, but not for this task
    r"(discriminator_predictions|generator_predictions|generator_lm_head|classifier|qa_outputs|sequence_summary)\..*"
)


def init_scale(config: Config, name: str) -> float:
    """Standard deviation of a freshly drawn weight."""
    return config.initializer_range
