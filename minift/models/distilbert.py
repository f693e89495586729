"""DistilBERT (Sanh et al., https://arxiv.org/abs/1910.01108): BERT at half the depth, taught by BERT.

    x = norm(word[id] + position[i])
    x = norm(x + out attention(query x, key x, value x))
    x = norm(x + drop(down act(up x)))              both of these, layer after layer

There are no token types, nothing is dropped after `out`, and the tanh layer of BERT's head is a ReLU layer that
pretraining did not leave. All else stands in bert.py. N tokens, M rows, C width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import tokenizer
from ..data.batch import Batch
from ..layers import Embedding, LayerNorm, Linear
from ..ops.dropout import SILENT, Noise, dropout
from . import bert, check_config

EPS = 1e-12  # of every layer norm: no field of config.json


@dataclass(frozen=True)
class Config:
    """The fields of a DistilBERT config.json that change what is computed, under their names there.

    `sinusoidal_pos_embds` is none of them: it says how positions were drawn, and they come with the checkpoint.
    """

    vocab_size: int = 30522
    dim: int = 768
    n_layers: int = 6
    n_heads: int = 12
    hidden_dim: int = 3072
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self):
        """Raises ValueError for a kind of DistilBERT that this file does not compute."""
        check_config(self, {}, "activation", "dim", "n_heads", "n_layers")

    @property
    def longest(self) -> int:
        """The longest sequence there are positions for, in tokens."""
        return self.max_position_embeddings

    @property
    def token_types(self) -> int:
        """0: DistilBERT has none."""
        return 0

    def with_dropout(self, p: float) -> dict:
        """The changes that set every dropout rate to p."""
        return dict(dropout=p, attention_dropout=p, seq_classif_dropout=p)


def bert_config(config: Config) -> bert.Config:
    """The fields that BERT's parts read, under their names there."""
    return bert.Config(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_attention_heads=config.n_heads,
        intermediate_size=config.hidden_dim,
        hidden_act=config.activation,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        layer_norm_eps=EPS,
    )


class Embeddings(nn.Module):
    """Word and position, summed and normalised."""

    def __init__(self, config: Config):
        super().__init__()
        self.word = Embedding(config.vocab_size, config.dim)
        self.position = Embedding(config.max_position_embeddings, config.dim)
        self.norm = LayerNorm(config.dim, EPS)

    def forward(self, batch: Batch) -> Tensor:
        return self.norm(self.word(batch.ids) + self.position(batch.positions))  # (N, C)


class Layer(bert.Layer):
    """BERT's, without the dropout after `out`, at site + 1."""

    def __init__(self, config: Config, site: int):
        super().__init__(bert_config(config), site)
        self.attention.p = 0.0


class Body(nn.Module):
    """The encoder. Dropout places: 0 after the embeddings, then three a layer; the head's follow."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, 1 + 3 * i) for i in range(config.n_layers))
        self.dtype = torch.float32  # of activations
        self.recompute = False  # whether a layer saves only its input

    def forward(self, batch: Batch, noise: Noise = SILENT) -> Tensor:
        """Hidden states at batch.rows, (M, C)."""
        x = self.embeddings(batch).to(self.dtype)
        x = dropout(x, self.config.dropout, noise, 0)  # (N, C)
        return bert.run_layers(self, x, batch, noise)  # (M, C)


class ClassifyHead(nn.Module):
    """One label a sequence, from its [CLS] token: a ReLU layer, dropout, a linear layer; none is pretrained."""

    architecture = "DistilBertForSequenceClassification"
    rename = (("head.dense.", "pre_classifier."), ("head.out.", "classifier."))
    learns = True

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        self.dense = Linear(config.dim, config.dim)
        self.out = Linear(config.dim, n_labels)
        self.p = config.seq_classif_dropout
        self.site = 1 + 3 * config.n_layers

    def features(self, h: Tensor, noise: Noise = SILENT) -> Tensor:
        """What the last linear layer sees, in float32. h (M, C) -> (M, C)."""
        return dropout(torch.relu(self.dense(h.float(), noise)), self.p, noise, self.site)


class FillHead(bert.FillHead):
    """BERT's, under other names."""

    architecture = "DistilBertForMaskedLM"
    rename = (
        ("head.dense.", "vocab_transform."),
        ("head.norm.", "vocab_layer_norm."),
        ("head.out.", "vocab_projector."),
    )
    bias_twin = ""

    def __init__(self, config: Config, n_labels: int = 0):
        super().__init__(bert_config(config))


HEADS = {"sequence": ClassifyHead, "masked": FillHead}
SHARDED = (Layer,)  # what is gathered as one where the weights are split over processes
ARCHITECTURE = "DistilBertModel"  # of a body without a head
ASKED = "first"  # the token of a sequence that classification asks about
TOKENIZER = tokenizer.BERT  # how its tokenizer splits a text, and joins two

# our name -> the hub's, replaced from top to bottom
RENAME = (
    ("body.", "distilbert."),
    ("embeddings.word.", "embeddings.word_embeddings."),
    ("embeddings.position.", "embeddings.position_embeddings."),
    ("embeddings.norm.", "embeddings.LayerNorm."),
    ("layers.", "transformer.layer."),
    ("attention.query.", "attention.q_lin."),
    ("attention.key.", "attention.k_lin."),
    ("attention.value.", "attention.v_lin."),
    ("attention.out.", "attention.out_lin."),
    ("attention.norm.", "sa_layer_norm."),
    ("mlp.up.", "ffn.lin1."),
    ("mlp.down.", "ffn.lin2."),
    ("mlp.norm.", "output_layer_norm."),
)
PREFIX = "distilbert."
EMBEDDING = "body.embeddings.word"  # which has a row for each token of the vocabulary
ALIASES = {  # other names that a config.json may give a field of Config (transformers' attribute_map)
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}
TRANSPOSED = ()
ROLES = {"query": "q_lin", "key": "k_lin", "value": "v_lin", "down": "ffn.lin2"}
IGNORED = bert.IGNORED  # buffers of old files, computed here
OTHER_HEADS = r"vocab_(transform|layer_norm|projector)\..*|(pre_)?classifier\..*|qa_outputs\..*"  # of other tasks
init_scale = bert.init_scale


def sized(vocab: int, width: int, layers: int, heads: int, positions: int) -> dict:
    """config.json of a model of this size, as bert.sized."""
    return {
        "vocab_size": vocab,
        "dim": width,
        "n_layers": layers,
        "n_heads": heads,
        "hidden_dim": 4 * width,
        "max_position_embeddings": positions,
    }
