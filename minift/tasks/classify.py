"""One label for a text or a pair of texts: [CLS] of BERT, the last token of GPT-2.

M rows, one a sequence; V labels. What each name below is for: tasks/__init__.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batch import Batch, Sequence
from ..data.check_texts import CHECKS as CHECKS
from ..data.examples import Example, examples_from, stream_examples
from ..data.labels import label_ids
from ..data.labels import label_names as label_names
from ..data.tokenizer import BATCH, Tokenizer
from ..errors import InputError, printable
from ..models import Model
from ..ops.dropout import Noise
from ..ops.loss import linear_cross_entropy
from . import confusion

NAMED_CLASSES = True
PEFT_TYPE = "SEQ_CLS"
PEFT_HEADS = ("classifier", "score")
COUNTED = "accuracy"
describe = confusion.describe


stream = stream_examples
from_rows = examples_from


# the head, and what checkpoints say of it


def architecture(family: ModuleType) -> str | None:
    """What transformers calls a family with this head."""
    head = family.HEADS.get("sequence")
    return head.architecture if head else None


def make_head(family: ModuleType, config, n_labels: int) -> nn.Module:
    """The family's head for one label a sequence."""
    return family.HEADS["sequence"](config, n_labels)


def check_settings(settings: dict, wanted: list[str] | None, own: list[str], path: Path) -> None:
    """Raises InputError where the checkpoint's head is for something else than one label of several.

    wanted: the classes of a new task; where they are as many as the head has outputs, it would be trained further.
    """
    kind = settings.get("problem_type")
    is_kept = wanted is None or len(wanted) == len(own)
    if is_kept and kind in ("regression", "multi_label_classification"):
        raise InputError(
            f"{path}: problem_type is {kind!r}, whose head is not supported; expected single_label_classification"
        )
    if wanted is None and len(own) == 1:
        raise InputError(
            f"{path}: its head has one output (num_labels 1), a number and no label; expected two labels or more"
        )


def settings(model: Model) -> dict:
    """Names of the classes, and the padding token that transformers finds the last token of a padded batch by."""
    found = {
        "id2label": {str(i): name for i, name in enumerate(model.labels)},
        "label2id": {name: i for i, name in enumerate(model.labels)},
        "problem_type": "single_label_classification",
    }
    if model.family.ASKED == "last" and model.settings.get("pad_token_id") is None:
        found["pad_token_id"] = model.settings.get("eos_token_id")
    return found


# examples -> sequences


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
    count = model.config.token_types
    if count and max(tokens.types, default=0) >= count:
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
    """The same one at a time, BATCH examples read ahead. Raises InputError for tokens that the model cannot read."""
    examples, labels, number = iter(examples), iter(labels), 0
    kinds = min(model.config.token_types, 128)  # they travel in 8 bits
    while part := list(islice(examples, BATCH)):
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
                rows=np.array([asked_row(tokens.ids, model)], np.int32),
                targets=np.array([next(labels)], np.int64),
                cut=tokens.truncated,
            )
            number += 1


def asked_row(ids: list[int], model: Model) -> int:
    """The position of the token asked about.

    GPT-2's is the last one that is not the padding token, which is its end-of-text: a text that ends in
    <|endoftext|> is asked about the token before it, as in transformers, which takes what is there for padding.
    """
    if model.family.ASKED == "first":
        return 0
    padding = model.settings.get("pad_token_id")
    if padding is None:
        padding = model.settings.get("eos_token_id")
    return next((i for i in reversed(range(len(ids))) if ids[i] != padding), 0)


def probe(number: int, ids: np.ndarray, model: Model) -> Sequence:
    """These tokens (n,) int32, all real, asked for their label."""
    row = 0 if model.family.ASKED == "first" else len(ids) - 1
    return Sequence(number, ids, None, np.array([row], np.int32), np.zeros(1, np.int64))


def summary(model: Model, sequences: list[Sequence]) -> list[str]:
    """The labels, and those of them that no example has."""
    lines = [f"labels: {', '.join(map(printable, model.labels))}"]
    seen = {int(s.targets[0]) for s in sequences}
    unseen = [printable(name) for i, name in enumerate(model.labels) if i not in seen]
    if unseen:
        lines.append(f"no example to train on has the label {', '.join(unseen)}")
    return lines


# what is learned and told


def loss(model: Model, batch: Batch, noise: Noise, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(cross-entropy summed over the batch's targets, number of targets predicted right)."""
    h = model.head.features(model(batch, noise), noise.at(batch.rows))  # (M, C)
    return linear_cross_entropy(h, model.last.weight, model.last.bias, batch.targets, smoothing, batch.losses)


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

    def counts(self) -> Tensor:
        """How often each label (row) was taken for each (column), (V, V)."""
        return self.sums[:-1].view(len(self.model.labels), -1)

    def result(self) -> dict[str, float]:
        """Macro-F1 is the plain mean of F1 over the labels that occur as target or prediction (as scikit-learn's)."""
        counts = self.counts()
        right, total = counts.diag(), int(counts.sum())
        either = counts.sum(0) + counts.sum(1)  # targets + predictions of each label
        f1 = (2 * right / either)[either > 0]
        return {
            "loss": self.sums[-1].item() / total,
            "accuracy": right.sum().item() / total,
            "macro_f1": f1.mean().item(),
            "examples": total,
        }

    def details(self) -> dict:
        """Precision, recall, F1 and support of each label, and which was taken for which."""
        return confusion.by_label(self.counts(), self.model.labels)


def next_command(folder: str, example: Example, tokenizer: Tokenizer) -> str:
    """The label of another text, or of another pair."""
    command = f'minift predict --model {folder} --text "..."'
    return command if example.pair is None else command + ' --pair "..."'


def question(example: Example, tokenizer: Tokenizer | None) -> tuple[Example, str]:
    """The texts without their label, and the label."""
    return replace(example, label=None), "" if example.label is None else str(example.label)


def predictions(model: Model, batch: Batch, tokenizer: Tokenizer) -> list[dict]:
    """One object a sequence: the label and the probability of each."""
    found = []
    for row in model.logits(batch).float().softmax(-1).tolist():  # (M, V)
        scores = dict(zip(model.labels, row, strict=True))
        found.append({"label": max(scores, key=scores.get), "scores": scores})
    return found
