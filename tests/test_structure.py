"""The shape of the house: who imports whom, what an import does, what the wheel holds, what the README promises.

python -m pytest tests/test_structure.py
"""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minift"

# module -> the modules of minift it may import; a parent folder stands for all files in it
ALLOWED = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "config": {"errors"},
    "cli": {
        "adapters",
        "config",
        "distributed",
        "errors",
        "files",
        "merge",
        "data",
        "tokenizer",
        "hub",
        "evaluate",
        "generate",
        "check",
        "train",
        "track",
        "precision",
        "models",
    },
    "train": {
        "adapters",
        "files",
        "layers",
        "quantize",
        "tasks",
        "data",
        "batch",
        "optim",
        "checkpoint",
        "distributed",
        "evaluate",
        "graph",
        "track",
        "hub",
        "config",
        "precision",
        "models",
        "ops",
        "tokenizer",
    },
    "graph": {"batch", "ops", "tasks"},
    "evaluate": {"tasks", "data", "batch", "track", "config", "models", "tokenizer"},
    "tasks": {"tasks", "batch", "config", "data", "models", "ops", "tokenizer"},
    "checkpoint": {"batch", "distributed", "errors", "files", "optim"},
    "distributed": {"batch"},
    "generate": {"batch", "config", "data", "models", "ops", "tasks", "tokenizer", "track"},
    "check": {"config", "data", "tokenizer"},
    "hub": {"adapters", "files", "layers", "models", "ops", "quantize", "tokenizer", "config", "distributed"},
    "adapters": {"adapters", "config", "layers", "ops"},
    "quantize": {"layers", "ops"},
    "merge": {
        "adapters",
        "batch",
        "config",
        "evaluate",
        "files",
        "hub",
        "layers",
        "models",
        "quantize",
        "tasks",
        "tokenizer",
    },
    "models": {"models", "layers", "ops", "batch"},
    "layers": {"ops"},
    "ops": {"errors", "ops"},
    "batch": {"ops"},
    "optim": {"layers", "distributed"},
    "precision": {"errors"},
    "files": {"errors"},
    "track": {"errors", "files"},
    "data": {"config"},
    "tokenizer": {"config"},
}
OUTSIDE = {"torch", "tokenizers", "safetensors", "numpy", "tqdm", "huggingface_hub"}
EXTRAS = {"track": {"wandb"}}  # imported where an option asks for them


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at the top or inside a function; those of minift start with `minift.`."""
    here, found = ["minift", *path.relative_to(PACKAGE).parent.parts], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1])
            found |= {f"{base}.{node.module}"} if node.module else {f"{base}.{a.name}" for a in node.names}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_the_right_way(path):
    module = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "minift":
            assert rest.split(".")[0] in ALLOWED[module], f"{path.name} imports {name}"
        else:
            allowed = OUTSIDE | EXTRAS.get(module, set())
            assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_every_module_has_its_line():
    assert {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in files()} == set(ALLOWED)


def test_an_import_does_nothing():
    """No device is probed, no thread setting touched, nothing printed."""
    code = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
import minift, minift.train, minift.evaluate, minift.cli
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
def test_the_wheel_holds_minift_and_the_kernels_alone(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
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
    assert inside == sources | kernels and "minift/kernels/README.md" in kernels
    assert not list((ROOT / "kernels").rglob("*.py"))


@pytest.mark.slow
def test_the_command_works_from_another_folder(tmp_path):
    """As installed, beside the interpreter that runs the tests."""
    command = Path(sys.executable).with_name("minift")
    if not command.exists():
        pytest.skip("minift is not installed in this environment (`pip install .`)")
    done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout


def test_the_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in files():
        name = path.relative_to(PACKAGE).name
        assert name.startswith("__") or name in readme, f"{name} is not in the README's tree"


def test_no_path_of_a_machine_in_the_sources():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if (ROOT / name).is_file() and not name.endswith(".safetensors"):
            text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/(home|root|Users)/\w+/", text), name
