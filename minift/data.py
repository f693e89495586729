"""Files -> examples: JSONL, CSV and TSV (each also .gz), and a folder with one sub-folder per class.

A file is streamed as bytes split at b"\\n" and nothing else: str.splitlines() would also cut at U+0085 and U+2028,
which real reviews contain. Every fault names its file and line, what was found and what was expected; up to five
are told at once, because people fix files in rounds.

Data are regular files: a pipe or a device may never end, and what is read twice (to be judged whole before anything is
computed) has to be the same both times. A line of LONGEST bytes or more is refused unless `--max-line` says otherwise.
"""

import codecs
import csv
import gzip
import io
import json
import random
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import NoReturn

from .config import LONGEST, InputError, printable

MOST = 5  # faults told at once
BUFFER = 1 << 16  # bytes of a file read at once
FEW = 10  # rows that show whether labels come again


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

    def add(self, where: str, message: str, kind: str = "other") -> None:
        """Note a fault and go on; the sixth ends it. `kind` is what check.py counts it under."""
        if len(self.lines) == MOST:
            raise InputError("\n".join([*self.lines, f"... stopped after {MOST} faults"]))
        self.lines.append(f"{where}: {message}")

    def stop(self, where: str, message: str, kind: str = "other") -> NoReturn:
        """A fault after which the rest of the file has no meaning."""
        raise InputError("\n".join([*self.lines, f"{where}: {message}"]))

    def warn(self, what: str, line: int, count: int = 1) -> None:
        """Something legal but seldom meant, of which check.py tells."""

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

    def missing(self, found) -> list[str]:
        """The needed names that are not in `found`."""
        return [name for role, name in self.names.items() if role in self.needed and name not in found]

    def __str__(self) -> str:
        return ", ".join(self.missing(()))


def _listed(option: str, given: str) -> list[str]:
    """The items of an option that is a comma list; one with a comma inside stands in "...", as in CSV."""
    try:
        items = next(csv.reader([given], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise InputError(f"{option} {given!r}: {error}; expected items between commas") from error
    return [item.strip() for item in items]


def _columns(given: str, need_label: bool, header: str = "auto") -> Columns:
    items = [re.fullmatch("(text|pair|label|_)(=.+)?", item) for item in _listed("--columns", given or "text,label")]
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
    return Columns(roles, names, needed, not any(item[2] for item in items), header)


# ---- headers: what a column is called where nobody says --------------------------------------------------------------

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


def _role_of(cell: str) -> str | None:
    """text, pair or label for a usual name of one, "" for a name of something else, None for what is no usual name."""
    return ROLE_OF.get(_plain_name(cell), None if cell.strip() else "")


def _looks_like_a_name(cell: str) -> bool:
    """Whether a cell is one word, such as tweet_text, of which a part is a usual name."""
    parts = re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", cell.strip())
    return not re.search(r"\s", cell.strip()) and any(_role_of(part) for part in parts if part)


# ---- one example -----------------------------------------------------------------------------------------------------


def _example(where: str, fields: dict, wanted: Columns, faults: Faults) -> Example | None:
    """The checked example, or None with its faults noted. fields: role -> value as the file has it."""
    fields = {role: value for role, value in fields.items() if role in wanted.needed or not _absent(role, value)}
    wrong = {role: fault for role, value in fields.items() if (fault := _wrong(role, value))}
    for role, (kind, message) in wrong.items():
        name = wanted.names.get(role, role)
        faults.add(where, f"{role} {message}" if name == role else f"{role} (column {name!r}) {message}", kind)
    return None if wrong else Example(fields["text"], fields.get("pair"), fields.get("label"), where)


def _absent(role: str, value: object) -> bool:
    """Where a field is not needed, a JSON null stands for none, and so does an empty label cell."""
    return value is None or (role == "label" and value == "")


def _wrong(role: str, value: object) -> tuple[str, str] | None:
    """What is wrong with a value, as the kind of fault and a message, or None."""
    if role == "label" and type(value) is int:  # not isinstance: True is an int too
        return None
    if not isinstance(value, str):
        kinds = "a string or an integer" if role == "label" else "a string"
        return "wrong type", f"is {_short(value)} ({type(value).__name__}); expected {kinds}"
    if not value.strip():
        return "empty text", f"is empty, {_short(value)}; expected some text"
    if lone := re.search("[\ud800-\udfff]", value):  # "\ud83d" alone is legal JSON, but has no UTF-8 and so no tokens
        where = f"{lone[0]!r} at character {lone.start()}"
        return "lone surrogate", f"has the lone surrogate {where}; expected valid Unicode"
    return None


# ---- files: bytes -> lines -> objects, rows --------------------------------------------------------------------------


def _lines(path: Path, name: str, faults: Faults, most: int) -> Iterator[tuple[int, str]]:
    """(number, line with its end). One of `most` bytes is a fault, never held whole, and passed over; 0: none is.

    A line that is not UTF-8 is noted as a fault and repaired, so that reading can go on.
    """
    number = 0
    if path.exists() and not path.is_file():
        faults.stop(printable(str(path)), f"is {_what_it_is(path)}; expected a regular file", "unreadable file")
    try:
        with _opened(path) as file:
            for number, raw in enumerate(iter(partial(file.readline, most or -1), b""), 1):
                if len(raw) == most and not raw.endswith(b"\n"):
                    length = most + _skip(file)
                    message = f"found a line of {length:,} bytes; expected fewer than {most:,} (--max-line)"
                    faults.add(f"{name}:{number}", message, "line too long")
                    continue
                if number == 1:
                    raw = _first_line(raw, name, faults)
                if raw[-2:] == b"\r\n":
                    faults.warn("line ends are CRLF", number)
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    line = _repaired(raw, error.start, f"{name}:{number}", faults)
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"the .gz is truncated or corrupt ({error}); expected a whole gzip file"
        faults.stop(f"{name}:{number + 1}", message, "truncated or corrupt .gz")
    except OSError as error:
        faults.stop(printable(str(path)), f"can't be read: {error.strerror}", "unreadable file")


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb", BUFFER)


def _what_it_is(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a pipe or a socket" if path.is_fifo() or path.is_socket() else "a device"


def _skip(file) -> int:
    """Read to the end of the line, a piece at a time; its length in bytes."""
    length = 0
    while piece := file.readline(1 << 20):
        length += len(piece)
        if piece.endswith(b"\n"):
            break
    return length


MAGIC = {  # how files begin that are often given a name that is not theirs
    b"PK\x03\x04": "a zip archive, as .xlsx and .docx are",
    b"\xd0\xcf\x11\xe0": "an older Excel or Word file",
    b"\x1f\x8b": "compressed by gzip, which its name should say (.gz)",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"%PDF-": "a PDF",
    b"SQLite format 3": "an SQLite database",
}


def _first_line(raw: bytes, name: str, faults: Faults) -> bytes:
    """The first line without a byte order mark; what cannot be UTF-8 text ends the reading here."""
    for start, what in MAGIC.items():
        if raw.startswith(start):
            faults.stop(f"{name}:1", f"the file is {what}; expected text in UTF-8", "not UTF-8")
    if encoding := _wide(raw):
        message = f"is {encoding.upper()}; expected UTF-8 (`iconv -f {encoding} -t utf-8` converts it)"
        faults.stop(f"{name}:1", message, "not UTF-8")
    if raw.startswith(codecs.BOM_UTF8):
        faults.warn("starts with a UTF-8 byte order mark, which is passed over", 1)
        return raw.removeprefix(codecs.BOM_UTF8)
    return raw


def _wide(raw: bytes) -> str:
    """iconv's name of the encoding with 2 or 4 bytes a character that a file begins in, or "".

    Without a byte order mark UTF-16 shows by its upper bytes, below 9 for the alphabets from Latin to Arabic: most of
    them stand at every second place. In UTF-8 these are control characters that no text holds in such numbers.
    """
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if raw.startswith(mark):
            return encoding
    start = raw[:400]
    even, odd = (sum(byte < 9 for byte in start[i::2]) / max(1, len(start[i::2])) for i in (0, 1))
    if max(even, odd) < 0.5 or even == odd:
        return ""
    return "utf-16le" if odd > even else "utf-16be"


def _repaired(raw: bytes, at: int, where: str, faults: Faults) -> str:
    """A line with a byte that is not UTF-8, which is told, and stands for U+FFFD so that reading can go on."""
    faults.add(
        where,
        f"byte offset {at} of the line holds {raw[at]:#04x}; expected UTF-8 "
        "(the file may be latin-1: `iconv -f latin1 -t utf-8` converts it)",
        "not UTF-8",
    )
    return raw.decode(errors="replace")


def _check_line_ends(where: str, line: str, faults: Faults) -> None:
    """Lines that end in CR alone, as on a Mac before 2001 and in some exports, make one line of a whole file."""
    if "\r" in line.rstrip("\r\n") and not line.endswith("\n"):
        message = "the lines end in CR alone; expected LF or CR LF (`tr '\\r' '\\n' < FILE` converts them)"
        faults.stop(where, message, "line ends")


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _objects(path: Path, faults: Faults, most: int) -> Iterator[tuple[str, dict]]:
    """(where, JSON object) of a JSONL file."""
    name, began = printable(path.name), False
    blank, first = 0, 0  # blank lines since the last other one; those at the end of a file do no harm
    for number, line in _lines(path, name, faults, most):
        if line.isspace():
            blank, first = blank + 1, first if blank else number
            continue
        if blank:
            faults.warn("blank lines", first, blank)
            blank = 0
        where = f"{name}:{number}"
        if not began:
            _check_line_ends(where, line, faults)
            _check_lines_of_json(where, line.strip(), faults)
            began = True
        if (row := _object(where, _without_end(line), faults)) is not None:
            yield where, row


def _check_lines_of_json(where: str, line: str, faults: Faults) -> None:
    """Whether a file that should have an object on each line begins as one JSON document over all its lines."""
    if line == "[" or re.match(r"\[\s*\{", line):
        over = "over several lines" if line == "[" else "of objects"
        message = f"found a JSON array {over}; expected one object per line (`jq -c '.[]'` converts it)"
        faults.stop(where, message, "not JSON")
    if line == "{":
        message = "found a JSON object over several lines; expected one object per line (`jq -c .` converts it)"
        faults.stop(where, message, "not JSON")


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; of a key that is there twice, json.loads would keep the last value without a word."""
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {_short(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return row


_decode_json = json.JSONDecoder(object_pairs_hook=_distinct).decode


def _object(where: str, line: str, faults: Faults) -> dict | None:
    """The JSON object of a line, or None with its fault noted."""
    try:
        row = _decode_json(line)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: Python refuses ints of 4,301 digits
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        message = f"not JSON, {reason}; found {_short(line.strip())}, expected one JSON object per line"
        faults.add(where, message, "not JSON")
        return None
    if not isinstance(row, dict):
        message = f"found {_short(row)} ({type(row).__name__}); expected one JSON object per line"
        faults.add(where, message, "not an object")
        return None
    return row


def _csv_rows(path: Path, faults: Faults, most: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells); a record with line ends inside its quotes counts by its first line."""
    csv.field_size_limit(most or 2**31 - 1)  # Python's own refuses a text of 128 KiB
    name, numbers = printable(path.name), []  # of the lines of the record at hand

    def lines() -> Iterator[str]:
        for number, line in _lines(path, name, faults, most):
            if number == 1:
                _check_line_ends(f"{name}:1", line, faults)
            numbers.append(number)
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        numbers.clear()
        try:
            row = next(reader, None)
        except csv.Error as error:
            faults.stop(
                f"{name}:{numbers[0]}",
                f"not CSV, {error} (at line {numbers[-1]}); expected cells between "
                'commas, those with commas or quotes inside in "...", and each quote there doubled',
                "not CSV",
            )
        if row is None:
            return
        yield numbers[0], row


def _tsv_rows(path: Path, faults: Faults, most: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells), split at tabs with no quoting: SST-2 and GLUE hold stray quote characters."""
    for number, line in _lines(path, printable(path.name), faults, most):
        if number == 1:
            _check_line_ends(f"{printable(path.name)}:1", line, faults)
        yield number, _without_end(line).split("\t")


# ---- files: each reader yields (where, {role: value}) ----------------------------------------------------------------


def _jsonl(path: Path, wanted: Columns, faults: Faults, most: int) -> Iterator:
    for where, row in _objects(path, faults, most):
        if missing := wanted.missing(row):
            message = f"no field {', '.join(missing)}; found {_short(list(row))}, expected {wanted}"
            faults.add(where, message, "missing key")
        else:
            yield where, {role: row[key] for role, key in wanted.names.items() if key in row}


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
    if wanted.numbered:
        return _by_number(row, wanted)
    if wanted.header != "no" and (layout := _by_name(where, row, wanted, faults)):
        return layout
    _check_separator(where, row, wanted, faults)
    if not wanted.bare:
        if wanted.header == "no":
            faults.stop(where, f"--header is no, but {wanted} are names, which stand in a header; expected numbers")
        faults.stop(where, f"found the header {_short(row)}; expected one with {wanted}", "unknown header")
    return _by_position(where, row, wanted, faults)


def _by_number(row: list[str], wanted: Columns) -> Layout:
    cells = {role: int(name) - 1 for role, name in wanted.names.items()}
    width = 1 + max(cells[role] for role in wanted.needed)
    return Layout(cells, width, f"{width} or more", False, wanted.header == "yes" or _are_names(row, cells, wanted))


def _by_name(where: str, row: list[str], wanted: Columns, faults: Faults) -> Layout | None:
    """The layout of a header with a column for each role that is needed; None for a row that is none."""
    found = {role: _called(row, role, wanted) for role in wanted.names}
    found = {role: at for role, at in found.items() if at}
    if not found.keys() >= wanted.needed or not _is_header(row, found, wanted):
        return None
    for role, at in found.items():
        if len(at) > 1:
            named = " and ".join(_short(row[i]) for i in at)
            message = f"found the header {_short(row)}, where {named} could each be the {role}; expected one"
            example = ",".join(f"{r}={cells[0] + 1}" for r, cells in found.items())
            faults.stop(where, f"{message}, or its number: --header yes --columns {example}", "unknown header")
    cells = {role: at[0] for role, at in found.items()}
    return Layout(cells, len(row), f"{len(row)}, as in the header", header=True)


def _called(row: list[str], role: str, wanted: Columns) -> list[int]:
    """The cells of a header that may be a role's: called exactly so, else alike, else by one of the usual names."""
    name = wanted.names[role]
    exact = [i for i, cell in enumerate(row) if cell == name]
    alike = [i for i, cell in enumerate(row) if _plain_name(cell) == _plain_name(name) != ""]
    usual = [i for i, cell in enumerate(row) if wanted.bare and _role_of(cell) == role]
    return exact or alike or usual


def _is_header(row: list[str], found: dict[str, list[int]], wanted: Columns) -> bool:
    """Whether names that were found make a row a header. One that is only like a name may be a text of one word."""
    exact = all(row[at[0]] == wanted.names[role] for role, at in found.items() if role in wanted.needed)
    return exact or "label" in found or wanted.header == "yes" or all(_role_of(cell) is not None for cell in row)


def _by_position(where: str, row: list[str], wanted: Columns, faults: Faults) -> Layout:
    roles = wanted.roles
    if "label" not in wanted.needed and len(row) == len(roles) - 1:
        roles = [role for role in roles if role != "label"]
    cells = {role: i for i, role in enumerate(roles) if role != "_"}
    header = wanted.header == "yes" or _are_names(row, cells, wanted)
    if wanted.header == "auto" and not header and _is_doubtful(row, cells):
        _stop_at_a_doubt(where, row, faults)
    return Layout(cells, len(roles), f"{len(roles)}: {', '.join(roles)} (or a header, see --columns)", header=header)


def _are_names(row: list[str], cells: dict[str, int], wanted: Columns) -> bool:
    """Whether each cell that is needed holds a usual name of its own role: a header, though columns were numbered."""
    needed = {role: i for role, i in cells.items() if role in wanted.needed}
    return wanted.header == "auto" and all(i < len(row) and _role_of(row[i]) == role for role, i in needed.items())


def _is_doubtful(row: list[str], cells: dict[str, int]) -> bool:
    """Whether a first row that is no header for certain may be one all the same: `tweet_words,label`.

    Without a stop here it would be trained on, as an example of the class "label", or predicted as a row too many.
    """
    text = row[cells["text"]] if cells["text"] < len(row) else ""
    label = row[cells["label"]] if cells.get("label", len(row)) < len(row) else ""
    one_word = not re.search(r"\s", text.strip())
    compound = _looks_like_a_name(text) and re.search("_|[a-z][A-Z]", text) is not None
    counted = all(re.fullmatch(r"(v|x|c|col|column|field|var)_?\d+", cell.strip().casefold()) for cell in row)
    return compound or counted or one_word and _role_of(label) == "label" or label == "label"


def _stop_at_a_doubt(where: str, row: list[str], faults: Faults) -> NoReturn:
    message = f"found {_short(row)}, which may be a header or an example; expected to be told, by --header yes"
    advice = "--header no, or the names of its columns, as in --columns text=sentence,label=class"
    faults.stop(where, f"{message}, {advice}", "header or example")


def _check_separator(where: str, row: list[str], wanted: Columns, faults: Faults) -> None:
    """A first row in one piece, with something in it that elsewhere separates cells, is no row of this kind of file."""
    separators = {"semicolons": ";", "tabs": "\t", "commas": ",", "vertical bars": "|"}
    for name, separator in separators.items():
        if len(row) == 1 and len(wanted.needed) > 1 and separator in row[0]:
            message = f"found one cell, {_short(row[0])}, with {name} in it; expected cells between commas in a .csv"
            faults.stop(where, f"{message}, between tabs in a .tsv", "wrong number of cells")


class Doubt:
    """Whether the first row was a header after all, by what the others say: no name of a column is a label twice.

    Told at the end of the file, for only then is it known; most often the second or third row clears it.
    """

    def __init__(self, where: str, row: list[str], layout: Layout):
        self.where, self.row = where, row
        self.text, self.label = (row[layout.cells[role]].strip() for role in ("text", "label"))
        self.numbers = not _is_number(self.label)  # whether all other labels are numbers
        self.word = self.numbers and not re.search(r"\s", self.text + self.label)  # whether the label never came again
        self.named = _role_of(self.text) == "text"
        self.count, self.others = 0, set()

    def look(self, label: str) -> bool:
        """One more label; whether the first row may still be a header."""
        label = label.strip()
        self.count += 1
        self.numbers = self.numbers and _is_number(label)
        self.word = self.word and label != self.label
        if self.word:
            self.others.add(label)
        return self.numbers or self.word

    def check(self, faults: Faults) -> None:
        """Ends the reading if the first row must be taken for a header."""
        repeated = self.named or self.count >= FEW and 2 * len(self.others) <= self.count
        if self.count and (self.numbers or self.word and repeated):
            _stop_at_a_doubt(self.where, self.row, faults)


def _table(path: Path, wanted: Columns, faults: Faults, most: int) -> Iterator:
    name, layout, doubt, header = printable(path.name), None, None, None
    for number, row in (_csv_rows if _kind(path) == ".csv" else _tsv_rows)(path, faults, most):
        where = f"{name}:{number}"
        if layout is None:
            if _is_excels_line(where, row, faults):
                continue
            layout = _layout(where, row, wanted, faults)
            if layout.header:
                header = row
                if wanted.missing(row):
                    faults.warn(f"taken for a header: {_short(row)}", number)
                continue
            if wanted.header == "auto" and len(row) > max(layout.cells.values()) and "label" in layout.cells:
                doubt = Doubt(where, row, layout)
        elif doubt and layout.cells["label"] < len(row) and not doubt.look(row[layout.cells["label"]]):
            doubt = None
        if row == header:  # of files that were joined with their headers; else it would be an example
            faults.add(where, f"found the header once more, {_short(row)}; expected an example", "repeated header")
        elif len(row) < layout.width or (layout.exact and len(row) > layout.width):
            message = f"found {len(row)} cells, {_short(row)}; expected {layout.expected}"
            faults.add(where, message, "wrong number of cells")
        else:
            yield where, {role: row[i] for role, i in layout.cells.items() if i < len(row)}
    if doubt:
        doubt.check(faults)


def _is_excels_line(where: str, row: list[str], faults: Faults) -> bool:
    """Whether a first row is the line `sep=,` by which Excel is told the separator."""
    line = ",".join(row)
    if not re.fullmatch("sep=.?", line):
        return False
    if line != "sep=,":
        faults.stop(where, f"found {_short(line)}; expected cells between commas", "wrong number of cells")
    return True


def _folder(path: Path, faults: Faults, most: int) -> Iterator:
    """folder/class/*.txt, sorted by name. Names with a leading dot are the system's own (.DS_Store)."""
    classes = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        message = "a folder without sub-folders; expected one sub-folder of .txt files per class"
        faults.stop(printable(str(path)), message, "no examples")
    files = {entry: [f for f in sorted(entry.iterdir()) if not f.name.startswith(".")] for entry in classes}
    for entry in classes:
        if not files[entry] and any(files.values()):
            message = "a class without examples; expected at least one .txt file"
            faults.add(printable("/".join(entry.parts[-2:])), message, "no examples")
    for file in (file for entry in classes for file in files[entry]):
        where = printable("/".join(file.parts[-3:]))
        if file.suffix.lower() != ".txt":
            faults.add(where, "not a .txt file; expected only FOLDER/CLASS/NAME.txt", "not a .txt file")
            continue
        if most and file.is_file() and file.stat().st_size >= most:
            message = f"found a text of {file.stat().st_size:,} bytes; expected fewer than {most:,} (--max-line)"
            faults.add(where, message, "line too long")
            continue
        text = "\n".join(_without_end(line) for _, line in _lines(file, where, faults, most))
        yield where, {"text": text, "label": file.parent.name}


READERS = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _table, ".tsv": _table}
TEXTS = (".jsonl", ".json", ".txt")  # what a language model learns


def _kind(path: Path) -> str:
    """.csv for reviews.csv and reviews.CSV.gz"""
    return PurePath(path.name.lower().removesuffix(".gz")).suffix


def _check_kind(path: Path, task: str) -> None:
    """Raises InputError unless `path` is a regular file of a kind that the task reads, or for classify a folder."""
    folder = task == "classify"
    kinds = READERS if folder else TEXTS
    shown = printable(str(path))
    if not path.exists():
        raise InputError(f"{shown}: no such file or folder")
    if path.is_dir() and folder:
        return
    if not path.is_file():
        advice = "" if path.is_dir() else " (what a pipe or a device gives has to be written to a file first)"
        raise InputError(f"{shown}: is {_what_it_is(path)}; expected a regular file{advice}")
    if _kind(path) not in kinds:
        expected = ".jsonl, .json or .txt, each also with .gz"
        if folder:
            expected = f"{', '.join(READERS)}, each also with .gz, or a folder with one sub-folder per class"
        raise InputError(f"{shown}: unknown kind of file {_kind(path)!r}; expected {expected}")


def rows(path: Path, wanted: Columns, faults: Faults, most: int) -> Iterator[tuple[str, dict]]:
    """(where, {role: value}) of every example in a file or a folder. Raises InputError."""
    _check_kind(path, "classify")
    return _folder(path, faults, most) if path.is_dir() else READERS[_kind(path)](path, wanted, faults, most)


class Stream:
    """Examples or passages of a file, read anew each time they are asked for: memory does not grow with their number.

    A first pass judges them all, so that a later one has nothing to refuse.
    """

    def __init__(self, path: Path, read: Callable[[Faults], Iterator], nothing: str):
        self.path, self.read, self.nothing = path, read, nothing
        self.count: int | None = None  # examples, after the first pass

    def __iter__(self) -> Iterator:
        """Every example without faults; at the end raises InputError for those with."""
        faults, count, name = Faults(), 0, printable(str(self.path))
        for example in self.read(faults):
            if example is None:
                continue
            if count == self.count:
                break
            count += 1
            yield example
        else:
            faults.check()
            if not count:
                raise InputError(f"{name}: {self.nothing}")
            self.count = count if self.count is None else self.count
            if count == self.count:
                return
        raise InputError(f"{name}: has changed while it was read; expected the same {self.count:,} examples again")


def stream(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> Stream:
    """The examples of a file, or of a folder laid out as folder/class/*.txt (`columns` has no meaning there).

    columns: the --columns option, a comma list of `role` or `role=name`; roles are text, pair, label and _ (ignored).
    need_label: False where labels are read if present but not needed (predict).
    header: whether a table's first row is a header: auto, yes or no. max_line: most bytes of a line, 0: any.
    Raises InputError: file, line, what was found, what was expected.
    """
    path, wanted = Path(path), _columns(columns, need_label, header)
    _check_kind(path, "classify")

    def read_once(faults: Faults) -> Iterator[Example | None]:
        return (_example(where, fields, wanted, faults) for where, fields in rows(path, wanted, faults, max_line))

    return Stream(path, read_once, "found no rows; expected at least one example")


def read(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> list[Example]:
    """stream(), all at once."""
    return list(stream(path, columns, need_label, header, max_line))


# ---- texts to be completed -------------------------------------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PIECE = 1 << 14  # characters of a plain text that make one passage


@dataclass(frozen=True, slots=True)
class Passage:
    """A text in parts, and which of them are learned: a completion, or what the assistant says."""

    parts: tuple[tuple[str, bool], ...]
    where: str  # "train.jsonl:17", for messages
    plain: bool = False  # a piece of running text: goes on in the next passage


def stream_passages(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> Stream:
    """What a language model learns: a .txt of running text, or .jsonl (also .gz) of prompts or of chats.

    {"prompt": ..., "completion": ...} or {"messages": [{"role", "content", "weight" 0 or 1}, ...]}, of which the
    assistant's messages with weight 1 (the default) are learned. Nothing is learned from what is said after the last
    of these, so it is left out.
    need_label: False for prompts. A completion may then be missing and is not given; of a chat the whole history is
    the prompt, but for an answer at its end, which is what is to be said.
    max_line: most bytes of a line, 0: any. Raises InputError: file, line, what was found, what was expected.
    """
    path = Path(path)
    if columns or header != "auto":
        option = "--columns" if columns else "--header"
        raise InputError(f"{option} has no meaning here; the keys are prompt and completion, or messages")
    _check_kind(path, "complete")
    plain = _kind(path) == ".txt"
    if plain and not need_label:
        raise InputError(f"{printable(str(path))}: is running text; expected prompts, in a .jsonl")

    def read_once(faults: Faults) -> Iterator[Passage]:
        return _plain(path, faults, max_line) if plain else _dialogues(path, need_label, faults, max_line)

    return Stream(path, read_once, "found nothing to read; expected at least one example")


def read_passages(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> list[Passage]:
    """stream_passages(), all at once."""
    return list(stream_passages(path, columns, need_label, header, max_line))


def pieces(path: Path, faults: Faults, most: int) -> Iterator[tuple[int, str]]:
    """(first line, text) of running text in pieces of whole lines; together they are the file, line ends included."""
    held, size, first = [], 0, 1
    for number, line in _lines(path, printable(path.name), faults, most):
        if number == 1:
            _check_running_text(f"{printable(path.name)}:1", line, faults)
        held.append(line)
        size += len(line)
        if size >= PIECE:
            yield first, "".join(held)
            held, size, first = [], 0, number + 1
    if held:
        yield first, "".join(held)


def _check_running_text(where: str, line: str, faults: Faults) -> None:
    """Lines of JSON under a name that ends in .txt would be learned with all their brackets and quotes."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and row.keys() & {"prompt", "completion", "messages", "text", *OTHER_FORMS}:
        message = f"found a JSON object with {_short(list(row))} in a .txt, which is read as running text"
        faults.stop(where, f"{message}; expected a name that ends in .jsonl", "JSON in a .txt")


def _plain(path: Path, faults: Faults, most: int) -> Iterator[Passage]:
    for first, text in pieces(path, faults, most):
        yield Passage(((text, True),), f"{printable(path.name)}:{first}", plain=True)


def _dialogues(path: Path, need_label: bool, faults: Faults, most: int) -> Iterator[Passage]:
    for where, row in _objects(path, faults, most):
        before = len(faults.lines)
        parts = _chat(where, row, need_label, faults) if "messages" in row else _prompt(where, row, need_label, faults)
        if len(faults.lines) == before:
            yield Passage(tuple(parts), where)


OTHER_FORMS = {  # a key of a common form that is not read here -> its name, and how it is converted
    "conversations": (
        "ShareGPT's form",
        """`jq -c '{messages: [.conversations[] | {role: ({human: "user", gpt: "assistant"}[.from] // .from), """
        "content: .value}]}'` converts it",
    ),
    "instruction": (
        "Alpaca's form",
        """`jq -c '{prompt: ([.instruction, .input // empty] | join("\\n") + "\\n"), completion: .output}'` """
        "converts it",
    ),
    "text": ("a text without a prompt", """`jq -c '{prompt: "", completion: .text}'` converts it"""),
    "chosen": ("pairs of preferences", "of which only the chosen one can be learned"),
}


def other_form(row: dict) -> str:
    """What is said, after the rest of a message, of an object in a common form that is not read here; or ""."""
    key = next((key for key in OTHER_FORMS if key in row), "")
    if not key or row.keys() & {"prompt", "completion", "messages"} == {"prompt", "completion"}:
        return ""
    return f" ({key}: {OTHER_FORMS[key][0]}; {OTHER_FORMS[key][1]})"


def _prompt(where: str, row: dict, need_label: bool, faults: Faults) -> list[tuple[str, bool]]:
    """The parts of a prompt and its completion; the prompt may be empty, the completion not."""
    needed = ("prompt", "completion") if need_label or row.get("completion") is not None else ("prompt",)
    if missing := [key for key in needed if key not in row]:
        expected = " and ".join(needed) + ", or messages"
        found = f"no field {', '.join(missing)}; found {_short(list(row))}, expected {expected}"
        faults.add(where, found + other_form(row), "missing key")
        return []
    for key in needed:
        if not isinstance(row[key], str) or (key == "completion" and not row[key].strip()):
            faults.add(where, f"{key} is {_short(row[key])}; expected some text", "wrong type")
        elif wrong := _wrong("text", row[key] + "."):  # the dot: a prompt may be empty
            faults.add(where, f"{key} {wrong[1]}", wrong[0])
    return [(row[key], key == "completion") for key in needed if row[key] and (need_label or key == "prompt")]


def _chat(where: str, row: dict, need_label: bool, faults: Faults) -> list[tuple[str, bool]]:
    """The parts of a conversation, as plain text: <|role|>, a line end, what is said, a line end.

    The flag of a part says that it is learned, and so ends with end-of-text: in the history of a prompt too.
    """
    messages, parts, text, whole = row["messages"], [], "", True
    if not isinstance(messages, list) or not messages:
        faults.add(where, f"messages is {_short(messages)}; expected a list of at least one message", "no messages")
        return []
    for i, message in enumerate(messages):
        if fault := _message_fault(message):
            faults.add(where, f"message {i + 1}: {fault[1]}", fault[0])
            whole = False
            continue
        if not need_label and i == len(messages) - 1 and message["role"] == "assistant":
            break  # what is to be said
        text += f"<|{message['role']}|>\n"
        if message["role"] == "assistant" and weight_of(message):
            parts += [(text, False), (message["content"], True)]
            text = ""
        text += "\n" if not text else message["content"] + "\n"
    if not need_label:
        return [*parts, (text + "<|assistant|>\n", False)]
    if not parts and whole:
        message = "no message to learn from; expected one of the assistant's, with weight 1"
        faults.add(where, message, "nothing trained")
    return parts


def weight_of(message: dict) -> object:
    """The weight of a message; null stands for none, as `datasets` writes what only other rows have."""
    weight = message.get("weight")
    return 1 if weight is None else weight


def _message_fault(message: object) -> tuple[str, str] | None:
    """What is wrong with one message of a chat, as the kind of fault and a message, or None."""
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        if isinstance(message, dict) and {"from", "value"} <= message.keys():
            found = f"found {_short(message)}, with from and value as ShareGPT has them"
            return "missing key", f"{found}; expected role (user for human, assistant for gpt) and content"
        return "missing key", f"found {_short(message)}; expected an object with role and content"
    if message["role"] not in ROLES:
        return "unrecognised role", f"role is {_short(message['role'])}; expected one of {', '.join(ROLES)}"
    if not isinstance(message["content"], str) or not message["content"].strip():
        return "wrong type", f"content is {_short(message['content'])}; expected some text"
    if "weight" in message and (fault := weight_fault(message)):
        return fault
    return _wrong("text", message["content"])


def weight_fault(message: dict) -> tuple[str, str] | None:
    """What is wrong with the weight of a message, as the kind of fault and a message, or None."""
    weight = weight_of(message)
    if message.get("weight") is None:
        return None
    if message.get("role") != "assistant":
        found = f"found a weight on the role {_short(message.get('role'))}"
        return "misplaced weight", f"{found}; expected one on assistant messages only"
    if type(weight) is not int or weight not in (0, 1):  # not isinstance: True is an int too
        return "wrong weight", f"weight is {_short(weight)}; expected 0 or 1"
    return None


# ---- examples -> classes and parts -----------------------------------------------------------------------------------


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", name) is not None


def label_names(examples: list[Example], given: str = "") -> list[str]:
    """The classes of a training set, in the order of their ids.

    given: the --labels option, as "negative,positive"; a name with a comma in it stands in "...", as in CSV. Without
    it, the labels found: sorted as numbers if all are numbers (so that 0..k are their own ids), else as text. Raises
    InputError for fewer than two, and for two that look alike, unless both are given.
    """
    names = _listed("--labels", given) if given else list({str(e.label) for e in examples})
    if "" in names or len(set(names)) < max(2, len(names)):
        found = [printable(name) for name in sorted(names)]
        source = f"--labels {given!r}" if given else f"the labels of the training data are {found}"
        raise InputError(f"{source}; expected two or more different classes")
    if given:
        return names
    _check_numbers(names)
    if twins := look_alikes(names):
        wheres = {str(e.label): e.where for e in reversed(examples)}
        first, second = twins[0]
        raise InputError(
            f"{wheres[second]}: found the label {second!r}, and at {wheres[first]} {first!r}; expected one spelling, "
            "or both in --labels if they are two classes"
        )
    return sorted(names, key=lambda name: (int(name), name)) if all(map(_is_number, names)) else sorted(names)


def _check_numbers(names: list[str]) -> None:
    """Raises InputError for labels that are scores, or that stand for no label: they would be classes like others."""
    if not all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names):
        return
    numbers = sorted(map(float, names))
    shown = f"the labels of the training data are {_short(sorted(names, key=float))}"
    if any(number != number // 1 for number in numbers):
        raise InputError(f"{shown}, scores and not classes; expected whole numbers or names, or all in --labels")
    if numbers[0] == -1 and numbers[1] == 0 and numbers[-1] > 1:
        raise InputError(
            f"{shown}, where -1 may stand for no label, as in SNLI; expected labelled examples alone, or --labels="
            + ",".join(sorted(names, key=float))
        )


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of labels that are one to the eye: they differ in spaces, invisible characters or how accents are coded."""
    seen, twins = {}, []
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
    if not any(map(_is_number, names)):
        index |= {str(i): i for i in range(len(names))}
    expected = ", ".join(map(printable, names))
    faults, ids = Faults(), []
    for example in examples:
        number = index.get(str(example.label))
        if number is None:
            faults.add(example.where, f"unknown label {_short(example.label)}; expected one of {expected}")
        else:
            ids.append(number)
    faults.check()
    return ids


def split(examples: list, fraction: float, seed: int) -> tuple[list, list]:
    """(train, valid): a random `fraction` of the examples set aside; both keep the order of the input."""
    count = round(fraction * len(examples)) if 0 < fraction < 1 else 0  # nan and inf have no round number
    if not 0 < count < len(examples):
        raise InputError(f"--valid {fraction} sets {count} of {len(examples)} examples aside; both parts need some")
    aside = set(random.Random(seed).sample(range(len(examples)), count))
    parts = [], []
    for i, example in enumerate(examples):
        parts[i in aside].append(example)
    return parts


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
