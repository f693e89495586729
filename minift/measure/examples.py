"""What became of each training example: its losses over the epochs, the hardest, and those that were never learned.

A run's examples.jsonl has the loss that each example had when it was trained on, in each epoch: of the model of that
moment, with dropout. Swayamdipta et al. (https://arxiv.org/abs/2009.10795) read such curves as easy, hard or in doubt.

An example is never learned if in no epoch after the first its label was the likelier half: its loss stays above ln 2.
Among them are the wrong labels, and what is in doubt.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

HALF = math.log(2)  # the loss of a target that has half of the probability


@dataclass
class Curve:
    """The losses of an example, epoch after epoch."""

    example: int  # its number in the training data, from 0
    losses: list[float]

    @property
    def mean(self) -> float:
        """Over all epochs."""
        return sum(self.losses) / len(self.losses)

    @property
    def never_learned(self) -> bool:
        """Whether it stayed wrong after the first epoch, or in that where there is no other."""
        return all(loss > HALF for loss in self.losses[1:] or self.losses)


def read_curves(run: Path) -> list[Curve]:
    """The curves of a run's examples, the hardest first: by their mean loss. Raises InputError."""
    path = run / "examples.jsonl"
    curves: dict[int, Curve] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                curves.setdefault(row["example"], Curve(row["example"], [])).losses.append(row["loss"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: cannot be read ({e}); expected the losses of a run's examples") from e
    return sorted(curves.values(), key=lambda curve: -curve.mean)
