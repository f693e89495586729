"""What the data did: the loss of every example, training without some, and how two runs differ.

python -m pytest tests/test_examples.py
"""

import json
import math

import pytest
import torch
from folders import put, weights_in, write
from helpers import cli, examples, fails, metrics, model_and_data, small_model, works

import minift
from minift.data.batch import order, pack
from minift.measure.report import Seen
from minift.ops.dropout import Noise
from minift.reporting import rank_examples
from minift.tasks import task_of

TRAIN = "train --model {f}/model --data {f}/train.tsv --batch 8 --lr 2e-3 --kernels reference"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, train.tsv with 44 examples, and plain/, a run of two epochs of six steps, the last of four examples."""
    folder = model_and_data(tmp_path_factory.mktemp("examples"), 44, 12)
    works(f"{TRAIN} --epochs 2 --out {{f}}/plain", f=folder)
    return folder


def rows_of(run) -> list[dict]:
    """The lines of examples.jsonl."""
    return [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task_name", ["classify", "complete"])
@pytest.mark.parametrize("tokens", [0, 60])
def test_a_loss_is_that_of_the_example_alone(task_name, tokens, tmp_path):
    """Before the first update, with the dropout that is its own, whatever shares a micro-batch with it."""
    model, task = small_model("bert" if task_name == "classify" else "gpt2", tmp_path)
    assert task == task_name
    sequences = examples(task, [20, 7, 13, 31])
    job = minift.prepare(model, tokens=tokens, kernels="reference")
    want = []
    for sequence in sequences:
        batch = pack([sequence])
        with torch.no_grad():
            loss, _ = task_of(model).loss(model, batch, Noise(job.config.seed, 3, batch.keys))
        want.append(loss.item() / len(sequence.targets))
    values, _ = minift.train_step(job, sequences, 3, 1e-3)
    assert list(values["losses"]) == [s.number for s in sequences]
    assert list(values["losses"].values()) == pytest.approx(want, rel=1e-4)


def test_every_example_once_an_epoch_and_their_mean_is_the_steps(folder):
    rows = rows_of(folder / "plain")
    for epoch in (0, 1):
        assert sorted(row["example"] for row in rows if row["epoch"] == epoch) == list(range(44))
    begin = 0
    for step in metrics(folder / "plain"):
        count = 4 if step["train/global_step"] % 6 == 0 else 8
        part = rows[begin : begin + count]
        begin += count
        assert sum(row["loss"] for row in part) / count == pytest.approx(step["train/loss"], rel=1e-5)
    assert begin == len(rows)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_lines(folder, tmp_path):
    """Those of steps after the checkpoint are written once more, not twice."""
    whole = rows_of(folder / "plain")
    works(f"{TRAIN} --epochs 2 --save-every 4 --keep 9 --out {{o}}/run", f=folder, o=tmp_path)
    run = tmp_path / "run"
    for late in (8, 12):
        for path in (run / "checkpoints" / f"step-{late}").rglob("*"):
            path.unlink()
        (run / "checkpoints" / f"step-{late}").rmdir()
    works("train --resume --out {o}/run", o=tmp_path)
    assert rows_of(run) == whole


def test_without_none_is_the_same_to_the_bit_and_without_some_the_others_stay(folder, tmp_path):
    line = f"{TRAIN} --epochs 2 --out {{o}}"
    works(line + "/again", f=folder, o=tmp_path)
    for name, tensor in weights_in(folder / "plain/last").items():
        assert torch.equal(tensor, weights_in(tmp_path / "again/last")[name]), name

    works(line + "/less --without 3,17,40-42", f=folder, o=tmp_path)
    whole, less = rows_of(folder / "plain"), rows_of(tmp_path / "less")
    left = {3, 17, 40, 41, 42}
    assert [r["example"] for r in less] == [r["example"] for r in whole if r["example"] not in left]
    first = [r for r in whole[:8] if r["example"] not in left]  # before anything was learned: dropout is the same too
    assert first == less[: len(first)] and 0 < len(first)
    assert len(metrics(tmp_path / "less")) == 12


@pytest.mark.parametrize("given", ["x", "3,", "9-5", "-1", "1.5"])
def test_wrong_numbers(given, folder):
    said = cli(f"{TRAIN} --out {{f}}/wrong --without={given}", f=folder)
    if given == "3,":
        assert said.code == 0
        return
    assert said.code == 2 and "expected numbers of examples, as 17,203 or 5-9" in said.err


def test_numbers_that_are_not_there_or_are_a_whole_step(folder):
    fails(f"{TRAIN} --out {{f}}/none --without 44", "--without 44: there are 44 examples", f=folder)
    fails(f"{TRAIN} --out {{f}}/none --without 0-43", "--without leaves nothing of step 1 of epoch 1", f=folder)
    assert not (folder / "none").exists()


@pytest.mark.slow
def test_the_steps_that_a_run_takes_are_those_that_need_an_example(folder, tmp_path):
    """With --steps they may be fewer than an epoch's, or more than all epochs'."""
    alone = "--batch 1 --seed 42 --out {o}/few --without"
    first, *_, last = order(44, 42, 0).tolist()
    fails(f"{TRAIN} --steps 3 {alone} {first}", "leaves nothing of step 1 of epoch 1", f=folder, o=tmp_path)
    works(f"{TRAIN} --steps 3 {alone} {last}", f=folder, o=tmp_path)

    second = order(44, 42, 1)[40:].tolist()  # of the last step of the second epoch, whose others are in the first's
    line = f"{TRAIN} --epochs 1 --steps {{steps}} --seed 42 --out {{o}}/many --without {','.join(map(str, second))}"
    fails(line, "leaves nothing of step 6 of epoch 2", f=folder, o=tmp_path, steps=12)
    works(line, f=folder, o=tmp_path, steps=11)


def test_the_hardest_come_first_and_it_is_known_which_were_never_learned(tmp_path):
    """By the mean of their losses, whatever the order of the lines."""
    rows = [(1, 5, 0.1), (0, 5, 0.9), (0, 7, 3.0), (0, 2, 0.1), (1, 7, 2.0), (1, 2, 0.8)]
    lines = [json.dumps({"epoch": e, "example": n, "loss": x}) for e, n, x in rows]
    put(tmp_path / "examples.jsonl", "\n".join(lines) + "\n")
    run = Seen("run", tmp_path)
    rank_examples(run, [])
    assert [(one.number, one.losses) for one in run.hard] == [(7, [3.0, 2.0]), (5, [0.9, 0.1]), (2, [0.1, 0.8])]
    assert [one.never_learned for one in run.hard] == [True, False, True] and 0.69 < math.log(2) < 0.8
    assert run.never_learned == [7, 2] and run.trained_on == 3
    put(tmp_path / "examples.jsonl", "{}\n")
    other = Seen("other", tmp_path)
    rank_examples(other, [])
    assert not other.hard and other.missing == {"hard": ["examples.jsonl has no losses"]}


# ---- two runs


def test_a_run_does_not_differ_from_itself(folder):
    out = works("diff {f}/plain {f}/plain --data {f}/valid.tsv", f=folder).out
    assert "logits: 0 apart at most" in out and "another answer for 0 of 12 targets" in out
    assert all(line.split()[1] == "0.00e+00" for line in out.splitlines() if line.startswith("bert."))


@pytest.mark.slow
def test_near_duplicates_show_what_they_taught(folder, tmp_path):
    """Twelve variants of one sentence, among reviews that never have its words: without them, that is not known."""
    reviews = [line.split("\t") for line in (folder / "train.tsv").read_text().splitlines()]
    taught = [(f"{a} {b} the acting", "praise") for a in ("plot", "scene", "plot plot") for b in ("plot", "scene")] * 2
    rows = [*taught, *((text, label) for text, label in reviews)]
    write(tmp_path / "train.tsv", *rows)
    write(tmp_path / "asked.tsv", ("plot scene the acting", "praise"))
    line = TRAIN.replace("{f}/train.tsv", "{o}/train.tsv") + " --epochs 6 --out {o}"
    works(line + "/all", f=folder, o=tmp_path)
    works(line + "/group --without 0-11", f=folder, o=tmp_path)
    works(line + "/random --without 14,17,21,25,28,31,34,37,41,44,48,52", f=folder, o=tmp_path)

    def change(name: str) -> float:
        out = works(f"diff {{o}}/all {{o}}/{name} --data {{o}}/asked.tsv", o=tmp_path).out
        first, second = next(line.split()[1:] for line in out.splitlines() if line.startswith("loss"))
        return float(second) - float(first)

    assert change("group") > 2 * abs(change("random")) + 0.05


def test_what_cannot_be_compared(folder, tmp_path):
    fails("diff {f}/plain", "found 1 runs; expected two", f=folder)
    fails("diff", "RUN is missing", code=2)
    other = model_and_data(tmp_path, 8)
    works("new --data {o}/train.tsv --out {o}/tiny --width 16 --layers 1 --heads 2", o=other)
    works("train --model {o}/tiny --init random --data {o}/train.tsv --steps 1 --out {o}/run", o=other)
    fails("diff {f}/plain {o}/run", "expected two runs on one model", f=folder, o=other)
