"""The models that ship with minift: found by their addresses without a network, used where no model is named, and what
their cards say of them.

python -m pytest tests/test_builtin.py
"""

import json
import os
import re

import pytest
import torch
import transformers
from folders import jsonl, names_in, put, refused, weights_in
from helpers import fails, losses, python, sequence, works
from test_structure import ROOT

import minift
from minift import tables
from minift.checkpoints.hub import BUILTIN, PREFIX, default_model, read_tokenizer_of, resolve
from minift.data.batch import pack

TASKS = {"bert-nano": "fill", "gpt2-nano": "complete"}  # what each was trained for
DATA = BUILTIN.parent / "data"
models = pytest.mark.parametrize("name", tables.BUILTIN)


def in_a_bare_process(code: str, folder, *words) -> str:
    """What a process prints that has an empty home, and does not ask the hub."""
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return python(code, *words, env=environment, cwd=folder)


# addresses


def test_every_folder_is_in_the_table():
    assert names_in(BUILTIN) == sorted(tables.BUILTIN) == sorted(TASKS)


LOAD = """
import sys
import minift
model, tokenizer = minift.load(sys.argv[1], task=sys.argv[2], fresh_head=False)
print(model.source, model.size(), tokenizer.vocab_size, model.report.notes)
"""


@pytest.mark.slow
@models
def test_it_loads_without_a_network_and_a_home(name, tmp_path):
    """From anywhere; nothing is written to the home."""
    said = in_a_bare_process(LOAD, tmp_path, PREFIX + name, TASKS[name])
    model, tokenizer = minift.load(BUILTIN / name, task=TASKS[name], fresh_head=False)
    assert said.split("\n")[0] == f"{PREFIX}{name} {model.size()} {tokenizer.vocab_size} []"
    assert not names_in(tmp_path)


@pytest.mark.parametrize("name, near", [("nonsense", ""), ("bert-nan", "; did you mean bert-nano?"), ("", "")])
def test_an_address_that_is_none(name, near):
    words = f"builtin:{name}: no such model; expected builtin:bert-nano or builtin:gpt2-nano{near}"
    for line in ("inspect", "eval --data x.csv", 'predict --text "a"'):
        said = fails(f"{line} --model builtin:{name}", words)
        assert near or "did you mean" not in said.err


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    """As with the hub's ids."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin:bert-nano").mkdir()
    assert resolve("builtin:bert-nano").resolve() == tmp_path / "builtin:bert-nano"
    monkeypatch.undo()
    assert resolve("builtin:bert-nano") == BUILTIN / "bert-nano"


@models
def test_transformers_loads_it(name):
    """The folder as it is: no tensor missing or too many, the same logits, the same ids."""
    cls = {"fill": transformers.AutoModelForMaskedLM, "complete": transformers.AutoModelForCausalLM}[TASKS[name]]
    theirs, info = cls.from_pretrained(BUILTIN / name, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model, tokenizer = minift.load(PREFIX + name, task=TASKS[name])
    texts = ["The film was not bad at all, I think.", "Füße 😀\r\n", "a"]
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN / name)
    found = [tokens.ids for tokens in tokenizer.encode(texts)]
    assert found == [their_tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        ours = model.logits(pack([sequence(0, found[0])]))
        want = theirs.eval()(input_ids=torch.tensor(found[:1])).logits[0]
    assert (ours - want).abs().max() <= 1e-4


# where no model is named


@pytest.fixture
def data(tmp_path):
    """A file for each task."""
    put(tmp_path / "classify.tsv", "a fine film\tgood\na dull film\tbad\n" * 4)
    put(tmp_path / "fill.jsonl", jsonl(*[{"text": "a film that is as good as any other film of its kind"}] * 8))
    put(tmp_path / "complete.jsonl", jsonl(*[{"prompt": "The film", "completion": " was good."}] * 8))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, task, name",
    [
        ("classify.tsv", "classify", "bert-nano"),
        ("fill.jsonl", "fill", "bert-nano"),
        ("complete.jsonl", "complete", "gpt2-nano"),
    ],
)
def test_training_without_a_model_says_which_is_used(file, task, name, data):
    """It is recorded, so that the run can be made again and gone on with."""
    said = works("train --task {task} --data {d}/{file} --out {d}/run --steps 2", task=task, d=data, file=file)
    assert f"no --model: {PREFIX}{name}, which ships with minift and is small; --model takes" in said.err
    works("train --config {d}/run/config.json --out {d}/again", d=data)
    assert losses(data / "run") == losses(data / "again") and len(losses(data / "run")) == 2
    assert works("train --resume --out {d}/run", d=data)


def test_where_a_model_is_named_nothing_is_said(data):
    said = works("train --model builtin:bert-nano --data {d}/classify.tsv --out {d}/run --steps 1", d=data)
    assert "no --model" not in said.err


def test_a_task_that_none_of_them_has_a_head_for(monkeypatch):
    monkeypatch.setattr(tables, "BUILTIN", {"gpt2-nano": ""})
    assert default_model("classify") == "builtin:gpt2-nano"
    refused(default_model, "fill", "--model is missing; no built-in model has a head for fill")


def test_an_adapter_of_one_is_found_again(data):
    """It names the address and no folder, for that may be another tomorrow."""
    works("train --data {d}/classify.tsv --method lora --out {d}/run --steps 2", d=data)
    assert minift.load(data / "run")[0].adapter.base == "builtin:bert-nano"
    (row,) = works('predict --model {d}/run --text "a fine film"', d=data).rows
    assert set(row["scores"]) == {"good", "bad"}


# what they are


def test_they_are_small():
    """The weights together, and all files together."""
    sizes = {path: path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if path.suffix == ".safetensors") <= 12 * 2**20
    assert sum(sizes.values()) <= 13e6
    for name in tables.BUILTIN:
        expected = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        assert names_in(BUILTIN / name) == expected


@models
def test_its_weights_are_whole(name):
    """16 bits each, all of them finite, no matrix without a spread."""
    for tensor in weights_in(BUILTIN / name).values():
        assert tensor.dtype == torch.float16 and tensor.isfinite().all()
        assert tensor.dim() == 1 or tensor.float().std() > 1e-3


@models
def test_its_card_says_where_it_comes_from(name):
    """Its size, the day, its data and their terms, the commands that made it, how well it does, what it cannot do."""
    card = (BUILTIN / name / "README.md").read_text()
    model, tokenizer = minift.load(PREFIX + name, task=TASKS[name])
    assert card.startswith(f"# {name}\n")
    assert f"{model.size():,} weights, made by minift from random numbers" in card
    assert re.search(r"\b20\d\d-\d\d-\d\d, torch \d+\.\d+", card)
    for field in ("Data", "Made by", "Loss in training", "On the held-out reviews", "What it can do"):
        assert f"**{field}**" in card, field
    assert "published for research without a licence of its own" in card and "https://" in card
    assert f"python benchmarks/builtin.py {name}" in card and (ROOT / "benchmarks/builtin.py").is_file()
    commands = [line for line in card.splitlines() if line.startswith("minift ")]
    assert commands[0].startswith("minift new ") and len(commands) >= 2
    assert all(line.startswith("minift train ") and TASKS[name] in line.split() for line in commands[1:])
    assert f"{model.config.longest} tokens at most" in card
    assert int(re.search(r"--vocab (\d+)", commands[0])[1]) == tokenizer.vocab_size == model.config.vocab_size
    assert re.search(r"little else|seldom", card)  # of what it is not good at


@models
def test_its_tokenizer_is_of_its_family(name):
    """What a text needs is in it: every byte, or every letter and the mask."""
    tokenizer = read_tokenizer_of(PREFIX + name)
    text = "A fine film, isn't it? 12 of 10!"
    ids = tokenizer.encode([text], special=False)[0].ids
    assert len(ids) < len(text) / 2 and tokenizer.id("[UNK]") not in ids
    assert (tokenizer.mask is not None) == (TASKS[name] == "fill")


@pytest.mark.slow
def test_they_know_the_language_of_reviews():
    """More than how frequent words are: on reviews written for minift, which they were not trained on."""
    lines = (DATA / "reviews.test.jsonl").read_text().splitlines()
    rows = [{"text": json.loads(line)["text"]} for line in lines]
    found = minift.evaluate(*minift.load("builtin:bert-nano", task="fill"), rows)
    assert found["accuracy"] > 0.3 and found["perplexity"] < 50  # 0.37 and 33; the commonest token is right in 6 %
    model, tokenizer = minift.load("builtin:gpt2-nano", task="complete")
    found = minift.evaluate(model, tokenizer, minift.EvalConfig(data=str(DATA / "prompts.test.jsonl")))
    assert found["perplexity"] < 120  # 81, of 4,096 tokens, without having seen such prompts
