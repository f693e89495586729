"""One label for a text or a pair of texts: [CLS] of BERT, the last token of GPT-2.

M rows, one a sequence; V labels.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch, Sequence
from ..data.check_texts import CHECKS as CHECKS
from ..data.examples import Example, read_examples, stream_examples
from ..data.labels import label_ids
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..models import Model
from ..ops.dropout import Noise
from ..ops.loss import linear_cross_entropy

CHUNK = 1000  # texts tokenised at once

read = read_examples
stream = stream_examples


def judge(examples: Iterable[Example], model: Model, tokenizer: Tokenizer, labelled: bool = True) -> list[int]:
    """The label of each example (0 where none is needed), all examples read and nothing of them kept.

    Raises InputError for an unknown label, and for a pair of texts where the model takes one alone.
    """
    paired = ""  # the first example with a pair

    def watched() -> Iterator[Example]:
        nonlocal paired
        for example in examples:
            if example.pair is not None:
                paired = paired or example.where
            yield example

    labels = label_ids(watched(), model.labels) if labelled else [0 for _ in watched()]
    if paired:
        check_pairs(paired, model, tokenizer)
    return labels


def check_pairs(where: str, model: Model, tokenizer: Tokenizer) -> None:
    """Raises InputError if the second text of a pair gets a type that the model has no embedding for."""
    (tokens,) = tokenizer.encode(["a"], ["a"])
    count = getattr(model.config, "type_vocab_size", None)
    if count is not None and max(tokens.types, default=0) >= count:
        raise InputError(
            f"{where}: found a pair of texts, the second of type {max(tokens.types)}; expected single texts, since the "
            f"model's type_vocab_size is {count}"
        )


def encode(
    examples: list[Example], model: Model, tokenizer: Tokenizer, max_length: int, labelled: bool = True
) -> list[Sequence]:
    """Tokens, the row asked about and its label, for each example. Raises InputError as judge does."""
    labels = judge(examples, model, tokenizer, labelled)
    return list(encoded(examples, labels, model, tokenizer, max_length))


def encoded(
    examples: Iterable[Example], labels: Iterable[int], model: Model, tokenizer: Tokenizer, max_length: int
) -> Iterator[Sequence]:
    """The same one at a time, CHUNK examples read ahead. Raises InputError for tokens that the model cannot read."""
    examples, labels, number = iter(examples), iter(labels), 0
    kinds = min(getattr(model.config, "type_vocab_size", 0), 128)  # they travel in 8 bits
    while part := list(islice(examples, CHUNK)):
        encodings = tokenizer.encode([e.text for e in part], [e.pair for e in part], max_length)
        for example, tokens in zip(part, encodings, strict=True):
            if not tokens.ids:
                raise InputError(f"{example.where}: the text gives no tokens at all; expected one or more")
            types = tokens.types if kinds and any(tokens.types) else None
            if types and max(types) >= kinds:
                raise InputError(
                    f"{example.where}: the tokenizer gives token type {max(types)}; expected below {kinds}, "
                    "since the model has no more (type_vocab_size)"
                )
            yield Sequence(
                number=number,
                ids=np.array(tokens.ids, np.int32),
                types=None if types is None else np.array(types, np.int8),
                rows=np.array([asked(tokens.ids, model)], np.int32),
                targets=np.array([next(labels)], np.int64),
                cut=tokens.truncated,
            )
            number += 1


def asked(ids: list[int], model: Model) -> int:
    """The position of the token asked about.

    GPT-2's is the last one that is not the padding token, which is its end-of-text: a text that ends in
    <|endoftext|> is asked about the token before it, as in transformers, which takes what is there for padding.
    """
    if model.family.ASKED == "first":
        return 0
    padding = model.settings.get("pad_token_id")
    padding = model.settings.get("eos_token_id") if padding is None else padding
    return next((i for i in reversed(range(len(ids))) if ids[i] != padding), 0)


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
