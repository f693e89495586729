"""benchmarks/*.py: each runs in its --quick form, by the code of the long one, and its rows hold what a table needs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import all as everything  # noqa: E402
import common  # noqa: E402
import ladder  # noqa: E402
import peers  # noqa: E402
import scaling  # noqa: E402
import step  # noqa: E402

# what each prints with --quick: the words that name its rows
AXES = ("tokens", "length", "width", "depth", "rank", "processes")
STEPS = [f"gpt2-qlora-webnlg {engine}" for engine in ("floor", "minift", "peer", "loop")]
ON_GPU = [f"{case} lora {engine}" for engine in ("minift", "eager") for case in ("bert-128", "gpt2-1024")]
REVIEWS = [
    "bert-nano, fine-tuned",
    "from random weights, the same options",
    "from random weights, its own options",
    "logistic regression, words and pairs",
]
CASES = {
    "ops": ("operator", ["attention", "lora", "nf4", "int8", "dropout", "norm", "gelu", "loss"]),
    "step": ("case engine", STEPS),
    "step --precision bf16 --cases bert-full-imdb --engines floor,compiled": (
        "case engine",
        ["bert-full-imdb floor", "bert-full-imdb compiled"],
    ),
    "ladder": ("case rung", [f"bert-imdb {rung}" for rung in ("longest", "packed", "rows", "bf16")]),
    "all --only quality": ("script result", ["quality done"]),
    "peers --data sst2": ("engine", ["minift", "trainer"]),
    "methods": ("engine", ["qlora", "peft-lora"]),
    "quality --data webnlg": ("engine", ["float32", "int8"]),
    "chars": ("engine", ["minift", "plain"]),
    "nano": ("what", [*REVIEWS, "gpt2-nano", "Kneser-Ney, 5 tokens"]),
    "invariance": ("task processes", ["classify 1", "classify 2"]),
    "plans": ("family method", ["bert lora"]),
    "labels": ("seed", ["42"]),
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
    "took",
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


# results


def test_rows_of_an_earlier_call_are_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"engine": "b", "seed": 1, "loss": 0.5}\nwords\n')
    monkeypatch.setattr(peers, "fresh", lambda case: {"loss": 9})
    given = SimpleNamespace(engines="a,b", seeds="1,2", rows=path)
    found = [(row["engine"], row["seed"], row["loss"]) for row in peers.run_all(given)]
    assert found == [("a", 1, 9), ("b", 1, 0.5), ("a", 2, 9), ("b", 2, 9)]
    given.rows = None
    assert [row["loss"] for row in peers.run_all(given)] == [9] * 4


def test_a_section_replaces_the_one_of_its_key_and_so_do_its_rows(tmp_path):
    path = tmp_path / "RESULTS.md"
    common.write_section(path, "a", "A", "python a.py", [{"x": 1}], "first")
    common.write_section(path, "b", "B", "python b.py", [{"x": 2}], "second", ("a device",))
    common.write_section(path, "a", "A", "python a.py --more", [{"x": 3}], "third")

    text = path.read_text()
    assert "first" not in text and text.index("third") < text.index("second")
    assert "`python a.py --more` on " in text and text.count("## A") == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["a", "b"]
    assert found["a"]["rows"] == [{"x": 3}] and found["a"]["command"] == "python a.py --more"
    assert found["b"]["rows"] == [{"x": 2}] and "a device" in found["b"]["machine"]
    assert all(set(section) == {"command", "date", "machine", "rows"} for section in found.values())


def test_the_reason_of_a_failure_is_the_line_that_names_an_error():
    compiler = [
        "Traceback",
        "torch._inductor.exc.InductorError: CppCompileError: no C++",
        "",
        "Set TORCHDYNAMO_VERBOSE=1",
    ]
    assert common.reason(compiler, 1) == compiler[1]
    assert common.reason(["error: nothing of that kind"], 2) == "error: nothing of that kind"
    assert common.reason(["a warning"], -9) == "ended by signal 9"
    assert common.reason([], 3) == "exit code 3"


def test_what_failed_has_dashes_and_its_reason():
    rows = [
        {"case": "a", "engine": "minift", "step_s": 2.0, "peak_mb": 100.0},
        {"case": "a", "engine": "loop", "step_s": 5.0, "peak_mb": 300.0},
        {"case": "a", "engine": "compiled", "why": "no compiler"},
    ]
    head, _, line = map(cells, step.steps_table(rows, step.BESIDE).splitlines())
    found = dict(zip(head, line, strict=True))
    assert found["loop / minift"] == "2.50" and found["compiled s"] == found["compiled MB"] == "-"
    assert "peer s" not in found
    assert common.failures(rows, "case", "engine") == "\n\n- a, compiled: no compiler"


# the ladder


def test_a_rung_is_the_one_above_with_its_change():
    case = ladder.CASES["bert-imdb"]
    for rung, (_, change) in ladder.RUNGS.items():
        case = case | change
        assert ladder.case_of("bert-imdb", rung, quick=False) == case
    last = {key: case[key] for key in ("engine", "method", "kernels", "tokens", "recompute", "precision", "last_layer")}
    assert list(last.values()) == ["minift", "nf4", "native", 768, True, "bf16", "rows"]


def test_a_last_layer_of_all_tokens_gives_the_same():
    import numpy as np

    import minift
    from minift.data.batch import Sequence, pack

    model, _ = minift.load("builtin:bert-nano", task="classify", labels=["0", "1"])
    rng = np.random.default_rng(1)
    given = [
        Sequence(i, rng.integers(5, 100, n).astype(np.int32), None, np.zeros(1, np.int32), np.array([0]))
        for i, n in enumerate((7, 11))
    ]
    batch = pack(given)
    expected = model(batch)
    seen = []
    model.body.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model(batch)
    ladder.compute_all_tokens(model)
    assert model(batch).detach().numpy() == pytest.approx(expected.detach().numpy(), abs=1e-5)
    assert seen == [2, 18]


# all of them


def test_all_scripts_have_minutes_and_together_no_more_than_there_are():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert {script.line.split(".")[0] for script in everything.SCRIPTS.values()} == scripts - NO_CASES - {"all"}
    on_cpu = {name: script for name, script in everything.SCRIPTS.items() if name != "gpu"}
    assert sum(script.minutes for script in on_cpu.values()) <= everything.BUDGET
    assert everything.chosen("step,ops") == ["ops", "step"]
    with pytest.raises(ValueError, match="nothing"):
        everything.chosen("step,nothing")


@pytest.mark.parametrize("name", everything.SCRIPTS)
def test_a_script_has_the_options_that_it_is_given(name):
    script = everything.SCRIPTS[name]
    sources = [ROOT / "benchmarks" / file for file in (script.line.split()[0], "peers.py")]
    text = "".join(path.read_text() for path in sources)
    words = f"{script.line} {script.options}".split()[1:]
    assert all(f'"{word}"' in text for word in words if word.startswith("--"))
    if "--cases" in words:
        assert set(words[words.index("--cases") + 1].split(",")) <= step.CASES.keys()


def test_what_is_left_goes_by_what_was_taken():
    names = ["ladder", "step"]
    assert everything.minutes_left(names, {}) == sum(everything.SCRIPTS[name].minutes for name in names)
    twice = 2 * everything.SCRIPTS["ladder"].minutes
    assert everything.minutes_left(names, {"ladder": twice}) == 2 * everything.SCRIPTS["step"].minutes


def test_the_others_run_after_one_that_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(everything, "run", lambda name, a: int(name == "ops"))
    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "scaling,ops", "--assets", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: ops") as stopped:
        everything.main()
    assert stopped.value.code != 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines() if line.startswith("{")]
    assert [(row["script"], row["result"]) for row in rows] == [("ops", "failed, exit code 1"), ("scaling", "done")]
    assert "[2/2] scaling" in printed.err
