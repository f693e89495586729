"""GPT-2, the causal decoder (Radford et al. 2019, https://github.com/openai/gpt-2), on packed tokens.

    x = drop(wte[id] + wpe[i])
    x = x + drop(c_proj attention(c_attn ln_1(x)))
    x = x + drop(c_proj act(c_fc ln_2(x)))          both of these, layer after layer
    h = ln_f(x)

The last layer is computed for the tokens asked about (`batch.rows`) alone; its keys and values (and, since c_attn is
one matrix, its queries) for all. N tokens, M rows, C width, H heads, D = C / H head size, L layers, V vocabulary.
"""

import math
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
    """The fields of a GPT-2 config.json that change what is computed, under their names there."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    add_cross_attention: bool = False

    def __post_init__(self):
        """Raises ValueError for a kind of GPT-2 that this file does not compute."""
        check_config(self, {"add_cross_attention": False}, "activation_function", "n_embd", "n_head", "n_layer")

    @property
    def longest(self) -> int:
        """The longest sequence there are positions for, in tokens."""
        return self.n_positions

    @property
    def token_types(self) -> int:
        """0: GPT-2 has none."""
        return 0

    def with_dropout(self, p: float) -> dict:
        """The changes that set every dropout rate to p."""
        return dict(resid_pdrop=p, embd_pdrop=p, attn_pdrop=p)


class Past:
    """Keys and values that one layer made of one sequence's T tokens so far, for the n tokens that come next."""

    def __init__(self, longest: int):
        self.longest = longest
        self.length = 0  # T
        self.kv: Tensor | None = None  # (2, longest, H, D)

    def join(self, k: Tensor, v: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Appends k, v (n, H, D); returns all k, v (T + n, H, D), their offsets, and `rows` counted in them."""
        if self.kv is None:
            self.kv = k.new_empty(2, self.longest, *k.shape[1:])
        start = self.length
        self.length += len(k)
        self.kv[0, start : self.length] = k
        self.kv[1, start : self.length] = v
        if rows is None:
            rows = torch.arange(start, self.length, device=k.device)
        else:
            rows = rows + start
        keys, values = self.kv[:, : self.length]
        return keys, values, torch.arange(2, device=k.device) * self.length, rows


class Attention(nn.Module):
    """Causal self-attention with its output projection."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.heads = config.n_head
        self.p = config.attn_pdrop
        self.site = 1 + 3 * layer
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, batch: Batch, noise: Noise, rows: Tensor | None, past: Past | None) -> Tensor:
        """x (N, C) -> (M, C) at `rows`, or (N, C) where rows is None; what is in `past` is attended to, too."""
        q, k, v = self.c_attn(x, noise).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (N, H, D) each
        at = noise
        if rows is not None:  # only these ask; all of them answer
            q = q.index_select(0, rows)  # (M, H, D)
            at = noise.at(rows)
        offsets, longest = batch.offsets, batch.longest
        if past is not None:
            k, v, offsets, rows = past.join(k, v, rows)
            longest = len(k)
        settings = Settings(self.scale, causal=True, p=self.p, noise=at, site=self.site, longest=longest)
        a = attention(q, k, v, offsets, rows, settings)
        return self.c_proj(a.flatten(1), at)


class MLP(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, config: Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, inner)
        self.c_proj = Linear(inner, config.n_embd)
        self.act = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        """x (M, C) -> (M, C)."""
        return self.c_proj(self.act(self.c_fc(x, noise)), noise)


class Layer(nn.Module):
    """The parts of a layer; Body.layer joins them, since a residual and the next norm are one operator."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)


class Body(nn.Module):
    """The decoder. Dropout places: 0 after the embeddings, then three a layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.dtype = torch.float32  # of activations
        self.recompute = False  # whether a layer saves only its input

    def new_cache(self) -> list[Past]:
        """An empty cache for one sequence, as forward takes it."""
        return [Past(self.config.longest) for _ in self.h]

    def forward(self, batch: Batch, noise: Noise = SILENT, cache: list[Past] | None = None) -> Tensor:
        """Hidden states at batch.rows, (M, C).

        With a cache, one Past a layer, the batch is the continuation of the one sequence there (no gradients).
        """
        positions = batch.positions if cache is None else batch.positions + cache[0].length
        x = (self.wte(batch.ids) + self.wpe(positions)).to(self.dtype)
        x = dropout(x, self.config.embd_pdrop, noise, 0)  # (N, C)
        y = self.h[0].ln_1(x)
        for i in range(len(self.h)):
            if self.recompute:
                x, y = recomputed(self.layer, i, x, y, batch, noise, cache)
            else:
                x, y = self.layer(i, x, y, batch, noise, cache)
        return y  # (M, C)

    def layer(
        self, i: int, x: Tensor, y: Tensor, batch: Batch, noise: Noise, cache: list[Past] | None
    ) -> tuple[Tensor, Tensor]:
        """Layer i: the residual stream x and its norm y, (N, C), to those after it; (M, C) from the last."""
        layer = self.h[i]
        last = i + 1 == len(self.h)
        p = self.config.resid_pdrop
        rows = batch.rows if last else None
        a = layer.attn(y, batch, noise, rows, cache and cache[i])
        if last:
            x = x.index_select(0, rows)
            noise = noise.at(rows)
        x, y = layer.ln_2.add(a, x, p, noise, 2 + 3 * i)
        after = self.ln_f if last else self.h[i + 1].ln_1
        return after.add(layer.mlp(y, noise), x, p, noise, 3 + 3 * i)


class LMHead(nn.Module):
    """The next token, from every row; the weight is the word embedding itself unless the config unties it."""

    architecture = "GPT2LMHeadModel"
    rename = (("head.out.", "lm_head."),)
    learns = False
    tied = ("head.out.weight", "body.wte.weight")

    def __init__(self, config: Config, n_labels: int = 0):
        super().__init__()
        self.out = Linear(config.n_embd, config.vocab_size, bias=False)

    def features(self, h: Tensor, noise: Noise = SILENT) -> Tensor:
        """What the last linear layer sees: h (M, C) itself."""
        return h


class ClassifyHead(nn.Module):
    """One label a sequence, from its last token, by a linear layer without bias or dropout."""

    architecture = "GPT2ForSequenceClassification"
    rename = (("head.out.", "score."),)
    learns = True

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        self.out = Linear(config.n_embd, n_labels, bias=False)

    def features(self, h: Tensor, noise: Noise = SILENT) -> Tensor:
        """What the last linear layer sees: h (M, C) in float32."""
        return h.float()


HEADS = {"vocabulary": LMHead, "sequence": ClassifyHead}
SHARDED = (Attention, MLP)  # what is gathered as one where the weights are split over processes
ARCHITECTURE = "GPT2Model"  # of a body without a head
ASKED = "last"  # the token of a sequence that classification asks about
TOKENIZER = tokenizer.GPT2  # how its tokenizer splits a text, and joins two

RENAME = (("body.", "transformer."),)  # our name -> the hub's
PREFIX = "transformer."
EMBEDDING = "body.wte"  # which has a row for each token of the vocabulary
ALIASES = {  # other names that a config.json may give a field of Config (transformers' attribute_map)
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) on the hub: Conv1D
ROLES = {"query": "c_attn", "key": "c_attn", "value": "c_attn", "down": "mlp.c_proj"}
IGNORED = r"(.*\.)?attn\.(bias|masked_bias)"  # causal masks kept as buffers
OTHER_HEADS = r"lm_head\..*|score\..*|classifier\..*|qa_outputs\..*"  # in the file, but not for this task


def sized(vocab: int, width: int, layers: int, heads: int, positions: int) -> dict:
    """config.json of a model of this size: rows of the embedding, C, layers, H, tokens of the longest sequence."""
    return {"vocab_size": vocab, "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": positions}


def init_scale(config: Config, name: str) -> float:
    """Standard deviation of a freshly drawn weight; of projections into the residual, shrinking with depth (2.3)."""
    return config.initializer_range / (math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1)
