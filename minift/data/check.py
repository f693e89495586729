"""A training file judged as a fine-tuning service would judge it, before anything is trained.

Training stops at the fifth fault; this tells every one, as file:line, what was found and what was expected, and then
warns of what is legal but seldom meant: duplicates, validation examples among the training ones, texts to be cut.

What a file of one kind should hold stands beside this file: check_texts.py for labelled texts, check_dialogues.py for
prompts, chats and running text. Each makes `Checks`, by which a task says what its files are.

Memory does not grow with the file but for 32 bytes an example (three 8-byte hashes and its line). A line of LONGEST
bytes or more is told by its length and never held whole, as in training.
Two different examples share a hash, and so are called duplicates, with probability n^2 / 2^65: 3 in a million for ten
million examples.
"""

import hashlib
import textwrap
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..config import CheckConfig
from ..errors import printable, short_repr
from .labels import look_alikes
from .lines import grouped
from .tokenizer import Tokenizer

FEWEST = 10  # examples; services refuse fewer
BATCH = 256  # examples tokenised at once
CHARACTERS = 1 << 20  # the same in characters
SHOWN = 20  # classes in the report
PLAIN_TEXT = "plain text"  # the format that has no examples, only pieces: divided and not cut


# ---- what is found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """An example without faults."""

    line: int  # in a folder: the number of the file
    parts: list[tuple[str, bool]]  # texts tokenised apart, and whether they are learned, as in passages.Passage
    prompt: str  # of labelled texts: the text, and its pair
    completion: str  # of labelled texts: the label; of a chat: the last message that is learned


class Stopped(Exception):
    """The rest of the file has no meaning."""


class Findings:
    """Tells each fault when it is met, and counts. Stands where lines.py takes its Faults."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.faults: Counter[str] = Counter()  # by kind
        self.notes: dict[str, tuple[int, list[int]]] = {}  # warning -> how often, its first lines
        self.mixed: set[str] = set()  # warnings that are none where they hold of every example
        self.form = ""  # of the file, named by whoever reads it before the first example
        self.where = ""  # of the last fault: what stands there is no example

    def add(self, where: str, message: str, kind: str = "other") -> None:
        """A fault."""
        self.faults[kind] += 1
        self.where = where
        self.say(f"{where}: {message}")

    def stop(self, where: str, message: str, kind: str = "other") -> NoReturn:
        """A fault after which the rest of the file has no meaning."""
        self.add(where, message, kind)
        raise Stopped

    def warn(self, what: str, line: int, count: int = 1) -> None:
        """Something legal but seldom meant, `count` times from `line` on."""
        before, lines = self.notes.get(what, (0, []))
        self.notes[what] = before + count, [*lines, line][:3]

    def warn_if_mixed(self, what: str, line: int) -> None:
        """Something that is worth a warning unless every example is so."""
        self.mixed.add(what)
        self.warn(what, line)

    def warnings(self, examples: int) -> Iterator[str]:
        """What to print of a file with so many examples."""
        for what, (count, lines) in self.notes.items():
            if what in self.mixed and count == examples:
                continue
            word = "line" if count == 1 else "lines"
            more = ", ..." if count > len(lines) else ""
            yield f"{what}: {count:,} ({word} {', '.join(map(str, lines))}{more})"


# ---- duplicates and leaks --------------------------------------------------------------------------------------------


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


NO_TEXT = _hash("")


class Seen:
    """Hashes of the examples of a file: 32 bytes each, where a Python set would take about 100."""

    def __init__(self):
        self.lines = array("Q")
        self.examples = array("Q")
        self.prompts = array("Q")
        self.completions = array("Q")

    def add(self, item: Item) -> None:
        """One more example."""
        self.lines.append(item.line)
        self.examples.append(_hash(repr((item.parts, item.completion))))
        self.prompts.append(_hash(item.prompt))
        self.completions.append(_hash(item.completion))


def repeated(hashes: array, others: array | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(the one before, this one): the indices of the examples whose hash stood there before, this one ascending.

    others: only those that differ here from the one before them with the same hash.
    """
    values = np.array(hashes, np.uint64)
    order = values.argsort(kind="stable")  # equal ones stay in the order of the file
    again = values[order[1:]] == values[order[:-1]]
    if others is not None:
        marks = np.array(others, np.uint64)[order]
        again &= marks[1:] != marks[:-1]
    before = order[:-1][again]
    these = order[1:][again]
    by_line = these.argsort()
    return before[by_line], these[by_line]


def _leaks(seen: Seen, valid: Seen, prompts: str, unit: str) -> Iterator[str]:
    """Warnings about what the training and the validation file share; `prompts` is what prompts are called."""
    hashes = {"examples": (seen.examples, valid.examples), prompts: (seen.prompts, valid.prompts)}
    for what, (ours, theirs) in hashes.items():
        values = np.array(ours, np.uint64)
        both = np.flatnonzero(np.isin(values, np.array(theirs, np.uint64)) & (values != NO_TEXT))
        if len(both):
            there = theirs.index(ours[both[0]])
            place = f"{unit} {seen.lines[both[0]]}, there {unit} {valid.lines[there]}"
            yield f"{what} that are also in the validation file: {len(both):,} (first: {place})"


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """Tokens per example, and what is left of them at max_length (0: everything).

    The histograms are exact and stay small: k different lengths take k^2 / 2 tokens, so 10 GB has at most 70,000.
    """

    max_length: int = 0
    examples: Counter[int] = field(default_factory=Counter)  # length -> how many
    trained: Counter[int] = field(default_factory=Counter)  # the same for trained tokens alone
    cut: int = 0  # examples longer than max_length
    cut_tokens: int = 0
    lost: int = 0  # examples of which no trained token is left
    tokens: int = 0  # left, a pass
    targets: int = 0  # of these, trained; of a plain text all but the first are, and this stays 0

    def add(self, parts: list[tuple[int, bool]]) -> None:
        """An example: the length of each part and whether it is trained."""
        total = sum(n for n, _ in parts)
        most = self.max_length or total
        trained = _trained(parts, total)
        left = _trained(parts, most)
        self.examples[total] += 1
        self.trained[trained] += 1
        if total > most:
            self.cut += 1
            self.cut_tokens += total - most
        if trained and not left:
            self.lost += 1
        self.tokens += min(total, most)
        self.targets += left


def _trained(parts: list[tuple[int, bool]], most: int) -> int:
    """Trained tokens among the first `most`. The very first is none: nothing stands before it to predict it from."""
    end = count = 0
    for n, is_trained in parts:
        if is_trained:
            count += max(0, min(end + n, most) - max(end, 1))
        end += n
    return count


def summary(histogram: Counter[int]) -> tuple[float, float, float, float, float]:
    """Minimum, median, mean, 95th percentile and maximum; between two values it interpolates, as numpy does."""
    values = np.repeat(np.array([*histogram], np.int32), [*histogram.values()])
    least, median, high, most = np.quantile(values, (0, 0.5, 0.95, 1))
    return least, median, values.mean(), high, most


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What check_file() found; str() of it is a table of at most 80 columns."""

    name: str
    faults: Counter[str]  # by kind, those of the validation file too
    lengths: Lengths | None  # with a tokenizer
    epochs: int
    form: str = ""  # chat, prompt/completion, plain text, classes
    examples: int = 0  # without faults; a plain text: its pieces
    empty: bool = True  # no example has any text
    warnings: list[str] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)  # examples of each class, where there are classes
    seen: Seen = field(default_factory=Seen)  # examples that can be compared: not the pieces of a plain text

    @property
    def ok(self) -> bool:
        """Whether there are no faults."""
        return not self.faults

    def __str__(self) -> str:
        title = f"{printable(self.name)} ({self.form or 'format unknown'})"
        unit = "pieces" if self.form == PLAIN_TEXT else "examples"
        rows = textwrap.wrap(title, 80, subsequent_indent="  ")
        rows.append(f"{unit:<12}{self.examples:>12,}  without faults")
        rows.append(f"{'faults':<12}{self.faults.total():>12,}")
        rows += [f"  {kind:<30}{n:>10,}" for kind, n in self.faults.most_common()]
        rows += self._classes()
        rows += self._tokens()
        rows.append(f"{'warnings':<12}{len(self.warnings):>12,}")
        for warning in self.warnings:
            rows += textwrap.wrap(warning, 80, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(rows)

    def _classes(self) -> list[str]:
        if not self.labels:
            return []
        total = self.labels.total()
        rows = [f"{'classes':<12}{len(self.labels):>12,}"]
        for name, n in self.labels.most_common(SHOWN):
            rows.append(f"  {short_repr(name):<60}{n:>10,}{n / total:>8.1%}")
        if len(self.labels) > SHOWN:
            rows.append(f"  ... and {len(self.labels) - SHOWN:,} more")
        return rows

    def _tokens(self) -> list[str]:
        lengths = self.lengths
        if not lengths or not lengths.examples:
            return []
        whole = "  a piece" if self.form == PLAIN_TEXT else "  an example"
        rows = [_row("tokens", ["min", "median", "mean", "p95", "max"]), _statistics(whole, lengths.examples)]
        if lengths.trained.keys() != {0}:  # as with classes, and with plain text
            rows.append(_statistics("  trained", lengths.trained))
        if lengths.max_length:
            examples = f"{lengths.cut:,} of the examples, by {lengths.cut_tokens:,} tokens"
            rows.append(f"cut at {lengths.max_length:,}: {examples}")
        rows.append(f"{lengths.tokens:,} tokens a pass, {lengths.tokens * self.epochs:,} in {self.epochs} epochs")
        if lengths.targets:
            trained = lengths.targets * self.epochs
            rows.append(f"{lengths.targets:,} trained a pass, {trained:,} in {self.epochs} epochs")
        return rows


def _statistics(name: str, histogram: Counter[int]) -> str:
    return _row(name, [f"{round(value, 1):,.10g}" for value in summary(histogram)])


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells)


# ---- the check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checks:
    """What a task says of its files.

    read: (path, --columns, --header, findings, most bytes of a line) -> the examples without faults. It names the
    format in findings.form before the first. Raises InputError for a file that isn't there or is of an unknown kind.
    count: (examples, tokenizer, lengths) -> None, adds the tokens of each to the lengths.
    repeats: (seen, "line" or "file") -> warnings about prompts and completions that are alike.
    prompts: what prompts are called in a warning. classes: whether the completions are classes, of which there should
    be two or more.
    """

    read: Callable[[Path, str, str, Findings, int], Iterator[Item]]
    count: Callable[[list[Item], Tokenizer, Lengths], None]
    repeats: Callable[[Seen, str], Iterator[str]]
    prompts: str
    classes: bool


def check_file(
    config: CheckConfig, checks: Checks, tokenizer: Tokenizer | None = None, say: Callable[[str], None] = print
) -> Report:
    """Judge a training file. Every fault is told through `say` as it is met; the report counts them.

    checks: what the file should hold, as the task says it. tokenizer: with one, tokens are counted.
    config.valid: a validation file, judged too, and searched for what is also in the training file.
    Raises InputError for a file that isn't there or is of an unknown kind.
    """

    def read(path: Path, findings: Findings) -> Iterator[Item]:
        with suppress(Stopped):
            yield from checks.read(path, config.columns, config.header, findings, config.max_line)

    path = Path(config.data)
    findings = Findings(say)
    report = Report(path.name, findings.faults, Lengths(config.max_length) if tokenizer else None, config.epochs)
    for batch in grouped(read(path, findings), _size, CHARACTERS):
        report.form = findings.form
        _add(batch, report, checks, tokenizer)
    report.form = findings.form
    _check_whole(printable(str(path)), report, checks, findings)
    report.warnings += findings.warnings(report.examples)

    # pieces of a plain text that are alike mean nothing
    unit = "file" if path.is_dir() else "line"
    if report.form != PLAIN_TEXT:
        report.warnings += _warnings(report, checks, unit)
    if config.valid:  # its faults count, its warnings do not
        other = Findings(say)
        theirs = Seen()
        for item in read(Path(config.valid), other):
            theirs.add(item)
        findings.faults += other.faults
        if report.form != PLAIN_TEXT:
            report.warnings += _leaks(report.seen, theirs, checks.prompts, unit)
    return report


def _add(batch: list[Item], report: Report, checks: Checks, tokenizer: Tokenizer | None) -> None:
    """Some more examples."""
    report.examples += len(batch)
    report.empty = report.empty and not any(text.strip() for item in batch for text, _ in item.parts)
    if tokenizer:
        if report.form == PLAIN_TEXT:  # it is divided, and not cut
            report.lengths.max_length = 0
        checks.count(batch, tokenizer, report.lengths)
    if report.form == PLAIN_TEXT:
        return
    for item in batch:
        report.seen.add(item)
    if checks.classes:
        report.labels.update(item.completion for item in batch)


def _size(item: Item) -> int:
    """The characters of an example; at least so many that a batch has no more than BATCH of them."""
    return max(CHARACTERS // BATCH, sum(len(text) for text, _ in item.parts))


def _check_whole(name: str, report: Report, checks: Checks, findings: Findings) -> None:
    """Faults of the file as a whole: no text, nothing to learn, one class, or two that look alike."""
    lengths = report.lengths
    if report.empty and not findings.faults:
        findings.add(name, "found no text; expected at least one example", "no examples")
    elif lengths and lengths.examples and not checks.classes:
        # of a plain text, every token but the first is learned
        learned = lengths.tokens - 1 if report.form == PLAIN_TEXT else lengths.targets
        where = f" at {lengths.max_length:,} tokens" if lengths.max_length else ""
        if not learned:
            message = f"nothing to learn from{where}; expected at least one token that is learned"
            findings.add(name, message, "nothing trained")
    if len(report.labels) == 1:
        findings.add(name, f"found one class, {short_repr(*report.labels)}; expected two or more", "one class")
    for first, second in look_alikes(report.labels):
        message = f"found the labels {first!r} and {second!r}; expected one spelling"
        findings.add(name, message, "labels that look alike")


def _warnings(report: Report, checks: Checks, unit: str) -> Iterator[str]:
    """Warnings about the examples as a whole."""
    seen, lengths = report.seen, report.lengths
    if report.examples < FEWEST:
        yield f"few examples: {report.examples}; services want at least {FEWEST}"
    before, these = repeated(seen.examples)
    if len(these):
        first = f"{unit} {seen.lines[these[0]]} repeats {unit} {seen.lines[before[0]]}"
        yield f"exact duplicates: {len(these):,} (first: {first})"
    yield from checks.repeats(seen, unit)
    if lengths and lengths.lost:
        yield f"nothing trained is left at {lengths.max_length:,} tokens: {lengths.lost:,} examples"
