"""What a minift of before wrote: it loads, evaluates to the same numbers and is resumed, all to the bit.

python -m pytest tests/test_older.py

The older minift is taken from the repository's history and makes its folders anew: whole models, adapters, NF4.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO

import pytest
from folders import write
from helpers import losses, reviews, small_bert, small_gpt2
from test_structure import ROOT

OLDER = "892e4ec"  # before the rooms of the package, the tables and the checksums of checkpoints

RUNS = {
    "full": "--model bert --data train.tsv",
    "lora over nf4": "--model bert --data train.tsv --method lora --base nf4",
    "dora": "--model bert --data train.tsv --method dora",
    "pissa": "--model bert --data train.tsv --method pissa",
    "head": "--model bert --data train.tsv --method head",
    "gpt2 by lora": "--model gpt2 --task complete --data facts.jsonl --method lora",
    "gpt2 on text": "--model gpt2 --task complete --data text.txt --valid 0.5",
}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A folder with the older minift, two small models and data."""
    folder = tmp_path_factory.mktemp("older")
    found = subprocess.run(["git", "archive", OLDER, "minift", "kernels"], cwd=ROOT, capture_output=True)
    if found.returncode:
        pytest.skip(f"commit {OLDER} is not here: no git checkout, or one without its history")
    with tarfile.open(fileobj=BytesIO(found.stdout)) as archive:
        archive.extractall(folder / "tree", filter="data")
    small_bert(folder / "bert")
    small_gpt2(folder / "gpt2")
    reviews(folder / "train.tsv", 32)
    write(folder / "text.txt", *(f"line {n}" + " and more" * 9 for n in range(500)))  # three pieces
    write(folder / "facts.jsonl", *({"prompt": f"a {n}", "completion": f" b {n % 3}"} for n in range(24)))
    return folder


def minift(folder, tree, line: str) -> str:
    """What a command of the minift in `tree` prints, run in `folder`."""
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-m", "minift", *line.split()], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_is_read_and_resumed_to_the_bit(name, older, tmp_path):
    shutil.copytree(older, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tree"))
    line = f"{RUNS[name]} --epochs 2 --save-every 2 --keep 99 --lr 1e-3 --device cpu"
    minift(tmp_path, older / "tree", f"train {line} --out run")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run/last").glob("*.safetensors")}
    curve = losses(tmp_path / "run")

    words = line.split()
    task = f"--data {words[words.index('--data') + 1]}" + " --task complete" * ("complete" in words)
    told = [minift(tmp_path, tree, f"eval --model run {task} --json") for tree in (older / "tree", ROOT)]
    then, now = (json.loads(text.splitlines()[-1]) for text in told)
    assert then == {name: now[name] for name in then}  # there may be more now

    for path in (tmp_path / "run/checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > 2:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run/last")
    minift(tmp_path, ROOT, "train --resume --out run")
    assert losses(tmp_path / "run") == curve
    assert {path.name: path.read_bytes() for path in (tmp_path / "run/last").glob("*.safetensors")} == whole
