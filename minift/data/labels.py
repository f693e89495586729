"""The labels of examples -> the classes of a model, and their numbers."""

import re
import unicodedata
from collections.abc import Iterable

from ..config import meant
from ..errors import InputError, printable, short_repr
from .columns import is_number_name, split_list
from .examples import Example
from .lines import Faults


def label_names(examples: list[Example], given: str = "") -> list[str]:
    """The classes of a training set, in the order of their ids.

    given: the --labels option, as "negative,positive"; a name with a comma in it stands in "...", as in CSV. Without
    it, the labels found: sorted as numbers if all are numbers (so that 0..k are their own ids), else as text. Raises
    InputError for fewer than two, and for two that look alike, unless both are given.
    """
    names = split_list("--labels", given) if given else list({str(e.label) for e in examples})
    if "" in names or len(set(names)) < max(2, len(names)):
        shown = [printable(name) for name in sorted(names)]
        source = f"--labels {given!r}" if given else f"the labels of the training data are {shown}"
        raise InputError(f"{source}; expected two or more different classes")
    if given:
        return names
    _check_numbers(names)
    if twins := look_alikes(names):
        wheres = {str(e.label): e.where for e in reversed(examples)}
        first, second = twins[0]
        found = f"{wheres[second]}: found the label {second!r}, and at {wheres[first]} {first!r}"
        raise InputError(f"{found}; expected one spelling, or both in --labels if they are two classes")
    if all(map(is_number_name, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _check_numbers(names: list[str]) -> None:
    """Raises InputError for labels that are scores or stand for "no label": they would silently become classes."""
    if not all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names):
        return
    names = sorted(names, key=float)
    numbers = [float(name) for name in names]
    shown = f"the labels of the training data are {short_repr(names)}"
    if any(number != number // 1 for number in numbers):
        raise InputError(f"{shown}, scores and not classes; expected whole numbers or names, or all in --labels")
    if numbers[0] == -1 and numbers[1] == 0 and numbers[-1] > 1:
        expected = f"labelled examples alone, or --labels={','.join(names)}"
        raise InputError(f"{shown}, where -1 may stand for no label, as in SNLI; expected {expected}")


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of labels that look the same: they differ in spaces, invisible characters or how accents are coded."""
    seen = {}  # how a name looks -> the first that looks so
    twins = []
    for name in sorted(names):
        visible = "".join(c for c in unicodedata.normalize("NFKC", name) if c.isprintable())
        key = " ".join(visible.split())
        if key in seen:
            twins.append((seen[key], name))
        seen.setdefault(key, name)
    return twins


def label_ids(examples: Iterable[Example], names: list[str]) -> list[int]:
    """The index in `names` of each example's label; a label may also be that index itself.

    Not so where a name is a number: if the classes are 1 to 5, a 0 is a mistake and not another way to write 1.
    """
    index = {name: i for i, name in enumerate(names)}
    if not any(map(is_number_name, names)):
        index |= {str(i): i for i in range(len(names))}
    expected = ", ".join(map(printable, names))
    faults = Faults()
    ids = []
    for example in examples:
        number = index.get(str(example.label))
        if number is None:
            near = printable(meant(str(example.label), names))
            faults.add(example.where, f"unknown label {short_repr(example.label)}; expected one of {expected}{near}")
        else:
            ids.append(number)
    faults.check()
    return ids
