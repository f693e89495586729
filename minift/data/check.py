"""A training file judged as a fine-tuning service would judge it, before anything is trained.

Training stops at the fifth fault; this tells every one, as file:line, what was found and what was expected, and then
warns of what is legal but seldom meant: duplicates, validation examples among the training ones, texts to be cut.

Memory does not grow with the file but for 32 bytes an example (three 8-byte hashes and its line). A line of LONGEST
bytes or more is told by its length and never held whole, as in training.
Two different examples share a hash, and so are called duplicates, with probability n^2 / 2^65: 3 in a million for ten
million examples.

The formats are those of OpenAI's fine-tuning API (https://platform.openai.com/docs/guides/fine-tuning); what is refused
follows its cookbook's validator for chat and the `validators` of openai-python 0.x for prompt/completion.
"""

import difflib
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

from ..config import LONGEST
from ..errors import printable, short_repr
from .columns import parse_columns
from .examples import check_kind, make_example, rows, text_fault
from .labels import look_alikes
from .lines import json_objects, kind_of_file
from .passages import ROLES, chat_parts, other_form, pieces, weight_fault, weight_of
from .tokenizer import Tokenizer

FEWEST = 10  # examples; services refuse fewer
BATCH, CHARACTERS = 256, 1 << 20  # examples, and characters, tokenised at once
SHOWN = 20  # classes in the report

FORMS = {"chat": ("messages",), "prompt/completion": ("prompt", "completion")}
CHAT_KEYS = {"tools": list, "functions": list, "parallel_tool_calls": bool}  # optional ones, beside "messages"
MESSAGE_KEYS = {  # optional ones, beside "role" and "content"; the value of "weight" is judged apart
    "name": str,
    "weight": object,
    "tool_calls": list,
    "tool_call_id": str,
    "function_call": dict,
    "refusal": str,
}
MIXED = "no system message, where other examples have one"
ENDS = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Item:
    """An example without faults."""

    line: int  # in a folder: the number of the file
    parts: list[tuple[str, bool]]  # texts tokenised apart, and whether they are learned, as in data.Passage
    prompt: str  # classify: the text, and its pair
    completion: str  # classify: the label; chat: the last message that is learned


# ---- what is found ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The rest of the file has no meaning."""


class Findings:
    """Tells each fault when it is met, and counts. Stands where lines.py takes its Faults."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.faults: Counter[str] = Counter()  # by kind
        self.notes: dict[str, tuple[int, list[int]]] = {}  # warning -> how often, its first lines
        self.form = ""
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

    def warnings(self, examples: int) -> Iterator[str]:
        """What to print. That no example at all has a system message is no warning."""
        if self.notes.get(MIXED, (0,))[0] == examples:
            self.notes.pop(MIXED, None)
        for what, (count, lines) in self.notes.items():
            more = ", ..." if count > len(lines) else ""
            yield f"{what}: {count:,} (line{'s' * (count > 1)} {', '.join(map(str, lines))}{more})"


# ---- one example -----------------------------------------------------------------------------------------------------


def _check_keys(where: str, prefix: str, row: dict, needed: tuple, optional: dict, found: Findings) -> None:
    """Unrecognised and missing keys, and the types of the optional ones, where null stands for none."""
    known, meant = [*needed, *optional], []
    for key in (key for key in row if key not in known):
        near = difflib.get_close_matches(key.lower()[:40], [k for k in known if k not in row], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
        found.add(where, f"{prefix}unrecognised key, found {short_repr(key)}; {hint}", "unrecognised key")
        meant += near  # told once: not missing as well
    for key in (key for key in needed if key not in row and key not in meant):
        found.add(where, f"{prefix}no key {key!r}; found {short_repr(list(row))}", "missing key")
    for key, kind in optional.items():
        if row.get(key) is not None and not isinstance(row[key], kind):
            _wrong_type(where, prefix + key, row[key], kind.__name__, found)


def _wrong_type(where: str, name: str, value: object, expected: str, found: Findings) -> None:
    found.add(where, f"{name} is {short_repr(value)} ({type(value).__name__}); expected {expected}", "wrong type")


def _check_text(where: str, name: str, value: object, found: Findings) -> None:
    if fault := text_fault("text", value):
        found.add(where, f"{name} {fault[1]}", fault[0])
    elif "\0" in value:
        message = f"{name} has a NUL at character {value.index(chr(0))}; expected text without"
        found.add(where, message, "NUL character")


def _judge_pair(where: str, line: int, row: dict, found: Findings) -> Item | None:
    """A prompt and its completion. The prompt may be empty: a text to be learned as it stands."""
    _check_keys(where, "", row, FORMS["prompt/completion"], {}, found)
    if row.get("prompt", "") != "":
        _check_text(where, "prompt", row["prompt"], found)
    if "completion" in row:
        _check_text(where, "completion", row["completion"], found)
    if found.where == where:
        return None
    prompt, completion = row["prompt"], row["completion"]
    if ENDS in prompt + completion:
        found.warn(f"{ENDS} in a text, which is read as that token", line)
    if prompt.endswith(" "):  # and a space that the model has to say after it would be the second
        found.warn("prompt ends in a space, which belongs before the first word of the completion", line)
    if not completion[0].isspace():  # byte-level BPE joins a space to the word after it
        found.warn("completion does not start with whitespace", line)
    return Item(line, [(prompt, False), (completion, True)], prompt, completion)


def _judge_chat(where: str, line: int, row: dict, found: Findings) -> Item | None:
    """A list of messages, of which those of the assistant are trained unless their weight is 0."""
    _check_keys(where, "", row, FORMS["chat"], CHAT_KEYS, found)
    messages = row.get("messages", [])
    if not isinstance(messages, list):
        _wrong_type(where, "messages", messages, "a list of objects", found)
    elif messages:
        for i, message in enumerate(messages, 1):
            _check_message(where, i, message, found)
        _check_trained(where, messages, found)
    elif "messages" in row:
        found.add(where, "messages is []; expected at least one message", "no messages")
    if found.where == where:
        return None
    _warn_of_roles(line, messages, found)
    parts = chat_parts(where, row, True, found)  # the template is that of training
    return Item(line, parts, "".join(text for text, _ in parts[:-1]), parts[-1][0])


def _check_message(where: str, i: int, message: object, found: Findings) -> None:
    if not isinstance(message, dict):
        return _wrong_type(where, f"message {i}", message, "an object with role and content", found)
    prefix, role = f"message {i}: ", message.get("role")
    calls = role == "assistant" and (message.get("tool_calls") or message.get("function_call"))
    silent = calls and message.get("content") is None
    needed = ("role",) if "content" not in message and silent else ("role", "content")
    _check_keys(where, prefix, message, needed, MESSAGE_KEYS, found)
    if "role" in message and role not in ROLES:
        found.add(where, f"{prefix}role is {short_repr(role)}; expected one of {', '.join(ROLES)}", "unrecognised role")
    if silent:
        text = "calls a tool and says nothing; expected content, for only text can be trained"
        found.add(where, prefix + text, "tool call without text")
    elif "content" in message:
        _check_text(where, prefix + "content", message["content"], found)
    if fault := weight_fault(message):
        found.add(where, prefix + fault[1], fault[0])


def _check_trained(where: str, messages: list, found: Findings) -> None:
    """Whether anything is learned from this example."""
    spoken = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not spoken:
        roles = [m.get("role") for m in messages if isinstance(m, dict)]
        text = f"found the roles {short_repr(roles)}; expected at least one message of the assistant"
        found.add(where, text, "no assistant message")
    elif all(weight_of(m) == 0 for m in spoken):
        text = "found weight 0 on every message of the assistant; expected at least one to train"
        found.add(where, text, "nothing trained")


def _warn_of_roles(line: int, messages: list[dict], found: Findings) -> None:
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        found.warn("no message of the user", line)
    if not {"system", "developer"} & set(roles):
        found.warn(MIXED, line)
    if any(ENDS in message["content"] for message in messages):
        found.warn(f"{ENDS} in a text, which is read as that token", line)
    if messages[-1]["role"] != "assistant" or not weight_of(messages[-1]):
        found.warn("messages after the last answer that is learned, which are left out", line)
    if any(message.get("tool_calls") or message.get("function_call") for message in messages):
        found.warn("tool calls, which are left out: only text is trained", line)


# ---- files -> examples -----------------------------------------------------------------------------------------------


def _form(row: dict) -> str:
    """Which of FORMS an object is by its keys, if need be by keys spelt nearly so; "" for none."""
    exact = [form for form, keys in FORMS.items() if any(key in row for key in keys)]
    if exact or other_form(row):
        return exact[0] if exact else ""
    words = [key.lower()[:40] for key in list(row)[:20]]
    near = (form for form, keys in FORMS.items() if any(difflib.get_close_matches(word, keys, 1) for word in words))
    return next(near, "")


def _pairs_or_chats(path: Path, found: Findings, most: int) -> Iterator[Item]:
    """The first example without faults sets the format of the file; a change is told at the line where it begins."""
    judges, last = {"chat": _judge_chat, "prompt/completion": _judge_pair}, ""
    for where, row in json_objects(path, found, most):
        line, form = int(where.rpartition(":")[2]), _form(row)
        if not form:
            text = f"unknown format, found {short_repr(list(row))}; expected either prompt and completion, or messages"
            found.add(where, text + other_form(row), "unknown format")
            continue
        if found.form not in ("", form) and last == found.form:
            text = f"found the format {form}; expected {found.form}, as in the lines before"
            found.add(where, text, "mixed formats")
        last = form
        if item := judges[form](where, line, row, found):
            found.form = found.form or form
            yield item


def _plain_text(path: Path, found: Findings, most: int) -> Iterator[Item]:
    """Pieces of whole lines, the same as training cuts."""
    found.form = "plain text"
    for number, text in pieces(path, found, most):
        yield Item(number, [(text, False)], "", "")


def _labelled(path: Path, columns: str, header: str, found: Findings, most: int) -> Iterator[Item]:
    """What data.read() reads for classification."""
    wanted, found.form = parse_columns(columns, need_label=True, header=header), "classes"
    for number, (where, fields) in enumerate(rows(path, wanted, found, most), 1):
        example = make_example(where, fields, wanted, found)
        if example and found.where != where:  # a line that is not UTF-8 is told and then read all the same
            line = number if path.is_dir() else int(where.rpartition(":")[2])
            texts = [example.text] if example.pair is None else [example.text, example.pair]
            yield Item(line, [(text, False) for text in texts], "\n".join(texts), str(example.label))


def _items(path: Path, task: str, columns: str, header: str, found: Findings, most: int) -> Iterator[Item]:
    """The examples without faults, by task and kind of file."""
    if task == "classify":
        items = _labelled(path, columns, header, found, most)
    else:
        check_kind(path, task)
        items = (_plain_text if kind_of_file(path) == ".txt" else _pairs_or_chats)(path, found, most)
    with suppress(Stopped):
        yield from items


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Lists of at most BATCH items, ended early by the one that brings them to CHARACTERS."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += sum(len(text) for text, _ in item.parts)
        if len(batch) == BATCH or size >= CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- duplicates and leaks --------------------------------------------------------------------------------------------


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _longs() -> array:
    return array("Q")


@dataclass
class Seen:
    """Hashes of the examples of a file: 32 bytes each, where a Python set would take about 100."""

    lines: array = field(default_factory=_longs)
    examples: array = field(default_factory=_longs)
    prompts: array = field(default_factory=_longs)
    completions: array = field(default_factory=_longs)

    def add(self, item: Item) -> None:
        self.lines.append(item.line)
        self.examples.append(_hash(repr((item.parts, item.completion))))
        self.prompts.append(_hash(item.prompt))
        self.completions.append(_hash(item.completion))


def _twins(hashes: array, others: array | None = None) -> tuple[int, int, int]:
    """How many hashes stood there before, and the indices of the first such pair.

    others: counts only what has the same hash as the one before it and differs here.
    """
    values = np.array(hashes, np.uint64)
    order = values.argsort(kind="stable")  # equal ones stay in the order of the file
    again = values[order[1:]] == values[order[:-1]]
    if others is not None:
        marks = np.array(others, np.uint64)[order]
        again &= marks[1:] != marks[:-1]
    if not again.any():
        return 0, 0, 0
    pairs = np.flatnonzero(again)
    first = pairs[order[pairs + 1].argmin()]
    return len(pairs), int(order[first]), int(order[first + 1])


def _shared(hashes: array, others: array) -> tuple[int, int, int]:
    """How many of the hashes are among the others, and the indices of the first such pair. That of "" never is."""
    values, others = np.array(hashes, np.uint64), np.array(others, np.uint64)
    both = np.flatnonzero(np.isin(values, others) & (values != _hash("")))
    return (len(both), int(both[0]), int((others == values[both[0]]).argmax())) if len(both) else (0, 0, 0)


def _repeats(seen: Seen, task: str, unit: str) -> Iterator[str]:
    """Warnings about examples that are alike."""
    count, a, b = _twins(seen.examples)
    if count:
        yield f"exact duplicates: {count:,} (first: {unit} {seen.lines[b]} repeats {unit} {seen.lines[a]})"
    if task == "classify":
        count, a, b = _twins(seen.prompts, seen.completions)
        if count:
            yield f"same text, different labels: {count:,} (first: {unit}s {seen.lines[a]} and {seen.lines[b]})"
    elif len(seen.lines) > 1 and len(set(seen.completions)) == 1:
        yield "completions are all the same"


def _leaks(seen: Seen, valid: Seen, task: str, unit: str) -> Iterator[str]:
    """Warnings about what the training and the validation file share."""
    word = "texts" if task == "classify" else "prompts"
    shared = {"examples": (seen.examples, valid.examples), word: (seen.prompts, valid.prompts)}
    for what, (mine, others) in shared.items():
        count, a, b = _shared(mine, others)
        if count:
            place = f"{unit} {seen.lines[a]}, there {unit} {valid.lines[b]}"
            yield f"{what} that are also in the validation file: {count:,} (first: {place})"


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
        trained, left = _trained(parts, total), _trained(parts, most)
        self.examples[total] += 1
        self.trained[trained] += 1
        self.cut += total > most
        self.cut_tokens += max(0, total - most)
        self.lost += trained > 0 == left
        self.tokens += min(total, most)
        self.targets += left


def _trained(parts: list[tuple[int, bool]], most: int) -> int:
    """Trained tokens among the first `most`. The very first is none: nothing stands before it to predict it from."""
    end = count = 0
    for n, is_trained in parts:
        count += is_trained * max(0, min(end + n, most) - max(end, 1))
        end += n
    return count


def summary(histogram: Counter[int]) -> tuple[float, float, float, float, float]:
    """Minimum, median, mean, 95th percentile and maximum; between two values it interpolates, as numpy does."""
    values = np.array(sorted(histogram))
    counts = np.array([histogram[n] for n in values.tolist()])
    ends = counts.cumsum()

    def quantile(q: float) -> float:
        at = q * (ends[-1] - 1)
        low, high = values[np.searchsorted(ends, [np.floor(at), np.ceil(at)], side="right")]
        return float(low + (high - low) * (at % 1))

    return quantile(0), quantile(0.5), float(values @ counts / ends[-1]), quantile(0.95), quantile(1)


def _count(batch: list[Item], task: str, tokenizer: Tokenizer, lengths: Lengths) -> None:
    if task == "classify":  # the pair in one sequence, with the special tokens
        texts = [item.parts[0][0] for item in batch]
        pairs = [item.parts[1][0] if len(item.parts) > 1 else None for item in batch]
        for tokens in tokenizer.encode(texts, pairs):
            lengths.add([(len(tokens.ids), False)])
        return
    tokens = iter(tokenizer.encode([text for item in batch for text, _ in item.parts]))
    for item in batch:  # an end-of-text token follows each part that is learned
        lengths.add([(len(next(tokens).ids) + learned, learned) for _, learned in item.parts])


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What check() found; str() of it is a table of at most 80 columns."""

    name: str
    form: str  # chat, prompt/completion, plain text, classes
    examples: int  # without faults; a plain text: its pieces
    faults: Counter[str]  # by kind, those of the validation file too
    warnings: list[str]
    labels: Counter[str]  # classify: examples of each class
    lengths: Lengths | None  # with a tokenizer
    epochs: int

    @property
    def ok(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        head = textwrap.wrap(f"{printable(self.name)} ({self.form or 'format unknown'})", 80, subsequent_indent="  ")
        unit = "pieces" if self.form == "plain text" else "examples"
        rows = [*head, f"{unit:<12}{self.examples:>12,}  without faults"]
        rows += [*_listing("faults", self.faults), *_classes(self.labels), *self._tokens()]
        rows += [f"{'warnings':<12}{len(self.warnings):>12,}"]
        for warning in self.warnings:
            rows += textwrap.wrap(warning, 80, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(rows)

    def _tokens(self) -> list[str]:
        if not self.lengths or not self.lengths.examples:
            return []
        names, left = ("min", "median", "mean", "p95", "max"), self.lengths
        rows = [f"{'tokens':<12}{''.join(f'{name:>12}' for name in names)}"]
        whole = "  a piece" if self.form == "plain text" else "  an example"
        for what, histogram in {whole: left.examples, "  trained": left.trained}.items():
            if histogram.keys() != {0}:  # classify and plain text
                rows.append(f"{what:<12}{''.join(f'{n:>12,.10g}' for n in map(_tenths, summary(histogram)))}")
        if left.max_length:
            rows.append(f"cut at {left.max_length:,}: {left.cut:,} of the examples, by {left.cut_tokens:,} tokens")
        rows.append(f"{left.tokens:,} tokens a pass, {left.tokens * self.epochs:,} in {self.epochs} epochs")
        if left.targets:
            rows.append(f"{left.targets:,} trained a pass, {left.targets * self.epochs:,} in {self.epochs} epochs")
        return rows


def _tenths(value: float) -> float:
    return round(value, 1)


def _listing(title: str, counts: Counter[str]) -> list[str]:
    return [f"{title:<12}{counts.total():>12,}", *(f"  {kind:<30}{n:>10,}" for kind, n in counts.most_common())]


def _classes(labels: Counter[str]) -> list[str]:
    if not labels:
        return []
    shown = [(short_repr(name), n) for name, n in labels.most_common(SHOWN)]
    rows = [f"  {name:<60}{n:>10,}{n / labels.total():>8.1%}" for name, n in shown]
    more = [f"  ... and {len(labels) - SHOWN:,} more"] if len(labels) > SHOWN else []
    return [f"{'classes':<12}{len(labels):>12,}", *rows, *more]


# ---- the check -------------------------------------------------------------------------------------------------------


def check(
    path: str | Path,
    task: str = "complete",
    *,
    valid: str | Path = "",
    columns: str = "",
    header: str = "auto",
    max_line: int = LONGEST,
    tokenizer: Tokenizer | None = None,
    max_length: int = 0,
    epochs: int = 3,
    say: Callable[[str], None] = print,
) -> Report:
    """Judge a training file. Every fault is told through `say` as it is met; the report counts them.

    task: complete (JSONL of prompt/completion or of chat messages, or plain text) or classify (what train reads).
    valid: a validation file, judged too, and searched for what is also in the training file.
    columns, header, max_line: the options of that name; the first two are for classify.
    tokenizer: with one, tokens are counted; max_length: what is longer will be cut, 0: nothing is.
    Raises InputError for a file that isn't there or is of an unknown kind, ValueError for an unknown task.
    """
    if task not in ("complete", "classify"):
        raise ValueError(f"--task is {task!r}; expected complete or classify")
    path, found, seen, labels, count = Path(path), Findings(say), Seen(), Counter(), 0
    text = task == "complete" and kind_of_file(path) == ".txt"
    lengths = Lengths(0 if text else max_length) if tokenizer else None  # a plain text is divided, and not cut
    empty = True
    for batch in _batches(_items(path, task, columns, header, found, max_line)):
        count += len(batch)
        empty = empty and not any(text.strip() for item in batch for text, _ in item.parts)
        for item in () if text else batch:
            seen.add(item)
        labels.update(item.completion for item in batch if task == "classify")
        if lengths:
            _count(batch, task, tokenizer, lengths)
    _check_whole(printable(str(path)), empty, labels, lengths, text, found)
    warnings = [*found.warnings(count)] if text else [*_warnings(found, seen, lengths, task, _unit(path))]
    if valid:
        theirs = _seen(Path(valid), task, columns, header, found, max_line)
        warnings += [] if text else _leaks(seen, theirs, task, _unit(path))
    return Report(path.name, found.form, count, found.faults, warnings, labels, lengths, epochs)


def _check_whole(
    name: str, empty: bool, labels: Counter[str], lengths: Lengths | None, text: bool, found: Findings
) -> None:
    """Faults that no line has alone: nothing to learn from, one class, two classes that look alike."""
    if empty and not found.faults:
        found.add(name, "found no text; expected at least one example", "no examples")
    elif lengths and lengths.examples and not labels and not (lengths.tokens - 1 if text else lengths.targets):
        where = f" at {lengths.max_length:,} tokens" if lengths.max_length else ""
        found.add(name, f"nothing to learn from{where}; expected at least one token that is learned", "nothing trained")
    if len(labels) == 1:
        found.add(name, f"found one class, {short_repr(*labels)}; expected two or more", "one class")
    for first, second in look_alikes(labels):
        found.add(name, f"found the labels {first!r} and {second!r}; expected one spelling", "labels that look alike")


def _seen(path: Path, task: str, columns: str, header: str, found: Findings, most: int) -> Seen:
    """The examples of the validation file; its faults count, its warnings do not."""
    other, seen = Findings(found.say), Seen()
    for item in _items(path, task, columns, header, other, most):
        seen.add(item)
    found.faults += other.faults
    return seen


def _unit(path: Path) -> str:
    return "file" if path.is_dir() else "line"


def _warnings(found: Findings, seen: Seen, lengths: Lengths | None, task: str, unit: str) -> Iterator[str]:
    count = len(seen.lines)
    yield from found.warnings(count)
    if count < FEWEST:
        yield f"few examples: {count}; services want at least {FEWEST}"
    yield from _repeats(seen, task, unit)
    if lengths and lengths.lost:
        yield f"nothing trained is left at {lengths.max_length:,} tokens: {lengths.lost:,} examples"
