"""The shape of the house: who imports whom, what an import does, what the wheel holds, what the README promises.

python -m pytest tests/test_structure.py
"""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minift import tables

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minift"

# the rooms, from the top of the house to its ground: a room imports from rooms below it, and from itself
ROOMS = [
    "__main__",
    "cli",
    "demo",
    "reporting",
    "diffing",
    "tracing",
    "planning",
    "training",
    "runs",
    "setup",
    "generation",
    "evaluation",
    "checkpoints",
    "engine",
]
ROOMS += ["measure", "tasks", "adapters", "models", "layers", "data", "ops", "config", "tables", "files", "errors"]
OUTSIDE = {"torch", "tokenizers", "safetensors", "numpy", "tqdm", "huggingface_hub"}
EXTRAS = {"measure": {"wandb", "matplotlib"}}  # imported where an option asks for them


def imports(path: Path, tree: ast.AST | None = None) -> set[str]:
    """Dotted names that a file imports, at the top or inside a function; those of minift start with `minift.`.

    tree: only this part of it.
    """
    here, found = ["minift", *path.relative_to(PACKAGE).parent.parts], set()
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1])
            found |= {f"{base}.{node.module or ''}".rstrip(".") + f".{a.name}" for a in node.names}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "minift":
            below = ROOMS[ROOMS.index(room) :] if room in ROOMS else []
            assert rest.split(".")[0] in below, f"{path.name} imports {name}"
        else:
            allowed = OUTSIDE | EXTRAS.get(room, set())
            assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_every_room_is_known():
    assert {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in files()} == {"__init__", *ROOMS}


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = ("minift", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def test_no_circle_within_a_room():
    """Of what is imported at the top of a file."""
    modules = {module_of(path): path for path in files()}
    needs = {}
    for name, path in modules.items():
        tops = ast.Module([n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)], [])
        found = {m for full in imports(path, tops) for m in (full, full.rpartition(".")[0]) if m in modules}
        needs[name] = found - {name, "minift"} - {name.rpartition(".")[0]}
    while needs:
        free = {name for name, found in needs.items() if not found & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: found for name, found in needs.items() if name not in free}


def test_no_module_is_called_as_a_public_function():
    """importing the file would hide the function: `minift.train` is the function, the file is training.py."""
    import minift

    assert not {path.stem for path in PACKAGE.glob("*.py")} & set(minift.__all__)
    assert not {path.name for path in PACKAGE.iterdir() if path.is_dir()} & set(minift.__all__)


# the folder in which a table's names may be compared: everybody else asks the thing itself
KNOWN_IN = {
    "tasks": tables.TASKS,
    "models": tables.FAMILIES,
    "adapters": tables.METHODS,
    "engine": tables.OPTIMIZERS | tables.SCHEDULES,
}


def compared_names(tree: ast.AST) -> set[str]:
    """The strings that a file compares with something: `x == "a"`, `x in ("a", "b")`, `{"a": ...}[x]`, `case "a"`."""
    found = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            parts = node.value.keys
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            for constant in ast.walk(part) if part else ():
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    found.add(constant.value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_a_thing_is_it_says_itself(path):
    """Outside tasks/ no task's name is compared, outside models/ no family's, outside adapters/ no method's."""
    room = path.relative_to(PACKAGE).parts[0]
    tree = ast.parse(path.read_text())
    for home, names in KNOWN_IN.items():
        if room != home:
            assert not compared_names(tree) & names.keys(), f"known in {home}/ alone"
    if room != "models":
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not any(re.search(r"\bhead\.(out|pooler)\b", text) for text in texts), "known in models/ alone"


@pytest.mark.slow
def test_an_import_does_nothing():
    """No device is probed, no thread setting touched, nothing printed."""
    code = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
import minift, minift.training, minift.evaluation, minift.cli
assert not torch.cuda.is_initialized()
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed())
assert callable(minift.train) and callable(minift.evaluate) and callable(minift.load), minift.train
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names():
    import minift

    for name in minift.__all__:
        assert getattr(minift, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = minift.nothing


@pytest.mark.slow
def test_the_wheel_holds_minift_its_demo_and_the_kernels_alone(tmp_path):
    tree = tmp_path / "tree"  # a copy: pip leaves a build/ in the tree, from which files that were removed come back
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("build", "*.egg-info", ".*", "__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {n for n in names if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in inside} == {"minift"}
    sources = {f"minift/{p.relative_to(PACKAGE).as_posix()}" for p in files()}
    assert {n for n in inside if n.endswith(".py")} == sources
    kernels = {
        f"minift/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}"
        for p in (ROOT / "kernels").rglob("*")
        if p.is_file()
    }
    demo = {
        f"minift/{path.relative_to(PACKAGE).as_posix()}"
        for pattern in ("data/*", "models/*/*")
        for path in (PACKAGE / "demo").glob(pattern)
        if path.is_file()
    }
    assert inside == sources | kernels | demo and "minift/kernels/README.md" in kernels
    assert "minift/demo/models/bert-nano/model.safetensors" in demo and "minift/demo/data/README.md" in demo
    assert not list((ROOT / "kernels").rglob("*.py"))


@pytest.mark.slow
def test_the_command_works_from_another_folder(tmp_path):
    """As installed, beside the interpreter that runs the tests."""
    command = Path(sys.executable).with_name("minift")
    if not command.exists():
        pytest.skip("minift is not installed in this environment (`pip install .`)")
    done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout


def chosen_by_name() -> set[str]:
    """The names in all tables of tables.py, as files and functions are called."""
    from minift import tables

    found = [table for table in vars(tables).values() if isinstance(table, dict) and "__name__" not in table]
    return {name.replace("-", "_") for table in found for name in table}


def test_the_readme_lists_every_file():
    """Those that tables.py has a line for are listed there."""
    readme = (ROOT / "README.md").read_text()
    for path in files():
        listed = path.name in readme or path.stem in chosen_by_name()
        assert path.name.startswith("__") or listed, f"{path.name} is not in the README's tree"


def test_every_choice_has_its_file_or_function():
    from minift import tables
    from minift.engine import optimizers, schedules

    there = {path.stem for path in (PACKAGE / "engine/optimizers").glob("*.py")} - {"__init__"}
    assert there == {name.replace("-", "_") for name in tables.OPTIMIZERS}
    for name in tables.OPTIMIZERS:
        assert optimizers.rule_named(name).__doc__, name
    for name in tables.SCHEDULES:
        assert callable(getattr(schedules, name.replace("-", "_"))), name


def test_no_path_of_a_machine_in_the_sources():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if (ROOT / name).is_file() and not name.endswith(".safetensors"):
            text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/(home|root|Users)/\w+/", text), name
