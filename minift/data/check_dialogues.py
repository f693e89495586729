"""What a file for a language model should hold, for check.py: prompts with completions, chats, or running text.

The formats are those of OpenAI's fine-tuning API (https://platform.openai.com/docs/guides/fine-tuning); what is refused
follows its cookbook's validator for chat and the `validators` of openai-python 0.x for prompt/completion.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path

from ..errors import short_repr
from .check import PLAIN_TEXT, Checks, Findings, Item, Lengths, Seen
from .examples import text_fault
from .lines import json_objects
from .passages import ROLES, chat_parts, is_running_text, other_form, pieces, require_passages, weight_fault, weight_of
from .tokenizer import Tokenizer

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
END = "<|endoftext|>"
END_IN_TEXT = f"{END} in a text, which is read as that token"


# ---- one example -----------------------------------------------------------------------------------------------------


def _check_keys(where: str, prefix: str, row: dict, needed: tuple, optional: dict, findings: Findings) -> None:
    """Unrecognised and missing keys, and the types of the optional ones, where null stands for none."""
    known = [*needed, *optional]
    meant = []  # keys that are there, but spelt wrong: told once, not as missing too
    for key in row:
        if key in known:
            continue
        near = difflib.get_close_matches(key.lower()[:40], [k for k in known if k not in row], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
        findings.add(where, f"{prefix}unrecognised key, found {short_repr(key)}; {hint}", "unrecognised key")
        meant += near
    for key in needed:
        if key not in row and key not in meant:
            findings.add(where, f"{prefix}no key {key!r}; found {short_repr(list(row))}", "missing key")
    for key, kind in optional.items():
        if row.get(key) is not None and not isinstance(row[key], kind):
            _wrong_type(where, prefix + key, row[key], kind.__name__, findings)


def _wrong_type(where: str, name: str, value: object, expected: str, findings: Findings) -> None:
    findings.add(where, f"{name} is {short_repr(value)} ({type(value).__name__}); expected {expected}", "wrong type")


def _check_text(where: str, name: str, value: object, findings: Findings) -> None:
    if fault := text_fault("text", value):
        findings.add(where, f"{name} {fault[1]}", fault[0])
    elif "\0" in value:
        message = f"{name} has a NUL at character {value.index(chr(0))}; expected text without"
        findings.add(where, message, "NUL character")


def _judge_pair(where: str, line: int, row: dict, findings: Findings) -> Item | None:
    """A prompt and its completion. The prompt may be empty: a text to be learned as it stands."""
    _check_keys(where, "", row, FORMS["prompt/completion"], {}, findings)
    if row.get("prompt", "") != "":
        _check_text(where, "prompt", row["prompt"], findings)
    if "completion" in row:
        _check_text(where, "completion", row["completion"], findings)
    if findings.where == where:
        return None
    prompt = row["prompt"]
    completion = row["completion"]
    if END in prompt + completion:
        findings.warn(END_IN_TEXT, line)
    if prompt.endswith(" "):  # and a space that the model has to say after it would be the second
        findings.warn("prompt ends in a space, which belongs before the first word of the completion", line)
    if not completion[0].isspace():  # byte-level BPE joins a space to the word after it
        findings.warn("completion does not start with whitespace", line)
    return Item(line, [(prompt, False), (completion, True)], prompt, completion)


def _judge_chat(where: str, line: int, row: dict, findings: Findings) -> Item | None:
    """A list of messages, of which those of the assistant are trained unless their weight is 0."""
    _check_keys(where, "", row, FORMS["chat"], CHAT_KEYS, findings)
    messages = row.get("messages", [])
    if not isinstance(messages, list):
        _wrong_type(where, "messages", messages, "a list of objects", findings)
    elif messages:
        for i, message in enumerate(messages, 1):
            _check_message(where, i, message, findings)
        _check_trained(where, messages, findings)
    elif "messages" in row:
        findings.add(where, "messages is []; expected at least one message", "no messages")
    if findings.where == where:
        return None
    _warn_of_roles(line, messages, findings)
    parts = chat_parts(where, row, True, findings)  # the template is that of training
    return Item(line, parts, "".join(text for text, _ in parts[:-1]), parts[-1][0])


def _check_message(where: str, i: int, message: object, findings: Findings) -> None:
    if not isinstance(message, dict):
        _wrong_type(where, f"message {i}", message, "an object with role and content", findings)
        return
    prefix = f"message {i}: "
    role = message.get("role")
    calls = role == "assistant" and (message.get("tool_calls") or message.get("function_call"))
    silent = calls and message.get("content") is None
    needed = ("role",) if "content" not in message and silent else ("role", "content")
    _check_keys(where, prefix, message, needed, MESSAGE_KEYS, findings)
    if "role" in message and role not in ROLES:
        text = f"role is {short_repr(role)}; expected one of {', '.join(ROLES)}"
        findings.add(where, prefix + text, "unrecognised role")
    if silent:
        text = "calls a tool and says nothing; expected content, for only text can be trained"
        findings.add(where, prefix + text, "tool call without text")
    elif "content" in message:
        _check_text(where, prefix + "content", message["content"], findings)
    if fault := weight_fault(message):
        findings.add(where, prefix + fault[1], fault[0])


def _check_trained(where: str, messages: list, findings: Findings) -> None:
    """Whether anything is learned from this example."""
    spoken = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not spoken:
        roles = [m.get("role") for m in messages if isinstance(m, dict)]
        text = f"found the roles {short_repr(roles)}; expected at least one message of the assistant"
        findings.add(where, text, "no assistant message")
    elif all(weight_of(m) == 0 for m in spoken):
        text = "found weight 0 on every message of the assistant; expected at least one to train"
        findings.add(where, text, "nothing trained")


def _warn_of_roles(line: int, messages: list[dict], findings: Findings) -> None:
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        findings.warn("no message of the user", line)
    if not {"system", "developer"} & set(roles):
        findings.warn_if_mixed("no system message, where other examples have one", line)
    if any(END in message["content"] for message in messages):
        findings.warn(END_IN_TEXT, line)
    if messages[-1]["role"] != "assistant" or not weight_of(messages[-1]):
        findings.warn("messages after the last answer that is learned, which are left out", line)
    if any(message.get("tool_calls") or message.get("function_call") for message in messages):
        findings.warn("tool calls, which are left out: only text is trained", line)


# ---- files -> examples -----------------------------------------------------------------------------------------------


def read(path: Path, columns: str, header: str, findings: Findings, most: int) -> Iterator[Item]:
    """Passages as read_passages() reads them; `columns` and `header` have no meaning here."""
    require_passages(path)
    if is_running_text(path):
        return _plain_text(path, findings, most)
    return _pairs_or_chats(path, findings, most)


def _plain_text(path: Path, findings: Findings, most: int) -> Iterator[Item]:
    """Pieces of whole lines, the same as training cuts."""
    findings.form = PLAIN_TEXT
    for number, text in pieces(path, findings, most):
        yield Item(number, [(text, False)], "", "")


def _pairs_or_chats(path: Path, findings: Findings, most: int) -> Iterator[Item]:
    """The first example without faults sets the format of the file; a change is told at the line where it begins."""
    judges = {"chat": _judge_chat, "prompt/completion": _judge_pair}
    last = ""
    for where, row in json_objects(path, findings, most):
        form = _form(row)
        if not form:
            text = f"unknown format, found {short_repr(list(row))}; expected either prompt and completion, or messages"
            findings.add(where, text + other_form(row), "unknown format")
            continue
        if findings.form not in ("", form) and last == findings.form:
            text = f"found the format {form}; expected {findings.form}, as in the lines before"
            findings.add(where, text, "mixed formats")
        last = form
        line = int(where.rpartition(":")[2])
        item = judges[form](where, line, row, findings)
        if item:
            findings.form = findings.form or form
            yield item


def _form(row: dict) -> str:
    """Which of FORMS an object is by its keys, if need be by keys spelt nearly so; "" for none."""
    for form, keys in FORMS.items():
        if any(key in row for key in keys):
            return form
    if other_form(row):
        return ""
    words = [key.lower()[:40] for key in list(row)[:20]]
    for form, keys in FORMS.items():
        if any(difflib.get_close_matches(word, keys, 1) for word in words):
            return form
    return ""


# ---- tokens and warnings ---------------------------------------------------------------------------------------------


def count(batch: list[Item], tokenizer: Tokenizer, lengths: Lengths) -> None:
    """Parts are tokenised apart; an end-of-text token follows each that is learned."""
    tokens = iter(tokenizer.encode([text for item in batch for text, _ in item.parts]))
    for item in batch:
        lengths.add([(len(next(tokens).ids) + learned, learned) for _, learned in item.parts])


def repeats(seen: Seen, unit: str) -> Iterator[str]:
    """The same answer to everything."""
    if len(seen.lines) > 1 and len(set(seen.completions)) == 1:
        yield "completions are all the same"


CHECKS = Checks(read, count, repeats, prompts="prompts", classes=False)
