"""The README's Python, run as it stands, on a small model in place of bert-base-uncased.

python -m pytest tests/test_readme.py
"""

import re

import pytest
from folders import write
from helpers import small_bert
from test_structure import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.slow
def test_the_python_runs(tmp_path, monkeypatch, capsys):
    """One block after another, as a reader would paste them; runs/a, b and c are there afterwards."""
    monkeypatch.chdir(tmp_path)
    small_bert(tmp_path / "bert-base-uncased")
    rows = [{"text": text, "label": label} for text, label in (("good film", "positive"), ("bad", "negative"))] * 10
    write(tmp_path / "reviews.jsonl", *rows)
    write(tmp_path / "test.jsonl", *rows[:4])
    assert len(BLOCKS) == 3
    code = "\n".join(BLOCKS).replace('"bert-base-uncased"', '"./bert-base-uncased"').replace("128", "32")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"a", "b", "c"}
    assert "{'label': '" in capsys.readouterr().out
    updates = {int(state["step"]) for state in names["job"].optimizer.state.values()}
    assert updates == {10} and names["loss"].isfinite()  # of the steps by hand


def test_a_step_by_hand_is_ten_lines():
    by_hand = next(block for block in BLOCKS if "prepare" in block)
    lines = [line for line in by_hand.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
