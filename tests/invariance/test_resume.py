"""A run that was stopped, killed or met a full disk, and was resumed, is the run that was not: to the bit, dropout on.

python -m pytest tests/invariance/test_resume.py
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from folders import configure, names_in, no_file_beyond, small_disk, weights_in
from helpers import arguments, fails, metrics, model_and_data, reviews, works

import minift
from minift.checkpoints import resume as checkpoint
from minift.measure import track

STEPS = 8
# runs the command line in a process that kills itself: argv[1] says where, the rest is the command
KILL = """
import os, signal, sys
from minift import cli, files; from minift.measure import track
where, at = sys.argv[1].split(":")
calls = 0
def killing(f):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return call
owners = {"step": track.Tracker, "flush": files, "rename": os, "replace": os}
owner, name = owners[where], where
setattr(owner, name, killing(getattr(owner, name)))
sys.exit(cli.main(sys.argv[2:]))
"""


# 8 steps of 8 examples, 5 an epoch; a checkpoint after every second, a validation after every third
TRAIN = (
    "train --model {f}/model --data {f}/train.tsv --valid {f}/valid.tsv --out {out} --steps 8 --lr 1e-3 --warmup 2"
    " --weight-decay 0.01 --save-every 2 --eval-every 3"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, train.tsv, valid.tsv, and the run that nothing disturbed in whole/."""
    folder = model_and_data(tmp_path_factory.mktemp("resume"), 40, valid=20)
    works(TRAIN, f=folder, out=folder / "whole")
    return folder


def result(out):
    """What a run is compared by: all it wrote but times and memory, and its final weights."""
    values = [
        {k: v for k, v in step.items() if k not in ("train/tokens_per_second", "train/peak_memory")}
        for step in metrics(out)
    ]
    return values, (out / "results.csv").read_text(), weights_in(out / "last"), weights_in(out / "best")


def check_equal(folder, out):
    """The run in `out` is the undisturbed one."""
    want, found = result(folder / "whole"), result(out)
    assert found[:2] == want[:2]
    for mine, theirs in zip(found[2:], want[2:], strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    states = [json.loads((checkpoint.latest(run) / "state.json").read_text()) for run in (folder / "whole", out)]
    for state in states:  # they were made in different folders
        for name_of_option in ("out", "resume", "save_every", "keep"):
            del state["options"][name_of_option]
    assert states[0] == states[1] and states[0]["step"] == STEPS


def check_resumed(folder, out):
    """The run in `out` can be resumed, and is then the undisturbed one."""
    works("train --resume --out {out}", out=out)
    check_equal(folder, out)


def test_checkpoints_are_safetensors_and_json_alone(folder):
    assert checkpoint.steps(folder / "whole") == [6, 8]  # --keep 2
    files = names_in(checkpoint.latest(folder / "whole"))
    assert files == ["minift.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert not list((folder / "whole").rglob(".minift-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("k", range(1, STEPS))
def test_stopped_at_every_step(folder, tmp_path, number, code, k, monkeypatch):
    """The step at hand is finished and saved, the way to go on is said, the exit code tells the signal."""
    written = track.Tracker.step

    def step(self, values, evaluated=None):
        written(self, values, evaluated)
        if values["train/global_step"] == k:
            signal.raise_signal(number)

    monkeypatch.setattr(track.Tracker, "step", step)
    fails(TRAIN, f"minift train --resume --out {tmp_path}", code=code, f=folder, out=tmp_path)
    assert checkpoint.steps(tmp_path)[-1] == k + 1  # the signal came before step k + 1, which was finished
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    check_resumed(folder, tmp_path)


WHERE = {"step": range(1, STEPS + 1), "flush": (2, 4, 6, 7, 8, 9, 11, 15), "rename": (1, 2, 3), "replace": (2, 3, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("where", [f"{call}:{k}" for call, numbers in WHERE.items() for k in numbers])
def test_killed_anywhere(folder, tmp_path, where):
    """SIGKILL before a step is written down, in the middle of a checkpoint, and between writing it and renaming it."""
    line = [sys.executable, "-c", KILL, where, *arguments(TRAIN, f=folder, out=tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_whole(tmp_path)  # what is there is whole
    check_resumed(folder, tmp_path)
    assert not list(tmp_path.rglob(".minift-*"))


def check_whole(run):
    """Every checkpoint of a run is whole."""
    assert all(checkpoint.is_whole(run / f"checkpoints/step-{n}") for n in checkpoint.steps(run))


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint(folder, tmp_path, monkeypatch):
    """From step 5 on no file may grow beyond 20 kB: step 6 cannot be saved, step 4 stays whole."""
    written = track.Tracker.step

    with contextlib.ExitStack() as disk:

        def step(self, values, evaluated=None):
            if values["train/global_step"] == 5:
                disk.enter_context(no_file_beyond(20_000))
            written(self, values, evaluated)

        monkeypatch.setattr(track.Tracker, "step", step)
        fails(TRAIN, "could not be written", f=folder, out=tmp_path)
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path) == [2, 4] and not list((tmp_path / "checkpoints").glob(".*"))
    check_resumed(folder, tmp_path)


@pytest.mark.slow
def test_a_really_full_disk(folder, tmp_path):
    """A file system of 800 kB: the run ends where no more fits, and goes on where there is room."""
    run = tmp_path / "disk/run"
    with small_disk(tmp_path / "disk", "800k"):
        fails(f"{TRAIN} --keep 9 --save-every 1", "could not be written", f=folder, out=run)
        check_whole(run)
        assert checkpoint.steps(run) and not list((run / "checkpoints").glob(".*"))
        shutil.copytree(run, tmp_path / "moved")
    works("train --resume --out {out}", out=tmp_path / "moved")
    want, found = result(folder / "whole"), result(tmp_path / "moved")
    assert found[:2] == want[:2] and all(torch.equal(found[2][k], want[2][k]) for k in want[2])


def test_resuming_a_finished_run_changes_nothing(folder):
    before = result(folder / "whole")[0]
    check_resumed(folder, folder / "whole")
    assert result(folder / "whole")[0] == before


def test_the_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), track.stop_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


# what cannot be resumed


def test_no_run_to_resume(tmp_path):
    fails("train --resume --out {out}", "config.json", out=tmp_path)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the whole run, to be changed."""
    return shutil.copytree(folder / "whole", tmp_path / "run")


def test_other_options_are_refused(copy):
    words = "--batch is 16; the run in --out began with 8"
    fails("train --resume --out {out} --batch 16", words, code=2, out=copy)


def test_other_data_is_refused(copy, tmp_path):
    configure(copy, data=str(reviews(tmp_path / "other.tsv", 40, seed=9)))
    fails("train --resume --out {out}", "is not what the run began with", out=copy)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(copy, file):
    path = checkpoint.latest(copy) / file
    path.write_bytes(path.read_bytes()[:-30])
    fails("train --resume --out {out}", "step-8: not a whole checkpoint: ", out=copy)


def test_patience(folder, tmp_path):
    """A learning rate of next to nothing gets no better: the first validation is the best, two more are waited for."""
    said = works(f"{TRAIN} --lr 1e-30 --patience 2 --eval-every 1", f=folder, out=tmp_path)
    assert len(metrics(tmp_path)) == 3 and "stopped after step 3" in said.err
    assert minift.load(tmp_path, task="classify") and (tmp_path / "last").is_dir()
