"""A frozen base in few bits: linear layers whose weights are codes in plain buffers, and do not learn.

    quantize(model, "int8")     a loaded model's layers, in place
    load(..., base="int8")      the same while it loads: each weight is packed as it arrives

Heads, the pooler and embeddings stay as they are unless named. To add a way to pack, write a file here and give it a
line in tables.BASES. The file has:

    Packed     a PackedLinear, with what that class leaves open
    MARK       the part whose presence in a file says that a weight is packed like this
    quantization_config(skipped) -> dict
               what config.json says of a saved model, for transformers; skipped: linear layers that are not packed
    reads(quantization_config) -> bool
               whether this is what a config.json speaks of

The files are those of bitsandbytes, and transformers loads them where that is installed.
"""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from ..ops.dropout import SILENT, Noise
from ..ops.linear import ByMatrix, frozen_linear
from ..tables import BASES
from . import Linear


class PackedLinear(nn.Module):
    """y = x W^T + b, with W (out_features, in_features) as codes in the buffer `weight`."""

    BASE = ""  # its name in tables.BASES
    PARTS: tuple[str, ...] = ()  # what a file has beside `weight`
    RECORDABLE = True  # whether a step can be recorded as a CUDA graph: its products read nothing back
    EXACT = False  # whether a row's product has the same bits whatever other rows there are
    CHEAP = True  # whether a product costs no more than with a matrix of floats, however few the tokens

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.is_packed_in_file = False  # whether the file that it is filled from has codes

    def pack(self, matrix: Tensor) -> None:
        """Takes a matrix (out, in) as its weight."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`, in memory that the next layer may use for its own: use it at once."""
        raise NotImplementedError

    def products(self):
        """The products with W, with ByMatrix's members (ops/linear.py)."""
        return ByMatrix(self.matrix)

    def parts(self) -> dict[str, Tensor]:
        """The tensors beside `weight` in a file, by their names in PARTS."""
        raise NotImplementedError

    def receive(self, found: dict[str, Tensor]) -> str:
        """Takes `weight` and its parts from a file; returns what is wrong with them, or nothing."""
        raise NotImplementedError

    def are_codes(self, shape: tuple) -> bool:
        """Whether a weight of this shape in a file is codes, and no matrix of floats."""
        raise NotImplementedError

    @staticmethod
    def part_name(weight: str, part: str) -> str:
        """What a file calls a part of the weight of that name."""
        return f"{weight}.{part}"

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        return frozen_linear(x, self.bias, self.products())


def way_named(base: str) -> ModuleType:
    """The file of a way to pack by its name in tables.BASES."""
    return import_module("." + base, __package__)


def packed_as(model: nn.Module) -> str:
    """How the layers of a model are packed, by the name in tables.BASES; "" where none is."""
    return next((module.BASE for module in model.modules() if isinstance(module, PackedLinear)), "")


def is_cheap(model: nn.Module) -> bool:
    """Whether packed layers cost no more for each micro-batch than others."""
    return all(module.CHEAP for module in model.modules() if isinstance(module, PackedLinear))


def is_exact(model: nn.Module) -> bool:
    """Whether the products with packed layers are, so that all of a step can have the same bits however it is split."""
    return any(module.EXACT for module in model.modules() if isinstance(module, PackedLinear))


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """(name, layer) of the layers that are packed by default: every Linear of the body, also inside an adapter."""
    return ((f"body.{name}", m) for name, m in model.body.named_modules() if isinstance(m, Linear))


def swap(model: nn.Module, name: str, base: str) -> PackedLinear:
    """Puts a packed layer without content where the Linear called `name` is; the bias goes over."""
    old = model.get_submodule(name)
    with torch.device("meta"):
        new = way_named(base).Packed(old.in_features, old.out_features, old.bias is not None)
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
    model.set_submodule(name, new)
    return new


def quantize(model: nn.Module, base: str = "nf4") -> nn.Module:
    """Packs the linear layers of the model's body, in place; they no longer learn. Returns the model."""
    for name, layer in list(linears(model)):
        weight = layer.weight.detach()
        swap(model, name, base).pack(weight)
    return model


def base_of_file(settings: dict) -> str | None:
    """How the weights of a file are packed, from its quantization_config; "" for none, None for a way unknown here."""
    if not settings:
        return ""
    return next((base for base in BASES if way_named(base).reads(settings)), None)


def part_of(raw: str) -> tuple[str, str]:
    """(name of the weight, part of it) of a tensor in a file that belongs to a packed weight; else (raw, "")."""
    for base in BASES:
        packed = way_named(base).Packed
        for part in packed.PARTS:
            ending = packed.part_name(".weight", part)
            if raw.endswith(ending):
                return raw.removesuffix(ending) + ".weight", part
    return raw, ""
