"""The README's commands and its Python, run as they stand, on the built-in models in place of the hub's.

python -m pytest tests/test_readme.py
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from folders import put, write
from helpers import cli
from test_structure import ROOT

from minift.demo import tour

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
ELSEWHERE = ("pip install", "pytest", "python benchmarks/assets.py")  # what CI runs, and what needs a network

HUB = {"bert-base-uncased": "bert-nano", "gpt2": "gpt2-nano"}
PRAISE = ["a lovely evening with friends", "the best film of the year", "warm, funny and well acted"]
BLAME = ["never again", "the plot makes no sense at all", "cold food and a rude waiter"]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A working directory with every file that the README speaks of, small, and models under the names of the hub's."""
    monkeypatch.chdir(tmp_path)
    for name, built_in in HUB.items():
        shutil.copytree(tour.DATA.parent / "models" / built_in, name)
    rows = [(text, label) for texts, label in ((PRAISE, "positive"), (BLAME, "negative")) for text in texts] * 4
    for name in ("reviews.csv", "test.csv"):
        write(Path(name), "text,label", *(f'"{text}",{label}' for text, label in rows))
    for name in ("reviews.jsonl", "test.jsonl"):
        write(Path(name), *({"text": text, "label": label} for text, label in rows))
    for name in ("imdb-train.jsonl", "imdb-test.jsonl"):
        write(Path(name), *({"text": text, "label": int(label == "positive")} for text, label in rows))
    facts = [{"prompt": f"The capital of {a} is", "completion": f" {b}."} for a, b in (("Peru", "Lima"), ("Chad", "N"))]
    write(Path("facts.jsonl"), *facts * 8)
    write(Path("held-out.jsonl"), {"prompt": "The capital of Cuba is", "completion": " Havana."})
    put(Path("book.txt"), "It was a dark and stormy night, and the ship had sailed at dawn. " * 60)
    return tmp_path


def at_hand(text: str) -> str:
    """The text with folders here in place of models of the hub."""
    for name in HUB:
        text = re.sub(rf'(--model |")({name})\b', r"\1./\2", text)
    return text


@pytest.mark.slow
def test_the_commands_work(desk):
    """One after another, as a reader would type them."""
    ran = 0
    for line in COMMANDS:
        if not line or line.startswith(ELSEWHERE):
            continue
        assert line.startswith("minift "), line
        arguments = shlex.split(at_hand(line))[1:]
        if "--limit" in arguments:  # there are fewer here
            arguments[arguments.index("--limit") + 1] = "20"
        said = cli(shlex.join(arguments))
        assert said.code == 0, f"{line}\n{said.err}"
        ran += 1
    assert ran > 12
    runs = {path.name for path in Path("runs").iterdir()}
    assert {"first", "bert", "facts", "book", "field", "tiny", "imdb", "gpt2-lora"} <= runs


@pytest.mark.slow
def test_the_python_runs(desk, capsys):
    """One block after another."""
    code = "\n".join(at_hand(block) for block in BLOCKS).replace("max_length=128", "max_length=32")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert {path.name for path in Path("runs").iterdir()} == {"trainer", "a", "b", "c"}
    assert "{'label': '" in capsys.readouterr().out
    updates = {int(state["step"]) for state in names["job"].optimizer.state.values()}
    assert updates == {10} and names["loss"].isfinite()  # of the steps by hand


def test_a_step_by_hand_is_ten_lines():
    by_hand = next(block for block in BLOCKS if "prepare" in block)
    lines = [line for line in by_hand.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


def test_links_lead_somewhere():
    """To a file or a heading; and the function that is named behind a file's link is in it."""
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)}
    found = re.findall(r"\[[^\]]*\]\(([^)]+)\)(?:,? `(\w+)`)?", README)
    assert len(found) > 25
    for target, name in found:
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).is_file(), target
            assert not name or re.search(rf"\b{name}\b", (ROOT / target).read_text()), (target, name)


def test_the_demo_is_the_one_that_is_shown():
    """What stands in the README is what it prints: its trainings and the texts that it asks about."""
    shown = README[README.index("$ minift demo") :].split("```")[0]
    for job in (*tour.CLASSIFY, tour.COMPLETE):
        assert f"   $ minift {job.command(Path('minift-demo'))}\n" in shown, job
    assert all(f'"{text}"' in shown for text in tour.REVIEWS)
