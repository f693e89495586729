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
import termios
import time

import pytest
import transformers
from folders import names_in, write
from helpers import command, fails, losses, metrics, model_and_data, peer, python, real_gpt2, reviews, works

from minift.tasks import classify

FORECASTS = True  # conftest.py
TRAIN = "train --model {run}/model --data {run}/train.tsv"
EVAL = "eval --model {run}/runs/a --data {run}/test.tsv --json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with model/, train.tsv, test.tsv, and runs/a trained from them."""
    folder = model_and_data(tmp_path_factory.mktemp("cli"), 256)
    reviews(folder / "test.tsv", 101, seed=1)
    works(f"{TRAIN} --valid 0.2 --out {{run}}/runs/a --epochs 8 --batch 16 --lr 2e-3 --max-length 16", run=folder)
    return folder


def test_training_learns_and_writes_the_run_folder(run):
    out = run / "runs/a"
    files = ["config.json", "examples.jsonl", "ledger.json", "metrics.jsonl", "results.csv"]
    assert names_in(out) == sorted(["best", "checkpoints", "last", *files])
    steps = metrics(out)
    assert [s["train/global_step"] for s in steps] == list(range(1, 105))  # 205 of 256 to train on: 13 steps an epoch
    names = ("loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second")
    assert {f"train/{name}" for name in names} <= set(steps[0])
    assert sum("eval/accuracy" in s for s in steps) == 8 and steps[-1]["train/epoch"] == 8
    assert steps[-1]["eval/accuracy"] > 0.95 > 0.8 > steps[0]["train/accuracy"]
    rows = list(csv.DictReader(open(out / "results.csv")))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert len(rows) == 104 and rows[12]["valid_loss"] and not rows[11]["valid_loss"]
    assert float(rows[3]["train_loss"]) == steps[3]["train/loss"]


def test_eval(run):
    said = works(EVAL, run=run)
    found = said.last
    assert found["examples"] == 101 and found["accuracy"] > 0.9
    assert abs(found["macro_f1"] - found["accuracy"]) < 0.02
    lines = said.out.splitlines()
    assert lines[1] == f"accuracy  {found['accuracy']:.4f}"
    recall = found["by_label"]["praise"]["recall"]
    assert found["confusion"]["praise"]["praise"] == round(recall * 50) > 40
    assert any(line.split()[0] == "praise" and f"{recall:.4f}" in line for line in lines if line)


def test_predict_agrees_with_eval_and_with_transformers(run, tmp_path):
    """The folder to take away gives the same probabilities in transformers' own pipeline."""
    works("predict --model {run}/runs/a --data {run}/test.tsv --out {out}/p.jsonl", run=run, out=tmp_path)
    predicted = [json.loads(line) for line in open(tmp_path / "p.jsonl")]
    rows = [line.rstrip("\n").split("\t") for line in open(run / "test.tsv")]
    hits = sum(p["label"] == label for p, (_, label) in zip(predicted, rows, strict=True))
    assert works(EVAL, run=run).last["accuracy"] == pytest.approx(hits / 101)

    best = run / "runs/a/best"
    theirs = transformers.pipeline(
        "text-classification",
        model=transformers.AutoModelForSequenceClassification.from_pretrained(best),
        tokenizer=transformers.AutoTokenizer.from_pretrained(best),
        top_k=None,
    )
    for p, answer in zip(predicted[:20], theirs([text for text, _ in rows[:20]]), strict=True):
        assert {a["label"]: a["score"] for a in answer} == pytest.approx(p["scores"], abs=1e-5)


def test_predict_one_text(run):
    (one,) = works("predict --model {run}/runs/a --text 'the film was good'", run=run).rows
    assert one["label"] == "praise" and sum(one["scores"].values()) == pytest.approx(1)


def test_predict_needs_no_labels(run, tmp_path):
    new = write(tmp_path / "new.jsonl", {"text": "the plot was bad"}, {"text": "a great film"})
    said = works("predict --model {run}/runs/a --data {new}", run=run, new=new)
    assert [row["label"] for row in said.rows] == ["blame", "praise"]


def test_inspect(run):
    out = works("inspect --model {run}/runs/a", run=run).out.splitlines()
    assert out[0].split() == ["tensor", "shape", "dtype", "bytes", "trainable"]
    word = next(line for line in out if line.startswith("body.embeddings.word.weight"))
    assert word.split() == ["body.embeddings.word.weight", "64x32", "float32", "8,192", "yes"]
    assert any("classify: blame, praise" in line for line in out)
    assert any(re.match(r"[\d,]+ parameters", line) for line in out)
    learned = out[out.index(f"learned on top of {run / 'model'}:") + 1 :]
    assert learned[0].split()[:2] == ["layer", "rank"] and len(learned) == 1 + 2 * 6 + 1  # and the pooler
    assert learned[1].split()[:2] == ["bert.encoder.layer.0.attention.self.query", "32"]


@pytest.mark.slow
def test_a_run_is_repeated_by_its_config(run):
    """`--config RUN/config.json` with another --out: the same losses, to the bit."""
    works("train --config {run}/runs/a/config.json --out {run}/runs/again", run=run)
    assert losses(run / "runs/a") == losses(run / "runs/again")


def test_limit_steps_and_eval_every(run):
    few = "--valid {run}/test.tsv --limit 40 --steps 5 --eval-every 2 --out {run}/runs/few"
    said = works(f"{TRAIN} {few}", run=run)
    steps = metrics(run / "runs/few")
    assert [("eval/loss" in s) for s in steps] == [False, True, False, True, True]
    assert "40 examples to train on, 101 to validate on" in said.err


@pytest.mark.slow
def test_gpt2_classifies_too(tmp_path, assets):
    """From vocab.json and merges.txt, as old GPT-2 folders have them."""
    real_gpt2(tmp_path / "model", assets, transformers.GPT2Model, n_positions=32)
    reviews(tmp_path / "train.tsv", 64)
    works(f"{TRAIN} --out {{run}}/out --epochs 2", run=tmp_path)
    works("eval --model {run}/out --data {run}/train.tsv", run=tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out/last").pad_token_id == 0


# what goes wrong


def test_bad_input_stops_before_anything_is_written(run, tmp_path):
    write(tmp_path / "bad.jsonl", {"text": "good", "label": 1}, {"text": "bad", "lable": 0})
    reviews(tmp_path / "ok.tsv", 10)
    write(tmp_path / "valid.tsv", ("the film was good", "superb"))
    for data, words in {
        "bad.jsonl": ["bad.jsonl:2", "lable", "label"],
        "none.tsv": ["none.tsv"],
        "ok.tsv --valid {here}/valid.tsv": ["valid.tsv:1", "superb", "blame"],
        "ok.tsv --max-length 41": ["--max-length is 41", "at most 40"],
        "ok.tsv --limit 11": ["--limit", "11"],
    }.items():
        fails(f"train --model {{run}}/model --out {{here}}/run --data {{here}}/{data}", *words, run=run, here=tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_touched(run):
    before = (run / "runs/a/metrics.jsonl").read_bytes()
    fails(f"{TRAIN} --out {{run}}/runs/a", "runs/a", "new or empty", run=run)
    assert (run / "runs/a/metrics.jsonl").read_bytes() == before


def test_eval_refuses_a_model_without_a_trained_head(run):
    fails("eval --model {run}/model --data {run}/test.tsv", "classifier.weight", "trained head", run=run)


def test_a_model_without_tokenizer(run, tmp_path):
    peer(transformers.BertModel, tmp_path / "model")
    fails("train --model {here}/model --data {run}/train.tsv --out {here}/run", "tokenizer", run=run, here=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    fails(f"{TRAIN} --out {{here}}/run --lr 1e30 --clip 0", "loss of step", "examples", run=run, here=tmp_path)


@pytest.mark.parametrize("line, words", [
    ("", ["COMMAND"]),
    ("tarin", ["tarin"]),
    ("train --model m --out y", ["--data is missing"]),
    ("train --model m --data x.tsv --out y --batch 0", ["--batch is 0", "at least 1"]),
    ("train --model m --data x.tsv --out y --batch many", ["many"]),
    ("train --model m --data x.tsv --out y --lr nan", ["--lr is nan"]),
    ("train --model m --data x.tsv --out y --task sing", ["sing", "classify"]),
    ("train --model m --data x.tsv --out y --eval-every day", ["--eval-every is 'day'"]),
    ("train --model m --data x.tsv --out y --dropout 1", ["--dropout is 1.0"]),
    ("predict --model m", ["--data", "--text"]),
    ("predict --model m --data x --text y", ["--data", "--text"]),
])  # fmt: skip
def test_bad_usage(line, words):
    fails(line, *words, code=2)


@pytest.mark.parametrize(
    "text, words",
    [("{", ["JSON"]), ('{"lr": 1, "speed": 2}', ["speed"]), ("[]", ["list"]), ("[" * 10**5, ["JSON", "nested"])],
    ids=["broken", "unknown", "list", "deep"],
)
def test_bad_config_files(tmp_path, text, words):
    fails("train --config {file}", "c.json", *words, file=write(tmp_path / "c.json", text))


def test_a_wrong_type_in_a_config_file(tmp_path):
    fails("train --config {file}", "--batch is '8'", "int", code=2, file=write(tmp_path / "c.json", {"batch": "8"}))


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
    assert "--max-length" in python(code)
    assert time.monotonic() - start < 2


FIVE = f"{TRAIN} --steps 5 --out {{here}}/run"


@pytest.mark.slow
def test_plain_lines_when_piped(run, tmp_path):
    line = command(f"{FIVE} --valid {{run}}/test.tsv", run=run, here=tmp_path)
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = re.search(r"^step 5/5  loss \d\.\d+  [\d,]+ tok/s  00:00 left$", done.stderr, re.M)
    assert last and "\r" not in done.stderr, done.stderr
    results = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert results == [*["valid"] * 4, "label", "blame", "praise", "true", "blame", "praise", "always"]


@pytest.mark.slow
def test_a_bar_on_a_terminal(run, tmp_path):
    """Of 24 lines and 80 columns."""
    main_end, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command(FIVE, run=run, here=tmp_path), stdout=other, stderr=other)
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


def test_check_says_where_a_task_has_no_check(tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "CHECKS", None)
    data = reviews(tmp_path / "train.tsv", 4)
    fails("check --task classify --data {data}", "--task is classify, whose files have no check", data=data)
