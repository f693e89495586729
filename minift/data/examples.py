"""Files -> examples of one or two texts and a label: JSONL, CSV and TSV (each also .gz), a folder per class."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import LONGEST
from ..errors import InputError, printable, short_repr
from .columns import Columns, Doubt, find_layout, is_excels_line, meant_columns, parse_columns
from .lines import Faults, csv_rows, json_objects, kind_of_file, read_lines, require_file, tsv_rows, without_line_end


@dataclass(frozen=True, slots=True)
class Example:
    text: str
    pair: str | None  # second sentence, or None
    label: str | int | None  # as the file has it: a JSON int stays int, a CSV cell is str; None if absent (predict)
    where: str  # "train.jsonl:17", for messages


def make_example(where: str, fields: dict, wanted: Columns, faults: Faults) -> Example | None:
    """The checked example, or None with its faults noted. fields: role -> value as the file has it."""
    fields = {role: value for role, value in fields.items() if role in wanted.needed or not _absent(role, value)}
    wrong = {role: fault for role, value in fields.items() if (fault := text_fault(role, value))}
    for role, (kind, message) in wrong.items():
        name = wanted.names.get(role, role)
        faults.add(where, f"{role} {message}" if name == role else f"{role} (column {name!r}) {message}", kind)
    return None if wrong else Example(fields["text"], fields.get("pair"), fields.get("label"), where)


def _absent(role: str, value: object) -> bool:
    """Where a field is not needed, a JSON null stands for none, and so does an empty label cell."""
    return value is None or (role == "label" and value == "")


def text_fault(role: str, value: object) -> tuple[str, str] | None:
    """What is wrong with a value, as the kind of fault and a message, or None."""
    if role == "label" and type(value) is int:  # not isinstance: True is an int too
        return None
    if not isinstance(value, str):
        kinds = "a string or an integer" if role == "label" else "a string"
        return "wrong type", f"is {short_repr(value)} ({type(value).__name__}); expected {kinds}"
    if not value.strip():
        return "empty text", f"is empty, {short_repr(value)}; expected some text"
    if lone := re.search("[\ud800-\udfff]", value):  # "\ud83d" alone is legal JSON, but has no UTF-8 and so no tokens
        where = f"{lone[0]!r} at character {lone.start()}"
        return "lone surrogate", f"has the lone surrogate {where}; expected valid Unicode"
    return None


def _jsonl(path: Path, wanted: Columns, faults: Faults, most: int) -> Iterator:
    for where, row in json_objects(path, faults, most):
        fields = _fields(where, row, wanted, faults)
        if fields is not None:
            yield where, fields


def _fields(where: str, row: dict, wanted: Columns, faults: Faults) -> dict | None:
    """{role: value} of an object, or None with its fault noted."""
    if missing := wanted.missing(row):
        message = f"no field {', '.join(missing)}; found {short_repr(list(row))}, expected {wanted}"
        if near := meant_columns(wanted, row):
            message += f"; did you mean --columns {near}?"
        faults.add(where, message, "missing key")
        return None
    return {role: row[key] for role, key in wanted.names.items() if key in row}


def _table(path: Path, wanted: Columns, faults: Faults, most: int) -> Iterator:
    name = printable(path.name)
    read_rows = csv_rows if kind_of_file(path) == ".csv" else tsv_rows
    layout = header = doubt = None
    for number, row in read_rows(path, faults, most):
        where = f"{name}:{number}"
        if layout is None:
            if is_excels_line(where, row, faults):
                continue
            layout = find_layout(where, row, wanted, faults)
            if layout.header:
                header = row
                if wanted.missing(row):
                    faults.warn(f"taken for a header: {short_repr(row)}", number)
                continue
            if wanted.header == "auto" and len(row) > max(layout.cells.values()) and "label" in layout.cells:
                doubt = Doubt(where, row, layout, meant_columns(wanted, row))
        elif doubt and layout.cells["label"] < len(row) and not doubt.look(row[layout.cells["label"]]):
            doubt = None
        if row == header:  # of files that were joined with their headers; else it would be an example
            faults.add(where, f"found the header once more, {short_repr(row)}; expected an example", "repeated header")
        elif len(row) < layout.width or (layout.exact and len(row) > layout.width):
            message = f"found {len(row)} cells, {short_repr(row)}; expected {layout.expected}"
            faults.add(where, message, "wrong number of cells")
        else:
            yield where, {role: row[i] for role, i in layout.cells.items() if i < len(row)}
    if doubt:
        doubt.check(faults)


def _folder(path: Path, faults: Faults, most: int) -> Iterator:
    """folder/class/*.txt, sorted by name. Names with a leading dot are the system's own (.DS_Store)."""
    classes = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        message = "a folder without sub-folders; expected one sub-folder of .txt files per class"
        faults.stop(printable(str(path)), message, "no examples")
    inside = {entry: [file for file in sorted(entry.iterdir()) if file.name[0] != "."] for entry in classes}
    files = [file for found in inside.values() for file in found]
    for entry, found in inside.items():
        if files and not found:  # of a folder without any files, something else is told
            message = "a class without examples; expected at least one .txt file"
            faults.add(printable("/".join(entry.parts[-2:])), message, "no examples")
    for file in files:
        where = printable("/".join(file.parts[-3:]))
        if file.suffix.lower() != ".txt":
            faults.add(where, "not a .txt file; expected only FOLDER/CLASS/NAME.txt", "not a .txt file")
            continue
        if most and file.is_file() and file.stat().st_size >= most:
            message = f"found a text of {file.stat().st_size:,} bytes; expected fewer than {most:,} (--max-line)"
            faults.add(where, message, "line too long")
            continue
        text = "\n".join(without_line_end(line) for _, line in read_lines(file, where, faults, most))
        yield where, {"text": text, "label": file.parent.name}


READERS = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _table, ".tsv": _table}
KINDS = f"{', '.join(READERS)}, each also with .gz, or a folder with one sub-folder per class"


def labelled_rows(path: Path, wanted: Columns, faults: Faults, most: int) -> Iterator[tuple[str, dict]]:
    """(where, {role: value}) of every example in a file or a folder. Raises InputError."""
    require_file(path, READERS, KINDS, folder=True)
    if path.is_dir():
        return _folder(path, faults, most)
    return READERS[kind_of_file(path)](path, wanted, faults, most)


class Stream:
    """Examples or passages of a file, read again on each pass, so memory does not grow with their number.

    The first pass finds every fault, so a later one has none left to raise.
    """

    def __init__(self, path: Path, read: Callable[[Faults], Iterator], nothing: str, plain: bool = False):
        """plain: whether the file is one running text, of which passages are pieces."""
        self.path, self.read, self.nothing = path, read, nothing
        self.plain = plain
        self.count: int | None = None  # examples, after the first pass

    def __iter__(self) -> Iterator:
        """Every example without faults; raises InputError at the end if any had one."""
        faults = Faults()
        name = printable(str(self.path))
        count = 0
        for example in self.read(faults):
            if example is None:
                continue
            count += 1
            if self.count and count > self.count:
                break
            yield example
        faults.check()
        if not count:
            raise InputError(f"{name}: {self.nothing}")
        self.count = self.count or count
        if count != self.count:
            raise InputError(f"{name}: has changed while it was read; expected the same {self.count:,} examples again")


def stream_examples(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> Stream:
    """The examples of a file, or of a folder laid out as folder/class/*.txt (`columns` has no meaning there).

    columns: the --columns option, a comma list of `role` or `role=name`; roles are text, pair, label and _ (ignored).
    need_label: False where labels are read if present but not needed (predict).
    header: whether a table's first row is a header: auto, yes or no. max_line: most bytes of a line, 0: any.
    Raises InputError: file, line, what was found, what was expected.
    """
    path = Path(path)
    wanted = parse_columns(columns, need_label, header)
    require_file(path, READERS, KINDS, folder=True)

    def read_once(faults: Faults) -> Iterator[Example | None]:
        rows = labelled_rows(path, wanted, faults, max_line)
        return (make_example(where, fields, wanted, faults) for where, fields in rows)

    return Stream(path, read_once, "found no rows; expected at least one example")


def make_all(rows: Iterable, make: Callable[[str, object, Faults], object | None]) -> list:
    """What `make` makes of each of a list's values, called "example 1" and so on. Raises InputError as for a file.

    make: (where, value, faults) -> what it is, or None with its faults noted.
    """
    if isinstance(rows, str | bytes | dict):  # these can be gone through too, by letters and keys
        raise InputError(f"found {short_repr(rows)} ({type(rows).__name__}); expected a list of examples")
    faults = Faults()
    made = [make(f"example {number}", row, faults) for number, row in enumerate(rows, 1)]
    faults.check()
    if not made:
        raise InputError("found an empty list; expected at least one example")
    return made


def examples_from(rows: Iterable, labelled: bool = True) -> list[Example]:
    """The examples in a list instead of a file: "a text", ("a text", "its pair"), or a dictionary as a line of JSONL.

    labelled: whether the labels have to be there. Raises InputError: which example, what was found and expected.
    """
    wanted = parse_columns("", labelled)

    def make(where: str, row: object, faults: Faults) -> Example | None:
        if isinstance(row, str):
            row = {"text": row}
        elif isinstance(row, tuple | list) and len(row) == 2:
            row = {"text": row[0], "pair": row[1]}
        if not isinstance(row, dict):
            message = f"found {short_repr(row)} ({type(row).__name__}); expected a text, a pair of texts, or {wanted}"
            faults.add(where, message, "not an object")
            return None
        fields = _fields(where, row, wanted, faults)
        return None if fields is None else make_example(where, fields, wanted, faults)

    return make_all(rows, make)


def split(examples: list, fraction: float, seed: int) -> tuple[list, list]:
    """(train, valid), with a random `fraction` of the examples set aside as valid; both keep the input's order."""
    count = round(fraction * len(examples)) if 0 < fraction < 1 else 0  # nan and inf have no round number
    if not 0 < count < len(examples):
        raise InputError(f"--valid {fraction} sets {count} of {len(examples)} examples aside; both parts need some")
    aside = set(random.Random(seed).sample(range(len(examples)), count))
    train = [example for i, example in enumerate(examples) if i not in aside]
    valid = [example for i, example in enumerate(examples) if i in aside]
    return train, valid


def at(examples: Iterable, numbers: Iterable[int]) -> Iterator:
    """The examples of these numbers, counted from 0 and ascending, without holding the others."""
    numbers = iter(numbers)
    wanted = next(numbers, None)
    for number, example in enumerate(examples):
        if wanted is None:
            return
        if number == wanted:
            yield example
            wanted = next(numbers, None)


def sample(examples: Sequence, n: int, seed: int) -> list:
    """n examples drawn at random without repeats, in the order of the input."""
    if not 0 < n <= len(examples):
        raise InputError(f"--limit {n}: the data has {len(examples)} examples; expected 1 to {len(examples)}")
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), n))]
