"""GPT-2 learns completions, chats and plain text: what is read, what is asked for, and the Trainer's losses on it.

MINIFT_ASSETS=../shared python -m pytest tests/test_complete.py
"""

import json
import math

import pytest
import torch
import transformers
from helpers import peer
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, GPT2LMHeadModel, Trainer, TrainingArguments

import minift
from minift.cli import main
from minift.data import passages
from minift.data.passages import Passage
from minift.tasks import complete

EOS = 50256


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory):
    """A small random GPT-2 with the real tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    peer(GPT2LMHeadModel, folder, scale=0.05, vocab_size=50257, n_positions=128, bos_token_id=EOS, eos_token_id=EOS)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((assets / "weights/tokenizers/gpt2" / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return minift.load(folder, task="complete")[1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    path = write(
        tmp_path / "a.jsonl",
        [{"prompt": "2+2=", "completion": " 4"}, {"prompt": "", "completion": "x"}, {"messages": chat}],
    )
    first, second, third = passages.read_passages(path)
    assert first == Passage((("2+2=", False), (" 4", True)), "a.jsonl:1")
    assert second.parts == (("x", True),)
    assert third.parts == (
        ("<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n", False),
        ("Hello", True),
        ("\n<|user|>\nBye\n<|assistant|>\nSee you\n<|user|>\n?\n<|assistant|>\n", False),
        ("!", True),
    )
    text = "a line\n" * 5000 + "the end"
    (tmp_path / "b.txt").write_text(text)
    pieces = passages.read_passages(tmp_path / "b.txt")
    assert len(pieces) > 1 and "".join(p.parts[0][0] for p in pieces) == text and all(p.plain for p in pieces)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a"}, ["no field completion"]),
        ({"promt": "a", "completion": "b"}, ["no field prompt", "promt"]),
        ({"prompt": "a", "completion": ""}, ["completion is ''"]),
        ({"prompt": 3, "completion": "b"}, ["prompt is 3"]),
        ({"prompt": "a", "completion": "\ud800"}, ["surrogate"]),
        ({"messages": []}, ["at least one message"]),
        ({"messages": "hi"}, ["messages is 'hi'"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["no message to learn from"]),
        ({"messages": [{"role": "human", "content": "a"}]}, ["message 1", "'human'", "assistant"]),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, ["message 1", "role and content"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
            ["message 2", "content is None"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]},
            ["message 2", "weight is 2"],
        ),
    ],
)
def test_faults_name_their_line(tmp_path, row, words):
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "a.jsonl", [good, row, good])
    with pytest.raises(minift.InputError) as e:
        passages.read_passages(path)
    for word in ["a.jsonl:2", *words]:
        assert word in str(e.value)


def test_other_files_are_refused(tmp_path):
    for name in ("a.csv", "none.jsonl"):
        with pytest.raises(minift.InputError, match=name):
            (tmp_path / "a.csv").write_text("x")
            passages.read_passages(tmp_path / name)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(minift.InputError, match="nothing to read"):
        passages.read_passages(tmp_path / "empty.txt")


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
    assert s.ids.tolist() == [*prompt, *completion, EOS] and s.rows.tolist() == [
        len(prompt) - 1 + i for i in range(len(completion) + 1)
    ]
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


@pytest.mark.slow
def test_twenty_steps_follow_the_trainer(folder, assets, tokenizer, tmp_path):
    """WebNLG prompts and completions of very unequal length, dropout 0: losses within 1e-5."""
    rows = rows_of(assets, 100)
    off = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    theirs = GPT2LMHeadModel.from_pretrained(folder, **off)
    examples = []
    for row in rows:
        prompt, completion = (tokenizer.encode([row[key]])[0].ids for key in ("prompt", "completion"))
        ids = [*prompt, *completion, EOS][:128]
        examples.append(
            {
                "input_ids": ids,
                "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:128],
                "attention_mask": [1] * len(ids),
            }
        )
    backend = transformers.GPT2Tokenizer.from_pretrained(assets / "weights/tokenizers/gpt2", pad_token="<|endoftext|>")
    arguments = TrainingArguments(
        output_dir=tmp_path / "peer",
        per_device_train_batch_size=8,
        max_steps=20,
        learning_rate=1e-3,
        seed=42,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=theirs, args=arguments, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(backend)
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, tok = minift.load(folder, task="complete", dropout=0.0)
    path = write(tmp_path / "train.jsonl", rows)
    minift.train(
        model,
        tok,
        minift.TrainConfig(task="complete", data=str(path), out=str(tmp_path / "run"), steps=20, batch=8, lr=1e-3),
    )
    found = [json.loads(line)["train/loss"] for line in open(tmp_path / "run/metrics.jsonl")]
    assert found == pytest.approx(expected, abs=1e-5) and found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 512])
def test_micro_batches_change_nothing(folder, assets, tmp_path, tokens):
    """Masked completions of very unequal length, dropout 0.1."""
    path = write(tmp_path / "train.jsonl", rows_of(assets, 40))
    curves = []
    for limit in (0, tokens):
        model, tok = minift.load(folder, task="complete")
        out = tmp_path / f"run-{limit}"
        minift.train(
            model,
            tok,
            minift.TrainConfig(task="complete", data=str(path), out=str(out), steps=6, batch=8, lr=1e-3, tokens=limit),
        )
        curves.append([json.loads(line)["train/loss"] for line in open(out / "metrics.jsonl")])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_learn_and_generate(method, folder, tmp_path, capsys):
    """Four facts by heart: train, eval, generate from prompts and from a file, transformers says the same.

    By LoRA over four bits too: all of it straight from the adapter folder, and transformers from the merged model.
    """
    facts = {
        "The capital of France is": " Paris.",
        "The capital of Italy is": " Rome.",
        "The capital of Spain is": " Madrid.",
        "The capital of Peru is": " Lima.",
    }
    rows = [{"prompt": p, "completion": c} for p, c in facts.items()]
    path = write(tmp_path / "facts.jsonl", rows)
    run = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--model",
                str(folder),
                "--task",
                "complete",
                "--data",
                str(path),
                "--valid",
                str(path),
                "--out",
                str(run),
                "--batch",
                "4",
                "--epochs",
                "120",
                "--lr",
                "3e-3",
                "--eval-every",
                "60",
                "--dropout",
                "0",
                *{"full": [], "lora": "--method lora --base nf4 --targets all-linear --rank 16".split()}[method],
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["eval", "--model", str(run), "--task", "complete", "--data", str(path), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["accuracy"] > 0.95 and metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert main(["generate", "--model", str(run), "--data", str(path)]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert main(["generate", "--model", str(run), "--prompt", "The capital of Peru is", "--max-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["completion"] == " Lima"
    plain = run / "best"
    if method == "lora":
        assert (run / "best/adapter_config.json").is_file()
        plain = tmp_path / "merged"
        assert main(["merge", "--model", str(run), "--out", str(plain), "--data", str(path)]) == 0
    theirs = GPT2LMHeadModel.from_pretrained(plain).eval()
    ids = torch.tensor([minift.load(run, task="complete")[1].encode(["The capital of Italy is"])[0].ids])
    assert (
        theirs.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=EOS)[0, ids.shape[1] :].tolist()[-1] == EOS
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "instruct/instructions.messages.jsonl"])
def test_real_text_and_real_chats(folder, assets, tmp_path, name):
    """A few steps on each bring the loss down, and everything in the file is read."""
    arguments = [
        "train",
        "--model",
        str(folder),
        "--task",
        "complete",
        "--data",
        str(assets / "data" / name),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "12",
        "--batch",
        "4",
        "--lr",
        "3e-3",
        "--valid",
        "0.01",
        "--eval-every",
        "12",
    ]
    assert main(arguments) == 0
    losses = [json.loads(line)["train/loss"] for line in open(tmp_path / "run/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.3
