"""Files -> lines -> objects and rows; every fault with its file and line.

A file is streamed as bytes split at b"\\n" and nothing else: str.splitlines() would also cut at U+0085 and U+2028,
which real reviews contain. Every fault names its file and line, what was found and what was expected; up to five
are told at once, because people fix files in rounds.

Data are regular files: a pipe or a device may never end, and what is read twice (to be judged whole before anything is
computed) has to be the same both times. A line of LONGEST bytes or more is refused unless `--max-line` says otherwise.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NoReturn

from ..config import meant_path
from ..errors import InputError, printable, short_repr

MOST = 5  # faults told at once
BUFFER = 1 << 16  # bytes of a file read at once


class Faults:
    """The faults of one input, raised together as one InputError."""

    def __init__(self):
        self.lines: list[str] = []

    def add(self, where: str, message: str, kind: str = "other") -> None:
        """Note a fault and go on; the sixth stops the reading. `kind` is what check.py counts it under."""
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


def read_lines(path: Path, name: str, faults: Faults, most: int) -> Iterator[tuple[int, str]]:
    """(number, line with its end). A line of `most` bytes or more is a fault: skipped, never held whole. 0: any.

    A line that is not UTF-8 is a fault too, and is repaired so that reading can go on.
    """
    number = 0
    if path.exists() and not path.is_file():
        faults.stop(printable(str(path)), f"is {kind_of_place(path)}; expected a regular file", "unreadable file")
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


def _opened(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb", BUFFER)


def kind_of_place(path: Path) -> str:
    """What is there that is no regular file, in words."""
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
    """The first line without its byte order mark. Stops at what cannot be UTF-8 text."""
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

    Without a byte order mark, UTF-16 shows in its upper bytes: below 9 for the alphabets from Latin to Arabic, at every
    second place. In UTF-8 such bytes are control characters, which no text has that many of.
    """
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even = _share_of_controls(raw[:400:2])
    odd = _share_of_controls(raw[1:400:2])
    if max(even, odd) < 0.5 or even == odd:
        return ""
    return "utf-16le" if odd > even else "utf-16be"


def _share_of_controls(raw: bytes) -> float:
    return sum(byte < 9 for byte in raw) / max(1, len(raw))


def _repaired(raw: bytes, at: int, where: str, faults: Faults) -> str:
    """Notes a byte that is not UTF-8, and gives the line with U+FFFD in its place, so that reading can go on."""
    message = f"byte offset {at} of the line holds {raw[at]:#04x}; expected UTF-8 (the file may be latin-1"
    faults.add(where, f"{message}: `iconv -f latin1 -t utf-8` converts it)", "not UTF-8")
    return raw.decode(errors="replace")


def _check_line_ends(where: str, line: str, faults: Faults) -> None:
    """Lines that end in CR alone, as on a Mac before 2001 and in some exports, make one line of a whole file."""
    if "\r" in line.rstrip("\r\n") and not line.endswith("\n"):
        message = "the lines end in CR alone; expected LF or CR LF (`tr '\\r' '\\n' < FILE` converts them)"
        faults.stop(where, message, "line ends")


def without_line_end(line: str) -> str:
    """A line without its LF or CRLF."""
    return line.removesuffix("\n").removesuffix("\r")


def grouped(items: Iterable, size: Callable[[Any], int], most: int) -> Iterator[list]:
    """Consecutive items in lists, each ended by the item that brings its sizes to `most` or more."""
    group = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= most:
            yield group
            group = []
            total = 0
    if group:
        yield group


def json_objects(path: Path, faults: Faults, most: int) -> Iterator[tuple[str, dict]]:
    """(where, JSON object) of a JSONL file."""
    name = printable(path.name)
    began = False
    blank = 0  # blank lines since the last other one; those at the end of a file do no harm
    first = 0  # number of the first of these
    for number, line in read_lines(path, name, faults, most):
        if line.isspace():
            if not blank:
                first = number
            blank += 1
            continue
        if blank:
            faults.warn("blank lines", first, blank)
            blank = 0
        where = f"{name}:{number}"
        if not began:
            _check_line_ends(where, line, faults)
            _check_lines_of_json(where, line.strip(), faults)
            began = True
        row = _object(where, without_line_end(line), faults)
        if row is not None:
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
    """A JSON object without repeated keys, of which json.loads would silently keep the last value."""
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {short_repr(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return row


_decode_json = json.JSONDecoder(object_pairs_hook=_distinct).decode


def _object(where: str, line: str, faults: Faults) -> dict | None:
    """The JSON object of a line, or None with its fault noted."""
    try:
        row = _decode_json(line)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: Python refuses ints of 4,301 digits
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        message = f"not JSON, {reason}; found {short_repr(line.strip())}, expected one JSON object per line"
        faults.add(where, message, "not JSON")
        return None
    if not isinstance(row, dict):
        message = f"found {short_repr(row)} ({type(row).__name__}); expected one JSON object per line"
        faults.add(where, message, "not an object")
        return None
    return row


def csv_rows(path: Path, faults: Faults, most: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells); a record with line ends inside its quotes counts by its first line."""
    csv.field_size_limit(most or 2**31 - 1)  # Python's own refuses a text of 128 KiB
    name = printable(path.name)
    numbers = []  # of the lines of the record at hand

    def lines() -> Iterator[str]:
        for number, line in read_lines(path, name, faults, most):
            if number == 1:
                _check_line_ends(f"{name}:1", line, faults)
            numbers.append(number)
            yield line

    try:
        for row in csv.reader(lines(), strict=True):
            yield numbers[0], row
            numbers.clear()
    except csv.Error as error:
        expected = 'cells between commas, those with commas or quotes inside in "...", and each quote there doubled'
        message = f"not CSV, {error} (at line {numbers[-1]}); expected {expected}"
        faults.stop(f"{name}:{numbers[0]}", message, "not CSV")


def tsv_rows(path: Path, faults: Faults, most: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells), split at tabs with no quoting: SST-2 and GLUE hold stray quote characters."""
    for number, line in read_lines(path, printable(path.name), faults, most):
        if number == 1:
            _check_line_ends(f"{printable(path.name)}:1", line, faults)
        yield number, without_line_end(line).split("\t")


def kind_of_file(path: Path) -> str:
    """.csv for reviews.csv and reviews.CSV.gz"""
    return PurePath(path.name.lower().removesuffix(".gz")).suffix


def require_file(path: Path, kinds: Iterable[str], expected: str, folder: bool = False) -> None:
    """Raises InputError unless `path` is a regular file of one of these kinds, or a folder where one may stand.

    expected: the kinds in words.
    """
    shown = printable(str(path))
    if not path.exists():
        near = meant_path(path, Path.exists)
        advice = f"; did you mean {printable(near)}?" if near else ""
        raise InputError(f"{shown}: no such file or folder{advice}")
    if path.is_dir() and folder:
        return
    if not path.is_file():
        advice = "" if path.is_dir() else " (what a pipe or a device gives has to be written to a file first)"
        raise InputError(f"{shown}: is {kind_of_place(path)}; expected a regular file{advice}")
    if kind_of_file(path) not in kinds:
        raise InputError(f"{shown}: unknown kind of file {kind_of_file(path)!r}; expected {expected}")
