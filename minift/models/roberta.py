"""RoBERTa (Liu et al., https://arxiv.org/abs/1907.11692): BERT's layers, with other positions and another head.

    x = norm(word[id] + type[t] + position[p + 1 + i])      p: the padding token's id, where positions begin after

It was trained without BERT's next sentences, and has one token type. All else stands in bert.py.
N tokens, M rows, C width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data import tokenizer
from ..data.batch import Batch
from ..layers import Linear
from ..ops.dropout import SILENT, Noise, dropout
from ..ops.gelu import ACTIVATIONS
from . import bert


@dataclass(frozen=True)
class Config(bert.Config):
    """The fields of a RoBERTa config.json that change what is computed: BERT's, and where positions begin."""

    vocab_size: int = 50265
    pad_token_id: int = 1

    def __post_init__(self):
        """Raises ValueError for a kind of RoBERTa that this file does not compute."""
        super().__post_init__()
        if self.longest < 1:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}; "
                f"expected at least {self.pad_token_id + 2}, since positions begin after pad_token_id"
            )

    @property
    def longest(self) -> int:
        """The longest sequence there are positions for, in tokens: 512 of roberta-base's 514."""
        return self.max_position_embeddings - self.pad_token_id - 1


def positions(batch: Batch, padding: int) -> Tensor:
    """The row of the position embedding for each token, (N,): padding + 1, padding + 2, ... in each sequence.

    A padding token in a text (somebody wrote "<pad>") is at `padding` and is not counted, as in fairseq.
    """
    is_text = (batch.ids != padding).long()
    counted = is_text.cumsum(0)  # from the beginning of the bag
    first = torch.arange(len(counted), device=counted.device) - batch.positions  # of each token's sequence
    before = (counted - is_text).index_select(0, first)
    return (counted - before) * is_text + padding


class Body(bert.Body):
    """BERT's encoder, with other positions."""

    config: Config

    def forward(self, batch: Batch, noise: Noise = SILENT) -> Tensor:
        """Hidden states at batch.rows, (M, C)."""
        placed = replace(batch, positions=positions(batch, self.config.pad_token_id))
        return super().forward(placed, noise)


class ClassifyHead(nn.Module):
    """One label a sequence, from its <s> token: dropout, a tanh layer, dropout, a linear layer; none is pretrained."""

    architecture = "RobertaForSequenceClassification"
    rename = (("head.dense.", "classifier.dense."), ("head.out.", "classifier.out_proj."))
    learns = True

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.out = Linear(config.hidden_size, n_labels)
        p = config.classifier_dropout
        self.p = config.hidden_dropout_prob if p is None else p
        self.site = 1 + 3 * config.num_hidden_layers

    def features(self, h: Tensor, noise: Noise = SILENT) -> Tensor:
        """What the last linear layer sees, in float32. h (M, C) -> (M, C)."""
        x = dropout(h.float(), self.p, noise, self.site)
        return dropout(torch.tanh(self.dense(x, noise)), self.p, noise, self.site + 1)


class FillHead(bert.FillHead):
    """BERT's under other names, always with GELU."""

    architecture = "RobertaForMaskedLM"
    rename = (
        ("head.dense.", "lm_head.dense."),
        ("head.norm.", "lm_head.layer_norm."),
        ("head.out.bias.", "lm_head.bias."),
        ("head.out.", "lm_head.decoder."),
    )
    bias_twin = "lm_head.decoder.bias"

    def __init__(self, config: Config, n_labels: int = 0):
        super().__init__(config, n_labels)
        self.act = ACTIVATIONS["gelu"]


HEADS = {"sequence": ClassifyHead, "masked": FillHead}
SHARDED = bert.SHARDED  # what is gathered as one where the weights are split over processes
ARCHITECTURE = "RobertaModel"  # of a body without a head
ASKED = "first"  # the token of a sequence that classification asks about
TOKENIZER = tokenizer.ROBERTA  # how its tokenizer splits a text, and joins two

RENAME = (("body.", "roberta."), *bert.RENAME)  # our name -> the hub's: BERT's below the first word
PREFIX = "roberta."
EMBEDDING = bert.EMBEDDING  # which has a row for each token of the vocabulary
ALIASES = {}  # other names that a config.json may give a field of Config
TRANSPOSED = ()
ROLES = bert.ROLES
IGNORED = bert.IGNORED  # buffers of old files, computed here
OTHER_HEADS = r"(roberta\.)?pooler\..*|lm_head\..*|classifier\..*|qa_outputs\..*"  # in the file, but not for this task
init_scale = bert.init_scale


def sized(vocab: int, width: int, layers: int, heads: int, positions: int) -> dict:
    """config.json of a model of this size, as bert.sized; positions begin after the padding token's."""
    padding = Config.pad_token_id
    return bert.sized(vocab, width, layers, heads, positions + padding + 1) | {"type_vocab_size": 1}
