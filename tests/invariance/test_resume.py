"""A run that was stopped, killed or met a full disk, and was resumed, is the run that was not: to the bit, dropout on.

python -m pytest tests/invariance/test_resume.py
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import reviews, small_bert
from safetensors.torch import load_file

import minift
from minift.checkpoints import resume as checkpoint
from minift.cli import main
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, train.tsv, valid.tsv, and the run that nothing disturbed in whole/."""
    folder = tmp_path_factory.mktemp("resume")
    small_bert(folder / "model")
    reviews(folder / "train.tsv", 40)
    reviews(folder / "valid.tsv", 20, seed=1)
    assert main(command(folder, "whole")) == 0
    return folder


def command(folder, name):
    """8 steps of 8 examples, 5 an epoch; a checkpoint after every second, a validation after every third."""
    data = ["--data", str(folder / "train.tsv"), "--valid", str(folder / "valid.tsv")]
    return [
        "train",
        "--model",
        str(folder / "model"),
        *data,
        "--out",
        str(folder / name),
        "--steps",
        str(STEPS),
        "--lr",
        "1e-3",
        "--warmup",
        "2",
        "--weight-decay",
        "0.01",
        "--save-every",
        "2",
        "--eval-every",
        "3",
    ]


def result(out):
    """What a run is compared by: all it wrote but times and memory, and its final weights."""
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    values = [
        {k: v for k, v in line.items() if k not in ("train/tokens_per_second", "train/peak_memory")} for line in lines
    ]
    return (
        values,
        (out / "results.csv").read_text(),
        load_file(out / "last/model.safetensors"),
        load_file(out / "best/model.safetensors"),
    )


def check_equal(folder, name):
    """The run in `name` is the undisturbed one."""
    want, found = result(folder / "whole"), result(folder / name)
    assert found[:2] == want[:2]
    for mine, theirs in zip(found[2:], want[2:], strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    states = [json.loads((checkpoint.latest(folder / n) / "state.json").read_text()) for n in ("whole", name)]
    for state in states:  # they were made in different folders
        for name_of_option in ("out", "resume", "save_every", "keep"):
            del state["options"][name_of_option]
    assert states[0] == states[1] and states[0]["step"] == STEPS


def resume(folder, name):
    return main(["train", "--resume", "--out", str(folder / name)])


def test_checkpoints_are_safetensors_and_json_alone(folder):
    assert checkpoint.steps(folder / "whole") == [6, 8]  # --keep 2
    assert sorted(p.name for p in checkpoint.latest(folder / "whole").iterdir()) == [
        "minift.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert not list((folder / "whole").rglob(".minift-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("k", range(1, STEPS))
def test_stopped_at_every_step(folder, number, code, k, monkeypatch, capsys):
    """The step at hand is finished and saved, the way to go on is said, the exit code tells the signal."""
    name, written = f"{number.name}-{k}", track.Tracker.step

    def step(self, values, evaluated=None):
        written(self, values, evaluated)
        if values["train/global_step"] == k:
            signal.raise_signal(number)

    monkeypatch.setattr(track.Tracker, "step", step)
    assert main(command(folder, name)) == code
    assert f"minift train --resume --out {folder / name}" in capsys.readouterr().err
    assert checkpoint.steps(folder / name)[-1] == k + 1  # the signal came before step k + 1, which was finished
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert resume(folder, name) == 0
    check_equal(folder, name)
    shutil.rmtree(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        *(f"step:{k}" for k in range(1, STEPS + 1)),
        *(f"flush:{k}" for k in (2, 4, 6, 7, 8, 9, 11, 15)),
        *(f"rename:{k}" for k in (1, 2, 3)),
        *(f"replace:{k}" for k in (2, 3, 4)),
    ],
)
def test_killed_anywhere(folder, where):
    """SIGKILL before a step is written down, in the middle of a checkpoint, and between writing it and renaming it."""
    name = where.replace(":", "-")
    done = subprocess.run([sys.executable, "-c", KILL, where, *command(folder, name)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for step in checkpoint.steps(folder / name):  # what is there is whole
        assert checkpoint.is_whole(folder / name / f"checkpoints/step-{step}")
    assert resume(folder, name) == 0
    check_equal(folder, name)
    assert not list((folder / name).rglob(".minift-*"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint(folder, monkeypatch, capsys):
    """From step 5 on no file may grow beyond 20 kB: step 6 cannot be saved, step 4 stays whole."""
    written, limits = track.Tracker.step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, values, evaluated=None):
        if values["train/global_step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        written(self, values, evaluated)

    monkeypatch.setattr(track.Tracker, "step", step)
    try:
        assert main(command(folder, "full")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert checkpoint.steps(folder / "full") == [2, 4] and not list((folder / "full/checkpoints").glob(".*"))
    assert "could not be written" in capsys.readouterr().err
    assert resume(folder, "full") == 0
    check_equal(folder, "full")


@pytest.mark.slow
def test_a_really_full_disk(folder, tmp_path, capsys):
    """A file system of 800 kB: the run ends where no more fits, and goes on where there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    try:
        small = [*command(folder, "unused"), "--out", str(disk / "run"), "--keep", "9", "--save-every", "1"]
        assert main(small) == 1
        assert "could not be written" in capsys.readouterr().err
        saved = checkpoint.steps(disk / "run")
        assert saved and all(checkpoint.is_whole(disk / f"run/checkpoints/step-{n}") for n in saved)
        assert not list((disk / "run/checkpoints").glob(".*"))
        shutil.copytree(disk / "run", folder / "moved")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert resume(folder, "moved") == 0
    want, found = result(folder / "whole"), result(folder / "moved")
    assert found[:2] == want[:2] and all(torch.equal(found[2][k], want[2][k]) for k in want[2])


def test_resuming_a_finished_run_changes_nothing(folder):
    before = result(folder / "whole")[0]
    assert resume(folder, "whole") == 0
    assert result(folder / "whole")[0] == before
    check_equal(folder, "whole")


def test_the_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), track.stop_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


# what cannot be resumed


def test_no_run_to_resume(tmp_path, capsys):
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_other_options_are_refused(folder, capsys):
    with pytest.raises(SystemExit) as e:
        main(["train", "--resume", "--out", str(folder / "whole"), "--batch", "16"])
    assert e.value.code == 2 and "--batch is 16; the run in --out began with 8" in capsys.readouterr().err


def test_other_data_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "whole", tmp_path / "run")
    settings = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(
        json.dumps(settings | {"data": str(reviews(tmp_path / "other.tsv", 40, seed=9))})
    )
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 1
    assert "is not what the run began with" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(folder, tmp_path, file, capsys):
    shutil.copytree(folder / "whole", tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run") / file
    path.write_bytes(path.read_bytes()[:-30])
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 1
    assert "step-8: not a whole checkpoint: " in capsys.readouterr().err


def test_patience(folder, tmp_path, capsys):
    """A learning rate of next to nothing gets no better: the first validation is the best, two more are waited for."""
    assert main([*command(folder, "patient"), "--lr", "1e-30", "--patience", "2", "--eval-every", "1"]) == 0
    lines = (folder / "patient/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and "stopped after step 3" in capsys.readouterr().err
    assert minift.load(folder / "patient", task="classify") and os.path.isdir(folder / "patient/last")
