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
from folders import put
from helpers import Said, arguments, cli, command, fails, model_and_data, works
from safetensors.torch import load_file

from minift.cli import COMMANDS
from minift.config import TrainConfig
from minift.measure import track
from minift.runs import is_better

TRAIN = "train --model {f}/model --data {f}/train.tsv --out {out} --steps 1 --kernels reference"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ with labels that are not ASCII, train.tsv, and run/, trained on it."""
    folder = model_and_data(tmp_path_factory.mktemp("usage"), 16)
    text = (folder / "train.tsv").read_text()
    put(folder / "train.tsv", text.replace("praise", "schön").replace("blame", "häßlich"))
    works(TRAIN, f=folder, out=folder / "run")
    return folder


def usage(line: str) -> str:
    """What is said of a line that is refused as bad usage."""
    said = fails(line, code=2)
    assert not said.out and len(said.err.splitlines()) <= 2, said.err
    return said.err


@pytest.mark.parametrize("given, words", [
    ("--modle x", "minift train: error: --modle is no option; did you mean --model?"),
    ("--learning-rate=3", "--learning-rate=3 is no option; did you mean --lr?"),
    ("--batch_size 3", "did you mean --batch?"),
    ("--xyzzy", "--xyzzy is no option\n"),
    ("--tok 3", "--tok is no option"),  # an abbreviation would change its meaning with the next option
    ("--task classification", "; did you mean classify?"),
    ("--method qlora", "did you mean lora with --base nf4?"),
    ("--method last-0", "head, bias, norm, last-K"),
    ("--precision float16", "did you mean fp16?"),
    ("--epochs 2.5", "argument --epochs: found '2.5'; expected a whole number"),
    ("--warmup inf", "--warmup is inf; expected a finite number"),
    ("--lr nan", "--lr is nan; expected a finite number"),
    (f"--seed {2**64}", f"--seed is {2**64}; expected at most {2**63 - 1}"),
    ("--seed -1", "--seed is -1; expected at least 0"),
])  # fmt: skip
def test_options_that_are_none(given, words):
    assert words in usage(f"train --model m --data d --out o {given}")


def test_commands_that_are_none():
    for given, words in {"trian": "mean train?", "finetune": "mean train?", "evaluate": "mean eval?"}.items():
        assert f"'{given}' is no COMMAND" in (said := usage(given)) and words in said
    assert "did you mean" not in usage("xyzzy") and "expected one of train, plan, trace, eval" in usage("xyzzy")
    assert "no COMMAND was given" in usage("")


def test_help_shows_every_default():
    for name, (cls, _) in COMMANDS.items():
        shown = " ".join(works(f"{name} --help").out.split())
        for field in dataclasses.fields(cls):
            has_default = field.default is not dataclasses.MISSING  # which words without a flag have not
            if has_default and field.default != "" and field.default is not False:
                assert f"(default {field.default})" in shown, field.name
            assert "\\d" not in shown


# ---- names that are nearly right


def test_a_model_folder_that_is_nearly_there(folder, monkeypatch):
    """Its own name or that of a folder around it; a run is known as such."""
    monkeypatch.chdir(folder)
    for given, near in {
        "modle": "./model",
        "rnu": "./run",
        "./modl": "./model",
        f"{folder}/modell": f"{folder}/model",
        f"{folder.parent}/{folder.name[:-1]}x/model": f"{folder}/model",
    }.items():
        fails(f"predict --model {given} --text a", f"{given}: no such folder (did you mean the folder {near}?)")
    said = fails("predict --model xyzzy --text a", "xyzzy: no such folder, and the hub is not asked").err
    assert "did you mean" not in said and len(said.splitlines()) == 1 and "builtin:" in said


def test_a_data_file_that_is_nearly_there(folder):
    line = "eval --model {f}/run --data "
    fails(line + "{f}/trian.tsv", "trian.tsv: no such file or folder; did you mean", f"{folder}/train.tsv?", f=folder)
    assert "did you mean" not in fails(line + "{f}/xyzzy.tsv", "no such file or folder", f=folder).err


def test_a_run_without_a_model_yet(folder, tmp_path):
    """Its own config.json is no model's."""
    out = tmp_path / "a b"
    works(TRAIN, f=folder, out=out)
    shutil.rmtree(out / "last")
    said = fails("predict --model {out} --text a", "a run that is not finished", out=out).err
    line = said.rpartition("to go on: minift ")[2]
    works(line)
    works("predict --model {out} --text a", out=out)


def test_a_label_that_is_nearly_one(folder, tmp_path):
    data = put(tmp_path / "d.tsv", "a film\tschon\na film\txyzzy\n")
    said = fails("eval --model {f}/run --data {data}", "'schon'; expected one of", f=folder, data=data).err
    assert "did you mean schön?" in said.splitlines()[0] and "did you mean" not in said.splitlines()[1]


@pytest.mark.parametrize("name, content", [
    ("d.jsonl", '{"txt": "a film", "lable": "x", "n": 1}\n{"txt": "a plot", "lable": "y", "n": 2}\n'),
    ("d.jsonl", '{"review": "a film", "sentiment": "x"}\n{"review": "a plot", "sentiment": "y"}\n'),
    ("d.csv", "review_id,txt,lable\n1,a film,x\n2,a plot,y\n"),
    ("d.csv", "text,lable\na film,x\na plot,y\na film,x\n"),
])  # fmt: skip
def test_columns_that_are_called_otherwise(folder, tmp_path, name, content):
    """What is advised works."""
    data = put(tmp_path / name, content)
    line = TRAIN.replace("{f}/train.tsv", "{data}")
    advised = fails(line, "--columns text=", f=folder, data=data, out=tmp_path / "out").err.splitlines()[0]
    columns = advised.rpartition("--columns ")[2].rstrip("?")
    works(line + " --columns {columns}", f=folder, data=data, out=tmp_path / "out", columns=columns)


def test_columns_that_are_not_there_at_all(folder, tmp_path):
    data = put(tmp_path / "d.jsonl", '{"a": "b", "c": "d"}\n')
    said = fails("train --model m --data {data} --out o", "found ['a', 'c'], expected text, label", data=data).err
    assert "did you mean" not in said


# ---- what a machine lacks


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda(folder, tmp_path):
    words = "--device is 'cuda', but torch finds no CUDA device; expected auto or cpu"
    fails(f"{TRAIN} --device cuda", words, f=folder, out=tmp_path / "out")
    fails("predict --model {f}/run --text 'a film' --device cuda", "expected auto or cpu", f=folder)
    assert not (tmp_path / "out").exists()


def process(line: list[str], **environment) -> subprocess.CompletedProcess:
    """A process of its own, with a changed environment."""
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True)


def test_no_compiler_where_one_is_asked_for(folder, tmp_path):
    """In a process of its own: here the compiler is known already."""
    line = f"{TRAIN} --kernels native"
    for words in (line, line.replace("train", "plan", 1)):
        done = process(
            command(words, f=folder, out=tmp_path / "out"),
            CXX="no-such-compiler",
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr and "fault of minift" not in done.stderr
        assert "--kernels is 'native', but no C++ compiler was found" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_library_leaves_no_folder(folder, tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    fails(f"{TRAIN} --log {name}", f'pip install "minift[{name}]"', f=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    works(TRAIN, f=folder, out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_another_encoding(folder, tmp_path, encoding):
    """Nothing is lost: JSON has escapes of its own, tables show them."""
    bad = put(tmp_path / "bad.jsonl", '{"text": "ü\\u2028", "lable": "ж"}\n')
    for line, code in (
        ("predict --model {f}/run --text 'die Häuser ж'", 0),
        ("inspect --model {f}/run", 0),
        ("check --data {bad} --task classify", 1),
    ):
        env = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command(line, f=folder, bad=bad), env=env, capture_output=True)
        assert done.returncode == code, done.stderr
        if line.startswith("predict"):
            assert json.loads(done.stdout.decode(encoding))["label"] in ("schön", "häßlich")


def in_a_shell(line: str, **places) -> subprocess.CompletedProcess:
    """A line of bash with {minift} in it."""
    return process(["bash", "-c", line.format(minift=f"{sys.executable} -m minift", **places)])


@pytest.mark.slow
def test_a_reader_that_has_enough(folder, tmp_path):
    """`| head` closes the pipe: no error, and nothing on standard error but progress."""
    many = put(tmp_path / "many.jsonl", '{"text": "the film was good"}\n' * 20_000)
    line = "{minift} predict --model {f}/run --data {many} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = in_a_shell(line, f=folder, many=many)
    assert done.stdout.splitlines()[1:] == ["141"] and "error" not in done.stderr.lower(), done.stderr


@pytest.mark.slow
def test_closed_streams(folder, tmp_path):
    assert in_a_shell(f"{{minift}} {TRAIN} >&- 2>&-", f=folder, out=tmp_path / "out").returncode == 0
    assert (tmp_path / "out/last/model.safetensors").exists()


@pytest.mark.slow
def test_no_temporary_folder(folder, tmp_path):
    """Kernels cannot be compiled there; the references run."""
    code = (
        "import sys, tempfile; from minift import cli;"
        "tempfile._candidate_tempdir_list = lambda: []; sys.exit(cli.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, *arguments(f"{TRAIN} --kernels auto", f=folder, out=tmp_path / "out")]
    done = process(line, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and "kernels: PyTorch reference (c++ does not run" in done.stderr, done.stderr


def test_the_home_folder_in_an_option(folder, tmp_path, monkeypatch):
    """A shell does not expand --out=~/run; a folder called ~ is not what anybody means."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    works(TRAIN.replace("--out {out}", "--out=~/run"), f=folder)
    assert (tmp_path / "run/last").is_dir() and not (tmp_path / "~").exists()


def test_an_output_folder_that_is_not_utf_8(folder, tmp_path):
    out = str(tmp_path / "r") + "\udcff"
    fails(TRAIN, "\\udcff: the name of the folder is not UTF-8", f=folder, out=out)
    assert not os.path.exists(out)


def test_names_with_spaces_and_signs(folder, tmp_path):
    place = tmp_path / "a b" / "ü'\"$x"
    shutil.copytree(folder / "model", place / "m o")
    works(TRAIN.replace("{f}/model", "{p}/m o".replace(" ", "\\ ")), f=folder, p=place, out=place / "r n")
    works("train --resume --out {p}/r\\ n", p=place)
    works("predict --model {p}/r\\ n --text 'a film' --out {p}/p\\ q", p=place)


# ---- what minift did not expect


def breaks(error: BaseException, monkeypatch) -> Said:
    """What is said where `minift inspect` raises the error."""

    def run(config):
        raise error

    monkeypatch.setitem(COMMANDS, "inspect", (COMMANDS["inspect"][0], run))
    said = cli("inspect --model x")
    assert said.code == 1
    return said


def test_a_fault_of_minift(monkeypatch):
    """One that gets through is told as what it is, with the details in a file to report."""
    said = breaks(KeyError("weird\x1b[31m"), monkeypatch).err
    assert said.startswith("minift: this is a fault of minift, not of your input: KeyError: 'weird\\x1b[31m'")
    path = said.partition("the details are in ")[2].partition(";")[0]
    details = open(path).read()
    os.remove(path)
    assert "Traceback (most recent call last)" in details and "in run" in details and "Traceback" not in said


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: you tried to ...")]
)
def test_out_of_memory(error, monkeypatch):
    said = breaks(error, monkeypatch).err
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
    "", " ", *"nan inf -inf -1 0 1 1e999 1e-999 0x10 1_0".split(), str(2**31), str(2**63), "9" * 40,
    *r"( [ * \ = a= =1 a=b , ,, a,b ' ü".split(), "\x1b[31m", "x" * 3000,
    *"../.. / . None true last- last-99 layer.( a=[2 (=3 epoch".split(),
]  # fmt: skip


def draws(n: int) -> list[tuple[str, str]]:
    """n pairs of an option of train and a value for it."""
    dice = random.Random(1)
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.type is not bool and f.name not in ("out", "log")]
    drawn = [(dice.choice(names), dice.choice(HOSTILE)) for _ in range(n)]
    endless = {("steps", str(2**31)), ("steps", str(2**63)), ("steps", "9" * 40)}  # which are what was asked for
    return [pair for pair in drawn if pair not in endless]


@pytest.mark.slow
def test_any_option_with_any_value(folder, tmp_path):
    """It trains, or it is refused in a line or two: no traceback, no hang, no memory without bound, no folder begun."""
    before = track.peak_memory()
    for i, (name, value) in enumerate(draws(250)):
        out, line = tmp_path / str(i), f"{TRAIN} --{name.replace('_', '-')}={{value}}"
        if name in ("rank", "alpha", "targets", "exclude", "layers", "rank_pattern", "alpha_pattern"):
            line += " --method lora"
        began = time.monotonic()
        code, _, said = cli(line, f=folder, out=out, value=value)
        place = f"--{name} {value!r:.50}: {said}"
        assert code in (0, 1, 2) and "fault of minift" not in said and "Traceback" not in said, place
        assert time.monotonic() - began < 5, place
        if code == 0:
            assert all(t.isfinite().all() for p in out.rglob("*.safetensors") for t in load_file(p).values()), place
        elif "is not finite" not in said and "the loss of step" not in said:
            assert not out.exists(), place
    assert track.peak_memory() - before < 1e9
