"""Which column of a table is the text, which its pair, which the label: by `--columns`, by a header, by position.

Where a first row could be a header or an example, nothing is guessed: the error shows the row and says how to tell.
"""

import csv
import difflib
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from ..errors import InputError, printable, short_repr
from .lines import Faults

FEW = 10  # rows that show whether labels come again


@dataclass(frozen=True, slots=True)
class Columns:
    """The --columns and --header options, read."""

    roles: list[str]  # in the order given, "_" too
    names: dict[str, str]  # role -> JSON key, header cell or column number
    needed: set[str]  # the roles that every example must have
    bare: bool  # no item has a name, so they may be positions
    header: str  # auto, yes or no

    @property
    def numbered(self) -> bool:
        """Whether the names are numbers of columns."""
        return all(re.fullmatch("[1-9][0-9]*", name) for name in self.names.values())

    def missing(self, names: Container[str]) -> list[str]:
        """The needed names that are not in `names`."""
        return [name for role, name in self.names.items() if role in self.needed and name not in names]

    def __str__(self) -> str:
        return ", ".join(self.missing(()))


def split_list(option: str, given: str) -> list[str]:
    """The items of an option that is a comma list; one with a comma inside stands in "...", as in CSV."""
    try:
        items = next(csv.reader([given], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise InputError(f"{option} {given!r}: {error}; expected items between commas") from error
    return [item.strip() for item in items]


def parse_columns(given: str, need_label: bool, header: str = "auto") -> Columns:
    """The --columns option, or its default, with --header. Raises InputError where it is not as documented."""
    items = [re.fullmatch("(text|pair|label|_)(=.+)?", item) for item in split_list("--columns", given or "text,label")]
    roles = [item[1] for item in items if item]
    names = {item[1]: (item[2] or item[1]).removeprefix("=") for item in items if item and item[1] != "_"}
    needed = ["text", "label"] if need_label else ["text"]
    repeated = len(names) + roles.count("_") < len(roles)
    if repeated or len(roles) < len(items) or not names.keys() >= set(needed):
        expected = "a comma list of ROLE or ROLE=NAME, each role once, of text, pair, label and _ (ignored)"
        raise InputError(f"--columns {given!r}: expected {expected}, with at least {' and '.join(needed)}")
    needed = {*needed, *names.keys() - {"label"}}
    if not given:
        names["pair"] = "pair"  # read by default where there is one, but not needed
    return Columns(roles, names, needed, not any(item[2] for item in items), header)


CALLED = {
    "text": "text sentence review comment utterance content message tweet post document body passage feedback "
    "headline question query premise sentence1 text1 question1",
    "pair": "pair textpair sentence2 text2 question2 hypothesis",
    "label": "label sentiment class category target intent topic tag emotion polarity rating star",
    "": "id idx index number date time user author source title name split guid",  # what is often beside them
}
PARTS = {"text": ("", "text"), "label": ("", "id", "name", "label")}  # label_id, review_text


def _forms(role: str) -> Iterator[str]:
    """Every way to write the usual names of a role, in lower case with nothing but letters and digits."""
    for name in CALLED[role].split():
        for part in PARTS.get(role, ("",)):
            for word in (name + part, name.removesuffix("y") + part):
                yield from (word, word + "s", word + "es", word + "ies")


ROLE_OF = {form: role for role in reversed(CALLED) for form in _forms(role)}


def _plain_name(cell: str) -> str:
    return re.sub(r"[\W_]+", "", cell).casefold()


def meant_columns(wanted: Columns, found: Iterable[object]) -> str:
    """The --columns that were probably meant, where a file has other names: "text=review,label=lable"; or ""."""
    needed = tuple((role, name) for role, name in wanted.names.items() if role in wanted.needed)
    return _nearest_columns(needed, tuple(name for name in found if isinstance(name, str))[:20])


@lru_cache(100)  # a file may have a million lines with the same keys
def _nearest_columns(needed: tuple[tuple[str, str], ...], found: tuple[str, ...]) -> str:
    chosen = {}
    for role, name in needed:
        left = [cell for cell in found if cell not in chosen.values()]
        usual = [cell for cell in left if _role_of(cell) == role]
        near = difflib.get_close_matches(name, left, 1, cutoff=0.6)
        at = [name] if name in left else usual or near
        if not at or re.search('[,="]', at[0]):
            return ""
        chosen[role] = printable(at[0])
    return ",".join(f"{role}={name}" for role, name in chosen.items())


def _role_of(cell: str) -> str | None:
    """text, pair or label for a usual name of one, "" for a name of something else, None for what is no usual name."""
    return ROLE_OF.get(_plain_name(cell), None if cell.strip() else "")


def _looks_like_a_name(cell: str) -> bool:
    """Whether a cell is one word, such as tweet_text, of which a part is a usual name."""
    parts = re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", cell.strip())
    return not re.search(r"\s", cell.strip()) and any(_role_of(part) for part in parts if part)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of a table are."""

    cells: dict[str, int]  # role -> index of its cell
    width: int  # cells in a row
    expected: str  # the same, in words
    exact: bool = True  # False: a row may have more (columns chosen by number)
    header: bool = False  # the first row is a header


def find_layout(where: str, row: list[str], wanted: Columns, faults: Faults) -> Layout:
    """Decided by the first row: columns by number, by the names of a header, or by position."""
    if wanted.numbered:
        return _by_number(row, wanted)
    if wanted.header != "no" and (layout := _by_name(where, row, wanted, faults)):
        return layout
    _check_separator(where, row, wanted, faults)
    if not wanted.bare:
        if wanted.header == "no":
            faults.stop(where, f"--header is no, but {wanted} are names, which stand in a header; expected numbers")
        near = meant_columns(wanted, row)
        advice = f"; did you mean --columns {near}?" if near else ""
        faults.stop(where, f"found the header {short_repr(row)}; expected one with {wanted}{advice}", "unknown header")
    return _by_position(where, row, wanted, faults)


def _by_number(row: list[str], wanted: Columns) -> Layout:
    cells = {role: int(name) - 1 for role, name in wanted.names.items()}
    width = 1 + max(cells[role] for role in wanted.needed)
    return Layout(cells, width, f"{width} or more", False, wanted.header == "yes" or _are_names(row, cells, wanted))


def _by_name(where: str, row: list[str], wanted: Columns, faults: Faults) -> Layout | None:
    """The layout of a header with a column for each role that is needed; None for a row that is none."""
    called = {}  # role -> the cells that may be its own
    for role in wanted.names:
        at = _called(row, role, wanted)
        if at:
            called[role] = at
    if not called.keys() >= wanted.needed or not _is_header(row, called, wanted):
        return None
    for role, at in called.items():
        if len(at) > 1:
            named = " and ".join(short_repr(row[i]) for i in at)
            message = f"found the header {short_repr(row)}, where {named} could each be the {role}; expected one"
            example = ",".join(f"{r}={cells[0] + 1}" for r, cells in called.items())
            faults.stop(where, f"{message}, or its number: --header yes --columns {example}", "unknown header")
    cells = {role: at[0] for role, at in called.items()}
    return Layout(cells, len(row), f"{len(row)}, as in the header", header=True)


def _called(row: list[str], role: str, wanted: Columns) -> list[int]:
    """The cells of a header that may be a role's: called exactly so, else alike, else by one of the usual names."""
    name = wanted.names[role]
    exact = [i for i, cell in enumerate(row) if cell == name]
    alike = [i for i, cell in enumerate(row) if _plain_name(cell) == _plain_name(name) != ""]
    usual = [i for i, cell in enumerate(row) if wanted.bare and _role_of(cell) == role]
    return exact or alike or usual


def _is_header(row: list[str], called: dict[str, list[int]], wanted: Columns) -> bool:
    """Whether names that were found make a row a header. One that is only like a name may be a text of one word."""
    exact = all(row[at[0]] == wanted.names[role] for role, at in called.items() if role in wanted.needed)
    return exact or "label" in called or wanted.header == "yes" or all(_role_of(cell) is not None for cell in row)


def _by_position(where: str, row: list[str], wanted: Columns, faults: Faults) -> Layout:
    roles = wanted.roles
    if "label" not in wanted.needed and len(row) == len(roles) - 1:
        roles = [role for role in roles if role != "label"]
    cells = {role: i for i, role in enumerate(roles) if role != "_"}
    header = wanted.header == "yes" or _are_names(row, cells, wanted)
    if wanted.header == "auto" and not header and _is_doubtful(row, cells):
        _stop_at_a_doubt(where, row, faults, meant_columns(wanted, row))
    return Layout(cells, len(roles), f"{len(roles)}: {', '.join(roles)} (or a header, see --columns)", header=header)


def _are_names(row: list[str], cells: dict[str, int], wanted: Columns) -> bool:
    """Whether each cell that is needed holds a usual name of its own role: a header, though columns were numbered."""
    needed = {role: i for role, i in cells.items() if role in wanted.needed}
    return wanted.header == "auto" and all(i < len(row) and _role_of(row[i]) == role for role, i in needed.items())


def _is_doubtful(row: list[str], cells: dict[str, int]) -> bool:
    """Whether a first row that is not clearly a header may still be one, as `tweet_words,label`.

    Without a stop here it would be trained on, as an example of the class "label", or get a prediction of its own.
    """
    text = row[cells["text"]] if cells["text"] < len(row) else ""
    label = row[cells["label"]] if cells.get("label", len(row)) < len(row) else ""
    one_word = not re.search(r"\s", text.strip())
    compound = _looks_like_a_name(text) and re.search("_|[a-z][A-Z]", text) is not None
    counted = all(re.fullmatch(r"(v|x|c|col|column|field|var)_?\d+", cell.strip().casefold()) for cell in row)
    return compound or counted or one_word and _role_of(label) == "label" or label == "label"


def _stop_at_a_doubt(where: str, row: list[str], faults: Faults, near: str = "") -> NoReturn:
    """near: the --columns that were probably meant, if it is a header."""
    message = f"found {short_repr(row)}, which may be a header or an example; expected to be told, by --header yes"
    advice = f"--header no, or the names of its columns, as in --columns {near or 'text=sentence,label=class'}"
    faults.stop(where, f"{message}, {advice}", "header or example")


def _check_separator(where: str, row: list[str], wanted: Columns, faults: Faults) -> None:
    """Stops at a first row of one cell that holds another kind of separator: the file is of another kind."""
    separators = {"semicolons": ";", "tabs": "\t", "commas": ",", "vertical bars": "|"}
    for name, separator in separators.items():
        if len(row) == 1 and len(wanted.needed) > 1 and separator in row[0]:
            cell = short_repr(row[0])
            message = f"found one cell, {cell}, with {name} in it; expected cells between commas in a .csv"
            faults.stop(where, f"{message}, between tabs in a .tsv", "wrong number of cells")


class Doubt:
    """Whether the first row was a header after all, judged by the other rows: a column's name never comes as a label.

    Known only at the end of the file; usually the second or third row settles it.
    """

    def __init__(self, where: str, row: list[str], layout: Layout, near: str = ""):
        """near: the --columns that were probably meant, if it was one."""
        self.near = near
        self.where = where
        self.row = row
        self.text, self.label = (row[layout.cells[role]].strip() for role in ("text", "label"))
        self.numbers = not is_number_name(self.label)  # whether all other labels are numbers
        self.word = self.numbers and not re.search(r"\s", self.text + self.label)  # whether the label never came again
        self.named = _role_of(self.text) == "text"
        self.count = 0
        self.others = set()

    def look(self, label: str) -> bool:
        """One more label; whether the first row may still be a header."""
        label = label.strip()
        self.count += 1
        self.numbers = self.numbers and is_number_name(label)
        self.word = self.word and label != self.label
        if self.word:
            self.others.add(label)
        return self.numbers or self.word

    def check(self, faults: Faults) -> None:
        """Ends the reading if the first row must be taken for a header."""
        repeated = self.named or self.count >= FEW and 2 * len(self.others) <= self.count
        if self.count and (self.numbers or self.word and repeated):
            _stop_at_a_doubt(self.where, self.row, faults, self.near)


def is_excels_line(where: str, row: list[str], faults: Faults) -> bool:
    """Whether a first row is the line `sep=,` by which Excel is told the separator."""
    line = ",".join(row)
    if not re.fullmatch("sep=.?", line):
        return False
    if line != "sep=,":
        faults.stop(where, f"found {short_repr(line)}; expected cells between commas", "wrong number of cells")
    return True


def is_number_name(name: str) -> bool:
    """Whether the name of a class is a whole number."""
    return re.fullmatch("[0-9]{1,18}", name) is not None
