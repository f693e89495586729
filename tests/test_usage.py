"""What is said of options that are none, of machines that lack something, and of faults of minift's own.

python -m pytest tests/test_usage.py
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import reviews, small_bert
from safetensors.torch import load_file

from minift.cli import COMMANDS, main
from minift.config import TrainConfig
from minift.measure import track
from minift.training import is_better

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ with labels that are not ASCII, train.tsv, and run/, trained on it."""
    folder = tmp_path_factory.mktemp("usage")
    small_bert(folder / "model")
    text = reviews(folder / "train.tsv", 16).read_text()
    (folder / "train.tsv").write_text(text.replace("praise", "schön").replace("blame", "häßlich"))
    assert main(base(folder, folder / "run")) == 0
    return folder


def base(folder, out) -> list[str]:
    return ["train", "--model", str(folder / "model"), "--data", str(folder / "train.tsv"), "--out", str(out),
            "--steps", "1", "--kernels", "reference"]  # fmt: skip


def usage(arguments: list[str], capsys) -> str:
    """What is said of arguments that are refused as bad usage."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(arguments)
    said = capsys.readouterr()
    assert e.value.code == 2 and not said.out and len(said.err.splitlines()) <= 2, said.err
    return said.err


@pytest.mark.parametrize(
    "given, words",
    [
        (["--modle", "x"], "minift train: error: --modle is no option; did you mean --model?"),
        (["--learning-rate=3"], "--learning-rate=3 is no option; did you mean --lr?"),
        (["--batch_size", "3"], "did you mean --batch?"),
        (["--xyzzy"], "--xyzzy is no option\n"),
        (["--tok", "3"], "--tok is no option"),  # an abbreviation would change its meaning with the next option
        (["--task", "classification"], "expected one of classify, complete; did you mean classify?"),
        (["--method", "qlora"], "did you mean lora with --base nf4?"),
        (["--method", "last-0"], "head, bias, norm, last-K"),
        (["--precision", "float16"], "did you mean fp16?"),
        (["--epochs", "2.5"], "argument --epochs: invalid int value: '2.5'"),
        (["--warmup", "inf"], "--warmup is inf; expected a finite number"),
        (["--lr", "nan"], "--lr is nan; expected a finite number"),
        (["--seed", str(2**64)], f"--seed is {2**64}; expected at most {2**63 - 1}"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
    ],
)
def test_options_that_are_none(given, words, folder, capsys):
    arguments = ["train", "--model", "m", "--data", "d", "--out", "o", *given]
    assert words in usage(arguments, capsys)


def test_commands_that_are_none(capsys):
    assert "'trian'" in usage(["trian"], capsys)
    assert "COMMAND" in usage([], capsys)


def test_help_shows_every_default(capsys):
    for name, (cls, _) in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(cls):
            if field.default != "" and field.default is not False:
                assert f"(default {field.default})" in shown, field.name
            assert "\\d" not in shown


# ---- what a machine lacks


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda(folder, tmp_path, capsys):
    assert main([*base(folder, tmp_path / "out"), "--device", "cuda"]) == 1
    assert "--device is 'cuda', but torch finds no CUDA device; expected auto or cpu" in capsys.readouterr().err
    assert main(["predict", "--model", str(folder / "run"), "--text", "a film", "--device", "cuda"]) == 1
    assert "expected auto or cpu" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_compiler_where_one_is_asked_for(folder, tmp_path, monkeypatch, capsys):
    """In a process of its own: here the compiler is known already."""
    command = [sys.executable, "-m", "minift", *base(folder, tmp_path / "out"), "--kernels", "native"]
    environment = os.environ | {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--kernels is 'native', but no C++ compiler was found" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_library_leaves_no_folder(folder, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    arguments = base(folder, tmp_path / "out")
    assert main([*arguments, "--log", name]) == 1
    assert f'pip install "minift[{name}]"' in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(arguments) == 0


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_another_encoding(folder, tmp_path, encoding):
    """Nothing is lost: JSON has escapes of its own, tables show them."""
    (tmp_path / "bad.jsonl").write_text('{"text": "ü\\u2028", "lable": "ж"}\n')
    commands = {
        "predict": ["--model", str(folder / "run"), "--text", "die Häuser ж"],
        "inspect": ["--model", str(folder / "run")],
        "check": ["--data", str(tmp_path / "bad.jsonl"), "--task", "classify"],
    }
    for name, arguments in commands.items():
        command = [sys.executable, "-m", "minift", name, *arguments]
        done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True)
        assert done.returncode == (1 if name == "check" else 0), done.stderr
        if name == "predict":
            assert json.loads(done.stdout.decode(encoding))["label"] in ("schön", "häßlich")


def in_a_shell(line: str, folder, **environment) -> subprocess.CompletedProcess:
    """A line of bash with $minift in it, run in `folder`."""
    minift = f"{sys.executable} -m minift"
    environment = os.environ | {"minift": minift} | environment
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_reader_that_has_enough(folder, tmp_path):
    """`| head` closes the pipe: no error, and nothing on standard error but progress."""
    line = '{"text": "the film was good"}\n'
    (tmp_path / "many.jsonl").write_text(line * 20_000)
    predict = f"$minift predict --model {folder / 'run'} --data many.jsonl"
    done = in_a_shell(f"{predict} | head -n 1; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert done.stdout.splitlines()[1:] == ["141"] and "error" not in done.stderr.lower(), done.stderr


@pytest.mark.slow
def test_closed_streams(folder, tmp_path):
    command = " ".join(base(folder, tmp_path / "out"))
    assert in_a_shell(f"$minift {command} >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "out/last/model.safetensors").exists()


@pytest.mark.slow
def test_no_temporary_folder(folder, tmp_path):
    """Kernels cannot be compiled there; the references run."""
    code = (
        "import sys, tempfile; from minift import cli;"
        "tempfile._candidate_tempdir_list = lambda: []; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *base(folder, tmp_path / "out"), "--kernels", "auto"]
    done = subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and "kernels: PyTorch reference (c++ does not run" in done.stderr, done.stderr


def test_the_home_folder_in_an_option(folder, tmp_path, monkeypatch):
    """A shell does not expand --out=~/run; a folder called ~ is not what anybody means."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = base(folder, "unused")
    assert main([*arguments[: arguments.index("--out")], "--out=~/run", "--steps=1", "--kernels=reference"]) == 0
    assert (tmp_path / "run/last").is_dir() and not (tmp_path / "~").exists()


def test_an_output_folder_that_is_not_utf_8(folder, tmp_path, capsys):
    out = str(tmp_path / "r") + "\udcff"
    assert main(base(folder, out)) == 1
    assert "\\udcff: the name of the folder is not UTF-8" in capsys.readouterr().err and not os.path.exists(out)


def test_names_with_spaces_and_signs(folder, tmp_path):
    place = tmp_path / "a b" / "ü'\"$x"
    shutil.copytree(folder / "model", place / "m o")
    arguments = base(folder, place / "r n")
    arguments[2] = str(place / "m o")
    assert main(arguments) == 0
    assert main(["train", "--resume", "--out", str(place / "r n")]) == 0
    assert main(["predict", "--model", str(place / "r n"), "--text", "a film", "--out", str(place / "p q")]) == 0


# ---- what minift did not expect


def test_a_fault_of_minift(monkeypatch, capsys):
    """One that gets through is told as what it is, with the details in a file to report."""

    def run(config):
        raise KeyError("weird\x1b[31m")

    monkeypatch.setitem(COMMANDS, "inspect", (COMMANDS["inspect"][0], run))
    assert main(["inspect", "--model", "x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("minift: this is a fault of minift, not of your input: KeyError: 'weird\\x1b[31m'")
    path = said.partition("the details are in ")[2].partition(";")[0]
    details = open(path).read()
    os.remove(path)
    assert "Traceback (most recent call last)" in details and "in run" in details and "Traceback" not in said


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: you tried to ...")]
)
def test_out_of_memory(error, monkeypatch, capsys):
    def run(config):
        raise error

    monkeypatch.setitem(COMMANDS, "inspect", (COMMANDS["inspect"][0], run))
    assert main(["inspect", "--model", "x"]) == 1
    said = capsys.readouterr().err
    assert "minift: error: out of memory" in said and "fewer --tokens" in said


# ---- the best of two, and a run's name elsewhere


def test_of_equal_accuracies_the_lower_loss_is_best():
    first = {"accuracy": 0.75, "loss": 0.354}
    assert is_better({"accuracy": 0.75, "loss": 0.259}, first, "accuracy", max)
    assert not is_better({"accuracy": 0.75, "loss": 0.354}, first, "accuracy", max)
    assert not is_better({"accuracy": 0.5, "loss": 0.1}, first, "accuracy", max)
    assert is_better({"accuracy": 1.0, "loss": 0.9}, first, "accuracy", max)


def test_a_run_begun_anew_is_another_at_wandb(tmp_path):
    """And a resumed one the same, also one that an older minift began."""
    first = track.wandb_id(tmp_path, {"resume": False})
    assert track.wandb_id(tmp_path, {"resume": True}) == first
    (tmp_path / "wandb-id").unlink()
    assert track.wandb_id(tmp_path, {"resume": False}) != first
    (tmp_path / "wandb-id").unlink()
    old = track.wandb_id(tmp_path, {"resume": True})
    assert old == track.wandb_id(tmp_path, {"resume": True}) and not (tmp_path / "wandb-id").exists()


# ---- any option, any value

HOSTILE = [
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "1e999",
    "1e-999",
    "0x10",
    "1_0",
    str(2**31),
    str(2**63),
    "9" * 40,
]
HOSTILE += [
    "(",
    "[",
    "*",
    "\\",
    "=",
    "a=",
    "=1",
    "a=b",
    ",",
    ",,",
    "a,b",
    "'",
    "ü",
    "\x1b[31m",
    "x" * 3000,
    "../..",
    "/",
    ".",
]
HOSTILE += ["None", "true", "last-", "last-99", "layer.(", "a=[2", "(=3", "epoch"]


def draws(n: int) -> list[tuple[str, str]]:
    """n pairs of an option of train and a value for it."""
    dice = random.Random(1)
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.type is not bool and f.name not in ("out", "log")]
    return [(dice.choice(names), dice.choice(HOSTILE)) for _ in range(n)]


@pytest.mark.slow
def test_any_option_with_any_value(folder, tmp_path, capsys):
    """It trains, or it is refused in a line or two: no traceback, no hang, no memory without bound, no folder begun."""
    before = track.peak_memory()
    for i, (name, value) in enumerate(draws(250)):
        out = tmp_path / str(i)
        arguments = [*base(folder, out), f"--{name.replace('_', '-')}={value}"]
        if name in ("rank", "alpha", "targets", "exclude", "layers", "rank_pattern", "alpha_pattern"):
            arguments += ["--method", "lora"]
        began = time.monotonic()
        try:
            code = main(arguments)
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr().err
        place = f"--{name} {value!r:.50}: {said}"
        assert code in (0, 1, 2) and "fault of minift" not in said and "Traceback" not in said, place
        assert time.monotonic() - began < 5, place
        if code == 0:
            assert all(t.isfinite().all() for p in out.rglob("*.safetensors") for t in load_file(p).values()), place
        elif "is not finite" not in said and "the loss of step" not in said:
            assert not out.exists(), place
    assert track.peak_memory() - before < 1e9
