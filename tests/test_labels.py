"""Which classes a model gets: those of the data, of --labels, or of the checkpoint it goes on from.

Alone: pytest tests/test_labels.py
"""

import json
import math

import numpy as np
import pytest
import torch
from folders import checked, put, refuse, refused, write
from folders import read_examples as read
from helpers import peer, reviews, small_bert, works
from transformers import BertForSequenceClassification, GPT2ForSequenceClassification

import minift
from minift.checkpoints import saving
from minift.data.labels import label_names, look_alikes

STILL = "--lr 1e-12 --steps 1"  # a run that learns nothing


def train(line: str, **places) -> str:
    """What a training run says."""
    return works(f"train {line} {STILL}", **places).err


def accuracy(model, path) -> float:
    return works("eval --model {model} --data {path} --json", model=model, path=path).last["accuracy"]


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a random classifier of {0: praise, 1: blame}, and data labelled as it predicts: accuracy 1."""
    model, tokenizer = minift.load(small_bert(tmp_path / "base"), task="classify", labels=["praise", "blame"])
    texts = [line.split("\t")[0] for line in reviews(tmp_path / "r.tsv", 40).read_text().splitlines()]
    path = write(tmp_path / "d.tsv", *((text, "?") for text in texts))
    with torch.no_grad():
        model.head.out.weight.normal_(0, 1)
        scores = [row["scores"] for row in predict(model, tokenizer, path)]
        odds = [math.log(row["blame"] / row["praise"]) for row in scores]
        model.head.out.bias[1] -= np.median(odds)  # so that half are predicted to be blame
    saving.save(model, tokenizer, tmp_path / "checkpoint")
    labels = [row["label"] for row in predict(model, tokenizer, path)]
    assert 10 < labels.count("blame") < 30
    return tmp_path / "checkpoint", write(path, *zip(texts, labels, strict=True))


def predict(model, tokenizer, path):
    return list(minift.predict(model, tokenizer, minift.PredictConfig(data=str(path))))


@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_the_same_names_keep_the_order_of_the_checkpoint(checkpoint, tmp_path, method):
    """From a model folder, then from a run folder. Without this accuracy fell from 1 to 0."""
    folder, path = checkpoint
    places = dict(folder=folder, path=path, here=tmp_path)
    said = train(f"--model {{folder}} --data {{path}} --out {{here}}/a --method {method}", **places)
    assert "classes as the checkpoint has them: 0 praise, 1 blame" in said and "labels: praise, blame" in said
    again = train(f"--model {{here}}/a --data {{path}} --out {{here}}/b --method {method}", **places)
    assert "0 praise, 1 blame" in again
    for run in (folder, tmp_path / "a", tmp_path / "b"):
        assert accuracy(run, path) == 1
    name = "minift-model.json" if method == "lora" else "config.json"
    assert json.loads((tmp_path / "b/last" / name).read_text())["id2label"] == {"0": "praise", "1": "blame"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_labels_given_in_another_order_take_their_rows_along(checkpoint, tmp_path, method):
    folder, path = checkpoint
    shared = f"--data {{path}} --method {method}"
    places = dict(folder=folder, path=path, here=tmp_path)
    said = train(f"--model {{folder}} --out {{here}}/a --labels blame,praise {shared}", **places)
    assert "the head's rows were put in the order of --labels: 0 blame, 1 praise" in said
    assert accuracy(tmp_path / "a", path) == 1
    said = train(f"--model {{here}}/a --out {{here}}/b --labels praise,blame {shared}", **places)
    assert "put in the order" in said and accuracy(tmp_path / "b", path) == 1


def test_load_puts_rows_in_the_order_asked_for(checkpoint):
    folder, path = checkpoint
    model, tokenizer = minift.load(folder, task="classify")
    other, _ = minift.load(folder, task="classify", labels=["blame", "praise"])
    assert (model.labels, other.labels) == (["praise", "blame"], ["blame", "praise"])
    assert torch.equal(model.head.out.weight, other.head.out.weight[[1, 0]])
    assert torch.equal(model.head.out.bias, other.head.out.bias[[1, 0]])
    theirs = BertForSequenceClassification.from_pretrained(folder)
    assert theirs.config.id2label == {0: "praise", 1: "blame"}
    assert torch.equal(theirs.classifier.weight, other.head.out.weight[[1, 0]])
    first, second = ([row["scores"] for row in predict(m, tokenizer, path)] for m in (model, other))
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("names", [("good", "bad"), ("good", "bad", "so-so")])
def test_another_set_of_classes_gets_a_new_last_layer(checkpoint, tmp_path, method, names):
    """As many or more: the rows of praise and blame are nobody's any longer, and that is said."""
    folder, path = checkpoint
    texts = [line.split("\t")[0] for line in path.read_text().splitlines()]
    write(tmp_path / "other.tsv", *((text, names[i % len(names)]) for i, text in enumerate(texts)))
    places = dict(folder=folder, path=path, here=tmp_path)
    train(f"--model {{folder}} --data {{path}} --out {{here}}/a --method {method} --seed 1", **places)
    said = train(f"--model {{here}}/a --data {{here}}/other.tsv --out {{here}}/b --method {method} --seed 1", **places)
    assert "2 of other classes, freshly initialised: classifier.weight, classifier.bias" in said
    assert "the checkpoint's classes were praise, blame" in said
    before, after = (minift.load(tmp_path / run, task="classify")[0] for run in "ab")
    assert after.labels == sorted(names) and after.head.out.weight.std() < 0.05 < before.head.out.weight.std()
    if len(names) == 2:  # a row of the checkpoint is nowhere
        assert (after.head.out.weight - before.head.out.weight).abs().max() > 0.1


def test_a_new_last_layer_is_drawn_as_for_a_model_without_one(checkpoint):
    """The same seed, the same draw, whatever stood there: that of transformers after set_seed."""
    folder, _ = checkpoint
    first, _ = minift.load(folder, task="classify", labels=["good", "bad"], seed=5)
    torch.manual_seed(5)
    expected = torch.nn.init.normal_(torch.empty(2, 32), 0, 0.02)
    assert torch.equal(first.head.out.weight, expected) and not first.head.out.bias.any()
    words = ("its classes are ", "'praise', 'blame'", "; expected a head trained for")
    refuse(folder, *words, labels=["good", "bad"], fresh_head=False)


def test_names_that_are_none_leave_the_rows(tmp_path):
    """LABEL_0 and LABEL_1, or 0 and 1, are no names: the rows get those of the data, which is said."""
    for own in (["LABEL_0", "LABEL_1"], ["0", "1"]):
        peer(BertForSequenceClassification, tmp_path, num_labels=2, id2label=dict(enumerate(own)))
        plain, _ = minift.load(tmp_path, task="classify")
        named, _ = minift.load(tmp_path, task="classify", labels=["no", "yes"])
        assert torch.equal(plain.head.out.weight, named.head.out.weight) and named.labels == ["no", "yes"]
        assert "its classes had no names, and are now: 0 no, 1 yes" in str(named.report)


def test_labels_that_are_numbers_are_those_of_the_checkpoints_classes(checkpoint, tmp_path):
    """Data with 0 and 1 for a checkpoint that has names: a dataset's ClassLabel is written so."""
    folder, path = checkpoint
    put(path, path.read_text().replace("praise", "0").replace("blame", "1"))
    said = train("--model {folder} --data {path} --out {here}/a", folder=folder, path=path, here=tmp_path)
    assert "classes as the checkpoint has them: 0 praise, 1 blame" in said
    assert accuracy(tmp_path / "a", path) == 1


def test_gpt2_heads_have_no_bias(tmp_path):
    peer(GPT2ForSequenceClassification, tmp_path, num_labels=3, id2label={0: "c", 1: "a", 2: "b"}, pad_token_id=0)
    first, _ = minift.load(tmp_path, task="classify")
    second, _ = minift.load(tmp_path, task="classify", labels=["a", "b", "c"])
    assert torch.equal(first.head.out.weight[[1, 2, 0]], second.head.out.weight)
    kept, _ = minift.load(tmp_path, task="classify", labels=["a", "b", "c"], ordered=False)
    assert kept.labels == ["c", "a", "b"] and torch.equal(first.head.out.weight, kept.head.out.weight)


# ---- the classes of the data -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_class_that_occurs_once_is_known_though_it_is_held_out(tmp_path):
    """Labels were collected after the split: "unknown label 'rare'" at its line."""
    write(tmp_path / "d.tsv", *[(f"good {i}", "ab"[i % 2]) for i in range(19)], ("so so", "rare"))
    small_bert(tmp_path / "base")
    line = "--model {f}/base --data {f}/d.tsv --valid 0.3"
    # in some of these it is held out
    said = [train(f"{line} --seed {seed} --out {{f}}/run-{seed}", f=tmp_path) for seed in range(12)]
    assert all("labels: a, b, rare" in text for text in said)
    held_out = [text for text in said if "no example to train on has the label rare" in text]
    assert 0 < len(held_out) < len(said)


def test_two_labels_that_look_alike_are_refused(tmp_path):
    path = write(tmp_path / "d.tsv", ("a b", "pos"), ("c d", "neg"), ("e f", "pos "), ("g h", "pos"))
    refused(label_names, read(path), "d.tsv:3: found the label 'pos ', and at d.tsv:1 'pos'; expected one ")
    assert label_names(read(path), '"pos",neg') == ["pos", "neg"]
    report, told = checked(path, "classify")
    assert report.faults == {"labels that look alike": 1}
    assert told == [f"{path}: found the labels 'pos' and 'pos '; expected one spelling"]


@pytest.mark.parametrize("one, other", [
    ("pos", " pos"), ("pos", "pos\xa0"), ("pos", "pos\u200b"), ("caf\xe9", "cafe\u0301"), ("a b", "a  b"),
    ("A", "\uff21"),
])  # fmt: skip
def test_what_looks_alike(one, other):
    assert look_alikes([one, other, "x"]) == [tuple(sorted([one, other]))]
    assert look_alikes(["a", "b", "A", "ab", "\xe9", "e"]) == []


def test_labels_with_commas_are_quoted_as_in_csv(tmp_path):
    given = '"Paris, France", "say ""hi""",other'
    assert label_names([], given) == ["Paris, France", 'say "hi"', "other"]
    for wrong in ('"a, b', '"a"b,c', '""', '"a, b"', "a,"):
        refused(label_names, [], "--labels", given=wrong)


def test_columns_with_commas_are_quoted_too(tmp_path):
    path = write(tmp_path / "d.csv", '"what, in words",gold', "a b,x", "c d,y")
    assert [e.text for e in read(path, '"text=what, in words",label=gold')] == ["a b", "c d"]


def test_labels_are_shown_without_what_a_terminal_acts_on(tmp_path):
    path = write(tmp_path / "d.tsv", ("a b", "\x1b[31mred"), ("c d", "\x1b[31mred"))
    _, told = checked(path, "classify")
    for text in (refused(label_names, read(path)), *told):
        assert text.isprintable() and "[31mred" in text


def test_predictions_of_a_model_with_many_classes(tmp_path):
    """Numbers as names sort as numbers: 10 after 9, and every one is its own id."""
    rng = np.random.default_rng(0)
    path = write(tmp_path / "d.tsv", *[(f"a b {i}", str(rng.integers(12))) for i in range(200)])
    assert label_names(read(path)) == [str(i) for i in range(12)]
