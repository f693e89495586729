"""MiSS: a frozen layer and an update whose blocks are all the same (Kang & Yin, https://arxiv.org/abs/2409.15371).

    W + [D^T, D^T, ..., D^T]                  D (R, out), repeated along the inputs, the last one cut where R does not
                                              divide them
    y = x W^T + b + s D                       s (N, R), s[n, r] = sum of drop(x)[n, i] over all i that are r modulo R

D begins at zero, in float32 whatever W is: there is no second matrix, and nothing is drawn. For backward a layer saves
s, R numbers a token, and nothing of x. PEFT's variants "bat" and "mini" (init_weights) are not computed here.

This file is a fork's: it stands in minift/adapters/, and tables.METHODS has the line
`"miss": Method("miss", "one small block for all parts of a row of the weight (MiSS)")`. What each name is for:
minift/adapters/__init__.py. At the end: MiSS in PEFT's files. N tokens, R rank.
"""

import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops.dropout import SILENT, Noise, dropout
from . import Options
from .files import (
    as_option,
    check_kinds,
    check_unknown,
    saved_in_file,
    targets_for_peft,
    targets_from_peft,
)
from .lora import SITE
from .targets import candidates, check_pattern, default_saved, roles, select, train_saved

SAVED_AS = "miss"
PEFT_TYPE = "MISS"
PATTERNS = ("targets", "exclude")


@dataclass(frozen=True)
class MissConfig:
    """What is put where; how layers are named is said in targets.py."""

    rank: int = 8
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ()  # () the family's query and value, or "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()  # numbers of the transformer layers; () all
    variant: str = "miss"
    saved: tuple[str, ...] | None = None  # modules of the head that are trained in full, and saved with the adapter
    base: str = ""  # where the frozen weights come from, as a folder or hub id
    kept: tuple[str, ...] = ()  # frozen parameters, by our names, that came with the adapter and are saved with it


class MissLinear(nn.Module):
    """A frozen layer and the block that is added to all parts of its weight."""

    def __init__(self, base: nn.Module, rank: int, p: float, site: int):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base = base.requires_grad_(False)
        self.block = nn.Parameter(torch.zeros(rank, base.out_features, device=base.weight.device))  # D
        self.p = p
        self.site = site

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's."""
        return self.base.bias

    @property
    def frozen(self) -> nn.Module:
        """The layer that was wrapped."""
        return self.base

    def set_frozen(self, layer: nn.Module) -> None:
        """Wraps another layer instead."""
        self.base = layer

    def tensors(self) -> dict[str, nn.Parameter]:
        """What was learned, by the end of its name in PEFT's file."""
        return {"miss_block": self.block}

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W with the block added to each of its parts, (out, in)."""
        parts = -(-self.in_features // len(self.block))
        update = self.block.t().repeat(1, parts)[:, : self.in_features]
        return (self.base.matrix(torch.float32) + update).to(dtype)

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        y = self.base(x, noise)
        dropped = dropout(x, self.p, noise, self.site)
        rank = len(self.block)
        sums = F.pad(dropped, (0, -self.in_features % rank)).unflatten(1, (-1, rank)).sum(1)  # (N, R)
        return y + sums @ self.block.to(x.dtype)


def add(model: nn.Module, options: Options) -> None:
    """`--method miss`: nothing is drawn, since every block begins at zero."""
    config = MissConfig(
        options.rank, options.dropout, options.targets, options.exclude, options.layers, base=model.source
    )
    wrap(model, config)


def wrap(model: nn.Module, config: MissConfig) -> None:
    """Puts MissLinears in place, and makes them and the saved modules the only trained ones. Raises InputError."""
    if not 0 <= config.dropout < 1:
        raise InputError(f"adapter dropout is {config.dropout}; expected at least 0 and below 1")
    check_pattern("targets", config.targets)
    check_pattern("exclude", config.exclude)
    saved = default_saved(model) if config.saved is None else config.saved
    targets = config.targets or roles(model, "query", "value")
    chosen = select(model, targets, config.exclude, config.layers, within=saved)

    # a layer's site is its number among all candidates: it is the same whichever others are adapted
    model.requires_grad_(False)
    for i, (name, hub) in enumerate(candidates(model).items()):
        if hub not in chosen:
            continue
        layer = model.get_submodule(name)
        if not 1 <= config.rank <= layer.in_features:
            raise InputError(f"rank is {config.rank} for {hub}; expected 1 to {layer.in_features}, its inputs")
        model.set_submodule(name, MissLinear(layer, config.rank, config.dropout, SITE + i))
    train_saved(model, saved)
    model.adapter = replace(config, saved=saved, targets=targets_for_peft(model, targets, config.layers, chosen))


# in PEFT's files

# options of a MissConfig that change what is computed, with the one value that is computed here
REFUSED = {"bias": "none", "layers_pattern": None}

# its other options: read here, or only about how training began
KNOWN = set(
    "auto_mapping base_model_name_or_path exclude_modules inference_mode init_weights layers_to_transform mini_r "
    "miss_dropout modules_to_save peft_type peft_version r revision target_modules task_type".split()
)
NAMES = ((str, list), "a string or a list of names")
KINDS = {
    "r": (int, "a whole number"),
    "miss_dropout": ((int, float), "a number"),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_to_transform": ((int, list), "a number or a list of numbers"),
    "modules_to_save": (list, "a list of names"),
    "base_model_name_or_path": (str, "a string"),
}


def read(found: dict, heads: tuple[str, ...]) -> tuple[MissConfig, list[str]]:
    """(the configuration, what else to tell) of an adapter_config.json. Raises ValueError for what is not supported."""
    check_kinds(found, KINDS)
    notes = check_unknown(found, KNOWN | REFUSED.keys())
    for key, only in REFUSED.items():
        if found.get(key, only) != only:
            raise ValueError(f"{key} is {found[key]!r}; expected {only!r}, the rest is not supported")
    if isinstance(found.get("init_weights"), str):
        raise ValueError(f"init_weights is {found['init_weights']!r}; expected true or false, MiSS without a variant")
    layers = found.get("layers_to_transform")
    config = MissConfig(
        rank=found.get("r", 64),
        dropout=float(found.get("miss_dropout", 0)),
        targets=targets_from_peft(found.get("target_modules")),
        exclude=targets_from_peft(found.get("exclude_modules")),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        saved=saved_in_file(found, heads),
        base=found.get("base_model_name_or_path") or "",
    )
    return config, notes


def modern_name(name: str) -> str:
    """How PEFT writes the name of a tensor today: without an adapter's name."""
    return re.sub(r"\.miss_block\.[^.]+$", ".miss_block", name)


def settings(model: nn.Module) -> dict:
    """adapter_config.json: every field that PEFT needs to compute the same."""
    config = model.adapter
    return {
        "r": config.rank,
        "miss_dropout": config.dropout,
        "layers_to_transform": list(config.layers) or None,
        "bias": "none",
        "init_weights": True,
    }


def options(model: nn.Module) -> dict:
    """The options of `minift train` that make such an adapter."""
    config = model.adapter
    return {
        "method": config.variant,
        "rank": config.rank,
        "adapter_dropout": config.dropout,
        "targets": as_option(config.targets),
        "exclude": as_option(config.exclude),
        "layers": as_option(config.layers),
    }
