"""The classes of a checkpoint and those asked for, made one: the head's rows keep their names, or are drawn anew."""

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import printable
from ..layers import Linear
from ..models import LAST, Model, is_last
from .weights import draw, hub_names


@dataclass
class Classes:
    """Which classes a model gets, and what becomes of the rows that the checkpoint has for its own."""

    rows: list[str]  # in the order of the head's rows as they are loaded
    labels: list[str] | None = None  # the order they are put in afterwards, if it is another
    own: list[str] | None = None  # the checkpoint's; None of a task without classes
    fresh: bool = False  # whether the last layer is drawn anew
    said: str = ""  # of a last layer that is not drawn anew

    def first_rows(self, is_adapter: bool) -> list[str]:
        """The labels that the model is built with: those of an adapter's own head if that does not stay."""
        if is_adapter and self.rows and self.own and (self.fresh or len(self.rows) != len(self.own)):
            return self.own
        return self.rows


def choose_classes(own: list[str], wanted: list[str] | None, ordered: bool) -> Classes:
    """The one place where a checkpoint's classes and those asked for (of the data, or of --labels) are joined.

    LABEL_0 or 0 is no name, only a number: such rows are given the names wanted, in their order.
    """
    if wanted is None or own == wanted:
        return Classes(own, own=own)
    if all(name in (f"LABEL_{i}", str(i)) for i, name in enumerate(own)):
        named = ", ".join(f"{i} {printable(name)}" for i, name in enumerate(wanted))
        same = len(own) == len(wanted)
        return Classes(wanted, own=own, said=f"its classes had no names, and are now: {named}" if same else "")
    numbers = {str(i) for i in range(len(own))}
    spelt = {name.casefold(): name for name in wanted}
    if sorted(map(str.casefold, own)) == sorted(map(str.casefold, wanted)) and len(spelt) == len(own):
        own = [spelt[name.casefold()] for name in own]  # ENTAILMENT is entailment; the data's spelling is kept
    if own == wanted:
        return Classes(wanted, own=own)
    if sorted(own) == sorted(wanted) or not ordered and set(wanted) <= numbers and not numbers & set(own):
        order = ", ".join(f"{i} {printable(name)}" for i, name in enumerate(wanted if ordered else own))
        what = "the head's rows were put in the order of --labels" if ordered else "classes as the checkpoint has them"
        return Classes(own, wanted if ordered else None, own, said=f"{what}: {order}")
    return Classes(wanted, own=own, fresh=True)


def settle_classes(model: Model, classes: Classes, seed: int) -> None:
    """What can be done only when all weights are there: a head under an adapter drawn anew, rows put in order."""
    report = model.report
    is_drawn = bool(classes.rows) and model.labels != classes.rows
    if is_drawn:
        model.set_last(on_meta(model.last, len(classes.rows)))
        model.labels = classes.rows
        draw(model, seed)
    if is_drawn or report.relabelled:
        report.relabelled = [model.hub_name(f"{LAST}.{name}") for name, _ in model.last.named_parameters()]
        own = ", ".join(map(printable, classes.own))
        report.labels = f"the checkpoint's classes were {own}; to go on with these, name them all: --labels"
    elif classes.labels:
        rows = [model.labels.index(name) for name in classes.labels]
        for parameter in model.last.parameters():
            parameter.data = parameter.data[rows]
        model.labels = classes.labels
    drawn = {*report.fresh, *report.reshaped}
    if not any(is_last(name) and hub in drawn for name, hub in hub_names(model).items()):
        report.labels = report.labels or classes.said


def on_meta(layer: nn.Module, rows: int) -> Linear:
    """A layer like this one for another number of rows, without memory: to be drawn."""
    with torch.device("meta"):
        return Linear(layer.in_features, rows, layer.bias is not None)
