"""BERT, the bidirectional encoder (Devlin et al., https://arxiv.org/abs/1810.04805), on packed tokens.

    x = norm(word[id] + type[t] + position[i])
    a = attention(query x, key x, value x)
    x = norm(x + drop(out a))
    x = norm(x + drop(down act(up x)))              both of these, layer after layer

The last layer is computed for the tokens asked about (`batch.rows`) alone; its keys and values for all.
N tokens, M rows, C width, H heads, D = C / H head size, L layers, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import tokenizer
from ..data.batch import Batch
from ..layers import Embedding, LayerNorm, Linear, recomputed
from ..ops.attention import Settings, attention
from ..ops.dropout import SILENT, Noise, dropout
from ..ops.gelu import ACTIVATIONS
from . import check_config


@dataclass(frozen=True)
class Config:
    """The fields of a BERT config.json that change what is computed, under their names there."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
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
    tie_word_embeddings: bool = True

    def __post_init__(self):
        """Raises ValueError for a kind of BERT that this file does not compute."""
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


class Embeddings(nn.Module):
    """Word, token type and position, summed and normalised."""

    def __init__(self, config: Config):
        super().__init__()
        self.word = Embedding(config.vocab_size, config.hidden_size)
        self.position = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        kind = self.token_type.weight[0] if batch.types is None else self.token_type(batch.types)
        return self.norm(self.word(batch.ids) + kind + self.position(batch.positions))  # (N, C)


class Attention(nn.Module):
    """Self-attention with its output projection, residual and norm."""

    def __init__(self, config: Config, site: int):
        super().__init__()
        width = config.hidden_size
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.out = Linear(width, width)
        self.norm = LayerNorm(width, config.layer_norm_eps)
        self.heads = config.num_attention_heads
        self.p_probs = config.attention_probs_dropout_prob
        self.p = config.hidden_dropout_prob
        self.site = site

    def forward(self, x: Tensor, batch: Batch, noise: Noise, rows: Tensor | None) -> Tensor:
        """x (N, C) -> (M, C) at `rows`, or (N, C) where rows is None."""
        asked, at = x, noise
        if rows is not None:  # only these ask; all of them answer
            asked, at = x.index_select(0, rows), noise.at(rows)
        split = (self.heads, -1)
        q = self.query(asked, at).unflatten(-1, split)  # (M, H, D)
        k = self.key(x, noise).unflatten(-1, split)  # (N, H, D)
        v = self.value(x, noise).unflatten(-1, split)  # (N, H, D)
        scale = q.shape[-1] ** -0.5
        settings = Settings(scale, p=self.p_probs, noise=at, site=self.site, longest=batch.longest)
        a = attention(q, k, v, batch.offsets, rows, settings)  # (M, H, D)
        _, y = self.norm.add(self.out(a.flatten(1), at), asked, self.p, at, self.site + 1)
        return y


class MLP(nn.Module):
    """The feed-forward half of a layer, with its residual and norm."""

    def __init__(self, config: Config, site: int):
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.act = ACTIVATIONS[config.hidden_act]
        self.p = config.hidden_dropout_prob
        self.site = site

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        """x (M, C) -> (M, C)."""
        h = self.down(self.act(self.up(x, noise)), noise)
        _, y = self.norm.add(h, x, self.p, noise, self.site)
        return y


class Layer(nn.Module):
    """Attention, then feed-forward. Three dropout places: site, site + 1, site + 2."""

    def __init__(self, config: Config, site: int):
        super().__init__()
        self.attention = Attention(config, site)
        self.mlp = MLP(config, site + 2)

    def forward(self, x: Tensor, batch: Batch, noise: Noise, rows: Tensor | None = None) -> Tensor:
        return self.mlp(self.attention(x, batch, noise, rows), noise.at(rows))


class Body(nn.Module):
    """The encoder. Dropout places: 0 after the embeddings, then three a layer; the head's follow."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, 1 + 3 * i) for i in range(config.num_hidden_layers))
        self.dtype = torch.float32  # of activations
        self.recompute = False  # whether a layer saves only its input

    def forward(self, batch: Batch, noise: Noise = SILENT) -> Tensor:
        """Hidden states at batch.rows, (M, C)."""
        x = self.embeddings(batch).to(self.dtype)
        x = dropout(x, self.config.hidden_dropout_prob, noise, 0)  # (N, C)
        return run_layers(self, x, batch, noise)  # (M, C)


def run_layers(body: nn.Module, x: Tensor, batch: Batch, noise: Noise) -> Tensor:
    """The layers of an encoder one after the other, the last at batch.rows alone: x (N, C) -> (M, C)."""
    for layer in body.layers:
        rows = batch.rows if layer is body.layers[-1] else None
        if body.recompute:
            x = recomputed(layer, x, batch, noise, rows)
        else:
            x = layer(x, batch, noise, rows)
    return x


class ClassifyHead(nn.Module):
    """One label a sequence, from its [CLS] token: a tanh layer that pretraining left, dropout, a linear layer."""

    architecture = "BertForSequenceClassification"
    rename = (("head.pooler.", "bert.pooler.dense."), ("head.out.", "classifier."))
    learns = True

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        self.pooler = Linear(config.hidden_size, config.hidden_size)
        self.out = Linear(config.hidden_size, n_labels)
        self.p = config.classifier_dropout
        if self.p is None:
            self.p = config.hidden_dropout_prob
        self.site = 1 + 3 * config.num_hidden_layers

    def features(self, h: Tensor, noise: Noise = SILENT) -> Tensor:
        """What the last linear layer sees, in float32. h (M, C) -> (M, C)."""
        return dropout(torch.tanh(self.pooler(h.float(), noise)), self.p, noise, self.site)


class FillHead(nn.Module):
    """The word at each row: a layer, its activation, a norm; then the word embedding itself, and a bias of its own."""

    architecture = "BertForMaskedLM"
    rename = (
        ("head.dense.", "cls.predictions.transform.dense."),
        ("head.norm.", "cls.predictions.transform.LayerNorm."),
        ("head.out.bias.", "cls.predictions.bias."),
        ("head.out.", "cls.predictions.decoder."),
    )
    learns = False
    tied = ("head.out.weight", "body.embeddings.word.weight")
    bias_twin = "cls.predictions.decoder.bias"

    def __init__(self, config: Config, n_labels: int = 0):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.out = Linear(config.hidden_size, config.vocab_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def features(self, h: Tensor, noise: Noise = SILENT) -> Tensor:
        """What the last linear layer sees. h (M, C) -> (M, C)."""
        return self.norm(self.act(self.dense(h, noise)))


HEADS = {"sequence": ClassifyHead, "masked": FillHead}
SHARDED = (Layer,)  # what is gathered as one where the weights are split over processes
ARCHITECTURE = "BertModel"  # of a body without a head
ASKED = "first"  # the token of a sequence that classification asks about
TOKENIZER = tokenizer.BERT  # how its tokenizer splits a text, and joins two

# our name -> the hub's, replaced from top to bottom
RENAME = (
    ("body.", "bert."),
    ("embeddings.word.", "embeddings.word_embeddings."),
    ("embeddings.position.", "embeddings.position_embeddings."),
    ("embeddings.token_type.", "embeddings.token_type_embeddings."),
    ("embeddings.norm.", "embeddings.LayerNorm."),
    ("layers.", "encoder.layer."),
    ("attention.query.", "attention.self.query."),
    ("attention.key.", "attention.self.key."),
    ("attention.value.", "attention.self.value."),
    ("attention.out.", "attention.output.dense."),
    ("attention.norm.", "attention.output.LayerNorm."),
    ("mlp.up.", "intermediate.dense."),
    ("mlp.down.", "output.dense."),
    ("mlp.norm.", "output.LayerNorm."),
)
PREFIX = "bert."
EMBEDDING = "body.embeddings.word"  # which has a row for each token of the vocabulary
ALIASES = {}  # other names that a config.json may give a field of Config
TRANSPOSED = ()
ROLES = {"query": "query", "key": "key", "value": "value", "down": "output.dense"}
IGNORED = r"(.*\.)?position_ids"  # buffers of old files, computed here
OTHER_HEADS = r"(bert\.)?pooler\..*|cls\..*|classifier\..*|qa_outputs\..*"  # in the file, but not for this task


def sized(vocab: int, width: int, layers: int, heads: int, positions: int) -> dict:
    """config.json of a model of this size: rows of the embedding, C, L, H, tokens of the longest sequence."""
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": positions,
    }


def init_scale(config: Config, name: str) -> float:
    """Standard deviation of a freshly drawn weight."""
    return config.initializer_range
