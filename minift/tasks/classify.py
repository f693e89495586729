"""One label for a text or a pair of texts: [CLS] of BERT, the last token of GPT-2.

M rows, one a sequence; V labels.
"""

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..batch import Batch, Sequence
from ..config import InputError
from ..data import Example, label_ids
from ..models import Model
from ..ops.dropout import Noise
from ..ops.loss import linear_cross_entropy
from ..tokenizer import Tokenizer

CHUNK = 1000  # texts tokenised at once

read = data.read


def encode(
    examples: list[Example], model: Model, tokenizer: Tokenizer, max_length: int, labelled: bool = True
) -> list[Sequence]:
    """Tokens, the row asked about and its label, for each example. Raises InputError for an unknown label."""
    labels = label_ids(examples, model.labels) if labelled else [0] * len(examples)
    kinds = min(getattr(model.config, "type_vocab_size", 0), 128)  # they travel in 8 bits
    sequences = []
    for i in range(0, len(examples), CHUNK):
        part = examples[i : i + CHUNK]
        for tokens in tokenizer.encode([e.text for e in part], [e.pair for e in part], max_length):
            number, n = len(sequences), len(tokens.ids)
            types = tokens.types if kinds and any(tokens.types) else None
            if not n:
                raise InputError(f"{examples[number].where}: the text gives no tokens at all; expected one or more")
            if types and max(types) >= kinds:
                raise InputError(
                    f"{examples[number].where}: the tokenizer gives token type {max(types)}; expected below {kinds}, "
                    "since the model has no more (type_vocab_size)"
                )
            sequences.append(
                Sequence(
                    number=number,
                    ids=np.array(tokens.ids, np.int32),
                    types=None if types is None else np.array(types, np.int8),
                    rows=np.array([0 if model.family.ASKED == "first" else n - 1], np.int32),
                    targets=np.array([labels[number]], np.int64),
                    cut=tokens.truncated,
                )
            )
    return sequences


def loss(model: Model, batch: Batch, noise: Noise, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(cross-entropy summed over the batch's targets, number of targets predicted right)."""
    h = model.head.features(model(batch, noise), noise.at(batch.rows))  # (M, C)
    out = model.head.out
    return linear_cross_entropy(h, out.weight, out.bias, batch.targets, smoothing)


class Metrics:
    """Loss per target, accuracy and macro-F1 of a stream of batches, from a V x V table of counts."""

    best = ("accuracy", max)  # which metric picks the best model, and how

    def __init__(self, model: Model):
        self.model = model
        n = len(model.labels)
        self.sums = torch.zeros(n * n + 1, dtype=torch.float64, device=model.device)  # pairs (target, predicted), loss

    def add(self, batch: Batch) -> None:
        """One more batch."""
        self.count(self.model.logits(batch), batch.targets)

    def count(self, logits: Tensor, targets: Tensor) -> None:
        """logits (M, V), targets (M,)."""
        pairs = targets * logits.shape[1] + logits.argmax(-1)
        self.sums[:-1] += torch.bincount(pairs, minlength=len(self.sums) - 1)
        self.sums[-1] += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")

    def result(self) -> dict[str, float]:
        """Macro-F1 is the plain mean of F1 over the labels that occur as target or prediction (as scikit-learn's)."""
        counts = self.sums[:-1].view(len(self.model.labels), -1)
        right, total = counts.diag(), int(counts.sum())
        either = counts.sum(0) + counts.sum(1)  # targets + predictions of each label
        f1 = (2 * right / either)[either > 0]
        return {
            "loss": self.sums[-1].item() / total,
            "accuracy": right.sum().item() / total,
            "macro_f1": f1.mean().item(),
            "examples": total,
        }


def predictions(model: Model, batch: Batch) -> list[dict]:
    """One object a sequence: the label and the probability of each."""
    rows = model.logits(batch).float().softmax(-1).tolist()  # (M, V)
    return [
        {
            "label": model.labels[max(range(len(p)), key=p.__getitem__)],
            "scores": dict(zip(model.labels, p, strict=True)),
        }
        for p in rows
    ]
