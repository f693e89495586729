"""A fork's task whose head and PEFT type are those of another task: `claims` tells them apart.

python -m pytest tests/extend/test_tasks_alike.py
"""

import sys
from types import ModuleType

import pytest
from helpers import small_bert, works

import minift
from minift.checkpoints import saving
from minift.cli import task_of
from minift.tables import TASKS
from minift.tasks import classify


@pytest.fixture
def number(monkeypatch):
    """A task "number" with the head of classify, of one output."""
    task = ModuleType("minift.tasks.number")
    vars(task).update({name: value for name, value in vars(classify).items() if not name.startswith("__")})
    task.NAMED_CLASSES = False
    task.make_head = lambda family, config, n_labels: family.HEADS["sequence"](config, 1)
    task.settings = lambda model: {"id2label": {"0": "LABEL_0"}, "problem_type": "regression"}
    task.claims = lambda settings: settings.get("problem_type") == "regression"
    monkeypatch.setitem(sys.modules, task.__name__, task)
    monkeypatch.setitem(TASKS, "number", "a number for a text")


@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_a_folder_says_which_of_them_it_is_for(labels, number, tmp_path):
    """A model and an adapter: those that inspect and merge get no --task for."""
    small_bert(tmp_path / "base")
    wanted = "classify" if labels else "number"
    for kind in ("whole", "adapter"):
        model, tokenizer = minift.load(tmp_path / "base", task=wanted, labels=labels)
        if kind == "adapter":
            minift.adapt(model, "lora", rank=2)
        saving.save(model, tokenizer, tmp_path / kind)
        assert f"bert, {wanted}" in works("inspect --model {folder}", folder=tmp_path / kind).out
    assert task_of(tmp_path / "whole") == minift.load(tmp_path / "adapter")[0].task == wanted
    (tmp_path / "sample.jsonl").write_text('{"text": "a text, and nothing that is right"}\n')
    works("merge --model {t}/adapter --data {t}/sample.jsonl --out {t}/merged", t=tmp_path)
    assert task_of(tmp_path / "merged") == wanted
