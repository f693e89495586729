"""Checkpoints of a run: with its config.json, all that the rest of the run depends on.

    out/checkpoints/step-120/   model.safetensors, optimizer.safetensors, state.json

Order, dropout and learning rate are functions of the step, so no generator's state is among it. A checkpoint is written
aside, flushed to the disk and renamed: a folder called step-N is whole, whatever killed the run. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .batch import Sequence
from .config import InputError
from .distributed import like, whole
from .optim import AdamW


def save(out: Path, model: nn.Module, optimizer: AdamW, state: dict, keep: int, write: bool) -> None:
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
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(weights, aside / "model.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in aside.iterdir():
            flush(path)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{folder}: the checkpoint could not be written ({e}); earlier ones are whole") from e
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try at the same step
    os.replace(aside, folder)
    flush(folder.parent)
    for old in steps(out)[:-keep]:
        shutil.rmtree(out / "checkpoints" / f"step-{old}", ignore_errors=True)


def load(folder: Path, model: nn.Module, optimizer: AdamW) -> dict:
    """Puts a checkpoint into model and optimizer; returns its state. Raises InputError where it is not one of them."""
    try:
        weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"{folder}: not a whole checkpoint ({e})") from e
    names = dict(trained(model))
    if different := sorted(weights.keys() ^ names.keys()):
        raise InputError(f"{folder}: not a checkpoint of this model; different: {', '.join(different[:5])}")
    for name, p in names.items():
        with torch.no_grad():
            p.copy_(like(weights[name], p))
        mine = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        optimizer.state[p] = {k: like(v, p) for k, v in mine.items()}
    return state


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a run folder."""
    found = steps(out)
    return out / "checkpoints" / f"step-{found[-1]}" if found else None


def steps(out: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folder = out / "checkpoints"
    names = (re.fullmatch(r"step-(\d+)", p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(m[1]) for m in names if m)


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


def flush(path: Path) -> None:
    """Makes the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
