"""minift as a fork has it: a copy of the tree with some files more, and a line more in a table."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from helpers import Said, arguments

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLES = "minift/tables.py"


def fork(folder: Path, files: dict[str, str], lines: dict[str, str], place: str = TABLES) -> Path:
    """A copy of minift in `folder`, with files of this folder put in places of the tree.

    lines: those that are new in the file `place`, each by the line that it goes below.
    """
    for part in ("minift", "kernels"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, new in files.items():
        assert not (folder / new).exists(), f"{new} is there already"
        shutil.copy(HERE / name, folder / new)
    text = (folder / place).read_text()
    for above, line in lines.items():
        assert text.count(f"\n{above}\n") == 1, f"{place}: expected one line {above}"
        text = text.replace(f"\n{above}\n", f"\n{above}\n{line}\n")
    (folder / place).write_text(text)
    return folder


def in_fork(folder: Path, code: str, *words) -> str:
    """What a process prints that runs this code, where the fork's minift is imported; it must end well."""
    path = os.pathsep.join(map(str, (folder, HERE.parent / "ops")))  # for judging.py
    environment = os.environ | {"PYTHONPATH": path}
    line = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = """
import contextlib, io, json, sys
from minift.cli import main
for words in json.loads(sys.argv[1]):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = main(words)
    print(json.dumps([code, *(stream.buffer.getvalue().decode() for stream in streams)]))
"""


def commands(folder: Path, *lines: str, code: int = 0, **places) -> list[Said]:
    """What the fork's `minift LINE` says, for each line, all in one process; each must end with this code."""
    words = [arguments(line, **places) for line in lines]
    out = in_fork(folder, COMMANDS, json.dumps(words))
    said = [Said(*json.loads(line)) for line in out.splitlines()]
    for line, one in zip(lines, said, strict=True):
        assert one.code == code, f"{line}: {one.err}"
    return said


STEP = """
import json, sys, torch, minift
from minift.data.batch import pack
from minift.ops.dropout import SILENT
from minift.tasks import task_named
folder, task, rows, out = sys.argv[1:]
model, tokenizer = minift.load(folder, task=task)
file = task_named(task)
batch = pack(file.encode(file.from_rows(json.loads(rows)), model, tokenizer, 40))
loss, _ = file.loss(model, batch, SILENT)
loss.backward()
gradients = {model.hub_name(name): p.grad for name, p in model.named_parameters()}
with torch.no_grad():
    torch.save({"logits": model.logits(batch), "loss": loss.detach(), "gradients": gradients}, out)
"""


def one_step(folder: Path, model: Path, task: str, rows: list[dict]) -> dict:
    """What the fork computes of these examples without dropout: logits (M, V), loss (), gradients by hub names."""
    out = folder / "step.pt"
    in_fork(folder, STEP, model, task, json.dumps(rows), out)
    return torch.load(out)


def check_gradients(found: dict[str, torch.Tensor], model: torch.nn.Module, tolerance: float = 1e-5) -> None:
    """Compares gradients with those of a model of transformers, relative to the largest of each tensor.

    Those that are 0 but for rounding, as a key's bias, are compared with 0.01 times the tolerance.
    """
    wanted = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        want = wanted[name].grad
        error = (gradient - want).abs().max()
        assert error <= tolerance * want.abs().max().clamp(min=1e-2), f"{name}: {error:.2e} of {want.abs().max():.2e}"
