"""The sources of the kernels: where they are, what they include, which functions they offer, with which arguments.

A function of a kernel takes one C struct (kernels/README.md), and what stands in the source is all there is to know of
it: `functions` reads the struct's fields there, `packed` sets them by name. So no list of arguments is kept twice.
"""

import re
import struct
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

PLAIN = {Tensor, nn.Parameter}  # kinds of tensor whose data_ptr is their data
FORMATS = {"int64_t": "q", "int32_t": "i", "uint32_t": "I", "float": "f", "double": "d"}  # as Python's `struct` does
POINTER = "P"


class Unavailable(Exception):
    """Why there is no native kernel, in one line."""


class Arguments(NamedTuple):
    """The C struct that a function takes."""

    name: str
    fields: dict[str, str]  # in their order, with the format of each
    layout: struct.Struct
    written: frozenset[str]  # fields that point to what is not const


def folder() -> Path:
    """The folder with cpu/ and cuda/: in the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    installed = package / "kernels"
    if installed.is_dir():
        return installed
    return package.parent / "kernels"


def read_sources(path: Path) -> dict[str, str]:
    """The texts of a source and of all headers of ours that it includes, by name; the source is the first.

    Headers lie beside the source or in the folder above. Raises OSError where there is no such source.
    """
    texts = {path.name: path.read_text()}
    for name in re.findall(r'^#include "(.+)"', texts[path.name], re.MULTILINE):
        header = next((p for p in (path.parent / name, path.parents[1] / name) if p.exists()), None)
        if header is not None and name not in texts:
            texts |= read_sources(header)
    return texts


def functions(texts: dict[str, str]) -> dict[str, Arguments | None]:
    """The functions that a source (as `read_sources` gives it) offers, each with its arguments; None: it takes none."""
    source = next(iter(texts.values()))
    everything = "\n".join(texts.values())
    offered = re.findall(r'^extern "C" (?:__global__ )?void (\w+)\((?:const )?(\w*)', source, re.MULTILINE)
    found = {}
    for function, name in offered:
        found[function] = arguments(name, everything) if name else None
    return found


def arguments(name: str, text: str) -> Arguments:
    """The C struct of that name: its fields in their order, those that are structs themselves too."""
    body = re.search(rf"^struct {name} {{(.*?)^}};", text, re.MULTILINE | re.DOTALL)[1]
    fields = {}
    written = set()
    for const, kind, names in re.findall(r"(const )?(\w+\*?)\s+([^;]+);", re.sub(r"//.*", "", body)):
        for field in names.split(","):
            if kind.endswith("*") or "*" in field:
                code = POINTER
                if not const:
                    written.add(field.strip(" *"))
            elif kind in FORMATS:
                code = FORMATS[kind]
            else:
                code = arguments(kind, text).layout.format
            fields[field.strip(" *")] = code
    layout = struct.Struct(aligned("".join(fields.values())))
    return Arguments(name, fields, layout, frozenset(written))


def aligned(codes: str) -> str:
    """The format of a struct, which begins and ends where its widest field could: zero of them fill up to there."""
    widest = max(re.sub(r"0\w", "", codes), key=struct.calcsize)
    return f"0{widest}{codes}0{widest}"


def packed(wanted: Arguments, given: dict) -> bytes:
    """The struct with these fields. A tensor stands for its address, None for null, a tuple for a struct within it,
    whose fields are tensors and numbers.

    All fields have to be given, and no others (KeyError).
    """
    assert len(given) == len(wanted.fields), f"{wanted.name} has {[*wanted.fields]}; given are {[*given]}"
    values = []
    for value in map(given.__getitem__, wanted.fields):
        kind = type(value)
        if kind is int:
            values.append(value)
        elif kind in PLAIN:
            values.append(value.data_ptr())
        elif kind is tuple:
            values += [part.data_ptr() if type(part) in PLAIN else part for part in value]
        else:
            values.append(0 if value is None else value)
    return wanted.layout.pack(*values)
