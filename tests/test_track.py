"""The files of a run, the loggers' real libraries, and the progress bar.

python -m pytest tests/test_track.py
"""

import json
import subprocess
import sys

import pytest
from helpers import reviews, small_bert

import minift
from minift.cli import main
from minift.measure import track


@pytest.fixture
def arguments(tmp_path):
    small_bert(tmp_path / "model")
    data = reviews(tmp_path / "train.tsv", 40)
    return [
        "train",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(data),
        "--valid",
        "0.2",
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "6",
    ]


@pytest.mark.slow
def test_tensorboard(arguments, tmp_path):
    """Read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*arguments, "--log", "tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    scalars = events.Scalars("train/loss")
    assert [e.step for e in scalars] == list(range(1, 7))
    assert [e.value for e in scalars] == pytest.approx([line["train/loss"] for line in lines], rel=1e-6)
    assert {"eval/accuracy", "train/learning_rate", "train/peak_memory"} <= set(events.Tags()["scalars"])
    assert "options/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_wandb_offline(arguments, tmp_path):
    """The real library without a network: its own file holds options, curves and the model as an artifact."""
    code = "import sys; from minift.cli import main; sys.exit(main(sys.argv[1:]))"
    env = {**__import__("os").environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--log", "wandb"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for word in (b"train/loss", b"eval/accuracy", b"weight_decay", b"model.safetensors"):
        assert word in content, word


def test_a_library_that_is_not_installed(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    assert main([*arguments, "--log", "wandb"]) == 1
    assert 'pip install "minift[wandb]"' in capsys.readouterr().err


def test_an_unknown_logger(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        main([*arguments, "--log", "tensorbord"])
    assert e.value.code == 2 and "tensorbord" in capsys.readouterr().err


def test_keep_lines(tmp_path):
    path = tmp_path / "a"
    for n, want in ((2, "1\n2\n"), (0, ""), (9, "1\n2\n3\nhal")):
        path.write_text("1\n2\n3\nhal")
        track.keep_lines(path, n)
        assert path.read_text() == want
    track.keep_lines(tmp_path / "none", 3)


def test_from_python(tmp_path):
    """The README's lines: load, train, evaluate, predict, save."""
    small_bert(tmp_path / "model")
    data = reviews(tmp_path / "train.tsv", 40)
    model, tokenizer = minift.load(tmp_path / "model", task="classify", labels=["blame", "praise"])
    run = minift.train(
        model, tokenizer, minift.TrainConfig(data=str(data), valid="0.25", out=str(tmp_path / "run"), epochs=1)
    )
    assert run.model == tmp_path / "run/best" and run.steps == 4 and run.metrics["examples"] == 10
    assert minift.evaluate(model, tokenizer, minift.EvalConfig(data=str(data)))["examples"] == 40
    (one,) = minift.predict(model, tokenizer, minift.PredictConfig(text="a great film"))
    assert set(one) == {"label", "scores"}
