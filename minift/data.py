"""Files -> examples: JSONL, CSV and TSV (each also .gz), and a folder with one sub-folder per class.

A file is streamed as bytes split at b"\\n" and nothing else: str.splitlines() would also cut at U+0085 and U+2028,
which real reviews contain. Every fault names its file and line, what was found and what was expected; up to five
are told at once, because people fix files in rounds.
"""

import csv
import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NoReturn

from .config import InputError

MOST = 5  # faults told at once


@dataclass(frozen=True, slots=True)
class Example:
    text: str
    pair: str | None  # second sentence, or None
    label: str | int | None  # as the file has it: a JSON int stays int, a CSV cell is str; None if absent (predict)
    where: str  # "train.jsonl:17", for messages


# ---- faults ----------------------------------------------------------------------------------------------------------


class Faults:
    """The faults of one input, told together in one InputError."""

    def __init__(self):
        self.lines: list[str] = []

    def add(self, where: str, message: str) -> None:
        """Note a fault and go on; the sixth ends it."""
        if len(self.lines) == MOST:
            raise InputError("\n".join([*self.lines, f"... stopped after {MOST} faults"]))
        self.lines.append(f"{where}: {message}")

    def stop(self, where: str, message: str) -> NoReturn:
        """A fault after which the rest of the file has no meaning."""
        raise InputError("\n".join([*self.lines, f"{where}: {message}"]))

    def check(self) -> None:
        """Raise if anything was noted."""
        if self.lines:
            raise InputError("\n".join(self.lines))


def _short(value: object) -> str:
    """repr in at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# ---- columns: which field is the text, the pair, the label -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Columns:
    """The --columns option, read."""

    roles: list[str]  # in the order given, "_" too
    names: dict[str, str]  # role -> JSON key, header cell or column number
    needed: set[str]  # the roles that every example must have
    bare: bool  # no item has a name, so they may be positions

    def missing(self, found) -> list[str]:
        """The needed names that are not in `found`."""
        return [name for role, name in self.names.items() if role in self.needed and name not in found]

    def __str__(self) -> str:
        return ", ".join(self.missing(()))


def _columns(given: str, need_label: bool) -> Columns:
    items = [re.fullmatch("(text|pair|label|_)(=.+)?", item.strip()) for item in (given or "text,label").split(",")]
    roles = [item[1] for item in items if item]
    names = {item[1]: (item[2] or item[1]).removeprefix("=") for item in items if item and item[1] != "_"}
    needed = ["text", "label"] if need_label else ["text"]
    repeated = len(names) + roles.count("_") < len(roles)
    if repeated or len(roles) < len(items) or not names.keys() >= set(needed):
        raise InputError(
            f"--columns {given!r}: expected a comma list of ROLE or ROLE=NAME, each role once, of text, "
            f"pair, label and _ (ignored), with at least {' and '.join(needed)}"
        )
    needed = {*needed, *names.keys() - {"label"}}
    if not given:
        names["pair"] = "pair"  # read by default where there is one, but not needed
    return Columns(roles, names, needed, bare=not any(item[2] for item in items))


# ---- one example -----------------------------------------------------------------------------------------------------


def _example(where: str, fields: dict, wanted: Columns, faults: Faults) -> Example | None:
    """The checked example, or None with its faults noted. fields: role -> value as the file has it."""
    fields = {role: value for role, value in fields.items() if role in wanted.needed or not _absent(role, value)}
    wrong = {role: fault for role, value in fields.items() if (fault := _wrong(role, value))}
    for role, fault in wrong.items():
        name = wanted.names.get(role, role)
        faults.add(where, f"{role} {fault}" if name == role else f"{role} (column {name!r}) {fault}")
    return None if wrong else Example(fields["text"], fields.get("pair"), fields.get("label"), where)


def _absent(role: str, value: object) -> bool:
    """Where a field is not needed, a JSON null stands for none, and so does an empty label cell."""
    return value is None or (role == "label" and value == "")


def _wrong(role: str, value: object) -> str:
    """What is wrong with a value, or ""."""
    if role == "label" and type(value) is int:  # not isinstance: True is an int too
        return ""
    if not isinstance(value, str):
        kinds = "a string or an integer" if role == "label" else "a string"
        return f"is {_short(value)} ({type(value).__name__}); expected {kinds}"
    if not value.strip():
        return f"is empty, {_short(value)}; expected some text"
    if lone := re.search("[\ud800-\udfff]", value):  # "\ud83d" alone is legal JSON, but has no UTF-8 and so no tokens
        return f"has the lone surrogate {lone[0]!r} at character {lone.start()}; expected valid Unicode"
    return ""


# ---- files: each reader yields (where, {role: value}) ----------------------------------------------------------------


def _lines(path: Path, name: str, faults: Faults) -> Iterator[str]:
    """The lines with their ends. One that is not UTF-8 is noted as a fault and repaired, so that reading can go on."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = _decoded(raw, f"{name}:{number}", faults)
                yield line.removeprefix("\ufeff") if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        faults.stop(f"{name}:{number + 1}", f"the .gz is truncated or corrupt ({error}); expected a whole gzip file")
    except OSError as error:
        faults.stop(str(path), f"can't be read: {error.strerror}")


def _decoded(raw: bytes, where: str, faults: Faults) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        faults.add(
            where,
            f"byte offset {error.start} of the line holds {raw[error.start]:#04x}; expected UTF-8 "
            "(the file may be latin-1: `iconv -f latin1 -t utf-8` converts it)",
        )
        return raw.decode(errors="replace")


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _jsonl(path: Path, wanted: Columns, faults: Faults) -> Iterator:
    for number, line in enumerate(_lines(path, path.name, faults), 1):
        where = f"{path.name}:{number}"
        row = _object(where, _without_end(line), faults) if line.strip() else None
        if row is not None and (missing := wanted.missing(row)):
            faults.add(where, f"no field {', '.join(missing)}; found {_short(list(row))}, expected {wanted}")
        elif row is not None:
            yield where, {role: row[name] for role, name in wanted.names.items() if name in row}


def _object(where: str, line: str, faults: Faults) -> dict | None:
    """The JSON object of a line, or None with its fault noted."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: Python refuses ints of 4,301 digits
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        faults.add(where, f"not JSON, {reason}; found {_short(line.strip())}, expected one JSON object per line")
        return None
    if not isinstance(row, dict):
        faults.add(where, f"found {_short(row)} ({type(row).__name__}); expected one JSON object per line")
        return None
    return row


def _csv_rows(path: Path, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """(line, cells); a record with line ends inside its quotes counts by its first line."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of 128 KiB
    reader = csv.reader(_lines(path, path.name, faults), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            faults.stop(
                f"{path.name}:{first}",
                f"not CSV, {error} (at line {reader.line_num}); expected cells between "
                'commas, those with commas or quotes inside in "...", and each quote there doubled',
            )
        if row is None:
            return
        yield first, row


def _tsv_rows(path: Path, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """(line, cells), split at tabs with no quoting: SST-2 and GLUE hold stray quote characters."""
    for number, line in enumerate(_lines(path, path.name, faults), 1):
        yield number, _without_end(line).split("\t")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of a table are."""

    cells: dict[str, int]  # role -> index of its cell
    width: int  # cells in a row
    expected: str  # the same, in words
    exact: bool = True  # False: a row may have more (columns chosen by number)
    header: bool = False  # the first row is a header


def _layout(where: str, row: list[str], wanted: Columns, faults: Faults) -> Layout:
    """Judged by the first row: columns by number, by the names of a header, or by position."""
    names, roles = wanted.names, wanted.roles
    if all(re.fullmatch("[1-9][0-9]*", name) for name in names.values()):
        cells = {role: int(name) - 1 for role, name in names.items()}
        width = 1 + max(cells[role] for role in wanted.needed)
        return Layout(cells, width, f"{width} or more", exact=False)
    if not wanted.missing(row):
        cells = {role: row.index(name) for role, name in names.items() if name in row}
        return Layout(cells, len(row), f"{len(row)}, as in the header", header=True)
    if not wanted.bare:
        faults.stop(where, f"found the header {_short(row)}; expected one with {wanted}")
    if "label" not in wanted.needed and len(row) == len(roles) - 1:
        roles = [role for role in roles if role != "label"]
    cells = {role: i for i, role in enumerate(roles) if role != "_"}
    # Without this the header `sentence,label` would be trained on, as an example of the class "label".
    if dict(zip(roles, row, strict=False)).get("label") == "label":
        faults.stop(
            where,
            f"found the header {_short(row)}; expected one with {wanted}, or name the columns, as in "
            "--columns text=sentence,label=label",
        )
    return Layout(cells, len(roles), f"{len(roles)}: {', '.join(roles)} (or a header, see --columns)")


def _table(path: Path, wanted: Columns, faults: Faults) -> Iterator:
    rows = (_csv_rows if _kind(path) == ".csv" else _tsv_rows)(path, faults)
    layout = None
    for number, row in rows:
        where = f"{path.name}:{number}"
        if layout is None:
            layout = _layout(where, row, wanted, faults)
            if layout.header:
                continue
        if len(row) < layout.width or (layout.exact and len(row) > layout.width):
            faults.add(where, f"found {len(row)} cells, {_short(row)}; expected {layout.expected}")
        else:
            yield where, {role: row[i] for role, i in layout.cells.items() if i < len(row)}


def _folder(path: Path, faults: Faults) -> Iterator:
    """folder/class/*.txt, sorted by name. Names with a leading dot are the system's own (.DS_Store)."""
    classes = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        faults.stop(str(path), "a folder without sub-folders; expected one sub-folder of .txt files per class")
    for file in (file for entry in classes for file in sorted(entry.iterdir()) if not file.name.startswith(".")):
        where = "/".join(file.parts[-3:])
        if file.suffix.lower() != ".txt":
            faults.add(where, "not a .txt file; expected only FOLDER/CLASS/NAME.txt")
            continue
        text = "\n".join(_without_end(line) for line in _lines(file, where, faults))
        yield where, {"text": text, "label": file.parent.name}


READERS = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _table, ".tsv": _table}


def _kind(path: Path) -> str:
    """.csv for reviews.csv and reviews.CSV.gz"""
    return PurePath(path.name.lower().removesuffix(".gz")).suffix


def _reader(path: Path) -> Callable:
    if _kind(path) not in READERS:
        raise InputError(
            f"{path}: unknown kind of file {_kind(path)!r}; expected {', '.join(READERS)}, each also "
            "with .gz, or a folder with one sub-folder per class"
        )
    return READERS[_kind(path)]


def read(path: str | Path, columns: str = "", need_label: bool = True) -> list[Example]:
    """The examples of a file, or of a folder laid out as folder/class/*.txt (`columns` has no meaning there).

    columns: the --columns option, a comma list of `role` or `role=name`; roles are text, pair, label and _ (ignored).
    need_label: False where labels are read if present but not needed (predict).
    Raises InputError: file, line, what was found, what was expected.
    """
    path, wanted, faults = Path(path), _columns(columns, need_label), Faults()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    rows = _folder(path, faults) if path.is_dir() else _reader(path)(path, wanted, faults)
    examples = [_example(where, fields, wanted, faults) for where, fields in rows]
    faults.check()
    if not examples:
        raise InputError(f"{path}: found no rows; expected at least one example")
    return examples


# ---- texts to be completed -------------------------------------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PIECE = 1 << 14  # characters of a plain text that make one passage


@dataclass(frozen=True, slots=True)
class Passage:
    """A text in parts, and which of them are learned: a completion, or what the assistant says."""

    parts: tuple[tuple[str, bool], ...]
    where: str  # "train.jsonl:17", for messages
    plain: bool = False  # a piece of running text: goes on in the next passage


def read_passages(path: str | Path, columns: str = "", need_label: bool = True) -> list[Passage]:
    """What a language model learns: a .txt of running text, or .jsonl (also .gz) of prompts or of chats.

    {"prompt": ..., "completion": ...} or {"messages": [{"role", "content", "weight" 0 or 1}, ...]}, of which the
    assistant's messages with weight 1 (the default) are learned. need_label: False where a completion may be missing.
    Raises InputError: file, line, what was found, what was expected.
    """
    path, faults = Path(path), Faults()
    if columns:
        raise InputError("--columns has no meaning here; the keys are prompt and completion, or messages")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if _kind(path) not in (".jsonl", ".json", ".txt"):
        raise InputError(f"{path}: unknown kind of file {_kind(path)!r}; expected .jsonl or .txt, each also with .gz")
    passages = list((_plain if _kind(path) == ".txt" else _dialogues)(path, need_label, faults))
    faults.check()
    if not passages:
        raise InputError(f"{path}: found nothing to read; expected at least one example")
    return passages


def _plain(path: Path, need_label: bool, faults: Faults) -> Iterator[Passage]:
    """Running text in pieces of whole lines; together they are the file, its line ends included."""
    held, size, first = [], 0, 1
    for number, line in enumerate(_lines(path, path.name, faults), 1):
        held.append(line)
        size += len(line)
        if size >= PIECE:
            yield Passage((("".join(held), True),), f"{path.name}:{first}", plain=True)
            held, size, first = [], 0, number + 1
    if held:
        yield Passage((("".join(held), True),), f"{path.name}:{first}", plain=True)


def _dialogues(path: Path, need_label: bool, faults: Faults) -> Iterator[Passage]:
    for number, line in enumerate(_lines(path, path.name, faults), 1):
        where = f"{path.name}:{number}"
        row = _object(where, _without_end(line), faults) if line.strip() else None
        if row is None:
            continue
        before = len(faults.lines)
        parts = _chat(where, row, need_label, faults) if "messages" in row else _prompt(where, row, need_label, faults)
        if len(faults.lines) == before:
            yield Passage(tuple(parts), where)


def _prompt(where: str, row: dict, need_label: bool, faults: Faults) -> list[tuple[str, bool]]:
    """The parts of a prompt and its completion; the prompt may be empty, the completion not."""
    needed = ("prompt", "completion") if need_label or "completion" in row else ("prompt",)
    if missing := [key for key in needed if key not in row]:
        expected = " and ".join(needed) + ", or messages"
        faults.add(where, f"no field {', '.join(missing)}; found {_short(list(row))}, expected {expected}")
        return []
    for key in needed:
        if not isinstance(row[key], str) or (key == "completion" and not row[key].strip()):
            faults.add(where, f"{key} is {_short(row[key])}; expected some text")
        elif wrong := _wrong("text", row[key] + "."):  # the dot: a prompt may be empty
            faults.add(where, f"{key} {wrong}")
    return [(row[key], key == "completion") for key in needed if row[key]]


def _chat(where: str, row: dict, need_label: bool, faults: Faults) -> list[tuple[str, bool]]:
    """The parts of a conversation, as plain text: <|role|>, a line end, what is said, a line end."""
    messages, parts, text = row["messages"], [], ""
    if not isinstance(messages, list) or not messages:
        faults.add(where, f"messages is {_short(messages)}; expected a list of at least one message")
        return []
    for i, message in enumerate(messages):
        if fault := _message_fault(message):
            faults.add(where, f"message {i + 1}: {fault}")
            continue
        text += f"<|{message['role']}|>\n"
        if message["role"] == "assistant" and message.get("weight", 1):
            parts += [(text, False), (message["content"], True)]
            text = ""
        text += "\n" if not text else message["content"] + "\n"
    if not parts and not need_label:
        return [(text + "<|assistant|>\n", False)]
    if not parts:
        faults.add(where, "no message to learn from; expected one of the assistant's, with weight 1")
    return parts


def _message_fault(message: object) -> str:
    """What is wrong with one message of a chat, or ""."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return f"found {_short(message)}; expected an object with role and content"
    if message["role"] not in ROLES:
        return f"role is {_short(message['role'])}; expected one of {', '.join(ROLES)}"
    if not isinstance(message["content"], str) or not message["content"].strip():
        return f"content is {_short(message['content'])}; expected some text"
    if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool):
        return f"weight is {_short(message['weight'])}; expected 0 or 1"
    return _wrong("text", message["content"])


# ---- examples -> classes and parts -----------------------------------------------------------------------------------


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", name) is not None


def label_names(examples: list[Example], given: str = "") -> list[str]:
    """The classes of a training set, in the order of their ids.

    given: the --labels option, as "negative,positive". Without it, the labels found: sorted as numbers if all are
    numbers (so that 0..k are their own ids), else as text. Raises InputError for fewer than two.
    """
    names = [name.strip() for name in given.split(",")] if given else list({str(e.label) for e in examples})
    if "" in names or len(set(names)) < max(2, len(names)):
        source = f"--labels {given!r}" if given else f"the labels of the training data are {sorted(names)}"
        raise InputError(f"{source}; expected two or more different classes")
    if given:
        return names
    return sorted(names, key=lambda name: (int(name), name)) if all(map(_is_number, names)) else sorted(names)


def label_ids(examples: list[Example], names: list[str]) -> list[int]:
    """The index in `names` of each example's label; a label may also be that index itself.

    Not so where a name is a number: if the classes are 1 to 5, a 0 is a mistake and not another way to write 1.
    """
    index = {name: i for i, name in enumerate(names)}
    if not any(map(_is_number, names)):
        index |= {str(i): i for i in range(len(names))}
    faults = Faults()
    for example in examples:
        if str(example.label) not in index:
            faults.add(example.where, f"unknown label {_short(example.label)}; expected one of {', '.join(names)}")
    faults.check()
    return [index[str(example.label)] for example in examples]


def split(examples: list, fraction: float, seed: int) -> tuple[list, list]:
    """(train, valid): a random `fraction` of the examples set aside; both keep the order of the input."""
    count = round(fraction * len(examples))
    if not 0 < count < len(examples):
        raise InputError(f"--valid {fraction} sets {count} of {len(examples)} examples aside; both parts need some")
    aside = set(random.Random(seed).sample(range(len(examples)), count))
    parts = [], []
    for i, example in enumerate(examples):
        parts[i in aside].append(example)
    return parts


def sample(examples: list, n: int, seed: int) -> list:
    """n examples drawn at random without repeats, in the order of the input."""
    if not 0 < n <= len(examples):
        raise InputError(f"--limit {n}: the data has {len(examples)} examples; expected 1 to {len(examples)}")
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), n))]
