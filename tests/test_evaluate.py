"""Streaming metrics beside scikit-learn's, in one batch or many, and memory that does not grow.

python -m pytest tests/test_evaluate.py
"""

from functools import partial

import numpy as np
import pytest
import torch
from folders import put, refused, write
from helpers import fails, python, random_ids, reviews, sequence, small_bert
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss

import minift
from minift.data import examples
from minift.evaluation import batches, measure
from minift.tasks import classify
from minift.tasks.classify import Metrics


class FourLabels:
    labels = list("abcd")
    device = "cpu"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 7))
def test_metrics_are_scikit_learns(pairs, size):
    rng = np.random.default_rng(0)
    targets = torch.tensor([t for t, _ in pairs])
    z = torch.from_numpy(rng.normal(size=(len(pairs), 4)))
    z[range(len(pairs)), [p for _, p in pairs]] += 9
    metrics = Metrics(FourLabels)
    for i in range(0, len(pairs), size):
        metrics.count(z[i : i + size], targets[i : i + size])
    found, predicted = metrics.result(), [p for _, p in pairs]
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert found["loss"] == pytest.approx(log_loss(targets, z.softmax(-1), labels=range(4)), rel=1e-5, abs=1e-6)


def test_the_size_of_batches_changes_nothing(untouched):
    model, _ = minift.load(untouched / "bert", task="classify")
    sequences = [sequence(i, x, rows=[0], targets=[i % 3]) for i, x in enumerate(random_ids([5, 40, 1, 17, 9, 30, 2]))]
    results = [measure(model, sequences, tokens) for tokens in (1, 40, 50, 10_000)]
    assert all(r == pytest.approx(results[0], rel=1e-5) for r in results)
    sizes = [b.ids.numel() for b in batches(sequences, 50)]
    assert sum(sizes) == 104 and max(sizes) <= 50


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(untouched):
    """Ten times the examples, the same peak: in fresh processes, the data made as it is asked for."""
    code = """
import sys, resource, minift
from helpers import sequence
from minift.evaluation import measure
class Stream:
    def __iter__(self):
        return (sequence(i, [1 + i % 90] * 39, rows=[0], targets=[i % 3]) for i in range(int(sys.argv[2])))
model, _ = minift.load(sys.argv[1], task="classify")
assert measure(model, Stream())["examples"] == int(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    tests = __file__.rsplit("/", 1)[0]
    peaks = [int(python(code, untouched / "bert", n, cwd=tests)) for n in (3_000, 30_000)]
    assert peaks[1] < peaks[0] * 1.03


def words_of(folder, names=("blame", "praise"), **changes):
    """A small BERT with a random head, and its tokenizer."""
    model, tokenizer = minift.load(small_bert(folder, **changes), task="classify", labels=list(names))
    return model, tokenizer


def test_limit_draws_the_same_examples_from_a_stream(tmp_path):
    """As when all were read and encoded first."""
    model, tokenizer = words_of(tmp_path / "bert")
    path = reviews(tmp_path / "d.tsv", 50)
    chosen = examples.sample(examples.read_examples(path), 13, seed=3)
    want = measure(model, classify.encode(chosen, model, tokenizer, 40))
    config = minift.EvalConfig(data=str(path), limit=13, seed=3)
    assert minift.evaluate(model, tokenizer, config) == pytest.approx(want, rel=1e-6) and want["examples"] == 13
    config = minift.EvalConfig(data=str(path), limit=51)
    refused(partial(minift.evaluate, model, tokenizer), config, "--limit 51: the data has 50 examples")


def test_a_fault_at_the_end_of_a_file_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    model, tokenizer = words_of(tmp_path / "bert")
    monkeypatch.setattr(type(model), "logits", lambda *_: pytest.fail("computed something"))
    evaluate, predict = partial(minift.evaluate, model, tokenizer), first_prediction(model, tokenizer)
    whole, bad = reviews(tmp_path / "d.tsv", 2500).read_text(), tmp_path / "bad.tsv"
    put(bad, whole + "good\tother\n")
    refused(evaluate, minift.EvalConfig(data=str(bad)), "bad.tsv:2501: unknown label 'other'")
    put(bad, whole + " \tpraise\n")
    refused(evaluate, minift.EvalConfig(data=str(bad)), "bad.tsv:2501: text is empty")
    refused(predict, minift.PredictConfig(data=str(bad)), "bad.tsv:2501: text is empty")
    refused(predict, minift.PredictConfig(data="gone.tsv"), "gone.tsv: no such file")


def first_prediction(model, tokenizer):
    """A function of a PredictConfig."""
    return lambda config: next(minift.predict(model, tokenizer, config))


@pytest.mark.parametrize("change", ["shorter", "longer", "faulty"])
def test_a_file_that_changes_between_the_two_passes(tmp_path, change):
    model, tokenizer = words_of(tmp_path / "bert")
    path = reviews(tmp_path / "d.tsv", 20)
    whole = path.read_text()
    examples = classify.stream(path)
    labels = classify.judge(examples, model, tokenizer)
    path.write_text({"shorter": whole[: len(whole) // 2], "longer": whole + whole, "faulty": whole + "\t\n"}[change])
    with pytest.raises(minift.InputError, match="d.tsv.*(has changed while it was read|found|empty)"):
        list(classify.encoded(examples, labels, model, tokenizer, 40))


def test_a_pair_where_the_model_has_one_type(tmp_path):
    """It was an IndexError inside the embedding, and train left a run folder."""
    model, tokenizer = words_of(tmp_path / "bert", type_vocab_size=1)
    rows = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}, {"text": "a", "pair": "b", "label": "a"}]
    path = write(tmp_path / "d.jsonl", *rows)
    predict, words = first_prediction(model, tokenizer), "d.jsonl:3: found a pair of texts"
    more = ["the second of type 1; expected single texts", " type_vocab_size is 1"]
    refused(predict, minift.PredictConfig(data=str(path)), words, *more)
    refused(predict, minift.PredictConfig(text="a", pair="b"), "--text: found a pair of texts")
    assert predict(minift.PredictConfig(text="a"))
    fails("train --model {f}/bert --data {f}/d.jsonl --out {f}/run", words, f=tmp_path)
    assert not (tmp_path / "run").exists()


def test_batches_are_a_stream():
    """The first batch comes before the last example is read."""
    read = []
    sequences = (read.append(i) or sequence(i, [1, 2, 3], rows=[0]) for i in range(10))
    next(batches(sequences, 3))
    assert len(read) == 2
