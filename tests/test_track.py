"""The files of a run, the loggers' real libraries, and the progress bar.

python -m pytest tests/test_track.py
"""

import csv
import json
import os
import subprocess
import sys

import pytest
from helpers import command, fails, losses, metrics, model_and_data, python, works

import minift
from minift.measure import track
from minift.tasks import classify

TRAIN = "train --model {f}/model --data {f}/train.tsv --valid 0.2 --out {f}/run --steps 6"


@pytest.fixture
def folder(tmp_path):
    """A folder with model/ and train.tsv."""
    return model_and_data(tmp_path, 40)


@pytest.mark.slow
def test_tensorboard(folder):
    """Read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    works(f"{TRAIN} --log tensorboard", f=folder)
    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [e.step for e in scalars] == list(range(1, 7))
    assert [e.value for e in scalars] == pytest.approx(losses(folder / "run"), rel=1e-6)
    assert {"eval/accuracy", "train/learning_rate", "train/peak_memory"} <= set(events.Tags()["scalars"])
    assert "options/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_wandb_offline(folder):
    """The real library without a network: its own file holds options, curves and the model as an artifact."""
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(folder)}
    line = command(f"{TRAIN} --log wandb", f=folder)
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "run/wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for word in (b"train/loss", b"eval/accuracy", b"weight_decay", b"model.safetensors"):
        assert word in content, word


def test_a_plain_line_comes_when_something_is_done(monkeypatch, capsys):
    """However long the first step takes: nothing is said of the time that is left before it."""
    monkeypatch.setattr(track, "EVERY", 0.0)
    progress = track.Progress(4, "step")
    progress.add(0)
    assert capsys.readouterr().err == ""
    progress.add(2)
    assert capsys.readouterr().err.startswith("step 2/4  00:00 left")


def test_a_task_names_its_own_metrics(folder, monkeypatch):
    """No accuracy anywhere: what is counted, the best metric and --patience are the task's."""

    class Metrics(classify.Metrics):
        best = ("mistakes", min)

        def result(self) -> dict:
            found = super().result()
            hits = found.pop("accuracy")
            return found | {"hits": hits, "mistakes": 1 - hits}

    monkeypatch.setattr(classify, "Metrics", Metrics)
    monkeypatch.setattr(classify, "COUNTED", "hits")
    works(f"{TRAIN} --eval-every 1 --patience 2 --lr 0.000001", f=folder)
    with open(folder / "run/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["step", "train_loss", "train_hits", "valid_loss", "valid_hits", "valid_mistakes"]
    steps = metrics(folder / "run")
    assert [float(row["valid_mistakes"]) for row in rows] == [step["eval/mistakes"] for step in steps]
    assert "train/hits" in steps[0] and not any("accuracy" in name for name in steps[0])
    best = json.loads(next((folder / "run/checkpoints").glob("*/state.json")).read_text())["best"]
    assert best["mistakes"] == min(step["eval/mistakes"] for step in steps)


def test_a_library_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    fails(f"{TRAIN} --log wandb", 'pip install "minift[wandb]"', f=folder)


def test_an_unknown_logger(folder):
    fails(f"{TRAIN} --log tensorbord", "tensorbord", code=2, f=folder)


def test_keep_lines(tmp_path):
    path = tmp_path / "a"
    for n, want in ((2, "1\n2\n"), (0, ""), (9, "1\n2\n3\nhal")):
        path.write_text("1\n2\n3\nhal")
        track.keep_lines(path, n)
        assert path.read_text() == want
    track.keep_lines(tmp_path / "none", 3)


def test_from_python(folder):
    """The README's lines: load, train, evaluate, predict, save."""
    data = str(folder / "train.tsv")
    model, tokenizer = minift.load(folder / "model", task="classify", labels=["blame", "praise"])
    config = minift.TrainConfig(data=data, valid="0.25", out=str(folder / "run"), epochs=1)
    run = minift.train(model, tokenizer, config)
    assert run.model == folder / "run/best" and run.steps == 4 and run.metrics["examples"] == 10
    assert minift.evaluate(model, tokenizer, minift.EvalConfig(data=data))["examples"] == 40
    (one,) = minift.predict(model, tokenizer, minift.PredictConfig(text="a great film"))
    assert set(one) == {"label", "scores"}


@pytest.mark.slow
def test_the_peak_is_this_processs_own():
    """Not that of the process that started it, with which Linux begins to count ru_maxrss."""
    code = "from minift.measure.track import peak_memory; print(peak_memory())"
    large = bytearray(1 << 30)
    large[:: 1 << 12] = b"x" * (1 << 18)  # every page of it
    assert int(python(code)) < 512 << 20 < len(large)
