"""Files and folders that tests write, change and read back, disks that are full, and what is said of faults."""

import contextlib
import gzip
import json
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minift
from minift.config import CheckConfig
from minift.data.check import Report, check_file
from minift.data.examples import Example, stream_examples
from minift.data.passages import Passage, stream_passages
from minift.tasks import task_named

# ---- files and folders


def put(path: Path, content: str | bytes) -> Path:
    """A file of this content, compressed if its name ends in .gz."""
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def jsonl(*rows) -> str:
    """One line of JSON for each row."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, *rows) -> Path:
    """A file with one line for each row: a string as it is, a tuple with tabs between its cells, all else as JSON."""
    lines = []
    for row in rows:
        if isinstance(row, tuple):
            row = "\t".join(map(str, row))
        lines.append(row if isinstance(row, str) else json.dumps(row))
    return put(path, "".join(line + "\n" for line in lines))


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def configure(path: Path, **changes) -> None:
    """Sets fields of a JSON file (a folder stands for its config.json); a value of ... takes the field out."""
    if path.is_dir():
        path = path / "config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings = {key: value for key, value in (settings | changes).items() if value is not ...}
    path.write_text(json.dumps(settings))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's model.safetensors."""
    return load_file(folder / "model.safetensors")


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors but the one of that name."""
    return {key: tensor for key, tensor in tensors.items() if key != name}


def rewrite(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Puts other tensors into a folder's model.safetensors."""
    whole = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, one number of which is none."""
    copy = tensor.clone()
    copy.view(-1)[0] = torch.nan
    return copy


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of this size at a new folder; the test skips where none may be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def no_file_beyond(size: int):
    """No file may grow beyond this many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_examples(*arguments, **options) -> list[Example]:
    """stream_examples(), all at once."""
    return list(stream_examples(*arguments, **options))


def read_passages(*arguments, **options) -> list[Passage]:
    """stream_passages(), all at once."""
    return list(stream_passages(*arguments, **options))


# ---- faults


def refused(call, argument, *words, **options) -> str:
    """The message of the InputError that call(argument, **options) must raise; all the words are in it."""
    with pytest.raises(minift.InputError) as caught:
        call(argument, **options)
    message = str(caught.value)
    for word in words:
        assert str(word) in message, message
    return message


def refuse(folder: Path | str, *words, task: str | None = "classify", **options) -> None:
    """Loading a folder is refused, with all the words in the one message."""
    refused(minift.load, folder, *words, task=task, **options)


def check(path: Path, task: str = "complete", tokenizer=None, say=print, **options) -> Report:
    """check_file() as `minift check --task` calls it."""
    config = CheckConfig(data=str(path), task=task, **options)
    return check_file(config, task_named(task).CHECKS, tokenizer, say)


def checked(path: Path, *arguments, **options):
    """(the report of `minift check` on a file, the faults that it told)."""
    told = []
    report = check(path, *arguments, say=told.append, **options)
    return report, told
