"""Streaming metrics beside scikit-learn's, in one batch or many, and memory that does not grow.

python -m pytest tests/test_evaluate.py
"""

from functools import partial

import numpy as np
import pytest
import torch
from folders import put, read_examples, refused, write
from helpers import fails, python, random_ids, reviews, sequence, small_bert
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support

import minift
from minift.data import examples
from minift.evaluation import batches, measure
from minift.tasks import classify, confusion
from minift.tasks.classify import Metrics


class FourLabels:
    labels = list("abcd")
    device = "cpu"


@pytest.mark.slow
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

    details = metrics.details()
    theirs = precision_recall_fscore_support(targets, predicted, labels=range(4), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), theirs, strict=True):
        assert [details["by_label"][label][name] for label in "abcd"] == pytest.approx(list(values)), name
    counts = [[details["confusion"][label].get(other, 0) for other in "abcd"] for label in "abcd"]
    assert counts == confusion_matrix(targets, predicted, labels=range(4)).tolist()


# ---- what is told of each label


def told(counts: list[list[int]], labels: list[str], width: int = 80) -> list[str]:
    """What is told of a table of counts; no line of it is wider than asked for."""
    lines = confusion.describe(confusion.by_label(torch.tensor(counts).double(), labels), width)
    assert max(map(len, lines)) <= width, lines
    return lines


def test_a_few_labels_are_told_as_a_table():
    assert told([[34, 23], [30, 1051]], ["negative", "positive"]) == [
        "label     precision  recall      f1  support",
        "negative     0.5312  0.5965  0.5620       57",
        "positive     0.9786  0.9722  0.9754    1,081",
        "",
        "true \\ predicted  negative  positive",
        "negative                34        23",
        "positive                30     1,051",
        "",
        "always answering positive: accuracy 0.9499",
    ]


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_long_names_do_not_wrap(width):
    names = [f"{'very ' * 20}long name number {i}" for i in range(3)]
    lines = told([[5, 1, 0], [9, 5, 0], [0, 0, 5]], names, width)
    head = next(i for i, line in enumerate(lines) if line.split()[:4] == ["wrong", "of", "true", "label"])
    assert lines[head + 1].split()[:2] == ["9", "14"] and lines[head + 2].split()[:2] == ["1", "6"]
    assert not lines[head + 3]  # no other confusion


def test_of_many_labels_the_worst_are_told():
    counts = torch.eye(40) * 10
    counts[3, 4], counts[7, 1] = 6, 2
    lines = told(counts.tolist(), [f"intent_{i}" for i in range(40)])
    assert lines[0].startswith("of 40 labels the 12 with the lowest F1") and lines[2].split()[0] == "intent_3"
    assert "    6  16  intent_3    intent_4" in lines and "    2  12  intent_7    intent_1" in lines
    assert len(lines) < 25


def test_nothing_wrong_among_many():
    assert "no label was taken for another" in told((torch.eye(13) * 2).tolist(), [f"x{i}" for i in range(13)])


def test_the_size_of_batches_changes_nothing(untouched):
    model, _ = minift.load(untouched / "bert", task="classify")
    sequences = [sequence(i, x, rows=[0], targets=[i % 3]) for i, x in enumerate(random_ids([5, 40, 1, 17, 9, 30, 2]))]
    results = [measure(model, sequences, tokens).result() for tokens in (1, 40, 50, 10_000)]
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
assert measure(model, Stream()).result()["examples"] == int(sys.argv[2])
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
    chosen = examples.sample(read_examples(path), 13, seed=3)
    metrics = measure(model, classify.encode(chosen, model, tokenizer, 40))
    want = metrics.result()
    config = minift.EvalConfig(data=str(path), limit=13, seed=3)
    found = minift.evaluate(model, tokenizer, config)
    assert {name: found.pop(name) for name in want} == pytest.approx(want, rel=1e-6) and want["examples"] == 13
    assert found == metrics.details()
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
