"""LoRA: a frozen layer with a trained low-rank update (Hu et al., https://arxiv.org/abs/2106.09685).

    y = x W^T + b + s drop(x) A^T B^T        s = alpha / R, or alpha / sqrt(R): rank-stabilised (arXiv 2312.03732)

A (R, in) begins random, B (out, R) at zero, both float32 whatever W is. `add_lora` puts one around every layer of a
loaded model that the targets name. How it is computed is in ops/lora.py; a variant is one more file beside this one.
At the end: LoRA in PEFT's files. What each name is for: adapters/__init__.py.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.dropout import SILENT, Noise
from ..ops.lora import lora_linear
from . import Names, Options
from .files import as_option, check_kinds, check_unknown, common_fields, targets_for_peft, tensor_name
from .targets import by_pattern, candidates, check_pattern, default_saved, name_in, names, roles, select, train_saved

SAVED_AS = "lora"
PEFT_TYPE = "LORA"
PATTERNS = ("targets", "exclude")
SITE = 1 << 16  # dropout places of adapters: this plus the layer's number among all that could have one


@dataclass(frozen=True)
class LoRAConfig:
    """What is put where; how layers are named is said in targets.py."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: Names = ()  # () the family's default, or "all-linear"
    exclude: Names = ()
    layers: tuple[int, ...] = ()  # numbers of the transformer layers; all
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    variant: str = "lora"
    saved: tuple[str, ...] | None = None  # modules of the head that are trained in full, and saved with the adapter
    base: str = ""  # where the frozen weights come from, as a folder or hub id
    kept: tuple[str, ...] = ()  # frozen parameters, by our names, that came with the adapter and are saved with it
    initial: str = ""  # of a file: what was taken out of the base before training (on_base)


class LoRALinear(nn.Module):
    """`base` (a Linear, a PackedLinear, whatever has their members) and its update."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool, site: int):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.alpha = alpha
        self.scale = scale_of(rank, alpha, rslora)
        self.p = dropout
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
        """What was learned, by the ends of their names in PEFT's file."""
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def delta(self) -> Tensor:
        """The update s B A, (out, in)."""
        return self.scale * (self.B @ self.A)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W + s B A (out, in): what the layer computes without dropout."""
        return (self.base.matrix(torch.float32) + self.delta()).to(dtype)

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        drop = noise.drop(self.p, self.site, self.in_features)
        return lora_linear(x, self.bias, self.A, self.B, self.base.products(), self.scale, drop)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """What an update is scaled by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def add(model: nn.Module, options: Options) -> None:
    """`--method lora`, and the first half of its variants."""
    more = {name: value for name, value in vars(options).items() if name not in ("method", "seed")}
    add_lora(model, **more, seed=options.seed, variant=options.method)


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: Names = (),
    *,
    exclude: Names = (),
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
    for rank in (config.rank, *config.rank_pattern.values()):
        if rank < 1:
            raise InputError(f"rank is {rank}; expected at least 1")
    if not 0 <= config.dropout < 1:
        raise InputError(f"adapter dropout is {config.dropout}; expected at least 0 and below 1")
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            check_pattern(option, key, at_end=True)
    saved = default_saved(model) if config.saved is None else config.saved
    targets = config.targets or roles(model, "query", "value")  # as PEFT, where none are named
    chosen = select(model, targets, config.exclude, config.layers, within=saved)

    # a layer's site is its number among all candidates: it is the same whichever others are adapted
    model.requires_grad_(False)
    for i, (name, hub) in enumerate(candidates(model).items()):
        if hub not in chosen:
            continue
        rank = by_pattern(config.rank_pattern, name_in(model, hub), config.rank)
        alpha = by_pattern(config.alpha_pattern, name_in(model, hub), config.alpha)
        layer = model.get_submodule(name)
        check_rank(rank, hub, layer)
        model.set_submodule(name, LoRALinear(layer, rank, alpha, config.dropout, config.rslora, SITE + i))
    train_saved(model, saved)
    model.adapter = replace(config, saved=saved, targets=targets_for_peft(model, targets, config.layers, chosen))


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


# what is there


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(hub name of the layer, its LoRALinear), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield model.hub_name(name.removesuffix(".lora")), module


def principal_part(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) of the best approximation scale * B A of a weight (out, in): its largest singular values."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def begin_at(lora: LoRALinear, weight: Tensor) -> None:
    """Makes A and B the principal part of a weight (out, in)."""
    a, b = principal_part(weight, len(lora.A), lora.scale)
    lora.A.copy_(a)
    lora.B.copy_(b)


def require_unpacked(name: str, weight: Tensor) -> None:
    """Raises InputError where a frozen weight is packed already, for variants that split it first."""
    if not weight.is_floating_point():
        raise InputError(f"{name}: its weight is packed; expected the original (quantize() the model afterwards)")


def check_splits(name: str, lora: LoRALinear) -> None:
    """Raises InputError where no part of a frozen weight can become the adapter's first A and B."""
    require_unpacked(name, lora.base.weight)
    rank, most = len(lora.A), min(lora.in_features, lora.out_features)
    if rank > most:
        size = f"{lora.out_features} x {lora.in_features}"
        raise InputError(f"rank is {rank} for {name}, which is {size}; expected at most {most}, its singular values")
    if lora.scale <= 0:
        raise InputError(f"alpha is {lora.alpha} for {name}; expected above 0, as the first A and B are divided by it")


# in PEFT's files

# options of a LoraConfig that change what is computed, with the one value that is computed here
REFUSED = {"bias": "none", "lora_bias": False, "use_qalora": False, "use_bdlora": False}
REFUSED |= dict.fromkeys(
    "alora_invocation_tokens arrow_config corda_config kasa_config layer_replication layers_pattern lora_ga_config "
    "megatron_config monteclora_config target_parameters trainable_token_indices velora_config".split()
)

# its other options: read here, or only about how training began
KNOWN = set(
    "alpha_pattern ensure_weight_tying eva_config fan_in_fan_out init_lora_weights layers_to_transform loftq_config "
    "lora_alpha lora_dropout megatron_core qalora_group_size r rank_pattern runtime_config use_dora use_rslora".split()
)

# the kinds that a value may be of, where it is not null, and how a message calls them
KINDS = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), ((int, float), "a number")),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, "an object of numbers")),
    "layers_to_transform": ((int, list), "a number or a list of numbers"),
}

# how training began, by init_lora_weights: with the base as it is, or with a part of it taken out, that is known
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
SPLIT = ("pissa", "olora")


def read(found: dict, heads: tuple[str, ...]) -> tuple[LoRAConfig, list[str]]:
    """(the configuration, what else to tell) of an adapter_config.json. Raises ValueError for what is not supported."""
    for key, only in REFUSED.items():
        if found.get(key, only) not in (only, {}, [], only or None):
            raise ValueError(f"{key} is {found[key]!r}; expected {only!r}, the rest is not supported")
    notes = check_unknown(found, KNOWN | REFUSED.keys())
    initial = found.get("init_lora_weights")
    if isinstance(initial, str):
        initial = initial.lower()  # as PEFT reads it
    if initial not in (*PLAIN, *SPLIT):
        raise ValueError(
            f"init_lora_weights is {initial!r}: the base was changed before training, in a way that cannot be "
            f"repeated; expected one of {', '.join(map(str, (*PLAIN[:2], *PLAIN[3:], *SPLIT)))}, or the adapter "
            "converted to plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("r", "lora_alpha", "lora_dropout"):
        if key in found and found[key] is None:
            raise ValueError(f"{key} is 'None'; expected a number")
    check_kinds(found, KINDS)
    layers = found.get("layers_to_transform")
    alpha = float(found.get("lora_alpha", 8))
    if not math.isfinite(alpha):
        raise ValueError(f"lora_alpha is {alpha}; expected a number")
    config = LoRAConfig(
        rank=int(found.get("r", 8)),
        alpha=alpha,
        dropout=float(found.get("lora_dropout", 0)),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        rank_pattern={k: int(v) for k, v in (found.get("rank_pattern") or {}).items()},
        alpha_pattern={k: float(v) for k, v in (found.get("alpha_pattern") or {}).items()},
        rslora=bool(found.get("use_rslora")),
        variant="dora" if found.get("use_dora") else "lora",
        initial=initial if initial in SPLIT else "",
        **common_fields(found, heads),
    )
    return config, notes


def modern_name(name: str) -> str:
    """How PEFT writes the name of a tensor today: without an adapter's name, and no `.weight` behind DoRA's vector."""
    name = re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", name)
    name = re.sub(r"lora_magnitude_vector\.default(?=\.|$)", "lora_magnitude_vector", name)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def on_base(model: nn.Module, config: LoRAConfig, found: dict[str, Tensor]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The same adapter for the base as it is; one that was trained beside a changed base gets twice the rank.

    PiSSA and OLoRA take the part s B0 A0 out of the weight before they train, and it can be computed again. So

        (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]

    which is what PEFT computes after loading (tuners/lora/layer.py), and how it converts such adapters.
    """
    if not config.initial:
        return config, found
    found = dict(found)
    for name, hub in candidates(model).items():
        keys = [tensor_name(model, f"{hub}.lora_{letter}.weight") for letter in "AB"]
        if not all(key in found and found[key].dim() == 2 for key in keys):
            continue
        layer = model.get_submodule(name)
        require_unpacked(hub, layer.weight)
        rank = by_pattern(config.rank_pattern, name_in(model, hub), config.rank)
        alpha = by_pattern(config.alpha_pattern, name_in(model, hub), config.alpha)
        scale = scale_of(rank, alpha, config.rslora)
        weight = layer.matrix(torch.float32)
        if config.initial == "olora":
            q, r = torch.linalg.qr(weight)
            a, b = r[:rank], q[:, :rank]
        else:
            a, b = principal_part(weight, rank, scale)
        found[keys[0]] = torch.cat([found[keys[0]].float(), a])
        found[keys[1]] = torch.cat([found[keys[1]].float(), -b], dim=1)
    more = math.sqrt(2) if config.rslora else 2
    return replace(
        config,
        initial="",
        rank=2 * config.rank,
        alpha=more * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
    ), found


def settings(model: nn.Module) -> dict:
    """adapter_config.json: every field that PEFT needs to compute the same."""
    config = model.adapter
    return {
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "layers_to_transform": list(config.layers) or None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.rslora,
        "use_dora": config.variant == "dora",
        "bias": "none",
        "init_lora_weights": True,
    }


def options(model: nn.Module) -> dict:
    """The options of `minift train` that make such an adapter."""
    config = model.adapter
    same = ("rank", "alpha", "targets", "exclude", "layers", "rank_pattern", "alpha_pattern", "rslora")
    found = {"method": config.variant, "adapter_dropout": config.dropout}
    return found | {name: as_option(getattr(config, name)) for name in same}
