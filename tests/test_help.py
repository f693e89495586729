"""What `--help` says: commands and examples that work, every option under its heading, nothing wider than the terminal.

python -m pytest tests/test_help.py
"""

import dataclasses
import shlex

import pytest
from helpers import works

from minift.cli import COMMANDS, FIRST, parse
from minift.config import from_args


def lines_of(name: str, width: int, monkeypatch) -> list[str]:
    """The help of a command ("": of minift) on a terminal of this width."""
    monkeypatch.setenv("COLUMNS", str(width))
    return works(f"{name} --help").out.splitlines()


def examples(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.startswith("  minift ")]


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits(name, width, monkeypatch):
    """Only what is to be copied may be wider. Lines of more than a hundred columns are hard to read on any terminal."""
    lines = lines_of(name, width, monkeypatch)
    assert all(len(line) <= min(width, 100) for line in lines if not line.startswith("  minift ")), lines
    assert not any("\x1b" in line or "\t" in line for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_come_first_and_are_understood(name, monkeypatch):
    """By the parser and by the checks of every option."""
    lines = lines_of(name, 80, monkeypatch)
    found = examples(lines)
    assert 1 <= len(found) <= 2 and lines.index(f"  {found[0]}") < lines.index("other:")
    for line in found:
        _, args = parse(shlex.split(line)[1:])
        assert args.command == name and from_args(COMMANDS[name][0], args)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_once_under_a_heading(name, monkeypatch):
    lines = lines_of(name, 80, monkeypatch)
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    fields = [field for field in dataclasses.fields(COMMANDS[name][0]) if "positional" not in field.metadata]
    wanted = [f"--{field.name.replace('_', '-')}" for field in fields]
    assert sorted(flags) == sorted([*wanted, "--config"])
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[-1] == "other:" and "options:" not in headings


def test_the_headings_of_train(monkeypatch):
    lines = lines_of("train", 80, monkeypatch)
    headings = ["model:", "data:", "what is trained:", "steps:", "speed and memory:", "run:", "other:"]
    at = [lines.index(heading) for heading in headings]
    assert at == sorted(at)

    def under(heading: str) -> list[str]:
        """The options between a heading and the next."""
        start = lines.index(heading)
        end = at[headings.index(heading) + 1]
        return [line.split()[0] for line in lines[start:end] if line.startswith("  --")]

    assert "--model" in under("model:") and {"--valid", "--columns"} < set(under("data:"))
    assert {"--method", "--rank", "--base"} < set(under("what is trained:"))
    assert {"--tokens", "--recompute"} < set(under("speed and memory:")) and "--out" in under("run:")


def test_the_overview(monkeypatch):
    """Each command in one line, and the first commands to try, which are understood."""
    lines = lines_of("", 60, monkeypatch)
    for name, (cls, _) in COMMANDS.items():
        assert any(line.split() == [name, *cls.__doc__.splitlines()[0].split()] for line in lines), name
    assert examples(lines) == FIRST.splitlines()
    for line in examples(lines):
        _, args = parse(shlex.split(line)[1:])
        assert from_args(COMMANDS[args.command][0], args)
