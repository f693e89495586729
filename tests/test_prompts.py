"""Prompts and chats, from their file to the tokens that are completed; texts that spell special tokens.

Alone: pytest tests/test_prompts.py
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from folders import check, checked, jsonl, put, read_passages, refused, write
from helpers import ENDS, EOS, fails, python, small_gpt2, works
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Tokenizer

import minift
from minift.config import GenerateConfig
from minift.data import examples, passages
from minift.data.batch import pack
from minift.data.passages import Passage
from minift.errors import InputError
from minift.tasks import classify, complete

UNTIED = dict(tie_word_embeddings=False)  # a random model with a tied head says its last token again and again


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    small_gpt2(folder, **UNTIED)
    return folder


@pytest.fixture(scope="module")
def tokenizer(gpt2):
    return minift.load(gpt2, task="complete")[1]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(*messages):
    return {"messages": list(messages)}


Q1, A1, Q2, A2 = say("user", "one?"), say("assistant", "One."), say("user", "two?"), say("assistant", "Two.")


def prompt_of(path, row):
    (passage,) = read_passages(write(path / "d.jsonl", row), need_label=False)
    return passage.parts


# ---- chats -----------------------------------------------------------------------------------------------------------


def test_the_whole_history_is_the_prompt(tmp_path):
    """A chat that ends in its second question: the first was answered once more."""
    parts = prompt_of(tmp_path, chat(Q1, A1, Q2))
    assert parts == (
        ("<|user|>\none?\n<|assistant|>\n", False),
        ("One.", True),
        ("\n<|user|>\ntwo?\n<|assistant|>\n", False),
    )
    assert prompt_of(tmp_path, chat(Q1, A1, Q2, A2)) == parts  # an answer at the end is what is to be said
    assert prompt_of(tmp_path, chat(Q1, A1, Q2, say("assistant", "Two.", weight=0))) == parts
    assert prompt_of(tmp_path, chat(Q1, A1)) == prompt_of(tmp_path, chat(Q1)) == parts[:1]
    assert prompt_of(tmp_path, chat(A1)) == (("<|assistant|>\n", False),)
    system = say("system", "Be kind.")
    assert prompt_of(tmp_path, chat(system)) == (("<|system|>\nBe kind.\n<|assistant|>\n", False),)


def test_an_answer_of_weight_0_in_the_history(tmp_path):
    """It was not learned, so no end-of-text follows it, here as in training."""
    text = "<|user|>\none?\n<|assistant|>\nOne.\n<|user|>\ntwo?\n<|assistant|>\n"
    first = say("assistant", "One.", weight=0)
    assert prompt_of(tmp_path, chat(Q1, first, Q2)) == ((text, False),)
    (trained,) = read_passages(write(tmp_path / "d.jsonl", chat(Q1, first, Q2, A2)))
    assert trained.parts == ((text, False), ("Two.", True))


@pytest.mark.parametrize("row", [
    chat(Q1, A1, Q2, A2),
    chat(say("system", "Be kind."), Q1, say("assistant", "One.", weight=0), Q2, A2),
    chat(Q1, A1, say("tool", "3"), A1, Q2, say("assistant", "Two.", weight=1)),
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "", "completion": "x y"},
])  # fmt: skip
def test_a_prompt_has_the_tokens_it_had_in_training(tmp_path, gpt2, row):
    """What is generated from is, to the token, what stood before the last answer when it was learned."""
    model, tokenizer = minift.load(gpt2, task="complete")
    path = write(tmp_path / "d.jsonl", row)
    ((_, ids, learned),) = complete.tokens_of(read_passages(path), model, tokenizer)
    ((_, prompt, _),) = complete.tokens_of(read_passages(path, need_label=False), model, tokenizer)
    answer = row.get("completion") or row["messages"][-1]["content"]
    assert ids == [*prompt, *tokenizer.encode([answer])[0].ids, EOS] and all(learned[len(prompt) :])


def test_generate_answers_the_last_question(tmp_path, gpt2):
    model, tokenizer = minift.load(gpt2, task="complete")
    rows = [chat(Q1, A1, Q2), chat(Q1, A1), {"prompt": "one? One. two?"}, {"prompt": ""}]
    path = write(tmp_path / "d.jsonl", *rows)
    found = list(minift.generate(model, tokenizer, GenerateConfig(data=str(path), max_tokens=5)))
    history = "<|user|>\none?\n<|assistant|>\nOne.\n<|user|>\ntwo?\n<|assistant|>\n"
    assert [row["prompt"] for row in found] == [history, history.partition("One.")[0], "one? One. two?", ""]
    theirs, letters = GPT2LMHeadModel.from_pretrained(gpt2), GPT2Tokenizer.from_pretrained(gpt2)
    first = history.partition("\n<|user|>\ntwo?")[0]
    ids = letters.encode(first) + [EOS] + letters.encode(history.removeprefix(first))
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=EOS)
    said = theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert found[0]["completion"] == tokenizer.decode(said)


def test_what_follows_the_last_answer_is_told(tmp_path):
    unlearned = say("assistant", "2", weight=0)
    path = write(tmp_path / "d.jsonl", chat(Q1, A1, Q2), chat(Q1, A1), chat(Q1, A1, Q2, unlearned))
    report = check(path, say=print)
    text = "messages after the last answer that is learned, which are left out: 2 (lines 1, 3)"
    assert report.ok and text in report.warnings


@pytest.mark.parametrize("message, words", [
    (say("assistant", "a", weight=1.0), "weight is 1.0; expected 0 or 1"),
    (say("assistant", "a", weight=True), "weight is True; expected 0 or 1"),
    (say("assistant", "a", weight=0.0), "weight is 0.0; expected 0 or 1"),
    (say("assistant", "a", weight="1"), "weight is '1'; expected 0 or 1"),
    (say("user", "a", weight=1), "found a weight on the role 'user'; expected one on assistant messages only"),
])  # fmt: skip
def test_train_and_check_agree_on_weights(tmp_path, message, words):
    path = write(tmp_path / "d.jsonl", chat(Q1, A1), chat(Q1, message, A2))
    refused(read_passages, path, f"d.jsonl:2: message 2: {words}")
    report, told = checked(path)
    assert not report.ok and told == [f"d.jsonl:2: message 2: {words}"]


def test_null_stands_for_no_weight(tmp_path):
    """`datasets` gives every message the keys that one of them has."""
    rows = [chat(Q1 | {"weight": None}, A1 | {"weight": None}), chat(Q1, say("assistant", "a", weight=0), A2)]
    path = write(tmp_path / "d.jsonl", *rows)
    assert read_passages(path)[0].parts[-1] == ("One.", True) and check(path, say=print).ok


SHAREGPT = {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "One."}]}
ALPACA = {"instruction": "Add.", "input": "2 2", "output": "4"}


@pytest.mark.parametrize("row, name, expected", [
    (SHAREGPT, "ShareGPT's form", chat(Q1, A1)),
    (ALPACA, "Alpaca's form", {"prompt": "Add.\n2 2\n", "completion": "4"}),
])  # fmt: skip
def test_other_forms_are_named_with_what_to_do(tmp_path, row, name, expected):
    """And what to do does it."""
    path = write(tmp_path / "d.jsonl", row)
    report, told = checked(path)
    assert report.faults == {"unknown format": 1}
    for text in (refused(read_passages, path), *told):
        assert "d.jsonl:1: " in text and name in text and "did you mean" not in text
        command = text.partition("`jq -c '")[2].partition("'`")[0]
        try:
            done = subprocess.run(["jq", "-c", command, path], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("jq is not installed")
        assert json.loads(done.stdout) == expected


def test_messages_of_sharegpt(tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": SHAREGPT["conversations"]})
    refused(read_passages, path, "with from and value as ShareGPT has them; expected role (user for human")


# ---- running text and what is no running text ------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": " b"}, chat(Q1, A1), {"text": "a"}, SHAREGPT, ALPACA])
def test_json_lines_in_a_txt_are_no_running_text(tmp_path, row):
    path = write(tmp_path / "d.txt", row, row)
    refused(read_passages, path, "d.txt:1: found a JSON object with ", " in a .txt", "; expected a name that ends")
    assert check(path, say=print).faults == {"JSON in a .txt": 1}


@pytest.mark.parametrize("line", ['{"name": "json"}', "{", '"quoted"', "[1, 2]", "{not json}"])
def test_running_text_may_begin_with_json(tmp_path, line):
    path = write(tmp_path / "d.txt", line, "more")
    assert read_passages(path)[0].parts == ((line + "\nmore\n", True),)


def test_a_txt_is_no_file_of_prompts(tmp_path):
    """It was one empty prompt."""
    path = write(tmp_path / "d.txt", "Once upon a time")
    refused(read_passages, path, "d.txt: is running text; expected prompts, in a .jsonl", need_label=False)


# ---- the context -----------------------------------------------------------------------------------------------------


def test_prompts_over_the_context_are_told_before_any_is_completed(tmp_path, gpt2):
    path = write(tmp_path / "d.jsonl", {"prompt": "short"}, "", {"prompt": "x" * 100}, chat(Q1, say("user", "y" * 90)))
    words = ("d.jsonl:3: the prompt has 100 tokens", "d.jsonl:4: the prompt has")
    said = fails("generate --model {gpt2} --data {path}", *words, gpt2=gpt2, path=path)
    assert said.out == "" and said.err.count("expected at most 99, since the model reads 100 at most") == 2
    line = "generate --model {gpt2} --prompt {prompt} --max-tokens 1"
    fails(line, "--prompt: the prompt has 100 tokens", gpt2=gpt2, prompt="x" * 100)
    works(line, gpt2=gpt2, prompt="x" * 99)


# ---- special tokens that a text spells -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "good", "good" + ENDS, ENDS + "good", "go" + ENDS + "od", "good" + ENDS * 3, ENDS, ENDS * 2, "good" + ENDS + " ",
])  # fmt: skip
@pytest.mark.parametrize("pad", [EOS, 7])
def test_end_of_text_in_a_text_to_classify_is_what_transformers_makes_of_it(tmp_path, text, pad):
    """Its classifier asks the last token that is not padding; GPT-2's padding is end-of-text."""
    theirs = small_gpt2(tmp_path, GPT2ForSequenceClassification, num_labels=2, pad_token_id=pad)
    model, tokenizer = minift.load(tmp_path, task="classify")
    ids = GPT2Tokenizer.from_pretrained(tmp_path).encode(text)
    (sequence,) = classify.encode([examples.Example(text, None, None, "")], model, tokenizer, 100, labelled=False)
    assert sequence.ids.tolist() == ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        found = model.logits(pack([sequence]))[0]
    assert (found - expected).abs().max() < 1e-5


def test_end_of_text_in_a_completion_is_that_token_and_check_tells(tmp_path, tokenizer):
    (sequence,) = complete.encode([Passage((("a", False), ("b" + ENDS, True)), "")], None, tokenizer, 100)
    assert sequence.targets.tolist().count(EOS) == 1 and sequence.targets[-1] == EOS  # and not twice
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": " b" + ENDS}, {"prompt": "a", "completion": " c"})
    assert f"{ENDS} in a text, which is read as that token: 1 (line 1)" in check(path, say=print).warnings
    path = write(tmp_path / "e.jsonl", chat(Q1, A1), chat(say("user", ENDS), A2))
    assert f"{ENDS} in a text, which is read as that token: 1 (line 2)" in check(path, say=print).warnings


# ---- nothing to learn from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content, length, words", [
    ("d.jsonl", jsonl({"prompt": "a long prompt", "completion": " b"}), 5, "nothing to learn from at 5 tokens"),
    ("d.txt", "a", 0, "nothing to learn from"),
])  # fmt: skip
def test_check_says_that_there_is_nothing_to_learn_from(tmp_path, tokenizer, name, content, length, words):
    """As train does; check called such a file without faults."""
    path = put(tmp_path / name, content)
    report, told = checked(path, tokenizer=tokenizer, max_length=length)
    assert report.faults == {"nothing trained": 1} and words in told[0]
    with pytest.raises(InputError, match="nothing to learn from"):
        complete.encode(read_passages(path), None, tokenizer, length or 100)


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_streamed_sequences_are_those_of_encode(tmp_path, tokenizer):
    """Running text too: cut at the same places, though its end is not known."""
    path = write(tmp_path / "d.txt", *(f"line {i} of the text" for i in range(5000)))
    ids = [i for p in read_passages(path) for i in tokenizer.encode([p.parts[0][0]])[0].ids]
    for length in (1, 7, 100, 10**6):
        found = list(complete.encoded(passages.stream_passages(path), (), None, tokenizer, length))
        assert [t for s in found for t in s.targets.tolist()] == ids[1:]
        assert [t for s in found for t in s.ids.tolist()] == ids[:-1]
        assert [len(s) for s in found[:-1]] == [length] * (len(found) - 1)
        assert [s.number for s in found] == list(range(len(found)))


@pytest.mark.slow
def test_memory_of_eval_and_predict_does_not_grow_with_the_file(tmp_path):
    """Eight times the examples, in fresh processes: the peak grows by the labels and counts alone."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    small_gpt2(tmp_path, GPT2ForSequenceClassification, num_labels=2, pad_token_id=EOS)
    code = """
import re, sys, minift
from minift.config import EvalConfig, PredictConfig
model, tokenizer = minift.load(sys.argv[1], task="classify")
model.logits = lambda batch: batch.rows[:, None] * batch.rows.new_zeros(2).float()
minift.evaluate(model, tokenizer, EvalConfig(data=sys.argv[2], max_length=20))
assert sum(1 for _ in minift.predict(model, tokenizer, PredictConfig(data=sys.argv[2], max_length=20))) > 0
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""
    peaks = []
    for n in (3_000, 24_000):
        path = write(tmp_path / f"{n}.jsonl", *({"text": f"{i} " + "words " * 20, "label": i % 2} for i in range(n)))
        peaks.append(int(python(code, tmp_path, path)))
    assert peaks[1] - peaks[0] < 14_000_000, peaks  # 28 to 45 million where all are held
