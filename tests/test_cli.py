"""The commands from end to end: train, eval, predict, inspect; what they print and write, and their exit codes.

python -m pytest tests/test_cli.py
"""

import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
import transformers
from helpers import peer, reviews, small_bert

from minift.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with model/, train.tsv, test.tsv, and runs/a trained from them."""
    folder = tmp_path_factory.mktemp("cli")
    small_bert(folder / "model")
    reviews(folder / "train.tsv", 256)
    reviews(folder / "test.tsv", 101, seed=1)
    code = main(
        [
            "train",
            "--model",
            str(folder / "model"),
            "--data",
            str(folder / "train.tsv"),
            "--valid",
            "0.2",
            "--out",
            str(folder / "runs/a"),
            "--epochs",
            "8",
            "--batch",
            "16",
            "--lr",
            "2e-3",
            "--max-length",
            "16",
        ]
    )
    assert code == 0
    return folder


def test_training_learns_and_writes_the_run_folder(run):
    out = run / "runs/a"
    assert sorted(p.name for p in out.iterdir()) == [
        "best",
        "checkpoints",
        "config.json",
        "last",
        "metrics.jsonl",
        "results.csv",
    ]
    steps = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [s["train/global_step"] for s in steps] == list(range(1, 105))  # 205 of 256 to train on: 13 steps an epoch
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "train/tokens_per_second"} <= set(
        steps[0]
    )
    assert sum("eval/accuracy" in s for s in steps) == 8 and steps[-1]["train/epoch"] == 8
    assert steps[-1]["eval/accuracy"] > 0.95 > 0.8 > steps[0]["train/accuracy"]
    rows = list(csv.DictReader(open(out / "results.csv")))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert len(rows) == 104 and rows[12]["valid_loss"] and not rows[11]["valid_loss"]
    assert float(rows[3]["train_loss"]) == steps[3]["train/loss"]


def test_eval(run, capsys):
    assert main(["eval", "--model", str(run / "runs/a"), "--data", str(run / "test.tsv"), "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    metrics = json.loads(out[-1])
    assert (
        metrics["examples"] == 101
        and metrics["accuracy"] > 0.9
        and abs(metrics["macro_f1"] - metrics["accuracy"]) < 0.02
    )
    assert out[1] == f"accuracy  {metrics['accuracy']:.4f}"


def test_predict_agrees_with_eval_and_with_transformers(run, capsys, tmp_path):
    """The folder to take away gives the same probabilities in transformers' own pipeline."""
    assert (
        main(
            [
                "predict",
                "--model",
                str(run / "runs/a"),
                "--data",
                str(run / "test.tsv"),
                "--out",
                str(tmp_path / "p.jsonl"),
            ]
        )
        == 0
    )
    predicted = [json.loads(line) for line in open(tmp_path / "p.jsonl")]
    rows = [line.rstrip("\n").split("\t") for line in open(run / "test.tsv")]
    hits = sum(p["label"] == label for p, (_, label) in zip(predicted, rows, strict=True))
    capsys.readouterr()
    main(["eval", "--model", str(run / "runs/a"), "--data", str(run / "test.tsv"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == pytest.approx(hits / 101)

    best = run / "runs/a/best"
    theirs = transformers.pipeline(
        "text-classification",
        model=transformers.AutoModelForSequenceClassification.from_pretrained(best),
        tokenizer=transformers.AutoTokenizer.from_pretrained(best),
        top_k=None,
    )
    for p, answer in zip(predicted[:20], theirs([text for text, _ in rows[:20]]), strict=True):
        assert {a["label"]: a["score"] for a in answer} == pytest.approx(p["scores"], abs=1e-5)


def test_predict_one_text(run, capsys):
    assert main(["predict", "--model", str(run / "runs/a"), "--text", "the film was good"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["label"] == "praise" and sum(one["scores"].values()) == pytest.approx(1)


def test_predict_needs_no_labels(run, capsys, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"text": "the plot was bad"}\n{"text": "a great film"}\n')
    assert main(["predict", "--model", str(run / "runs/a"), "--data", str(tmp_path / "new.jsonl")]) == 0
    assert [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()] == ["blame", "praise"]


def test_inspect(run, capsys):
    assert main(["inspect", "--model", str(run / "runs/a")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["tensor", "shape", "dtype", "bytes", "trainable"]
    word = next(line for line in out if line.startswith("body.embeddings.word.weight"))
    assert word.split() == ["body.embeddings.word.weight", "64x32", "float32", "8,192", "yes"]
    assert any("classify: blame, praise" in line for line in out) and any(
        re.match(r"[\d,]+ parameters", line) for line in out
    )
    learned = out[out.index(f"learned on top of {run / 'model'}:") + 1 :]
    assert learned[0].split()[:2] == ["layer", "rank"] and len(learned) == 1 + 2 * 6 + 1  # and the pooler
    assert learned[1].split()[:2] == ["bert.encoder.layer.0.attention.self.query", "32"]


def test_a_run_is_repeated_by_its_config(run, capsys):
    """`--config RUN/config.json` with another --out: the same losses, to the bit."""
    assert main(["train", "--config", str(run / "runs/a/config.json"), "--out", str(run / "runs/again")]) == 0
    losses = [
        [json.loads(line)["train/loss"] for line in open(run / name / "metrics.jsonl")]
        for name in ("runs/a", "runs/again")
    ]
    assert losses[0] == losses[1]


def test_limit_steps_and_eval_every(run, capsys):
    assert (
        main(
            [
                "train",
                "--model",
                str(run / "model"),
                "--data",
                str(run / "train.tsv"),
                "--valid",
                str(run / "test.tsv"),
                "--limit",
                "40",
                "--steps",
                "5",
                "--eval-every",
                "2",
                "--out",
                str(run / "runs/few"),
            ]
        )
        == 0
    )
    steps = [json.loads(line) for line in open(run / "runs/few/metrics.jsonl")]
    assert [("eval/loss" in s) for s in steps] == [False, True, False, True, True]
    assert "40 examples to train on, 101 to validate on" in capsys.readouterr().err


@pytest.mark.slow
def test_gpt2_classifies_too(tmp_path, assets, capsys):
    """From vocab.json and merges.txt, as old GPT-2 folders have them."""
    peer(transformers.GPT2Model, tmp_path / "model", vocab_size=50257, n_positions=32)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "model" / name).write_bytes((assets / "weights/tokenizers/gpt2" / name).read_bytes())
    reviews(tmp_path / "train.tsv", 64)
    assert (
        main(
            [
                "train",
                "--model",
                str(tmp_path / "model"),
                "--data",
                str(tmp_path / "train.tsv"),
                "--out",
                str(tmp_path / "run"),
                "--epochs",
                "2",
            ]
        )
        == 0
    )
    assert main(["eval", "--model", str(tmp_path / "run"), "--data", str(tmp_path / "train.tsv")]) == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run/last").pad_token_id == 0


# what goes wrong


def fails(arguments, code, *words, capsys):
    try:
        found = main(arguments)
    except SystemExit as e:  # argparse
        found = e.code
    err = capsys.readouterr().err
    assert found == code, err
    for word in words:
        assert str(word) in err, err
    assert "Traceback" not in err


def test_bad_input_stops_before_anything_is_written(run, tmp_path, capsys):
    base = ["train", "--model", str(run / "model"), "--out", str(tmp_path / "run")]
    (tmp_path / "bad.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "lable": 0}\n')
    fails([*base, "--data", str(tmp_path / "bad.jsonl")], 1, "bad.jsonl:2", "lable", "label", capsys=capsys)
    fails([*base, "--data", str(tmp_path / "none.tsv")], 1, "none.tsv", capsys=capsys)
    reviews(tmp_path / "ok.tsv", 10)
    (tmp_path / "valid.tsv").write_text("the film was good\tsuperb\n")
    fails(
        [*base, "--data", str(tmp_path / "ok.tsv"), "--valid", str(tmp_path / "valid.tsv")],
        1,
        "valid.tsv:1",
        "superb",
        "blame",
        capsys=capsys,
    )
    fails(
        [*base, "--data", str(tmp_path / "ok.tsv"), "--max-length", "41"],
        1,
        "--max-length is 41",
        "at most 40",
        capsys=capsys,
    )
    fails([*base, "--data", str(tmp_path / "ok.tsv"), "--limit", "11"], 1, "--limit", "11", capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_touched(run, capsys):
    before = (run / "runs/a/metrics.jsonl").read_bytes()
    fails(
        ["train", "--model", str(run / "model"), "--data", str(run / "train.tsv"), "--out", str(run / "runs/a")],
        1,
        "runs/a",
        "new or empty",
        capsys=capsys,
    )
    assert (run / "runs/a/metrics.jsonl").read_bytes() == before


def test_eval_refuses_a_model_without_a_trained_head(run, capsys):
    fails(
        ["eval", "--model", str(run / "model"), "--data", str(run / "test.tsv")],
        1,
        "classifier.weight",
        "trained head",
        capsys=capsys,
    )


def test_a_model_without_tokenizer(run, tmp_path, capsys):
    peer(transformers.BertModel, tmp_path / "model")
    fails(
        ["train", "--model", str(tmp_path / "model"), "--data", str(run / "train.tsv"), "--out", str(tmp_path / "run")],
        1,
        "tokenizer",
        capsys=capsys,
    )


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, capsys):
    fails(
        [
            "train",
            "--model",
            str(run / "model"),
            "--data",
            str(run / "train.tsv"),
            "--out",
            str(tmp_path / "run"),
            "--lr",
            "1e30",
            "--clip",
            "0",
        ],
        1,
        "loss of step",
        "examples",
        capsys=capsys,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["COMMAND"]),
        (["tarin"], ["tarin"]),
        (["train", "--data", "x.tsv", "--out", "y"], ["--model is missing"]),
        (["train", "--model", "m", "--data", "x.tsv", "--out", "y", "--batch", "0"], ["--batch is 0", "at least 1"]),
        (["train", "--model", "m", "--data", "x.tsv", "--out", "y", "--batch", "many"], ["many"]),
        (["train", "--model", "m", "--data", "x.tsv", "--out", "y", "--lr", "nan"], ["--lr is nan"]),
        (["train", "--model", "m", "--data", "x.tsv", "--out", "y", "--task", "sing"], ["sing", "classify"]),
        (["train", "--model", "m", "--data", "x.tsv", "--out", "y", "--eval-every", "day"], ["--eval-every is 'day'"]),
        (["train", "--model", "m", "--data", "x.tsv", "--out", "y", "--dropout", "1"], ["--dropout is 1.0"]),
        (["predict", "--model", "m"], ["--data", "--text"]),
        (["predict", "--model", "m", "--data", "x", "--text", "y"], ["--data", "--text"]),
    ],
)
def test_bad_usage(arguments, words, capsys):
    fails(arguments, 2, *words, capsys=capsys)


@pytest.mark.parametrize("text, words", [("{", ["JSON"]), ('{"lr": 1, "speed": 2}', ["speed"]), ("[]", ["list"])])
def test_bad_config_files(tmp_path, text, words, capsys):
    (tmp_path / "c.json").write_text(text)
    fails(["train", "--config", str(tmp_path / "c.json")], 1, "c.json", *words, capsys=capsys)


def test_a_wrong_type_in_a_config_file(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"batch": "8"}')
    fails(["train", "--config", str(tmp_path / "c.json")], 2, "--batch is '8'", "int", capsys=capsys)


# what people see


@pytest.mark.slow
def test_help_answers_at_once():
    """Without importing torch."""
    code = (
        "import sys; from minift.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--max-length" in done.stdout, done.stderr
    assert time.monotonic() - start < 2


@pytest.mark.slow
def test_plain_lines_when_piped(run, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "minift",
            "train",
            "--model",
            run / "model",
            "--data",
            run / "train.tsv",
            "--valid",
            run / "test.tsv",
            "--out",
            tmp_path / "run",
            "--steps",
            "5",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr and re.search(
        r"^step 5/5  loss \d\.\d+  [\d,]+ tok/s  00:00 left$", done.stderr, re.M
    ), done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["valid"] * 4  # results alone


@pytest.mark.slow
def test_a_bar_on_a_terminal(run, tmp_path):
    main_end, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "minift",
            "train",
            "--model",
            run / "model",
            "--data",
            run / "train.tsv",
            "--out",
            tmp_path / "run",
            "--steps",
            "5",
        ],
        stdout=other,
        stderr=other,
    )
    os.close(other)
    seen = b""
    while True:
        try:
            part = os.read(main_end, 4096)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        seen += part
    assert process.wait() == 0
    text = seen.decode()
    assert "\r" in text and "5/5" in text and "loss" in text and "tok/s" in text
