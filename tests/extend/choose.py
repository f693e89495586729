"""Multiple choice: which of several endings goes on from a text. One score for each, the highest wins.

    {"text": "She opened the umbrella", "choices": ["since it rained.", "to eat it."], "label": 0}

An example is one sequence of as many pieces as it has endings, each the text and an ending as a pair. Attention sees
one piece at a time, and the loss sets them against each other. This file is a fork's: it stands in minift/tasks/, and
tables.TASKS has the line `"choose": "which of several endings goes on from a text"`. What each name is for:
minift/tasks/__init__.py. T examples, M rows: one an ending.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..config import LONGEST
from ..data.batch import Batch, Sequence
from ..data.examples import Stream, make_all
from ..data.lines import Faults, json_objects
from ..data.tokenizer import Tokenizer
from ..errors import InputError, short_repr
from ..models import Model
from ..ops.dropout import SILENT, Noise

NAMED_CLASSES = False
PEFT_TYPE = "CHOICE"  # PEFT has no name for it
PEFT_HEADS = ("classifier",)
COUNTED = "accuracy"
CHECKS = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A text, its possible endings, and which is right (None where nobody says it)."""

    text: str
    endings: tuple[str, ...]
    label: int | None
    where: str


# examples


def make_choice(where: str, row: object, labelled: bool, faults: Faults) -> Choice | None:
    """The checked example, or None with its fault noted."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        faults.add(where, f"found {short_repr(row)}; expected an object with text, choices and label", "wrong type")
        return None
    endings = row.get("choices")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e.strip() for e in endings):
        faults.add(where, f"choices is {short_repr(endings)}; expected two or more texts", "wrong type")
        return None
    label = row.get("label")
    if labelled and (type(label) is not int or not 0 <= label < len(endings)):
        faults.add(where, f"label is {short_repr(label)}; expected 0 to {len(endings) - 1}", "wrong label")
        return None
    return Choice(row["text"], tuple(endings), label if labelled else None, where)


def stream(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> Stream:
    """The examples of a .jsonl, read anew each time. Raises InputError."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        raise InputError(f"{path}: not a .jsonl; expected one with text, choices and label in each line")

    def read_once(faults: Faults) -> Iterator[Choice | None]:
        return (make_choice(where, row, need_label, faults) for where, row in json_objects(path, faults, max_line))

    return Stream(path, read_once, "found nothing to read; expected at least one example")


def from_rows(rows: list, labelled: bool = True) -> list[Choice]:
    """The examples in a list of dictionaries."""
    return make_all(rows, lambda where, row, faults: make_choice(where, row, labelled, faults))


def label_names(examples: list[Choice], given: str = "") -> None:
    """There are no classes: an ending has a number in its example alone."""


# examples -> sequences


def judge(examples: Iterable[Choice], model: Model, tokenizer: Tokenizer, labelled: bool = True) -> list[int]:
    """The number of the right ending of each example, 0 where nobody says it."""
    return [example.label or 0 for example in examples]


def encode(
    examples: list[Choice], model: Model, tokenizer: Tokenizer, max_length: int, labelled: bool = True
) -> list[Sequence]:
    """A sequence for each example."""
    return list(encoded(examples, judge(examples, model, tokenizer, labelled), model, tokenizer, max_length))


def encoded(
    examples: Iterable[Choice], labels: Iterable[int], model: Model, tokenizer: Tokenizer, max_length: int
) -> Iterator[Sequence]:
    """The same one at a time."""
    for number, (example, label) in enumerate(zip(examples, labels, strict=True)):
        pieces = tokenizer.encode([example.text] * len(example.endings), list(example.endings), max_length)
        lengths = np.array([len(piece.ids) for piece in pieces])
        starts = lengths.cumsum() - lengths
        types = None
        if model.config.token_types > 1:
            types = np.concatenate([np.array(piece.types, np.int8) for piece in pieces])
        asked = 0 if model.family.ASKED == "first" else lengths - 1
        yield Sequence(
            number=number,
            ids=np.concatenate([np.array(piece.ids, np.int32) for piece in pieces]),
            types=types,
            rows=(starts + asked).astype(np.int32),
            targets=np.array([[label, len(pieces)]], np.int64),  # (1, 2): one target an example, not one a row
            cut=any(piece.truncated for piece in pieces),
            starts=starts,
        )


def probe(number: int, ids: np.ndarray, model: Model) -> Sequence:
    """These tokens as the two halves of a choice."""
    starts = np.array([0, len(ids) // 2])
    return Sequence(number, ids, None, starts.astype(np.int32), np.array([[0, 2]], np.int64), starts=starts)


def summary(model: Model, sequences: list[Sequence]) -> list[str]:
    """How many endings the examples have."""
    counts = sorted({int(s.targets[0, 1]) for s in sequences})
    return [f"endings to choose from: {', '.join(map(str, counts))}"]


# the head


def architecture(family: ModuleType) -> str | None:
    """What transformers calls it."""
    return family.ARCHITECTURE.replace("Model", "ForMultipleChoice") if "sequence" in family.HEADS else None


def make_head(family: ModuleType, config, n_labels: int) -> nn.Module:
    """The family's head for one label a sequence, with one output: the score of an ending."""
    head = family.HEADS["sequence"](config, 1)
    head.architecture = architecture(family)
    return head


def settings(model: Model) -> dict:
    """Nothing beside the checkpoint's own."""
    return {}


# what is learned and told


def scores_of(model: Model, batch: Batch, noise: Noise = SILENT) -> tuple[Tensor, Tensor]:
    """(score of each ending (T, K), right ending (T,)); where an example has fewer than K, the rest are -inf."""
    h = model.head.features(model(batch, noise), noise.at(batch.rows))  # (M, C)
    score = model.last(h)[:, 0].float()  # (M,)
    right, counts = batch.targets.unbind(1)
    parts = score.split(counts.tolist())
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-torch.inf), right


def loss(model: Model, batch: Batch, noise: Noise, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(cross-entropy summed over the examples, number of examples whose right ending has the highest score)."""
    scores, right = scores_of(model, batch, noise)
    total = nn.functional.cross_entropy(scores, right, reduction="sum", label_smoothing=smoothing)
    return total, (scores.argmax(1) == right).sum()


def next_command(folder: str, example: Choice, tokenizer: Tokenizer) -> str:
    """The right endings of other examples."""
    return f"minift predict --task choose --model {folder} --data FILE.jsonl"


class Metrics:
    """Loss per example and accuracy."""

    best = ("accuracy", max)

    def __init__(self, model: Model):
        self.model = model
        self.sums = torch.zeros(3, dtype=torch.float64, device=model.device)  # loss, right, examples

    def add(self, batch: Batch) -> None:
        """One more batch."""
        total, right = loss(self.model, batch, SILENT)
        self.sums += torch.stack([total.double(), right.double(), torch.full_like(total, batch.n_targets).double()])

    def result(self) -> dict[str, float]:
        """Means over the examples."""
        total, right, count = self.sums.tolist()
        return {"loss": total / count, "accuracy": right / count, "examples": int(count)}


def predictions(model: Model, batch: Batch, tokenizer: Tokenizer) -> list[dict]:
    """The number of the likeliest ending, and the probability of each."""
    scores, _ = scores_of(model, batch)
    found = []
    for row, count in zip(scores.softmax(1).tolist(), batch.targets[:, 1].tolist(), strict=True):
        found.append({"label": row.index(max(row)), "scores": row[:count]})
    return found
