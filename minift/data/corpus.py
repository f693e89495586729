"""Running text of any size: tokenised once into a file, of which a run reads the blocks of the step at hand.

    pieces = read_all(stream)                          the examples of a text: numbers, for its words stay in the file
    for done in tokenise(pieces[0].text, tokenizer)    makes the file of tokens, or goes on with one that was begun
    blocks(pieces, tokenizer, length, overlap, make)   looks like a list of Sequences; each is made when asked for

The file of tokens is kept in the user's cache folder, beside the kernels, under a key of all that it was made from:

    text/KEY/           tokens.bin, ids of all pieces end to end, uint16 or uint32; ends.bin, int64, where each piece
                        ends there; state.json, how many they are and of which text; minift.json, their SHA-256
    text/KEY.partial/   the same while it is made. state.json says how far the others are on the disk: what a killed
                        process wrote beyond that is cut off, and the next one goes on from there
    text/KEY.lock       held by the process that makes it; others wait for that one

A training set is a list of pieces. Their tokens, joined in its order, are one stream, and that is cut into blocks. What
is held for each piece is about 100 bytes: half a percent of the text.
"""

import hashlib
import json
import os
import tempfile
import weakref
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import InputError, printable
from . import passages
from .batch import Sequence
from .examples import Stream
from .lines import grouped
from .tokenizer import Tokenizer

VERSION = 1  # of the files' format, and of how a text is read into pieces
CHARACTERS = 1 << 20  # of text tokenised at once, and lost where the process is killed
TOKENS, ENDS, STATE = "tokens.bin", "ends.bin", "state.json"
FILES = {TOKENS, ENDS, STATE, files.MANIFEST}
TOGETHER = 100  # blocks that are made at once, where all are asked for


# ---- the text


@dataclass(eq=False)
class Text:
    """A file of running text, read once and found without fault."""

    stream: Stream  # its passages, read anew each time
    count: int  # of them
    content: str  # SHA-256 of its bytes
    stamp: tuple  # of the file as it was then
    opened: dict[str, "TokenFile"] = field(default_factory=dict)  # by their keys

    @property
    def name(self) -> str:
        """For messages."""
        return printable(str(self.stream.path))

    def words(self) -> Iterator[str]:
        """The text of each piece. Raises InputError where they are no longer as many."""
        for passage in self.stream:
            yield "".join(text for text, _ in passage.parts)

    def check(self) -> None:
        """Raises InputError where the file is not the one that was read first."""
        if stamp_of(self.stream.path) != self.stamp:
            raise InputError(f"{self.name}: has changed while it was read; expected the same text again")


@dataclass(frozen=True, slots=True)
class Piece:
    """An example of running text: some whole lines of it, about passages.PIECE characters."""

    text: Text
    number: int  # from 0


def read_all(stream: Stream) -> list:
    """All examples of a file, of running text its pieces. Raises InputError."""
    return read_pieces(stream) if stream.plain else list(stream)


def read_pieces(stream: Stream) -> list[Piece]:
    """The pieces of a running text. Reads it once: raises InputError for all that is wrong with it."""
    stamp = stamp_of(stream.path)
    count = sum(1 for _ in stream)
    text = Text(stream, count, files.digest(stream.path), stamp)
    text.check()
    return [Piece(text, number) for number in range(count)]


def stamp_of(path: Path) -> tuple:
    """What differs where a file is written to, or replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def texts_of(*parts: list) -> list[Text]:
    """The running texts that some lists of examples are from, each once."""
    return list(dict.fromkeys(part[0].text for part in parts if is_running(part)))


def is_running(examples: list) -> bool:
    """Whether examples are pieces of running text."""
    return bool(examples) and isinstance(examples[0], Piece)


# ---- the file of its tokens


class TokenFile:
    """The tokens of a text, as a whole file has them. Of these two files, memory holds `ends` alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.kind = np.dtype(json.loads((folder / STATE).read_text())["kind"])
        self.ends = np.append(0, np.fromfile(folder / ENDS, np.int64))  # (pieces + 1,): piece i is ends[i] to ends[i+1]
        self.handle = os.open(folder / TOKENS, os.O_RDONLY)  # stays open: the file may be deleted at any time
        weakref.finalize(self, os.close, self.handle)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin to end, (n,) int32."""
        size = self.kind.itemsize
        words = os.pread(self.handle, (end - begin) * size, begin * size)
        return np.frombuffer(words, self.kind).astype(np.int32)


def key_of(text: Text, tokenizer: Tokenizer) -> str:
    """A name for all that the tokens of a text depend on."""
    parts = (VERSION, text.content, passages.PIECE, tokenizer.digest())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def places() -> list[Path]:
    """Where files of tokens are kept: the cache folder, and what stands in where that cannot be written."""
    found = [files.cache_folder("text")]
    with suppress(OSError):  # no temporary folder either
        found.append(Path(tempfile.gettempdir(), f"minift-{os.getuid()}"))
    return found


def find(text: Text, tokenizer: Tokenizer) -> TokenFile | None:
    """The file of a text's tokens, if there is one, whole, that nobody else can write to."""
    key = key_of(text, tokenizer)
    for place in places():
        if key not in text.opened and files.private(place) and is_whole(place / key):
            text.opened[key] = TokenFile(place / key)
    return text.opened.get(key)


def is_whole(folder: Path) -> bool:
    """Whether a folder has all that was written into it."""
    try:
        return (
            files.private(folder) and FILES - {files.MANIFEST} <= set(files.listed(folder)) and not files.fault(folder)
        )
    except InputError:  # its list of files is damaged
        return False


def tokenise(text: Text, tokenizer: Tokenizer) -> Iterator[int]:
    """Makes the file of a text's tokens; yields how many pieces are done: at first those of an earlier start.

    Yields nothing where the file is there, or where another process has made it in the meantime. Raises InputError
    where the text changes, OSError where nothing can be written; what was done by then stays, but not of a text that
    changes.
    """
    if find(text, tokenizer):
        return
    key = key_of(text, tokenizer)
    with ExitStack() as held:
        place = lock_place(key, held)
        if find(text, tokenizer):
            return
        partial = place / f"{key}.partial"
        try:
            yield from append_pieces(partial, text, tokenizer)
        except InputError:
            files.remove_files(partial, FILES)
            raise
        files.seal(partial)
        files.remove_files(place / key, FILES)  # one that is not whole
        os.rename(partial, place / key)
        files.flush(place)


def lock_place(key: str, held: ExitStack) -> Path:
    """The first of `places` that can be written, the lock of this key held there. Raises OSError: there is none."""
    refused = []
    for place in places():
        try:
            files.make_private(place)
            held.enter_context(files.locked(place / f"{key}.lock"))
            return place
        except OSError as e:
            refused.append(f"{place} ({e.strerror})")
    expected = "expected a folder with room for them in the environment variable XDG_CACHE_HOME"
    raise OSError(f"the tokens of a text cannot be written to {' or '.join(refused)}; {expected}")


def append_pieces(folder: Path, text: Text, tokenizer: Tokenizer) -> Iterator[int]:
    """Writes the tokens of the pieces that a folder lacks; yields the number of those that it has, again and again."""
    folder.mkdir(mode=0o700, exist_ok=True)
    files.remove_leftovers(folder)
    (folder / files.MANIFEST).unlink(missing_ok=True)
    kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    done, total = read_state(folder, kind)
    text.check()
    yield done

    with files.naming(folder), open(folder / TOKENS, "ab") as tokens, open(folder / ENDS, "ab") as ends:
        tokens.truncate(total * kind.itemsize)
        ends.truncate(done * np.dtype(np.int64).itemsize)
        for words in grouped(islice(text.words(), done, None), len, CHARACTERS):
            encoded = tokenizer.encode(words, special=False)
            lengths = np.array([len(piece.ids) for piece in encoded], np.int64)
            for piece in encoded:
                tokens.write(np.array(piece.ids, kind).tobytes())
            ends.write((total + lengths.cumsum()).tobytes())
            done += len(lengths)
            total += int(lengths.sum())

            # the state comes last, so that all it speaks of is on the disk
            text.check()
            for file in (tokens, ends):
                file.flush()
                os.fsync(file.fileno())
            write_state(folder, done, total, kind, text)
            yield done


def write_state(folder: Path, done: int, total: int, kind: np.dtype, text: Text) -> None:
    """What the files hold: pieces, tokens, their type; and for people, of which text they are."""
    state = {"pieces": done, "tokens": total, "kind": kind.name, "text": os.path.abspath(text.stream.path)}
    files.write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def read_state(folder: Path, kind: np.dtype) -> tuple[int, int]:
    """(pieces, tokens) that a folder has for certain; none where its files are not what its state says."""
    try:
        state = json.loads((folder / STATE).read_text())
        done, total = int(state["pieces"]), int(state["tokens"])
        ends = np.fromfile(folder / ENDS, np.int64, done)
        size = (folder / TOKENS).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    if len(ends) != done or not done or ends[-1] != total or size < total * kind.itemsize:
        return 0, 0
    return done, total


# ---- blocks of it


class Joined:
    """The tokens of some pieces end to end, behind those that the tokenizer puts in front of a text."""

    def __init__(self, file: TokenFile, numbers: np.ndarray, before: list[int]):
        """numbers: (pieces,) int64."""
        lengths = file.ends[numbers + 1] - file.ends[numbers]
        self.file = file
        self.before = np.array(before, np.int32)
        self.sources = file.ends[numbers]  # (pieces,) where each begins in the file
        self.places = len(before) + np.append(0, lengths.cumsum())  # (pieces + 1,) where it begins here, and the end

    def __len__(self) -> int:
        return int(self.places[-1])

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin to end, (n,) int32."""
        found = [self.before[begin:end]]
        at = max(begin, len(self.before))
        piece = int(self.places.searchsorted(at, "right")) - 1
        while at < end:
            stop = min(end, int(self.places[piece + 1]))
            source = int(self.sources[piece]) + at - int(self.places[piece])
            found.append(self.file.read(source, source + stop - at))
            at = stop
            piece += 1
        return np.concatenate(found)


Make = Callable[[list[int], list[np.ndarray]], list[Sequence]]  # (numbers of blocks, their tokens) -> what is learned


@dataclass(frozen=True, eq=False)
class Blocks(abc.Sequence):
    """A list of Sequences by its looks: [i] and iteration make them, a slice is another one."""

    tokens: Joined
    length: int  # tokens of a block
    overlap: int  # how many of them are the next one's first
    make: Make
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int | slice) -> Any:
        """A Sequence, or Blocks of those in the slice."""
        if isinstance(i, slice):
            return replace(self, numbers=self.numbers[i])
        number = self.numbers[i]
        return self.make([number], [self.read(number)])[0]

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, TOGETHER at a time: some tasks make many faster than one."""
        for start in range(0, len(self), TOGETHER):
            numbers = self.numbers[start : start + TOGETHER]
            yield from self.make(list(numbers), [self.read(number) for number in numbers])

    def read(self, number: int) -> np.ndarray:
        """The tokens of a block, (n,) int32."""
        begin = number * (self.length - self.overlap)
        end = min(begin + self.length, len(self.tokens))
        return self.tokens.read(begin, end)


def blocks(
    pieces: list[Piece],
    tokenizer: Tokenizer,
    length: int,
    overlap: int,
    make: Make,
    before: list[int] = (),
) -> Blocks:
    """Pieces of one text in blocks of `length` tokens, the last one shorter; makes the file of tokens if there is none.

    overlap: how many tokens two neighbours share; a block has more than these. make: what the task makes of blocks.
    before: tokens that stand once, in front of all. Raises what `tokenise` raises.
    """
    text = pieces[0].text
    for _ in tokenise(text, tokenizer):
        pass
    numbers = np.array([piece.number for piece in pieces], np.int64)
    tokens = Joined(find(text, tokenizer), numbers, before)
    count = -(-(len(tokens) - overlap) // (length - overlap))
    return Blocks(tokens, length, overlap, make, range(max(0, count)))
