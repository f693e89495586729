"""minift as a fork has it: a copy of the tree with some files more, and a line more in a table."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def fork(folder: Path, files: dict[str, str], line: tuple[str, str] | None = None) -> Path:
    """A copy of minift in `folder`, with files of this folder put in places of the tree.

    line: (table of minift/tables.py, the line that it gets).
    """
    for part in ("minift", "kernels"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, place in files.items():
        assert not (folder / place).exists(), f"{place} is there already"
        shutil.copy(HERE / name, folder / place)
    if line:
        table, entry = line
        path = folder / "minift/tables.py"
        before = path.read_text()
        after = before.replace(f"{table} = {{\n", f"{table} = {{\n    {entry},\n")
        assert after.count("\n") == before.count("\n") + 1
        path.write_text(after)
    return folder


def in_fork(folder: Path, *words, code: int = 0) -> subprocess.CompletedProcess:
    """What `python WORDS` does where the fork's minift is the one that is imported; it must end with this code."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == code, done.stderr
    return done
