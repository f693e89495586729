"""The last lines of a run: what they say is what the run's files say, and the command in them works.

python -m pytest tests/test_summary.py
"""

import json
import re
import shlex

import pytest
from folders import write
from helpers import Said, cli, metrics, model_and_data, reviews, small_gpt2, works

from minift import tables
from minift.tasks import task_named

FORECASTS = True  # conftest.py
TRAIN = "train --model {f}/model --data {f}/train.tsv --steps 6 --lr 2e-3 --kernels reference"
NAMES = ["learned", "quality", "time", "memory", "forecast", "model", "next"]


def last_lines(said: Said) -> dict[str, str]:
    """The summary by the first word of each line."""
    lines = said.err.splitlines()[-len(NAMES) :]
    assert [line.split()[0] for line in lines] == NAMES, said.err
    assert max(map(len, lines[:5])) <= 80
    return {line.split()[0]: line[10:] for line in lines}


def follow(found: dict[str, str]) -> dict:
    """Runs the command that a summary ends with."""
    assert found["next"].startswith("minift ")
    (row,) = works(found["next"].removeprefix("minift ").replace("...", "a fine film")).rows
    return row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, train.tsv and valid.tsv, in a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("summary") / "a b"
    folder.mkdir()
    return model_and_data(folder, 60, 21)


@pytest.mark.slow
def test_with_a_validation(folder):
    said = works(f"{TRAIN} --valid {{f}}/valid.tsv --eval-every 2 --out {{f}}/run", f=folder)
    found = last_lines(said)
    steps = metrics(folder / "run")
    first_loss = [(s["eval/accuracy"], -s["eval/loss"], s["train/global_step"]) for s in steps if "eval/loss" in s]
    accuracy, _, step = max(first_loss)
    assert found["quality"] == f"accuracy {accuracy:.4f} on 21 examples held out, the best, after step {step}"
    assert found["learned"].startswith("classify: blame, praise (full: ")
    assert re.match(r"6 steps in \d+\.\d s, [\d,]+ tokens/s", found["time"])
    assert re.fullmatch(r"[\d,]+ MB at the peak|[\d,]+ MB on the GPU, [\d,]+ MB at the peak beside it", found["memory"])
    assert found["model"] == f"{folder / 'run/best'} (a model that transformers loads)"
    assert set(follow(found)) == {"label", "scores"}

    # the figures of each label are results, and those of the best validation
    rows = [line.split() for line in said.out.splitlines() if line]
    supports = [int(row[4]) for row in rows if row[0] in ("blame", "praise") and len(row) == 5]
    assert supports == [11, 10]
    right = sum(int(row[1 + i]) for i, row in enumerate(row for row in rows if len(row) == 3 and row[0] != "valid"))
    assert right / 21 == pytest.approx(accuracy)


@pytest.mark.slow
def test_after_a_resume_the_figures_are_still_those_of_the_best(folder):
    """Nothing is left to do for it, but to tell it once more."""
    options = f"{TRAIN} --valid {{f}}/valid.tsv --eval-every 2 --out {{f}}/again"
    first = works(options, f=folder)
    again = works("train --resume --out {f}/again", f=folder)
    assert again.out == first.out
    assert last_lines(again)["quality"] == last_lines(first)["quality"]


@pytest.mark.slow
def test_without_a_validation_an_adapter_and_pairs(folder):
    rows = [{"text": "a film", "pair": "good", "label": "x"}, {"text": "a plot", "pair": "bad", "label": "y"}] * 4
    data = write(folder / "pairs.jsonl", *rows)
    said = works(TRAIN.replace("train.tsv", data.name) + " --method lora --out {f}/pairs", f=folder)
    found = last_lines(said)
    assert not said.out and found["quality"].startswith("training loss 0.") and "--valid" in found["quality"]
    assert "(lora: " in found["learned"] and "an adapter that PEFT loads" in found["model"]
    assert "--pair" in found["next"] and set(follow(found)["scores"]) == {"x", "y"}


def test_a_language_model(tmp_path):
    small_gpt2(tmp_path / "model")
    write(tmp_path / "train.jsonl", *[{"prompt": "a", "completion": "b"}] * 8)
    line = TRAIN.replace("train.tsv", "train.jsonl") + " --task complete --valid 0.25 --out {f}/run"
    found = last_lines(works(line, f=tmp_path))
    assert found["quality"].startswith("loss ") and found["learned"].startswith("complete (full")
    assert set(follow(found)) == {"prompt", "completion"}


@pytest.mark.slow
def test_a_masked_language_model(folder):
    """The command has the tokenizer's own mask in it."""
    write(folder / "texts.txt", *["the film was good and the plot was great"] * 40)
    found = last_lines(works(TRAIN.replace("train.tsv", "texts.txt") + " --task fill --out {f}/fill", f=folder))
    row = works(found["next"].removeprefix("minift ").replace("...", "film")).rows[0]
    assert len(row["masks"]) == 1 and "[MASK]" not in row["text"]


@pytest.mark.slow
def test_many_labels_are_counted(folder):
    rows = [{"text": f"film {i}", "label": f"class {i % 15}"} for i in range(30)]
    data = write(folder / "many.jsonl", *rows)
    said = works(TRAIN.replace("train.tsv", data.name) + " --valid {f}/many.jsonl --out {f}/many", f=folder)
    assert last_lines(said)["learned"].startswith("classify with 15 labels (full")
    assert max(map(len, said.out.splitlines())) <= 80 and "class 14" in said.out


def test_how_to_go_on_is_a_command_for_a_shell(folder, monkeypatch):
    """A folder with a space in its name is quoted."""
    from minift import training
    from minift.runs import Interrupted

    def stop(*_):
        raise Interrupted(2, folder)

    monkeypatch.setattr(training, "loop", stop)
    said = cli(f"{TRAIN} --out {{f}}/stopped", f=folder)
    line = said.err.splitlines()[-1].removeprefix("to go on: ")
    assert said.code == 130 and shlex.split(line)[-1] == str(folder / "stopped")


def test_every_task_names_the_command_that_asks_its_model():
    for name in tables.TASKS:
        assert callable(task_named(name).next_command), name


@pytest.mark.slow
def test_json_has_what_is_shown(folder):
    reviews(folder / "test.tsv", 31, seed=2)
    works(f"{TRAIN} --out {{f}}/plain", f=folder)
    found = works("eval --model {f}/plain --data {f}/test.tsv --json", f=folder).last
    assert {"loss", "accuracy", "macro_f1", "examples"} < set(found)
    assert sum(map(sum, (row.values() for row in found["confusion"].values()))) == found["examples"] == 31
    assert json.dumps(found["by_label"]["blame"]).count("0.") >= 1
