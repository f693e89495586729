"""benchmarks/*.py: each runs in its --quick form, by the code of the long one, and its rows hold what a table needs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

# what each prints with --quick: the words that name its rows
AXES = ("tokens", "length", "width", "depth", "rank", "processes")
STEPS = [
    f"{case} {engine}" for case in ("bert-full-imdb", "gpt2-qlora-webnlg") for engine in ("floor", "minift", "peer")
]
ON_GPU = [f"{case} lora {engine}" for engine in ("minift", "eager") for case in ("bert-128", "gpt2-1024")]
REVIEWS = [
    "bert-nano, fine-tuned",
    "from random weights, the same options",
    "from random weights, its own options",
    "logistic regression, words and pairs",
]
CASES = {
    "ops": ("operator", ["attention", "lora", "nf4", "dropout", "norm", "gelu", "loss"]),
    "step": ("case engine", STEPS),
    "peers --data sst2": ("engine", ["minift", "trainer"]),
    "methods": ("engine", ["qlora", "peft-lora"]),
    "chars": ("engine", ["minift", "plain"]),
    "nano": ("what", [*REVIEWS, "gpt2-nano", "Kneser-Ney, 5 tokens"]),
    "invariance": ("task processes", ["classify 1", "classify 2"]),
    "plans": ("family method", ["bert lora"]),
    "gpu": ("case method engine", ON_GPU),
    "scaling": ("axis", [axis for axis in AXES for _ in range(2)] + list(AXES)),  # two points each, then the exponents
}
NO_CASES = {"assets", "builtin", "common", "ngrams"}  # they measure nothing
COSTS = {
    "step_s",
    "peak_mb",
    "floor_s",
    "ms",
    "seconds",
    "tokens_s",
    "tokens_per_second",
    "grown_mb",
    "native",
    "plain",
}


def run(line: str, **options) -> subprocess.CompletedProcess:
    """`python benchmarks/LINE`, with one thread."""
    script, *words = line.split()
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *words]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, **options)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_script_has_a_quick_form_here():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - NO_CASES == {line.split()[0] for line in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("line", CASES)
def test_a_quick_form_prints_its_rows_and_their_table(line, assets):
    done = run(f"{line} --quick")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [json.loads(found) for found in lines if found.startswith("{")]
    names, expected = CASES[line]
    found = [" ".join(str(row[name]) for name in names.split()) for row in rows]
    if line == "ops":  # several shapes of each
        found = list(dict.fromkeys(found))
    assert found == expected

    # every figure is a number, and a cost is above 0; each row has one figure at least
    for row in rows:
        figures = {key: value for key, value in row.items() if isinstance(value, float)}
        assert figures and all(map(math.isfinite, figures.values())), row
        assert all(figures[key] > 0 for key in COSTS & figures.keys()), row

    # the tables stand below the rows, and all lines of one have as many cells as its head
    width = 0
    shown = 0
    for text in lines[lines.index(next(found for found in lines if found.startswith("|"))) :]:
        if not text.startswith("|"):
            width = 0
            continue
        width = width or len(cells(text))
        assert len(cells(text)) == width and "nan" not in cells(text), text
        shown += 1
    assert shown > 2


def test_figures_of_a_quick_form_are_not_written(tmp_path):
    done = run(f"scaling --quick --write {tmp_path}/RESULTS.md")
    assert done.returncode == 2 and "--quick is given with --write" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("e", [-1, 0, 1.5])
def test_the_exponent_of_a_power_law_is_found(e):
    x = [1, 2, 4, 8]
    found, off = scaling.power_law(x, [3 * n**e for n in x])
    assert found == pytest.approx(e, abs=1e-9) and off == pytest.approx(1)


def test_a_cost_that_is_no_power_law_says_so():
    found, off = scaling.power_law([1, 10, 100], [1, 1, 100])
    assert found == pytest.approx(1) and off == pytest.approx(10 ** (2 / 3))


def test_a_step_of_every_axis_has_its_tokens():
    for axis, values in scaling.AXES.items():
        for x in values:
            case = scaling.BASE | {axis: x}
            sequences = scaling.make_sequences(case, 3)
            assert sum(map(len, sequences)) == case["tokens"]
            assert case["width"] % 64 == 0
