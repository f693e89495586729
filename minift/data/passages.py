"""Files -> passages for a language model: prompts with completions, chats, and running text."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import LONGEST
from ..errors import InputError, printable, short_repr
from .examples import Stream, make_all, text_fault
from .lines import Faults, grouped, json_objects, kind_of_file, read_lines, require_file

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
    assistant's messages with weight 1 (the default) are learned. What comes after the last of these teaches nothing and
    is left out.
    need_label: False reads prompts. A completion may then be missing, and is dropped; a chat's prompt is its whole
    history without an answer at its end, which is what the model is to say.
    max_line: most bytes of a line, 0: any. Raises InputError: file, line, what was found, what was expected.
    """
    path = Path(path)
    if columns or header != "auto":
        option = "--columns" if columns else "--header"
        raise InputError(f"{option} has no meaning here; the keys are prompt and completion, or messages")
    require_passages(path)
    plain = is_running_text(path)
    if plain and not need_label:
        raise InputError(f"{printable(str(path))}: is running text; expected prompts, in a .jsonl")

    def read_once(faults: Faults) -> Iterator[Passage | None]:
        if plain:
            return _plain(path, faults, max_line)
        rows = json_objects(path, faults, max_line)
        return (_dialogue(where, row, need_label, faults) for where, row in rows)

    return Stream(path, read_once, "found nothing to read; expected at least one example", plain)


def is_running_text(path: Path) -> bool:
    """Whether a file is one text, by its name."""
    return kind_of_file(path) == ".txt"


def require_passages(path: Path) -> None:
    """Raises InputError unless `path` is a regular file that a language model learns from, by its name."""
    require_file(path, (".jsonl", ".json", ".txt"), ".jsonl, .json or .txt, each also with .gz")


def pieces(path: Path, faults: Faults, most: int) -> Iterator[tuple[int, str]]:
    """(first line, text) of running text in pieces of whole lines; together they are the file, line ends included."""
    name = printable(path.name)

    def lines() -> Iterator[tuple[int, str]]:
        for number, line in read_lines(path, name, faults, most):
            if number == 1:
                _check_running_text(f"{name}:1", line, faults)
            yield number, line

    for piece in grouped(lines(), lambda numbered: len(numbered[1]), PIECE):
        yield piece[0][0], "".join(line for _, line in piece)


def _check_running_text(where: str, line: str, faults: Faults) -> None:
    """Stops at JSON in a .txt, which would be learned with all its brackets and quotes."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and row.keys() & {"prompt", "completion", "messages", "text", *OTHER_FORMS}:
        message = f"found a JSON object with {short_repr(list(row))} in a .txt, which is read as running text"
        faults.stop(where, f"{message}; expected a name that ends in .jsonl", "JSON in a .txt")


def _plain(path: Path, faults: Faults, most: int) -> Iterator[Passage]:
    for first, text in pieces(path, faults, most):
        yield Passage(((text, True),), f"{printable(path.name)}:{first}", plain=True)


def _dialogue(where: str, row: dict, need_label: bool, faults: Faults) -> Passage | None:
    """A prompt or a chat, or None with its faults noted."""
    before = len(faults.lines)
    read_parts = chat_parts if "messages" in row else _prompt
    parts = read_parts(where, row, need_label, faults)
    return Passage(tuple(parts), where) if len(faults.lines) == before else None


def passages_from(rows: Iterable, labelled: bool = True) -> list[Passage]:
    """The passages in a list instead of a file: dictionaries as the lines of a JSONL have them.

    labelled: as need_label in stream_passages(); where it is False a prompt may also be a string. Raises InputError:
    which example, what was found, what was expected.
    """
    expected = "prompt and completion, or messages" if labelled else "a prompt or messages"

    def make(where: str, row: object, faults: Faults) -> Passage | None:
        if isinstance(row, str) and not labelled:
            row = {"prompt": row}
        if not isinstance(row, dict):
            message = f"found {short_repr(row)} ({type(row).__name__}); expected a dictionary with {expected}"
            faults.add(where, message, "not an object")
            return None
        return _dialogue(where, row, labelled, faults)

    return make_all(rows, make)


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
    """What a message adds about an object in a common form that is not read here; or ""."""
    key = next((key for key in OTHER_FORMS if key in row), "")
    if not key or row.keys() & {"prompt", "completion", "messages"} == {"prompt", "completion"}:
        return ""
    return f" ({key}: {OTHER_FORMS[key][0]}; {OTHER_FORMS[key][1]})"


def _prompt(where: str, row: dict, need_label: bool, faults: Faults) -> list[tuple[str, bool]]:
    """The parts of a prompt and its completion; the prompt may be empty, the completion not."""
    needed = ("prompt", "completion") if need_label or row.get("completion") is not None else ("prompt",)
    if missing := [key for key in needed if key not in row]:
        expected = " and ".join(needed) + ", or messages"
        found = f"no field {', '.join(missing)}; found {short_repr(list(row))}, expected {expected}"
        faults.add(where, found + other_form(row), "missing key")
        return []
    for key in needed:
        if not isinstance(row[key], str) or (key == "completion" and not row[key].strip()):
            faults.add(where, f"{key} is {short_repr(row[key])}; expected some text", "wrong type")
        elif wrong := text_fault("text", row[key] + "."):  # the dot: a prompt may be empty
            faults.add(where, f"{key} {wrong[1]}", wrong[0])
    return [(row[key], key == "completion") for key in needed if row[key] and (need_label or key == "prompt")]


def chat_parts(where: str, row: dict, need_label: bool, faults: Faults) -> list[tuple[str, bool]]:
    """The parts of a conversation, as plain text: <|role|>, a line end, what is said, a line end.

    A part whose flag is set is learned and so ends with end-of-text, also in the history of a prompt.
    """
    messages = row["messages"]
    parts = []
    text = ""  # said since the last part
    whole = True  # no message has a fault
    if not isinstance(messages, list) or not messages:
        faults.add(where, f"messages is {short_repr(messages)}; expected a list of at least one message", "no messages")
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
            text = "\n"
        else:
            text += message["content"] + "\n"
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
            found = f"found {short_repr(message)}, with from and value as ShareGPT has them"
            return "missing key", f"{found}; expected role (user for human, assistant for gpt) and content"
        return "missing key", f"found {short_repr(message)}; expected an object with role and content"
    if message["role"] not in ROLES:
        return "unrecognised role", f"role is {short_repr(message['role'])}; expected one of {', '.join(ROLES)}"
    if not isinstance(message["content"], str) or not message["content"].strip():
        return "wrong type", f"content is {short_repr(message['content'])}; expected some text"
    return weight_fault(message) or text_fault("text", message["content"])


def weight_fault(message: dict) -> tuple[str, str] | None:
    """What is wrong with the weight of a message, as the kind of fault and a message, or None."""
    weight = message.get("weight")
    if weight is None:
        return None
    if message.get("role") != "assistant":
        found = f"found a weight on the role {short_repr(message.get('role'))}"
        return "misplaced weight", f"{found}; expected one on assistant messages only"
    if type(weight) is not int or weight not in (0, 1):  # not isinstance: True is an int too
        return "wrong weight", f"weight is {short_repr(weight)}; expected 0 or 1"
    return None
