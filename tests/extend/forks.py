"""minift as a fork has it: a copy of the tree with some files more, and one line more in a table."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS, ROOT = HERE.parent, HERE.parents[1]
TABLES = "minift/tables.py"


def fork(folder: Path, files: dict[str, str], line: tuple[str, str], place: str = TABLES) -> Path:
    """A copy of minift in `folder`, with files of this folder put in places of the tree.

    line: (a table, the line that it gets); place: the file that the table stands in.
    """
    for part in ("minift", "kernels"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, new in files.items():
        assert not (folder / new).exists(), f"{new} is there already"
        shutil.copy(HERE / name, folder / new)
    table, entry = line
    before = (folder / place).read_text()
    after = before.replace(f"\n{table} = {{\n", f"\n{table} = {{\n    {entry},\n")
    assert after.count("\n") == before.count("\n") + 1, f"{place}: no table {table}"
    (folder / place).write_text(after)
    return folder


def in_fork(folder: Path, code: str, *words) -> str:
    """What a process prints that runs this code, where the fork's minift is imported; it must end well.

    `from helpers import ...` works there as in a test. One process for several commands: each imports torch first.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, TESTS)))}
    line = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout
