"""IA3: a frozen layer with a learned factor for each channel (Liu et al., https://arxiv.org/abs/2205.05638).

    y = l * (x W^T + b)      l (out,): keys and values
    y = (l * x) W^T + b      l (in,): a layer of the feed-forward half, whose input is what the activation gave

l begins at 1, in float32 whatever W is, and multiplies in float32: bfloat16 has no number between 1 and 1.008. For
backward the first form saves one value of width `out` a token more than the frozen layer; the second its input, which
is made again in backward where it came from an activation (ops/rematerialise.py).

Which layers are scaled at their input is decided as in PEFT: those whose names end in one of `feedforward`, or are
matched by it. BERT's defaults in PEFT are key, value and output.dense, which is also the end of attention's output
projection, so that this one is scaled at its input too. At the end: IA3 in PEFT's files.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..ops.dropout import SILENT, Noise
from . import Options
from .files import NAMES, as_option, check_kinds, check_unknown, common_fields, targets_from_peft
from .targets import Names, candidates, check_pattern, default_saved, name_in, roles, select, train_saved

SAVED_AS = "ia3"
PEFT_TYPE = "IA3"
PATTERNS = ("targets", "exclude", "feedforward")
LEARNING_RATE = 3e-3  # as in the paper


@dataclass(frozen=True)
class IA3Config:
    """What is put where; how layers are named is said in targets.py."""

    targets: Names = ()  # () the family's default, or "all-linear"
    exclude: Names = ()
    layers: tuple[int, ...] = ()  # numbers of the transformer layers; () all
    feedforward: Names | None = None  # those that are scaled at their input; None the family's default
    variant: str = "ia3"
    saved: tuple[str, ...] | None = None  # modules of the head that are trained in full, and saved with the adapter
    base: str = ""  # where the frozen weights come from, as a folder or hub id
    kept: tuple[str, ...] = ()  # frozen parameters, by our names, that came with the adapter and are saved with it


class IA3Linear(nn.Module):
    """A frozen layer and the factors of its outputs or, in the feed-forward half, of its inputs."""

    def __init__(self, base: nn.Module, scales_input: bool):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base = base.requires_grad_(False)
        self.scales_input = scales_input
        channels = base.in_features if scales_input else base.out_features
        self.factors = nn.Parameter(torch.ones(channels, device=base.weight.device))

    @property
    def bias(self) -> Tensor | None:
        """What is added to the product: l * b where the output is scaled."""
        if self.base.bias is None or self.scales_input:
            return self.base.bias
        return self.factors * self.base.bias

    @property
    def frozen(self) -> nn.Module:
        """The layer that was wrapped."""
        return self.base

    def set_frozen(self, layer: nn.Module) -> None:
        """Wraps another layer instead."""
        self.base = layer

    @property
    def scaling(self) -> Tensor:
        """The factors as they multiply W: a row (1, in) where the input is scaled, else a column (out, 1)."""
        return self.factors[None, :] if self.scales_input else self.factors[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """What was learned, by the end of its name in PEFT's file."""
        return {"ia3_l": self.scaling}

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W with its columns or rows scaled, (out, in)."""
        return (self.scaling * self.base.matrix(torch.float32)).to(dtype)

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        if self.scales_input:
            return self.base((x * self.factors).to(x.dtype), noise)
        return (self.base(x, noise) * self.factors).to(x.dtype)


def add(model: nn.Module, options: Options) -> None:
    """`--method ia3`: nothing is drawn, since every factor begins at 1."""
    wrap(model, IA3Config(options.targets, options.exclude, options.layers, base=model.source))


def wrap(model: nn.Module, config: IA3Config) -> None:
    """Puts IA3Linears in place, and makes them and the saved modules the only trained ones."""
    check_pattern("feedforward_modules", config.feedforward)
    saved = default_saved(model) if config.saved is None else config.saved
    targets = config.targets or roles(model, "key", "value", "down")
    feedforward = roles(model, "down") if config.feedforward is None else config.feedforward
    chosen = select(model, targets, config.exclude, config.layers, within=saved)

    model.requires_grad_(False)
    layers = {name_in(model, hub): name for name, hub in candidates(model).items() if hub in chosen}
    at_input = tuple(name for name in layers if is_feedforward(name, feedforward))
    for name, ours in layers.items():
        layer = model.get_submodule(ours)
        model.set_submodule(ours, IA3Linear(layer, name in at_input))
    train_saved(model, saved)

    # PEFT's IA3 knows no numbers of layers, and refuses a file whose feedforward_modules, as a list, are not among its
    # target_modules: where these names cannot say what was chosen, the layers' own do
    if not at_input:
        feedforward = ()
    if config.layers or targets == "all-linear" or not is_subset(feedforward, targets):
        targets = tuple(layers)
        feedforward = at_input
    model.adapter = replace(config, saved=saved, targets=targets, layers=(), feedforward=feedforward)


def is_feedforward(name: str, feedforward: Names) -> bool:
    """Whether PEFT scales the input of a layer; of a tuple, whatever the name ends in counts, after a dot or not."""
    if isinstance(feedforward, str):
        return bool(re.fullmatch(feedforward, name))
    return name.endswith(feedforward)


def is_subset(feedforward: Names, targets: Names) -> bool:
    """Whether PEFT accepts the two in a file; it compares tuples alone."""
    if isinstance(feedforward, str) or isinstance(targets, str):
        return True
    return set(feedforward) <= set(targets)


# in PEFT's files


def read(found: dict, heads: tuple[str, ...]) -> tuple[IA3Config, list[str]]:
    """(the configuration, what else to tell) of an adapter_config.json. Raises ValueError for what is not supported."""
    check_kinds(found, {"feedforward_modules": NAMES})
    # beside it, what is only about how training began, or about how weights are stored
    notes = check_unknown(found, {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})
    feedforward = found.get("feedforward_modules")
    if feedforward is not None:
        feedforward = targets_from_peft(feedforward)
    return IA3Config(feedforward=feedforward, **common_fields(found, heads)), notes


def modern_name(name: str) -> str:
    """How PEFT writes the name of a tensor today: without an adapter's name."""
    return re.sub(r"\.ia3_l\.[^.]+$", ".ia3_l", name)


def settings(model: nn.Module) -> dict:
    """adapter_config.json: every field that PEFT needs to compute the same."""
    return {"feedforward_modules": model.adapter.feedforward, "init_ia3_weights": True}


def options(model: nn.Module) -> dict:
    """The options of `minift train` that make such an adapter; which inputs are scaled follows from the names."""
    config = model.adapter
    return {"method": config.variant, "targets": as_option(config.targets), "exclude": as_option(config.exclude)}
