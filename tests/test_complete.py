"""GPT-2 learns completions, chats and plain text: what is read, what is asked for, and the Trainer's losses on it.

MINIFT_ASSETS=../shared python -m pytest tests/test_complete.py
"""

import json
import math

import pytest
import torch
import transformers
from folders import put, read_passages, refused, write
from helpers import losses, real_gpt2, train, trainer_log, works
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, GPT2LMHeadModel

import minift
from minift.data.passages import Passage
from minift.tasks import complete

EOS = 50256


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory):
    """A small random GPT-2 with the real tokenizer."""
    ids = dict(bos_token_id=EOS, eos_token_id=EOS)
    return real_gpt2(tmp_path_factory.mktemp("gpt2"), assets, scale=0.05, n_positions=128, **ids)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return minift.load(folder, task="complete")[1]


def learned(sequence, tokenizer):
    """The text of a sequence's targets, end-of-text shown."""
    return "".join("<eos>" if t == EOS else tokenizer.decode([t]) for t in sequence.targets)


# reading


def test_prompts_and_chats_and_text(tmp_path):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you", "weight": 0},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!", "weight": 1},
    ]
    rows = [{"prompt": "2+2=", "completion": " 4"}, {"prompt": "", "completion": "x"}, {"messages": chat}]
    path = write(tmp_path / "a.jsonl", *rows)
    first, second, third = read_passages(path)
    assert first == Passage((("2+2=", False), (" 4", True)), "a.jsonl:1")
    assert second.parts == (("x", True),)
    assert third.parts == (
        ("<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n", False),
        ("Hello", True),
        ("\n<|user|>\nBye\n<|assistant|>\nSee you\n<|user|>\n?\n<|assistant|>\n", False),
        ("!", True),
    )
    text = "a line\n" * 5000 + "the end"
    pieces = read_passages(put(tmp_path / "b.txt", text))
    assert len(pieces) > 1 and "".join(p.parts[0][0] for p in pieces) == text and all(p.plain for p in pieces)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a"}, ["no field completion"]),
    ({"promt": "a", "completion": "b"}, ["no field prompt", "promt"]),
    ({"prompt": "a", "completion": ""}, ["completion is ''"]),
    ({"prompt": 3, "completion": "b"}, ["prompt is 3"]),
    ({"prompt": "a", "completion": "\ud800"}, ["surrogate"]),
    ({"messages": []}, ["at least one message"]),
    ({"messages": "hi"}, ["messages is 'hi'"]),
    ({"messages": [USER]}, ["no message to learn from"]),
    ({"messages": [USER | {"role": "human"}]}, ["message 1", "'human'", "assistant"]),
    ({"messages": [{"role": "user"}, ANSWER]}, ["message 1", "role and content"]),
    ({"messages": [USER, ANSWER | {"content": None}]}, ["message 2", "content is None"]),
    ({"messages": [USER, ANSWER | {"weight": 2}]}, ["message 2", "weight is 2"]),
])  # fmt: skip
def test_faults_name_their_line(tmp_path, row, words):
    good = {"prompt": "a", "completion": "b"}
    refused(read_passages, write(tmp_path / "a.jsonl", good, row, good), "a.jsonl:2", *words)


def test_other_files_are_refused(tmp_path):
    refused(read_passages, put(tmp_path / "a.csv", "x"), "a.csv")
    refused(read_passages, tmp_path / "none.jsonl", "none.jsonl")
    refused(read_passages, put(tmp_path / "empty.txt", ""), "nothing to read")


# encoding


def test_the_loss_falls_on_completions_alone(tokenizer):
    passages = [
        Passage((("The answer is", False), (" yes", True)), ""),
        Passage((("Q", False), (" a", True), ("\nR", False), (" b c", True)), ""),
    ]
    one, two = complete.encode(passages, None, tokenizer, 100)
    assert learned(one, tokenizer) == " yes<eos>" and learned(two, tokenizer) == " a<eos> b c<eos>"
    for s in (one, two):  # each target is the token after its row
        full = [*s.ids.tolist(), None]
        assert [full[r + 1] for r in s.rows] == s.targets.tolist()
    assert one.ids.tolist() == tokenizer.encode(["The answer is yes"])[0].ids + [EOS]  # the same as in one piece


def test_the_boundary_never_moves(tokenizer):
    """Tokenised together, " straw" + "berry" would be other tokens: apart, the prompt's are its own."""
    (s,) = complete.encode([Passage(((" straw", False), ("berry", True)), "")], None, tokenizer, 100)
    prompt, completion = (tokenizer.encode([t])[0].ids for t in (" straw", "berry"))
    assert s.ids.tolist() == [*prompt, *completion, EOS]
    assert s.rows.tolist() == [len(prompt) - 1 + i for i in range(len(completion) + 1)]
    assert s.ids.tolist() != tokenizer.encode([" strawberry"])[0].ids + [EOS]


def test_cut_and_empty(tokenizer):
    passages = [
        Passage((("a b c d", False), (" e f g", True)), "here:1"),
        Passage((("a", False), (" b", True)), "here:2"),
    ]
    long, short = complete.encode(passages, None, tokenizer, 5)
    assert long.cut and len(long) == 5 and learned(long, tokenizer) == " e" and not short.cut
    with pytest.raises(minift.InputError, match="here:1.*cut off at 4"):
        complete.encode(passages[:1], None, tokenizer, 4)
    (alone,) = complete.encode([Passage((("x y", True),), "")], None, tokenizer, 9)
    assert learned(alone, tokenizer) == " y<eos>"  # nothing comes before the first token


@given(
    st.text(min_size=2, max_size=400).filter(lambda t: not any(0xD800 <= ord(c) < 0xE000 for c in t)),
    st.integers(1, 50),
)
def test_plain_text_asks_for_every_token_once(tokenizer, text, length):
    ids = tokenizer.encode([text])[0].ids
    if len(ids) < 2:
        return
    blocks = complete.encode([Passage(((text, True),), "", plain=True)], None, tokenizer, length)
    assert [t for s in blocks for t in s.targets] == ids[1:]
    assert [t for s in blocks for t in s.ids] == ids[:-1] and all(len(s) == len(s.targets) <= length for s in blocks)


# training


def rows_of(assets, n):
    with open(assets / "data/webnlg/train.jsonl") as f:
        return [json.loads(next(f)) for _ in range(n)]


def encoded(row, tokenizer) -> dict:
    """A row as the peer's collator wants it."""
    prompt, completion = (tokenizer.encode([row[key]])[0].ids for key in ("prompt", "completion"))
    ids = [*prompt, *completion, EOS][:128]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids, "labels": labels[:128], "attention_mask": [1] * len(ids)}


@pytest.mark.slow
def test_twenty_steps_follow_the_trainer(folder, assets, tokenizer, tmp_path):
    """WebNLG prompts and completions of very unequal length, dropout 0: losses within 1e-5."""
    rows = rows_of(assets, 100)
    theirs = GPT2LMHeadModel.from_pretrained(folder, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    backend = transformers.GPT2Tokenizer.from_pretrained(assets / "weights/tokenizers/gpt2", pad_token="<|endoftext|>")
    examples, collator = [encoded(row, tokenizer) for row in rows], DataCollatorForSeq2Seq(backend)
    expected = [entry["loss"] for entry in trainer_log(theirs, examples, collator, tmp_path, learning_rate=1e-3)]

    model, tok = minift.load(folder, task="complete", dropout=0.0)
    path = write(tmp_path / "train.jsonl", *rows)
    train(model, tok, path, tmp_path / "run", task="complete", steps=20, batch=8, lr=1e-3)
    found = losses(tmp_path / "run")
    assert found == pytest.approx(expected, abs=1e-5) and found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 512])
def test_micro_batches_change_nothing(folder, assets, tmp_path, tokens):
    """Masked completions of very unequal length, dropout 0.1."""
    path = write(tmp_path / "train.jsonl", *rows_of(assets, 40))
    for name, limit in (("whole", 0), ("split", tokens)):
        model, tok = minift.load(folder, task="complete")
        train(model, tok, path, tmp_path / name, task="complete", steps=6, batch=8, lr=1e-3, tokens=limit)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "split"), abs=1e-5)


METHODS = {"full": "", "lora": "--method lora --base nf4 --targets all-linear --rank 16"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_learn_and_generate(method, folder, tmp_path):
    """Four facts by heart: train, eval, generate from prompts and from a file, transformers says the same.

    By LoRA over four bits too: all of it straight from the adapter folder, and transformers from the merged model.
    """
    capitals = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima"}
    rows = [{"prompt": f"The capital of {land} is", "completion": f" {city}."} for land, city in capitals.items()]
    places = dict(model=folder, run=tmp_path / "run", facts=write(tmp_path / "facts.jsonl", *rows))
    often = "--batch 4 --epochs 120 --lr 3e-3 --eval-every 60 --dropout 0"
    line = "train --model {model} --task complete --data {facts} --valid {facts} --out {run}"
    works(f"{line} {often} {METHODS[method]}", **places)

    metrics = works("eval --model {run} --task complete --data {facts} --json", **places).last
    assert metrics["accuracy"] > 0.95 and metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert works("generate --model {run} --data {facts}", **places).rows == rows
    (one,) = works("generate --model {run} --prompt 'The capital of Peru is' --max-tokens 1", **places).rows
    assert one["completion"] == " Lima"

    plain = tmp_path / "run/best"
    if method == "lora":
        assert (plain / "adapter_config.json").is_file()
        plain = tmp_path / "merged"
        works("merge --model {run} --out {plain} --data {facts}", plain=plain, **places)
    theirs = GPT2LMHeadModel.from_pretrained(plain).eval()
    tokenizer = minift.load(tmp_path / "run", task="complete")[1]
    ids = torch.tensor([tokenizer.encode(["The capital of Italy is"])[0].ids])
    said = theirs.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=EOS)[0, ids.shape[1] :]
    assert said.tolist()[-1] == EOS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "instruct/instructions.messages.jsonl"])
def test_real_text_and_real_chats(folder, assets, tmp_path, name):
    """A few steps on each bring the loss down, and everything in the file is read."""
    line = "train --model {model} --task complete --data {data} --out {run} --steps 12 --batch 4 --lr 3e-3"
    places = dict(model=folder, data=assets / "data" / name, run=tmp_path / "run")
    works(f"{line} --valid 0.01 --eval-every 12", **places)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.3
