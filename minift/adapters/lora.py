"""LoRA: a frozen layer with a trained low-rank update (Hu et al., https://arxiv.org/abs/2106.09685).

    y = x W^T + b + s drop(x) A^T B^T        s = alpha / R, or alpha / sqrt(R): rank-stabilised (arXiv 2312.03732)

A (R, in) begins random, B (out, R) at zero, both float32 whatever W is. `add_lora` puts one around every layer of a
loaded model that the targets name, by the names and matching rules that PEFT uses, so that its files mean the same
here. How it is computed is in ops/lora.py; a variant is one more file beside this one.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.dropout import SILENT, Noise
from ..ops.lora import lora_linear

TARGETS = {"bert": ("query", "value"), "gpt2": ("c_attn",)}  # by model_type, where none are named
SITE = 1 << 16  # dropout places of adapters: this plus the layer's number among all that could have one


@dataclass(frozen=True)
class LoRAConfig:
    """What is put where. Patterns are regular expressions for the end of a layer's name.

    Layers are named by a tuple, one of which their hub name is or ends in after a dot, or by a regular expression for
    all of it.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: str | tuple[str, ...] = ()  # () the family's default, or "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()  # numbers of the transformer layers; all
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    variant: str = "lora"
    saved: tuple[str, ...] | None = None  # modules of the head that are trained in full, and saved with the adapter
    base: str = ""  # where the frozen weights come from, as a folder or hub id
    kept: tuple[str, ...] = ()  # frozen parameters, by our names, that came with the adapter and are saved with it
    initial: str = ""  # of a file: what was taken out of the base before training (peft_format.with_initial_part)


class LoRALinear(nn.Module):
    """`base` (a Linear, an NF4Linear, whatever has their four members) and its update."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool, site: int):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.alpha, self.scale = alpha, alpha / (math.sqrt(rank) if rslora else rank)
        self.p, self.site = dropout, site

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's."""
        return self.base.bias

    @property
    def frozen(self) -> nn.Module:
        """The layer that was wrapped."""
        return self.base

    def delta(self) -> Tensor:
        """The update s B A, (out, in)."""
        return self.scale * (self.B @ self.A)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W + s B A (out, in): what the layer computes without dropout."""
        return (self.base.matrix(torch.float32) + self.delta()).to(dtype)

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        base = self.base
        return lora_linear(x, base.bias, self.A, self.B, base.matrix, self.scale, self.p, noise, self.site)


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: str | tuple[str, ...] = (),
    *,
    exclude: str | tuple[str, ...] = (),
    seed: int = 42,
    **more,
) -> nn.Module:
    """Freezes a loaded model and puts LoRA around the layers that `targets` names, in place. Returns the model.

    targets, exclude: as in LoRAConfig, or as a string with commas, "query,value"; "all-linear" is every layer but the
    head's last.
    more: the other fields of LoRAConfig; base is where the model was loaded from. seed: of the adapters' first weights.
    The head of a classifier stays trained, in full. Raises InputError that lists the names, where nothing matches.
    """
    config = LoRAConfig(rank, alpha, dropout, names(targets), names(exclude), **{"base": model.source} | more)
    if model.adapter:
        raise InputError("the model has an adapter already; expected one without, or merged")
    wrap(model, config)
    generator = torch.Generator().manual_seed(seed)
    for _, lora in adapters(model):
        initialise(lora, generator)
    return model


def wrap(model: nn.Module, config: LoRAConfig) -> None:
    """Puts LoRALinears in place, with nothing drawn yet, and makes them and the saved modules the only trained ones."""
    for option, value in (("rank", config.rank), *(("rank", r) for r in config.rank_pattern.values())):
        if value < 1:
            raise InputError(f"{option} is {value}; expected at least 1")
    if not 0 <= config.dropout < 1:
        raise InputError(f"adapter dropout is {config.dropout}; expected at least 0 and below 1")
    check_patterns(config)
    saved = default_saved(model) if config.saved is None else config.saved
    layers = candidates(model)
    chosen = select(model, config, {hub: name for name, hub in layers.items() if not is_within(hub, saved)})
    model.requires_grad_(False)
    for i, (name, hub) in enumerate(layers.items()):
        if hub in chosen:
            r, a = (
                by_pattern(config.rank_pattern, name_in(model, hub), config.rank),
                by_pattern(config.alpha_pattern, name_in(model, hub), config.alpha),
            )
            layer = model.get_submodule(name)
            check_rank(r, hub, layer)
            put(model, name, LoRALinear(layer, r, a, config.dropout, config.rslora, SITE + i))
    for name, module in model.named_modules():
        if name.startswith("head.") and is_within(model.hub_name(name), saved):
            module.requires_grad_()
    targets = config.targets
    if targets == "all-linear":
        targets = tuple(name_in(model, hub) for hub in chosen)
    model.adapter = LoRAConfig(**vars(config) | {"saved": saved, "targets": targets or default_targets(model)})


def check_patterns(config: LoRAConfig) -> None:
    """Raises InputError that names the option and the regular expression that is none."""
    for option, value in (("targets", config.targets), ("exclude", config.exclude)):
        if isinstance(value, str):
            check_pattern(option, value)
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            check_pattern(option, key, end_of(key))


def check_pattern(option: str, pattern: str, used: str = "") -> None:
    """Raises InputError where `pattern` is no regular expression; used: the longer one that it is a part of."""
    try:
        re.compile(used or pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise InputError(f"{option} is {pattern!r}: not a regular expression ({e})") from e


def check_rank(rank: int, hub: str, layer: nn.Module) -> None:
    """Raises InputError where A and B would be larger than anything that the layer can use."""
    most = layer.in_features + layer.out_features
    if rank > most:
        size = f"{layer.out_features} x {layer.in_features}"
        raise InputError(f"rank is {rank} for {hub}, which is {size}; expected at most {most}")


def initialise(lora: LoRALinear, generator: torch.Generator) -> None:
    """A as PEFT draws it, to the bit: uniform within 1 / sqrt(in), after two draws that it throws away."""
    nn.init.kaiming_uniform_(torch.empty(lora.A.shape), a=math.sqrt(5), generator=generator)
    nn.init.kaiming_uniform_(torch.empty(lora.B.shape), a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        lora.A.copy_(nn.init.kaiming_uniform_(torch.empty(lora.A.shape), a=math.sqrt(5), generator=generator))


# which layers


def candidates(model: nn.Module) -> dict[str, str]:
    """Our name -> the hub's of every layer that an adapter can wrap: all linear ones but the head's last."""
    return {
        name: model.hub_name(name)
        for name, module in model.named_modules()
        if hasattr(module, "matrix") and hasattr(module, "in_features") and name != "head.out"
    }


def name_in(model: nn.Module, hub: str) -> str:
    """The hub's name as it is in this model, for transformers and PEFT: a body without a head has no prefix."""
    return hub if model.head else hub.removeprefix(model.family.PREFIX)


def select(model: nn.Module, config: LoRAConfig, layers: dict[str, str]) -> list[str]:
    """Those of the hub names `layers` that the configuration means. Raises InputError where it means none."""
    targets = config.targets or default_targets(model)
    found = [
        hub
        for hub in layers
        if not (config.exclude and is_named(name_in(model, hub), config.exclude))
        and (targets == "all-linear" or is_named(name_in(model, hub), targets))
        and (not config.layers or number(hub) in config.layers)
    ]
    if not found:
        kinds = sorted({re.sub(r"\.\d+\.", ".N.", hub) for hub in layers})
        of_layers = f", in layers {', '.join(map(str, config.layers))}" if config.layers else ""
        raise InputError(
            f"targets {targets!r}{of_layers}: no layer has such a name; there are:\n  " + "\n  ".join(kinds)
        )
    return found


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """What PEFT adapts in such a model where nothing is named."""
    return TARGETS[model.settings["model_type"]]


def names(text: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Names with commas between as a tuple; "all-linear" and a regular expression (it has other signs) as they are."""
    return tuple(filter(None, text.split(","))) if isinstance(text, str) and re.fullmatch(r"[\w.,]*", text) else text


def is_named(hub: str, wanted: str | tuple[str, ...]) -> bool:
    """Whether a layer's name is meant by targets."""
    if isinstance(wanted, str):
        return bool(re.fullmatch(wanted, hub))
    return any(hub == name or hub.endswith("." + name) for name in wanted)


def by_pattern(patterns: dict, hub: str, default):
    """The value of the first pattern that the end of a name fits."""
    return next((value for key, value in patterns.items() if re.match(end_of(key), hub)), default)


def end_of(key: str) -> str:
    """The regular expression for names of which `key` fits the end."""
    return rf"(?:.*\.)?(?:{key})$"


def is_within(hub: str, modules: tuple[str, ...]) -> bool:
    """Whether a name is one of `modules` (or ends in it after a dot), or inside one."""
    return any(re.match(rf"(?:.*\.)?{re.escape(m)}(?:$|\.)", hub) for m in modules)


def number(hub: str) -> int | None:
    """The number of the transformer layer that a name belongs to."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", hub)
    return int(found[1]) if found else None


def default_saved(model: nn.Module) -> tuple[str, ...]:
    """Modules of the head to train in full: a classifier's last layer, and what had no weights in the checkpoint."""
    if model.task != "classify":
        return ()
    fresh = {model.hub_name("head.pooler")} & {name.rpartition(".")[0] for name in model.report.fresh}
    return (model.hub_name("head.out"), *fresh)


# what is there


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(hub name of the layer, its LoRALinear), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield model.hub_name(name.removesuffix(".lora")), module


def check_float(name: str, weight: Tensor) -> None:
    """Raises InputError where a frozen weight is packed already, for variants that split it first."""
    if not weight.is_floating_point():
        raise InputError(f"{name}: its weight is in 4 bits; expected the original (quantize() the model afterwards)")


def check_splits(name: str, lora: LoRALinear) -> None:
    """Raises InputError where no part of a frozen weight can become the adapter's first A and B."""
    check_float(name, lora.base.weight)
    rank, most = len(lora.A), min(lora.in_features, lora.out_features)
    if rank > most:
        size = f"{lora.out_features} x {lora.in_features}"
        raise InputError(f"rank is {rank} for {name}, which is {size}; expected at most {most}, its singular values")
    if lora.scale <= 0:
        raise InputError(f"alpha is {lora.alpha} for {name}; expected above 0, as the first A and B are divided by it")


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Our name of an adapted layer -> what wraps it: a LoRALinear, or a variant of one with `lora` inside."""
    found = {name: m for name, m in model.named_modules() if hasattr(m, "matrix") and hasattr(m, "frozen")}
    return {name: m for name, m in found.items() if not name.endswith(".lora")}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Makes `module` the layer called `name`."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)
