"""Alone: pytest tests/test_check.py   (MINIFT_ASSETS=FOLDER for the tests on real files)"""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from folders import check, read_passages
from hypothesis import given
from hypothesis import strategies as st

from minift.config import LONGEST, CheckConfig
from minift.data import tokenizer
from minift.data.check import Lengths, summary
from minift.errors import InputError
from minift.tasks import complete


def pair(prompt="Question ->", completion=" Answer.", **more):
    return {"prompt": prompt, "completion": completion, **more}


def user(content="Hello.", **more):
    return {"role": "user", "content": content, **more}


def assistant(content="Good day.", **more):
    return {"role": "assistant", "content": content, **more}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def raw(row) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def write(path, *rows, end=b"\n"):
    """One row a line: bytes as they stand, anything else as JSON."""
    content = b"".join(raw(row) + end for row in rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def judged(path, *args, **options):
    """(report, {line: [what was told of it]}); every fault must name the file and a line."""
    told = []
    report = check(path, *args, say=told.append, **options)
    found = [re.fullmatch(r"([^:]+):(\d+): (.+)", text) for text in told]
    assert all(found), told
    lines: dict[int, list[str]] = {}
    for match in found:
        lines.setdefault(int(match[2]), []).append(f"{match[1]} {match[3]}")
    assert report.ok == (not told) and report.faults.total() == len(told)
    assert all(len(line) <= 80 for line in str(report).splitlines()), str(report)
    return report, lines


def ten(make=lambda i: pair(f"Question {i} ->")):
    """Enough examples for a service, all different."""
    return [make(i) for i in range(10)]


def talk(i=0):
    return chat(user(f"Hello {i}."), assistant(f"Good day {i}."))


# ---- every fault, on its own line ------------------------------------------------------------------------------------

CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
PAIRS = [  # (line, what must be told of it)
    (b"{'prompt': 1}", "not JSON, Expecting property name enclosed in double quotes at column 2"),
    (b'{"prompt": "a", "completion": " b"', "not JSON, Expecting ',' delimiter at column 35"),
    (["a", " b"], "(list); expected one JSON object"),
    ({"prompt": "a"}, "no key 'completion'; found ['prompt']"),
    ({"completion": " b"}, "no key 'prompt'"),
    ({"promt": "a", "completion": " b"}, "found 'promt'; did you mean 'prompt'?"),
    ({"Prompt": "a", "Completion": " b"}, "found 'Prompt'; did you mean 'prompt'?"),
    (pair(id=7), "unrecognised key, found 'id'; expected prompt, completion"),
    (pair(prompt=["a"]), "prompt is ['a'] (list); expected a string"),
    (pair(prompt=None), "prompt is None (NoneType); expected a string"),
    (pair(completion=3), "completion is 3 (int); expected a string"),
    (pair(completion=""), "completion is empty"),
    (pair(completion=" \n"), "completion is empty"),
    (pair(completion=" a\0b"), "completion has a NUL at character 2"),
    (b'{"prompt": "a", "completion": " \\ud83d"}', "completion has the lone surrogate '\\ud83d'"),
    (b'{"prompt": "caf\xe9", "completion": " b"}', "byte offset 15 of the line holds 0xe9; expected UTF-8"),
    ({"instruction": "a", "output": "b"}, "unknown format, found ['instruction', 'output']; expected either prompt"),
    (talk(), "found the format chat; expected prompt/completion"),
    (b"[" * 100_000, "not JSON"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'"' + b"x" * LONGEST + b'"', f"found a line of {LONGEST + 3:,} bytes; expected fewer than {LONGEST:,}"),
]
CHATS = [
    (chat(), "messages is []; expected at least one"),
    ({"messages": "Hello."}, "messages is 'Hello.' (str); expected a list of objects"),
    ({"message": [user(), assistant()]}, "found 'message'; did you mean 'messages'?"),
    (chat(user(), assistant(), extra=1), "found 'extra'; expected messages, tools"),
    (chat(user(), assistant(), tools={}), "tools is {} (dict); expected list"),
    (chat(user(), assistant(), parallel_tool_calls="no"), "parallel_tool_calls is 'no' (str); expected bool"),
    (chat("Hello.", assistant()), "message 1 is 'Hello.' (str); expected an object"),
    (chat(user(), {"content": "Hello."}, assistant()), "message 2: no key 'role'"),
    (chat({"role": "user"}, assistant()), "message 1: no key 'content'"),
    (chat({"role": "user", "contents": "a"}, assistant()), "message 1: unrecognised key, found 'contents'; did you"),
    (chat({"role": "human", "content": "a"}, assistant()), "message 1: role is 'human'; expected one of system, dev"),
    (chat({"role": ["user"], "content": "a"}, assistant()), "message 1: role is ['user']"),
    (chat(user(""), assistant()), "message 1: content is empty"),
    (chat(user(None), assistant()), "message 1: content is None (NoneType)"),
    (chat(user([{"type": "text", "text": "a"}]), assistant()), "message 1: content is [{'type'"),
    (chat(user(), assistant("")), "message 2: content is empty"),
    (chat(user(), assistant(None)), "message 2: content is None"),
    (chat(user(), assistant(None, tool_calls=CALL)), "message 2: calls a tool and says nothing; expected content"),
    (chat(user(), {"role": "assistant", "function_call": {"name": "f"}}), "message 2: calls a tool and says nothing"),
    (chat(user(), assistant(tool_calls={"a": 1})), "message 2: tool_calls is {'a': 1} (dict); expected list"),
    (chat(user(name=3), assistant()), "message 1: name is 3 (int); expected str"),
    (chat(user("a\0"), assistant()), "message 1: content has a NUL at character 1"),
    (chat(user(), user("Are you there?")), "expected at least one message of the assistant"),
    (chat(user(), assistant(weight=0), user(), assistant(weight=0)), "found weight 0 on every message"),
    (chat(user(), assistant(weight=0.5)), "message 2: weight is 0.5; expected 0 or 1"),
    (chat(user(), assistant(weight=True)), "message 2: weight is True"),
    (chat(user(weight=1), assistant()), "message 1: found a weight on the role 'user'; expected one on assistant"),
    (pair(), "found the format prompt/completion; expected chat"),
]


@pytest.mark.parametrize("clean, hostile", [(pair("first"), PAIRS), (talk(), CHATS)], ids=["pairs", "chats"])
def test_every_planted_fault_is_told_with_its_line(tmp_path, clean, hostile):
    """Line 1 is clean, the faults stand on lines 2, 4, 6 ..., and clean examples between them."""
    between = pair if clean == pair("first") else talk
    rows = [clean, *(row for i, (line, _) in enumerate(hostile) for row in (line, between(f"{i}")))]
    report, told = judged(write(tmp_path / "d.jsonl", *rows))
    for line, (_, expected) in enumerate(hostile, 1):
        assert any(expected in text for text in told[2 * line]), told.get(2 * line)
    assert set(told) == set(range(2, 2 * len(hostile) + 1, 2))
    assert report.examples == 1 + len(hostile)
    shown = str(report)
    for kind, count in report.faults.items():
        assert kind != "other" and re.search(rf"  {re.escape(kind)} +{count}\n", shown)


@pytest.mark.parametrize("clean, hostile", [(pair(), PAIRS), (talk(), CHATS)], ids=["pairs", "chats"])
def test_one_mistake_is_one_fault(tmp_path, clean, hostile):
    rows = [row for row, _ in hostile if row != {"Prompt": "a", "Completion": " b"}]
    _, told = judged(write(tmp_path / "d.jsonl", clean, *rows))
    assert all(len(texts) == 1 for texts in told.values()), told


def test_several_faults_of_one_line_are_all_told(tmp_path):
    bad = chat({"role": "bot", "content": ""}, user(weight=2, nmae="x"), tools=3)
    _, told = judged(write(tmp_path / "d.jsonl", talk(), bad))
    assert len(told[2]) == 6  # tools; role, content; key, weight; no assistant


def test_a_line_that_is_not_utf8_is_no_example(tmp_path):
    cafe = b'{"prompt": "caf\xe9", "completion": 5}', b'{"text": "caf\xe9", "label": "x"}'
    report, told = judged(write(tmp_path / "d.jsonl", *ten(), cafe[0]))
    assert report.examples == 10 and [len(texts) for texts in told.values()] == [2]
    rows = [{"text": f"{i}", "label": "xy"[i % 2]} for i in range(10)]
    report, told = judged(write(tmp_path / "d.jsonl", *rows, cafe[1]), "classify")
    assert report.examples == 10 and set(told) == {11}


def test_a_change_of_format_is_told_once_where_it_begins(tmp_path):
    rows = [pair("1"), talk(), talk(), pair("4"), talk()]
    _, told = judged(write(tmp_path / "d.jsonl", *rows))
    assert set(told) == {2, 5}


def test_the_first_example_without_faults_sets_the_format(tmp_path):
    _, told = judged(write(tmp_path / "d.jsonl", {"message": []}, *ten()))
    assert set(told) == {1}


def test_what_services_accept_has_no_fault(tmp_path):
    rows = [
        chat({"role": "developer", "content": "Be kind."}, user(name="ann"), assistant(refusal=None, tool_calls=None)),
        chat(user(), assistant(weight=0), user(), assistant(weight=1), tools=[], parallel_tool_calls=False),
        chat(user(), assistant("I look.", tool_calls=CALL), {"role": "tool", "content": "4", "tool_call_id": "1"}),
        chat({"role": "function", "name": "f", "content": "4"}, assistant(), functions=[]),
    ]
    report, _ = judged(write(tmp_path / "d.jsonl", *rows))
    assert report.ok and "tool calls, which are left out: only text is trained: 1 (line 3)" in report.warnings
    assert judged(write(tmp_path / "d.jsonl", *(pair(prompt="", completion=f" {i}") for i in range(10))))[0].ok


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_bom_crlf_and_blank_lines_are_warnings(tmp_path):
    first, *others = map(raw, ten(lambda i: pair(f"{i} ->", f" {i}")))
    path = write(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + first, *others, b"", b" ", raw(pair("last")), b"", end=b"\r\n")
    report, _ = judged(path)
    assert report.ok and report.examples == 11
    assert report.warnings == [
        "starts with a UTF-8 byte order mark, which is passed over: 1 (line 1)",
        "line ends are CRLF: 14 (lines 1, 2, 3, ...)",
        "blank lines: 2 (lines 11, ...)",
    ]


def test_utf16_and_json_arrays_are_told_once(tmp_path):
    (tmp_path / "u.jsonl").write_bytes(json.dumps(pair()).encode("utf-16"))
    assert "UTF-16; expected UTF-8" in judged(tmp_path / "u.jsonl")[1][1][0]
    (tmp_path / "a.json").write_text(json.dumps(ten(), indent=1))
    report, told = judged(tmp_path / "a.json")
    assert "found a JSON array over several lines" in told[1][0] and report.faults.total() == 1


def test_truncated_gz(tmp_path):
    rng = np.random.default_rng(0)
    whole = write(tmp_path / "d.jsonl.gz", *(pair(rng.bytes(200).hex()) for _ in range(500)))
    assert judged(whole)[0].examples == 500
    (tmp_path / "cut.jsonl.gz").write_bytes(whole.read_bytes()[:-2000])
    report, told = judged(tmp_path / "cut.jsonl.gz")
    ((line, (text,)),) = told.items()
    assert 450 < line <= 500 and "the .gz is truncated or corrupt" in text and report.examples == line - 1


def test_plain_text(tmp_path):
    report, _ = judged(write(tmp_path / "d.txt", b"\xef\xbb\xbfOne.", b"", b"Two."))
    assert (report.ok, report.form, report.examples, len(report.warnings)) == (True, "plain text", 1, 1)
    assert "byte offset 3 of the line holds 0xe9" in judged(write(tmp_path / "d.txt", b"ok", b"caf\xe9"))[1][2][0]


@pytest.mark.parametrize("name, content", [("d.jsonl", b""), ("d.jsonl", b"\n\n"), ("d.txt", b""), ("d.txt", b" \n\n")])
def test_empty_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    told = []
    assert not check(tmp_path / name, say=told.append).ok
    assert len(told) == 1 and "expected at least one example" in told[0]


def test_wrong_calls(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="unknown kind of file '.xlsx'; expected .jsonl, .json or .txt"):
        check(write(tmp_path / "d.xlsx"))
    with pytest.raises(ValueError, match="--task is 'tag'; expected one of classify, fill, complete"):
        CheckConfig(data="d.jsonl", task="tag").check()


# ---- memory ----------------------------------------------------------------------------------------------------------

# VmHWM and not getrusage: ru_maxrss of a new process begins at the size of the one that started it.
MEASURE = """
import re, sys
from minift.config import CheckConfig
from minift.data import check_dialogues, check_texts
from minift.data.check import check_file
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
checks = {"classify": check_texts.CHECKS, "complete": check_dialogues.CHECKS}[sys.argv[3]]
check_file(CheckConfig(data=sys.argv[1]), checks, say=lambda text: None)
before = peak()
check_file(CheckConfig(data=sys.argv[2]), checks, say=lambda text: None)
print(peak() - before)
"""


def growth(small, large, task="complete") -> int:
    """Bytes by which the peak of a fresh process grows when it checks `large` after `small`."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    command = [sys.executable, "-c", MEASURE, small, large, task]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("task, times", [("complete", 0.5), ("classify", 0.5)])
def test_a_line_of_50_mb(tmp_path, task, times):
    """It is refused unread, as in training."""
    size = 50_000_000
    rows = [pair()] if task == "complete" else [{"text": "a", "label": "b"}]
    small = write(tmp_path / "small.jsonl", *rows)
    large = write(tmp_path / "large.jsonl", *rows, {**rows[0], next(iter(rows[0])): "x" * size})
    assert growth(small, large, task) < times * size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    files = []
    for n in (5_000, 50_000):
        files.append(write(tmp_path / f"{n}.jsonl", *(pair(f"{i} {'word ' * 200}") for i in range(n))))
    assert growth(*files) < 45_000 * 100 + 4_000_000  # the file itself grows by 48 MB


# ---- warnings --------------------------------------------------------------------------------------------------------


def test_a_clean_file_has_no_warning(tmp_path):
    for rows in (ten(lambda i: pair(f"{i} ->", f" {i}")), ten(talk)):
        report, _ = judged(write(tmp_path / "d.jsonl", *rows))
        assert report.ok and report.warnings == []


def test_duplicates_spaces_and_few_examples(tmp_path):
    rows = [pair("1"), pair("2"), b"", pair("3", "none"), pair("2"), pair("1"), pair("2")]
    report, _ = judged(write(tmp_path / "d.jsonl", *rows))
    assert "exact duplicates: 3 (first: line 5 repeats line 2)" in report.warnings
    assert "completion does not start with whitespace: 1 (line 4)" in report.warnings
    assert "few examples: 6; services want at least 10" in report.warnings


def test_a_different_weight_or_role_is_no_duplicate(tmp_path):
    said = [user("a"), assistant("b"), user("c"), assistant("d")]
    other = [user("a"), assistant("b", weight=0), user("c"), assistant("d")]
    third = [{"role": "system", "content": "a"}, *said[1:]]
    report, _ = judged(write(tmp_path / "d.jsonl", chat(*said), chat(*other), chat(*third)))
    assert not any("duplicates" in warning for warning in report.warnings)


def test_completions_all_the_same(tmp_path):
    report, _ = judged(write(tmp_path / "d.jsonl", *ten()))
    assert report.warnings == ["completions are all the same"]


@pytest.mark.parametrize("make", [lambda p, c: pair(p, c), lambda p, c: chat(user(p), assistant(c))])
def test_leaks_into_the_validation_file(tmp_path, make):
    train = [make(f"{i}", f" {i}") for i in range(10)]
    valid = [make("a", " a"), make("3", " 3"), make("5", " other"), make("7", " 7")]
    options = {"valid": write(tmp_path / "valid.jsonl", *valid)}
    report, _ = judged(write(tmp_path / "train.jsonl", *train), **options)
    assert report.ok and report.warnings == [
        "examples that are also in the validation file: 2 (first: line 4, there line 2)",
        "prompts that are also in the validation file: 3 (first: line 4, there line 2)",
    ]


def test_faults_of_the_validation_file_are_told_too(tmp_path):
    train, valid = write(tmp_path / "train.jsonl", *ten()), write(tmp_path / "valid.jsonl", pair(), b"?")
    report, told = judged(train, valid=valid)
    assert "valid.jsonl not JSON" in told[2][0] and report.faults == {"not JSON": 1} and report.examples == 10


def test_empty_prompts_are_no_leak(tmp_path):
    train, valid = ([pair("", f" {who} {i}") for i in range(10)] for who in "ab")
    report, _ = judged(write(tmp_path / "t.jsonl", *train), valid=write(tmp_path / "v.jsonl", *valid))
    assert report.warnings == []


# ---- classify --------------------------------------------------------------------------------------------------------


def test_classify_tells_every_fault(tmp_path):
    bad = [
        b"?",
        {"text": "a"},
        {"text": "", "label": "x"},
        {"text": "a", "label": 1.5},
        b"[]",
        {"text": 3, "label": "x"},
    ]
    good = [{"text": f"{i}", "label": "xy"[i % 2]} for i in range(10)]
    report, told = judged(write(tmp_path / "d.jsonl", *good, *bad), "classify")
    assert set(told) == set(range(11, 17)) and "other" not in report.faults
    assert report.labels == {"x": 5, "y": 5} and "'x'" in str(report)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_classify_tables(tmp_path, suffix):
    gap = {"csv": b",", "tsv": b"\t"}[suffix]
    rows = [b"sentence", b"class"], [b"a", b"x"], [b"b", b"y"], [b"a", b"y"], [b"c"], [b"b", b"y"]
    path = write(tmp_path / f"d.{suffix}", *map(gap.join, rows))
    report, told = judged(path, "classify", columns="text=sentence,label=class")
    assert set(told) == {5} and report.faults == {"wrong number of cells": 1} and report.labels == {"x": 1, "y": 3}
    assert "same text, different labels: 1 (first: lines 2 and 4)" in report.warnings
    assert "exact duplicates: 1 (first: line 6 repeats line 3)" in report.warnings


def test_classify_folder_one_class_and_leaks(tmp_path):
    (tmp_path / "d/pos").mkdir(parents=True)
    for name in "ab":
        (tmp_path / f"d/pos/{name}.txt").write_text("good")
    told = []
    report = check(tmp_path / "d", "classify", valid=tmp_path / "d", say=told.append)
    assert len(told) == 1 and "found one class, 'pos'; expected two or more" in told[0] and report.examples == 2
    assert "exact duplicates: 1 (first: file 2 repeats file 1)" in report.warnings
    assert "texts that are also in the validation file: 2 (first: file 1, there file 1)" in report.warnings


# ---- tokens ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 300), min_size=1, max_size=400))
def test_statistics_of_a_histogram_are_those_of_numpy(lengths):
    expected = min(lengths), np.median(lengths), np.mean(lengths), np.percentile(lengths, 95), max(lengths)
    assert summary(Counter(lengths)) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1), st.integers(1, 60))
def test_what_is_left_of_an_example(parts, most):
    lengths, flags = Lengths(most), [is_trained for n, is_trained in parts for _ in range(n)]
    flags[:1] = [False] * len(flags[:1])  # the first token of all can't be predicted
    lengths.add(parts)
    kept = flags[:most]
    assert (lengths.tokens, lengths.targets, lengths.cut_tokens) == (len(kept), sum(kept), len(flags) - len(kept))
    assert (lengths.cut, lengths.lost) == (len(flags) > most, any(flags) and not any(kept))


@pytest.fixture(scope="module")
def gpt2(assets):
    return tokenizer.read_tokenizer(assets / "weights/tokenizers/gpt2")


def test_tokens_of_pairs(tmp_path, gpt2):
    rows = [pair("One two three ->", " " + "four " * n) for n in range(1, 301)]  # more than a batch
    report, _ = judged(write(tmp_path / "d.jsonl", *rows), tokenizer=gpt2, max_length=100, epochs=4)
    ids = [[len(gpt2.backend.encode(row[key]).ids) for key in ("prompt", "completion")] for row in rows]
    totals = np.array([a + b + 1 for a, b in ids])
    assert report.lengths.examples == Counter(totals.tolist())
    assert report.lengths.trained == Counter(b + 1 for _, b in ids)
    assert report.lengths.tokens == np.minimum(totals, 100).sum() and report.lengths.cut == (totals > 100).sum()
    assert f"{report.lengths.tokens * 4:,} in 4 epochs" in str(report)


def test_tokens_of_a_chat(tmp_path, gpt2):
    """Of two answers only the second is learned, with its end-of-text; what follows it is left out."""
    row = chat(user("Hi."), assistant("Yes?", weight=0), user("Bye."), assistant("Good bye."), user("Hm."))
    report, _ = judged(write(tmp_path / "d.jsonl", row), tokenizer=gpt2)
    pieces = "<|user|>\nHi.\n<|assistant|>\nYes?\n<|user|>\nBye.\n<|assistant|>\n", "Good bye."
    a, b = (len(gpt2.backend.encode(piece).ids) for piece in pieces)
    assert report.lengths.examples == {a + b + 1: 1} and report.lengths.trained == {b + 1: 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["instruct/instructions.messages.jsonl", "webnlg/dev.jsonl", "wikitext2/valid.txt"])
def test_the_counts_are_those_of_training(assets, gpt2, name):
    path, most = assets / "data" / name, 50
    report, _ = judged(path, tokenizer=gpt2, max_length=most)
    sequences = complete.encode(read_passages(path), None, gpt2, most)
    targets = sum(len(s.targets) for s in sequences)
    if name.endswith(".txt"):
        assert report.lengths.tokens == targets + 1
    else:
        assert report.lengths.tokens == sum(len(s.ids) for s in sequences) and report.lengths.targets == targets
        assert report.lengths.lost == sum(not len(s.targets) for s in sequences)


def test_tokens_for_classify_count_the_special_ones(tmp_path, assets):
    bert = tokenizer.read_tokenizer(assets / "weights/tokenizers/bert-base-uncased")
    rows = [{"text": "one two", "label": 0}, {"text": "one two", "pair": "three", "label": 1}]
    report, _ = judged(write(tmp_path / "d.jsonl", *rows), "classify", tokenizer=bert, max_length=5)
    assert report.lengths.examples == {4: 1, 6: 1} and (report.lengths.cut, report.lengths.tokens) == (1, 9)


# ---- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, count", [("instruct/instructions.messages.jsonl", 1100), ("webnlg/dev.jsonl", 2262)])
def test_clean_real_files(assets, name, count):
    report, told = judged(assets / "data" / name)
    assert report.examples == count and told == {} and report.warnings == []


@pytest.mark.slow
def test_webnlg_training_file(assets):
    """Counted once more, with whole examples instead of hashes."""
    paths = [assets / f"data/webnlg/{name}.jsonl" for name in ("train", "dev")]
    report, _ = judged(paths[0], valid=paths[1])
    train, valid = ([tuple(json.loads(line).values()) for line in path.open(encoding="utf-8")] for path in paths)
    pairs, prompts = set(valid), {prompt for prompt, _ in valid}
    counts = {
        "exact duplicates": len(train) - len(set(train)),
        "examples that are also in the validation file": sum(row in pairs for row in train),
        "prompts that are also in the validation file": sum(prompt in prompts for prompt, _ in train),
    }
    assert report.ok and report.examples == len(train) == 18102
    assert [warning.partition(" (")[0] for warning in report.warnings] == [f"{what}: {n}" for what, n in counts.items()]


def test_the_deliberate_oddities_of_the_toy_chat(assets):
    """Five examples: one without a system message, one without a user, one of 8,000 tokens."""
    gpt2 = tokenizer.read_tokenizer(assets / "weights/tokenizers/gpt2")
    path = assets / "data/openai-chat/toy_chat_fine_tuning.jsonl"
    report, _ = judged(path, tokenizer=gpt2, max_length=4096)
    assert report.ok and report.examples == 5 and report.lengths.cut == 1
    assert report.warnings == [
        "no system message, where other examples have one: 1 (line 3)",
        "no message of the user: 1 (line 4)",
        "few examples: 5; services want at least 10",
    ]
