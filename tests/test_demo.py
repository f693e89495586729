"""`minift demo` as a person runs it first: in an empty folder, with an empty home, without a network.

python -m pytest tests/test_demo.py
"""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from folders import names_in, put
from helpers import command, fails, losses
from test_structure import ROOT

from minift.demo import tour

# put before everything else that a process imports: whoever asks for an address outside is noted, and refused
NO_NETWORK = """
import pathlib, socket
def refuse(*arguments, **options):
    with open(pathlib.Path(__file__).with_name("asked"), "a") as file:
        file.write(f"{arguments}\\n")
    raise OSError("no network")
socket.getaddrinfo = refuse
socket.socket.connect = refuse
"""


def in_a_bare_place(line: str, place: Path) -> subprocess.CompletedProcess:
    """Runs `minift LINE` in place/work, in a process of its own."""
    for name in ("home", "work", "outside"):
        (place / name).mkdir(exist_ok=True)
    put(place / "outside/sitecustomize.py", NO_NETWORK)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(place / "home"),
        "PYTHONPATH": f"{place / 'outside'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",  # where other tests run beside it, threads wait for each other: three times as long
    }
    return subprocess.run(command(line), env=environment, cwd=place / "work", capture_output=True, text=True)


def files_in(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """When each file was written, and what is in it."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def rows_below(head: str, said: str) -> list[list[str]]:
    """The cells of the table in what was said whose last column but two is `head`, without its head."""
    lines = said.split("\n")
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["what", "learns"] and head in line)
    end = lines.index("", start)
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : end]]


@pytest.mark.slow
def test_the_demo(tmp_path):
    """Every training makes it better; every one has its row, its folder and its log; a second demo changes nothing."""
    done = in_a_bare_place("demo", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "outside/asked").exists(), (tmp_path / "outside/asked").read_text()
    out = tmp_path / "work/minift-demo"
    jobs = (*tour.CLASSIFY, tour.COMPLETE)
    assert names_in(tmp_path / "work") == ["minift-demo"]
    data = [path.name for path in tour.DATA.glob("*.jsonl")]
    assert set(names_in(out)) == {*data, *(job.name for job in jobs), *(f"{job.name}.log" for job in jobs)}

    before, *after = rows_below("accuracy", done.stdout)
    assert before[0] == "before" and [row[0] for row in after] == [job.what for job in tour.CLASSIFY]
    at_first = float(before[1].rstrip("%"))
    for name, weights, accuracy, seconds, memory in after:
        assert float(accuracy.rstrip("%")) >= at_first + 3, name  # five of 160 reviews; seen: 9 to 13
        assert int(weights.replace(",", "")) > 10_000 and int(seconds) > 0 and 100 < int(memory.split()[0]) < 2000

    before, after = rows_below("perplexity", done.stdout)
    assert before[0] == "before" and after[0] == tour.COMPLETE.what
    assert float(after[2]) < 0.7 * float(before[1])  # seen: half

    for job in jobs:
        curve = losses(out / job.name)
        assert sum(curve[-20:]) < sum(curve[:20]), job.name
        assert f"--out minift-demo/{job.name}" in done.stdout
    for text in tour.REVIEWS:
        assert done.stdout.count(f'"{text}"\n     before: ') == 1

    found = files_in(out)
    again = in_a_bare_place("demo", tmp_path)
    assert again.returncode == 1 and not again.stdout
    assert "--out minift-demo: is there already; expected a new or empty folder" in again.stderr
    assert files_in(out) == found


def test_a_folder_with_something_in_it(tmp_path):
    """It is left alone, and nothing is trained."""
    put(tmp_path / "notes.txt", "mine")
    fails("demo --out {t}", f"--out {tmp_path}: is there already", t=tmp_path)
    fails("demo --out {t}/notes.txt", "is there already", t=tmp_path)
    assert names_in(tmp_path) == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_training_that_fails_is_told(tmp_path):
    """With the end of its log; those that wait for it do not begin."""
    broken = tour.Job("broken", "nothing", "reviews.train.jsonl", 1, "--lr nothing")
    others = [replace(broken, name=f"other-{i}") for i in range(6)]
    shutil.copy(tour.DATA / broken.data, tmp_path)
    trainings = tour.Trainings(tmp_path)
    trainings.start([broken, *others])
    with pytest.raises(tour.InputError, match="exit code 2; the end of .*broken.log"):
        trainings.costs([broken])
    trainings.stop()
    assert "expected a number" in (tmp_path / "broken.log").read_text()
    assert not (tmp_path / "other-5.log").exists()


@pytest.mark.slow
def test_steps_of_a_training(tmp_path):
    """As many as its curve has lines."""
    job = tour.Job("short", "nothing", "few.jsonl", 2, "--lr 1e-4")
    put(tmp_path / "few.jsonl", "".join(f'{{"text": "number {i}", "label": {i % 2}}}\n' for i in range(9)))
    tour.train_in_process(job, tmp_path)
    assert len((tmp_path / "short/metrics.jsonl").read_text().splitlines()) == job.steps(tmp_path) == 4
