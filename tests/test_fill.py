"""Masked language modelling: which tokens a step asks about and how it shows them, what is cut, filled in and told.

python -m pytest tests/test_fill.py
"""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from folders import put, read_passages, refuse, refused, weights_in, write
from helpers import VOCABULARY, WORDS, arguments, fails, losses, metrics, peer, small_bert, small_gpt2, works
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift import training
from minift.data import corpus
from minift.data.batch import pack
from minift.measure import track
from minift.tasks import fill

FORECASTS = True  # conftest.py

BOUND = 1e-5  # of losses, however a step is split


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The files of tokens of this module's running texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """bert/, with its head; body/, without; gpt2/; texts.jsonl, of 1 to 60 words; book.txt, running text."""
    folder = tmp_path_factory.mktemp("fill")
    small_bert(folder / "body")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64)
    peer(transformers.BertForMaskedLM, folder / "bert", scale=0.1, **sizes)
    put(folder / "bert/vocab.txt", (folder / "body/vocab.txt").read_bytes())
    small_gpt2(folder / "gpt2")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in (*range(1, 61, 2), 60)]
    write(folder / "texts.jsonl", *({"text": text} for text in texts))
    write(folder / "book.txt", *texts)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    """(model, tokenizer) of bert/, to be looked at alone."""
    return minift.load(folder / "bert", task="fill")


def contents(texts) -> list[tuple]:
    """What a draw made of each text, to be compared."""
    return [(t.number, t.ids.tolist(), t.rows.tolist(), t.targets.tolist(), t.whole.tolist()) for t in texts]


# which tokens are asked about

RULES = SimpleNamespace(mask=4, special={0, 1, 2, 3, 4}, vocab_size=64)  # what a draw asks of a tokenizer


def plain(number: int, ids) -> fill.Text:
    """A text of these tokens, nothing of it hidden."""
    none = np.zeros(0, np.int64)
    ids = np.array(ids, np.int32)
    return fill.Text(number, ids, None, none.astype(np.int32), none, whole=ids, tokenizer=RULES)


IDS = st.lists(st.integers(0, 63), min_size=1, max_size=40)
TEXTS = st.dictionaries(st.integers(0, 10**9), IDS, min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.data())
def test_a_draw_changes_only_what_it_asks_about(found, seed, step, data):
    """Rows ascend, their targets are what stood there, no special token is asked about; alone, in any order, or drawn
    over another draw, a text looks the same."""
    texts = [plain(number, ids) for number, ids in found.items()]
    drawn = fill.draw(texts, seed, step)
    for before, text in zip(texts, drawn, strict=True):
        whole = np.array(found[text.number], np.int32)
        assert text.ids.dtype == text.rows.dtype == np.int32 and text.targets.dtype == np.int64
        assert np.array_equal(text.whole, whole) and np.array_equal(before.ids, whole)
        assert np.array_equal(text.targets, whole[text.rows])
        assert (np.diff(text.rows) > 0).all() and not np.isin(text.targets, list(RULES.special)).any()
        others = np.setdiff1d(np.arange(len(whole)), text.rows)
        assert np.array_equal(text.ids[others], whole[others])
        assert ((text.ids >= 0) & (text.ids < RULES.vocab_size)).all()
    chosen = data.draw(st.permutations(range(len(texts))))[: data.draw(st.integers(1, len(texts)))]
    assert contents(fill.draw([texts[i] for i in chosen], seed, step)) == contents([drawn[i] for i in chosen])
    assert contents(fill.draw(fill.draw(texts, seed + 1, step + 1), seed, step)) == contents(drawn)


def within(count: int, n: int, p: float) -> bool:
    """Whether `count` of n is at most five standard deviations from what probability p gives."""
    return abs(count - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


TOKEN = 7


@pytest.fixture(scope="module")
def many():
    """(what is asked about, what is shown) of 600,000 tokens 7, each (600, 1000), as one step draws them."""
    drawn = fill.draw([plain(number, [TOKEN] * 1000) for number in range(600)], 42, 3)
    asked = np.zeros((600, 1000), bool)
    for i, text in enumerate(drawn):
        asked[i, text.rows] = True
    return asked, np.stack([text.ids for text in drawn])


def test_shares(many):
    """15 of 100 are asked about; of these 80 hidden, 10 changed (now and then to the mask or to itself), 10 as is."""
    asked, shown = many
    n = int(asked.sum())
    assert within(n, asked.size, fill.ASKED) and fill.ASKED == 0.15
    seen = shown[asked]
    assert within((seen == RULES.mask).sum(), n, 0.8 + 0.1 / 64)
    assert within((seen == TOKEN).sum(), n, 0.1 + 0.1 / 64)
    assert within((~np.isin(seen, (RULES.mask, TOKEN))).sum(), n, 0.1 * 62 / 64)


def test_places_and_texts_are_asked_alike(many):
    """Each place of a text, and each text, within chance; chi-square's standard deviation is sqrt(2 k)."""
    asked, _ = many
    for axis in (0, 1):
        counts = asked.sum(axis)
        n = asked.shape[axis]
        square = ((counts - n * 0.15) ** 2).sum() / (n * 0.15 * 0.85)
        assert abs(square - len(counts)) <= 5 * (2 * len(counts)) ** 0.5
    neighbours = asked[:, 1:] & asked[:, :-1]
    assert within(neighbours.sum(), neighbours.size, 0.15**2)


def test_other_tokens_are_any_of_the_vocabulary(many):
    """Special ones too, as often as any other."""
    asked, shown = many
    counts = np.bincount(shown[asked], minlength=64)
    others = np.delete(counts, [RULES.mask, TOKEN])
    mean = others.mean()
    square = ((others - mean) ** 2 / mean).sum()
    assert len(counts) == 64 and abs(square - 61) <= 5 * (2 * 61) ** 0.5


def test_each_step_and_seed_draws_anew():
    """What two of them both ask about is what chance has in common."""
    texts = [plain(number, [TOKEN] * 1000) for number in range(100)]

    def asked(seed, step):
        found = np.zeros((100, 1000), bool)
        for i, text in enumerate(fill.at_step(texts, seed, step)):
            found[i, text.rows] = True
        return found

    draws = [asked(42, 0), asked(42, 1), asked(42, 2), asked(43, 0), asked(43, 1)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert within((one & other).sum(), one.size, 0.15**2)
    assert np.array_equal(asked(42, 1), draws[1])


# the masks of a run

TRAIN = (
    "train --task fill --model {f}/bert --data {data} --out {out} --lr 1e-3 --batch 6 --steps 8 --max-length 20"
    " --kernels reference"
)


@pytest.mark.slow
def test_masks_do_not_depend_on_micro_batches(folder, tmp_path, monkeypatch):
    """Of every step the same tokens are shown and asked about, in micro-batches of any size; so the losses agree.

    They are what the run's seed and the step's number say.
    """
    shown: dict[str, list] = {}
    curves = []
    for tokens in (0, 1, 50):
        seen = shown.setdefault(tokens, [])
        monkeypatch.setattr(training, "pack", lambda micro, seen=seen: seen.extend(contents(micro)) or pack(micro))
        works(f"{TRAIN} --seed 7 --tokens {tokens}", f=folder, data=folder / "texts.jsonl", out=tmp_path / str(tokens))
        curves.append(losses(tmp_path / str(tokens)))
    encoded = fill.encode(
        corpus.read_all(fill.stream(folder / "texts.jsonl")), *minift.load(folder / "bert", task="fill"), 20
    )
    for step in range(8):
        part = shown[0][6 * step : 6 * step + 6]
        assert part == contents(fill.draw([encoded[number] for number, *_ in part], 7, step))
    assert len(shown[0]) == 48 and sorted(shown[0]) == sorted(shown[1]) == sorted(shown[50])
    assert len(set(curves[0])) == 8
    assert curves[0] == pytest.approx(curves[1], abs=BOUND) and curves[0] == pytest.approx(curves[2], abs=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["texts.jsonl", "book.txt"])
def test_stopped_and_resumed_it_is_the_same_run(data, folder, tmp_path, monkeypatch):
    """To the bit, dropout on: SIGTERM after the third step."""
    line = f"{TRAIN} --save-every 2"
    works(line, f=folder, data=folder / data, out=tmp_path / "whole")
    written = track.Tracker.step

    def step(self, values, evaluated=None):
        written(self, values, evaluated)
        if values["train/global_step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(track.Tracker, "step", step)
    fails(line, "to go on", code=143, f=folder, data=folder / data, out=tmp_path / "stopped")
    monkeypatch.undo()
    works("train --resume --out {out}", out=tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8
    want = weights_in(tmp_path / "whole/last")
    found = weights_in(tmp_path / "stopped/last")
    assert want.keys() == found.keys() and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["texts.jsonl", "book.txt"])
def test_two_processes_are_the_run_of_one(data, folder, tmp_path):
    """The file of tokens is there by then; the masks are drawn before a step is dealt out."""
    line = f"{TRAIN} --valid {{f}}/texts.jsonl --out {{out}}"
    works(line, f=folder, data=folder / data, out=tmp_path / "one")
    launch = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 -m minift"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch.split(), *arguments(line, f=folder, data=folder / data, out=tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy"):
            assert one.get(key) == pytest.approx(two.get(key), abs=BOUND)


@pytest.mark.slow
def test_what_is_held_out_is_asked_the_same_each_time(folder, tmp_path):
    """Whatever the seed and the step; `eval` asks that too. (At this learning rate no weight changes.)"""
    found = []
    for seed in (1, 2):
        line = f"{TRAIN} --valid {{f}}/texts.jsonl --eval-every 4 --seed {seed} --lr 1e-30"
        works(line, f=folder, data=folder / "book.txt", out=tmp_path / str(seed))
        found.append(metrics(tmp_path / str(seed)))
    assert fill.HELD_OUT[1] > 10**9  # no run takes so many steps
    held_out = [step["eval/loss"] for steps in found for step in steps if "eval/loss" in step]
    assert len(held_out) == 4 and len(set(held_out)) == 1
    assert [step["train/loss"] for step in found[0]] != [step["train/loss"] for step in found[1]]
    said = works("eval --task fill --model {out}/1 --data {f}/texts.jsonl --json", f=folder, out=tmp_path).last
    assert said["loss"] == pytest.approx(held_out[0], abs=BOUND)


@pytest.mark.slow
def test_it_learns(folder, tmp_path):
    """Sentences of one word, again and again: accuracy from chance to nearly all."""
    write(tmp_path / "d.jsonl", *({"text": " ".join([word] * 12)} for word in WORDS))
    ask = "eval --task fill --model {model} --data {t}/d.jsonl --json"
    before = works(ask, model=folder / "bert", t=tmp_path).last["accuracy"]
    line = "train --task fill --model {f}/bert --data {t}/d.jsonl --out {t}/run --lr 1e-2 --batch 24 --steps 40"
    works(f"{line} --dropout 0 --kernels reference", f=folder, t=tmp_path)
    assert before < 0.3 < 0.8 < works(ask, model=tmp_path / "run", t=tmp_path).last["accuracy"]


# texts -> sequences


@pytest.mark.parametrize("max_length", [3, 7, 20, 40])
def test_a_long_text_is_cut_into_several(max_length, folder, loaded):
    """With the special tokens around each, and nothing is lost."""
    model, tokenizer = loaded
    texts = corpus.read_all(fill.stream(folder / "texts.jsonl"))
    found = fill.encode(texts, model, tokenizer, max_length)
    assert max(map(len, found)) == max_length and [text.number for text in found] == list(range(len(found)))
    assert not any(text.cut for text in found)
    for text in found:
        assert text.whole[0] == tokenizer.before[0] and text.whole[-1] == tokenizer.behind[0]
    joined = [i for text in found for i in text.whole[1:-1].tolist()]
    assert joined == [i for tokens in tokenizer.encode([t.text for t in texts], special=False) for i in tokens.ids]
    sizes = [len(tokens.ids) for tokens in tokenizer.encode([t.text for t in texts], special=False)]
    assert len(found) == sum(-(-n // (max_length - 2)) for n in sizes)  # no text shares a sequence with another


@pytest.mark.parametrize("max_length", [3, 7, 20, 40])
def test_running_text_is_the_same_from_its_file_and_as_a_stream(max_length, folder, loaded):
    """What `train` reads block by block and `eval` as it comes; also one by one, and where a slice begins."""
    model, tokenizer = loaded
    passages = list(read_passages(folder / "book.txt"))
    want = list(fill.encoded(passages, [True] * len(passages), model, tokenizer, max_length))
    found = fill.encode(corpus.read_all(fill.stream(folder / "book.txt")), model, tokenizer, max_length)
    assert len(found) == len(want) and contents(found) == contents(want)
    assert contents(found[1::2]) == contents(want[1::2]) and contents([found[-1]]) == contents(want[-1:])
    assert all(len(text) == max_length for text in want[:-1])
    joined = [i for text in want for i in text.whole[1:-1].tolist()]
    assert joined == tokenizer.encode([(folder / "book.txt").read_text()], special=False)[0].ids


def test_a_length_without_room(folder, tmp_path):
    line = TRAIN.replace("--max-length 20", "--max-length {n}")
    for data in ("texts.jsonl", "book.txt"):
        for n in (1, 2):
            words = f"--max-length is {n}; expected at least 3, a token between the special ones"
            fails(line, words, f=folder, data=folder / data, out=tmp_path / "out", n=n)
    fails(
        line,
        "--max-length is 41; expected at most 40",
        f=folder,
        data=folder / "texts.jsonl",
        out=tmp_path / "out",
        n=41,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_short_texts_are_no_warning(folder, tmp_path):
    """A step may ask nothing of a text; another step asks."""
    write(tmp_path / "d.jsonl", *({"text": word} for word in WORDS))
    said = works(TRAIN, f=folder, data=tmp_path / "d.jsonl", out=tmp_path / "out")
    assert "nothing is left to learn" not in said.err
    assert any(losses(tmp_path / "out"))


# what is measured and filled in


def test_measures_are_those_of_the_peer(folder, loaded):
    """Loss, perplexity and accuracy over all tokens asked about, however many texts are computed at once."""
    model, tokenizer = loaded
    theirs = transformers.BertForMaskedLM.from_pretrained(folder / "bert").eval()
    total = right = n = 0
    for text in fill.encode(corpus.read_all(fill.stream(folder / "texts.jsonl")), model, tokenizer, 40):
        with torch.no_grad():
            logits = theirs(input_ids=torch.from_numpy(text.ids).long()[None]).logits[0, text.rows]
        targets = torch.from_numpy(text.targets)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        n += len(targets)
    for tokens in (1, 4096):
        config = minift.EvalConfig(task="fill", data=str(folder / "texts.jsonl"), tokens=tokens)
        found = minift.evaluate(model, tokenizer, config)
        assert found["loss"] == pytest.approx(total / n, abs=BOUND) and found["tokens"] == n
        assert found["accuracy"] == pytest.approx(right / n) and found["perplexity"] == pytest.approx(
            np.exp(total / n), rel=1e-4
        )


def test_masks_in_a_text_are_filled(folder, loaded):
    """One, two, and three at once, each with the five likeliest tokens and the peer's probabilities of them."""
    model, tokenizer = loaded
    theirs = transformers.BertForMaskedLM.from_pretrained(folder / "bert").eval()
    texts = ["the [MASK] was good", "the film [MASK] very [MASK]", "[MASK][MASK] [MASK]"]
    found = minift.predict(model, tokenizer, texts)
    assert [len(row["masks"]) for row in found] == [1, 2, 3]
    for text, row in zip(texts, found, strict=True):
        ids = tokenizer.encode([text])[0].ids
        with torch.no_grad():
            scores = theirs(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        places = [i for i, token in enumerate(ids) if token == tokenizer.mask]
        filled = list(ids)
        for place, mask in zip(places, row["masks"], strict=True):
            best = scores[place].topk(5)
            assert list(mask.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
            filled[place] = int(best.indices[0])
        assert row["text"] == tokenizer.decode(filled)


def test_the_command_fills_masks(folder, tmp_path):
    """Of a text, and of a file in its order; the tokens are written out, those without a sign of their own too."""
    row = works('predict --task fill --model {f}/bert --text "the [MASK] was [MASK]"', f=folder).last
    assert len(row["masks"]) == 2 and all(len(mask) == 5 for mask in row["masks"])
    known = {*VOCABULARY, *"abcdefghijklmnopqrstuvwxyz", *(f"token {i}" for i in range(55, 64))}
    assert set(row["masks"][0]) <= known
    write(tmp_path / "d.jsonl", {"text": "a [MASK]"}, {"text": "[MASK] the [MASK] film"}, {"text": "[MASK]"})
    rows = works("predict --task fill --model {f}/bert --data {t}/d.jsonl", f=folder, t=tmp_path).rows
    assert [len(row["masks"]) for row in rows] == [1, 2, 1] and "the" in rows[1]["text"]


def test_a_text_without_a_mask(folder, tmp_path, loaded):
    """All texts are looked at before the first is filled."""
    words = "found no [MASK] in the text; expected one or more"
    assert not fails('predict --task fill --model {f}/bert --text "the film"', f"--text: {words}", f=folder).out
    write(tmp_path / "d.jsonl", {"text": "a [MASK]"}, {"text": "the film"})
    line = "predict --task fill --model {f}/bert --data {t}/d.jsonl"
    assert not fails(line, f"d.jsonl:2: {words}", f=folder, t=tmp_path).out
    refused(minift.predict, loaded[0], words, tokenizer=loaded[1], config=["the film"])


# what cannot be


def test_a_tokenizer_without_a_mask(folder, tmp_path):
    small_bert(tmp_path / "bert")
    write(tmp_path / "bert/vocab.txt", *(token for token in VOCABULARY if token != "[MASK]"))
    line = "train --task fill --model {t}/bert --data {f}/{data} --out {t}/out --kernels reference"
    for data in ("texts.jsonl", "book.txt"):
        fails(line, "the tokenizer has no mask_token", f=folder, t=tmp_path, data=data)
    assert not (tmp_path / "out").exists()


def test_a_family_without_such_a_head(folder, tmp_path):
    words = "gpt2 has no head for fill; expected one of classify, complete"
    for line in (
        "train --task fill --model {f}/gpt2 --data {f}/texts.jsonl --out {t}/out",
        "eval --task fill --model {f}/gpt2 --data {f}/texts.jsonl",
        'predict --task fill --model {f}/gpt2 --text "a [MASK]"',
    ):
        said = fails(line, words, f=folder, t=tmp_path)
        assert said.err.count("error") == 1 and not said.out
    refuse(folder / "gpt2", words, task="fill")


def test_nothing_to_learn_or_to_measure(folder, tmp_path):
    """Texts of no tokens, and held-out ones that nothing is asked of: said before a step is made."""
    put(tmp_path / "none.txt", "\u200b\u200d\n")
    write(tmp_path / "none.jsonl", {"text": "\u200b"})
    for data in ("none.txt", "none.jsonl"):
        words = "nothing to learn from; expected a token or more"
        fails(TRAIN, words, f=folder, data=tmp_path / data, out=tmp_path / "out")
    write(tmp_path / "short.jsonl", {"text": "the"})
    line = f"{TRAIN} --valid {{t}}/short.jsonl"
    words = "--valid: none of the tokens is asked about; expected more text"
    fails(line, words, f=folder, data=folder / "texts.jsonl", out=tmp_path / "out", t=tmp_path)
    line = "eval --task fill --model {f}/bert --data {t}/short.jsonl"
    fails(line, "none of the tokens is asked about; expected more text", f=folder, t=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_model_without_the_head(folder):
    """To be trained it is drawn; to be asked, it has to be there."""
    line = 'predict --task fill --model {f}/body --text "a [MASK]"'
    fails(line, "cls.predictions.transform.dense.weight", "expected a trained head", f=folder)


# adapters


@pytest.mark.slow
def test_an_adapter_beside_the_head(folder, tmp_path):
    """It is learned, saved, asked, and merged; the head stays as it was."""
    works(f"{TRAIN} --method lora --valid 0.2", f=folder, data=folder / "texts.jsonl", out=tmp_path / "run")
    ask = "eval --task fill --model {model} --data {f}/texts.jsonl --json"
    adapted = works(ask, f=folder, model=tmp_path / "run").last
    assert adapted["loss"] != pytest.approx(works(ask, f=folder, model=folder / "bert").last["loss"], abs=1e-4)
    works("merge --model {t}/run --out {t}/merged", t=tmp_path)
    assert "bert, fill" in works("inspect --model {t}/run", t=tmp_path).out
    assert works(ask, f=folder, model=tmp_path / "merged").last["loss"] == pytest.approx(adapted["loss"], abs=BOUND)


def test_an_adapter_beside_a_head_that_is_not_there(folder, tmp_path):
    """It would be saved without the head, and be of no use."""
    line = TRAIN.replace("{f}/bert", "{f}/body")
    words = "cls.predictions.transform.dense is new; expected a model that has it, or --method full"
    fails(f"{line} --method lora", words, f=folder, data=folder / "texts.jsonl", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
