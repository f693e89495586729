"""Checkpoints of a run: with its config.json, all that the rest of the run depends on.

    out/checkpoints/step-120/   model.safetensors, optimizer.safetensors, state.json, and minift.json with their SHA-256

Order, dropout and learning rate are functions of the step, so no generator's state is among it. A checkpoint is written
aside, flushed to the disk and renamed: a folder called step-N is whole, whatever killed the run. Nothing is pickled.
Nothing of a checkpoint is used before all of it was checked: checksums, names, shapes, dtypes, and what its state says
of the run, its options and its frozen weights.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import files
from ..data.batch import Sequence
from ..engine.distributed import like, whole
from ..engine.optimizers import Optimizer
from ..errors import InputError
from .weights import is_finite

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FILES = {WEIGHTS, MOMENTS, STATE, files.MANIFEST}


LATER = {"valid": str, "base": dict, "options": dict}  # of a state; not in one that an older minift wrote
BASE = {"config": dict, "labels": list, "frozen": str}  # what fingerprint_base finds


def write_checkpoint(out: Path, model: nn.Module, optimizer: Optimizer, state: dict, keep: int, write: bool) -> None:
    """Writes the checkpoint of step state["step"] and removes all but the newest `keep`. Raises OSError (disk full).

    write: whether this process does; of a sharded model, all have to give their parts.
    """
    weights = {name: whole(p.detach()).cpu() for name, p in trained(model)}
    moments = {
        f"{name}/{k}": whole(v).cpu() for name, p in trained(model) for k, v in optimizer.state.get(p, {}).items()
    }
    if not write:
        return
    folder = out / "checkpoints" / f"step-{state['step']}"

    def put_files(aside: Path) -> None:
        save_file(weights, aside / WEIGHTS)
        save_file(moments, aside / MOMENTS)
        (aside / STATE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    try:
        files.write_folder(folder, put_files)
    except (OSError, SafetensorError) as e:
        earlier = latest(out)
        kept = f"{earlier} is whole" if earlier else "there is none before it"
        raise OSError(f"{folder}: the checkpoint could not be written ({e}); {kept}") from e
    for old in steps(out)[:-keep]:
        files.remove_files(out / "checkpoints" / f"step-{old}", FILES)


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, check: Callable[[dict], None]) -> dict:
    """Puts a checkpoint into model and optimizer; returns its state.

    check: raises InputError where the state is not of this run; called before model and optimizer are touched.
    Raises InputError that names the file where anything of it is not what a run of this model wrote, and the newest
    checkpoint before it that is whole.
    """
    with offering_earlier(folder):
        weights, moments, state = read_checkpoint(folder)
    check(state)
    names = dict(trained(model))
    with offering_earlier(folder):
        check_tensors(folder / WEIGHTS, weights, {name: (p.shape, p.dtype) for name, p in names.items()})
        check_tensors(folder / MOMENTS, moments, expected_moments(names, moments, optimizer))
    for name, p in names.items():
        with torch.no_grad():
            p.copy_(like(weights[name], p))
        mine = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        if mine:
            optimizer.state[p] = {k: like(v, p) for k, v in mine.items()}
    return state


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """The weights, the moments and the state in a checkpoint's files. Raises InputError where they are not whole."""
    if fault := files.fault(folder):
        raise InputError(f"{folder}: not a whole checkpoint: {fault}")
    try:
        weights, moments = load_file(folder / WEIGHTS), load_file(folder / MOMENTS)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError, RecursionError) as e:
        raise InputError(f"{folder}: not a whole checkpoint ({e})") from e
    check_state(folder / STATE, state)
    return weights, moments, state


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint can be read."""
    with suppress(InputError):
        read_checkpoint(folder)
        return True
    return False


def check_state(path: Path, state: object) -> None:
    """Raises InputError unless the state has what every run's has, each of its kind."""
    kinds = {"step": int, "best": dict, "stale": int, "data": str, "scaler": dict}
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds {type(state).__name__}; expected an object")
    kinds |= {name: kind for name, kind in LATER.items() if name in state}
    for name, kind in kinds.items():
        if type(state.get(name)) is not kind:
            raise InputError(f"{path}: {name} is {state.get(name)!r:.60}; expected {kind.__name__}")
    base = state.get("base", {"config": {}, "labels": [], "frozen": ""})
    if not all(type(base.get(name)) is kind for name, kind in BASE.items()):
        raise InputError(f"{path}: base is {base!r:.60}; expected {', '.join(BASE)} of the base model")
    for name, lowest in (("step", 1), ("stale", 0)):
        if state[name] < lowest:
            raise InputError(f"{path}: {name} is {state[name]}; expected at least {lowest}")
    for place in ("best", "scaler"):
        for name, value in state[place].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InputError(f"{path}: {place} has {name} {value!r:.60}; expected a finite number")


def check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Raises InputError unless a file's tensors have just these names, shapes and dtypes, and finite numbers."""
    if different := sorted(found.keys() ^ expected.keys()):
        raise InputError(f"{path}: not a checkpoint of this model and optimizer; different: {', '.join(different[:5])}")
    for name, tensor in found.items():
        shape, dtype = expected[name]
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise InputError(f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}; expected {tuple(shape)} {dtype}")
        if not is_finite(tensor):
            raise InputError(f"{path}: {name} has numbers that are not finite")


def expected_moments(names: dict[str, nn.Parameter], found: dict[str, Tensor], optimizer: Optimizer) -> dict:
    """Name -> (shape, dtype) of the optimizer's tensors. A parameter that never had a gradient has none."""
    updated = {key.rpartition("/")[0] for key in found} & names.keys() or names.keys()
    return {f"{name}/{k}": tensor for name in updated for k, tensor in optimizer.expected_state(names[name]).items()}


@contextmanager
def offering_earlier(folder: Path) -> Iterator[None]:
    """Adds to an error about the checkpoint in `folder` which one before it is whole, and how to go on from there."""
    try:
        yield
    except InputError as e:
        here = int(folder.name.removeprefix("step-"))
        for step in reversed([n for n in steps(folder.parents[1]) if n < here]):
            earlier = folder.with_name(f"step-{step}")
            if is_whole(earlier):
                raise InputError(f"{e}\n{earlier} is whole; to go on from there: mv {folder} {folder}.damaged") from e
        raise InputError(f"{e}\nno earlier checkpoint is whole") from e


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a run folder."""
    found = steps(out)
    return out / "checkpoints" / f"step-{found[-1]}" if found else None


def steps(out: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if any((path / name).is_file() for name in FILES)]
    return sorted(int(found[1]) for found in (re.fullmatch(r"step-([1-9]\d*)", name) for name in names) if found)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that training changes; a tied parameter once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def fingerprint(sequences: list[Sequence]) -> str:
    """A hash of encoded examples: tells a resumed run whether its data is still the same."""
    digest = hashlib.blake2b(digest_size=16)
    for s in sequences:
        for part in (s.ids, s.rows, s.targets):
            digest.update(part.tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def fingerprint_base(model: nn.Module) -> dict:
    """What the model is apart from what a checkpoint holds: its configuration, labels and frozen weights.

    With it a resumed run knows that it stands on the same base. {"config": {...}, "labels": [...], "frozen": SHA-256}
    """
    digest = hashlib.sha256()
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    for name, tensor in (*frozen, *model.named_buffers()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    config = {"model_type": model.settings["model_type"]} | dataclasses.asdict(model.config)
    return {"config": config, "labels": list(model.labels), "frozen": digest.hexdigest()}


def check_base(folder: Path, now: dict, then: dict) -> None:
    """Raises InputError where the base of a run is not what it was when the run began."""
    for name, value in now["config"].items():
        before = then["config"].get(name, value)
        if before != value:
            said = f"the base model's config.json says {name} {value!r}"
            raise InputError(f"{folder}: {said}; the run began with {before!r}")
    if now["labels"] != then["labels"]:
        labels, before = ", ".join(now["labels"]), ", ".join(then["labels"])
        raise InputError(f"{folder}: the labels are {labels}; the run began with {before}")
    if now["frozen"] != then["frozen"]:
        raise InputError(f"{folder}: the base model's weights are not those that the run began with")
