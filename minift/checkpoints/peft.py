"""PEFT adapter folders, in and out: adapter_config.json and adapter_model.safetensors; LoRA and DoRA, saved heads.

    base_model.model.<layer>.lora_A.weight (R, in)          base_model.model.<layer>.lora_B.weight (out, R)
    base_model.model.<layer>.lora_magnitude_vector (out,)   base_model.model.<saved module>.weight, .bias

Layers have the hub's names. What PEFT can and this engine cannot is refused by its name in the file, never passed over.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import dora
from ..adapters.lora import LoRAConfig, adapters, by_pattern, candidates, check_float, is_within, name_in, wrap
from ..config import parse_json
from ..errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHT_FILES = (WEIGHTS, "adapter_model.bin")
PREFIX = "base_model.model."
TASK_TYPES = {"classify": "SEQ_CLS", "complete": "CAUSAL_LM"}
HEADS = ("classifier", "score")  # what PEFT trains and saves for SEQ_CLS without being told

# options of a LoraConfig that change what is computed, with the one value that is computed here
REFUSED = {
    "bias": "none",
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": False,
    **dict.fromkeys(
        (
            *("alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "layer_replication"),
            *("lora_ga_config", "monteclora_config", "target_parameters", "trainable_token_indices", "velora_config"),
            *("layers_pattern", "megatron_config"),
        )
    ),
}

# its other options: read here, or only about how training began
KNOWN = set(
    "alpha_pattern auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode init_lora_weights layers_to_transform loftq_config lora_alpha lora_dropout megatron_core "
    "modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "task_type use_dora use_rslora".split()
)

# the kinds that a value may be of, where it is not null, and how a message calls them
KINDS = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), ((int, float), "a number")),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, "an object of numbers")),
    **dict.fromkeys(("target_modules", "exclude_modules"), ((str, list), "a string or a list of names")),
    "layers_to_transform": ((int, list), "a number or a list of numbers"),
    "modules_to_save": (list, "a list of names"),
    "base_model_name_or_path": (str, "a string"),
}

# how training began, by init_lora_weights: with the base as it is, or with a part of it taken out, that is known
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
SPLIT = ("pissa", "olora")


# in


def read_config(folder: Path) -> tuple[LoRAConfig, str | None, list[str]]:
    """(the configuration, the task it is for, what else to tell) of an adapter folder. Raises InputError."""
    path = folder / CONFIG
    found = parse_json(path.read_bytes(), path)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path}: peft_type is {kind!r}; expected 'LORA'")
    for key, only in REFUSED.items():
        if found.get(key, only) not in (only, {}, [], only or None):
            raise InputError(f"{path}: {key} is {found[key]!r}; expected {only!r}, the rest is not supported")
    notes = check_unknown(found, path)
    initial = first_weights(found)
    if initial not in (*PLAIN, *SPLIT):
        raise InputError(
            f"{path}: init_lora_weights is {initial!r}: the base was changed before training, in a way that cannot be "
            f"repeated; expected one of {', '.join(map(str, (*PLAIN[:2], *PLAIN[3:], *SPLIT)))}, or the adapter "
            "converted to plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    kind = found.get("task_type")
    task = {kind: task for task, kind in TASK_TYPES.items()}.get(kind if isinstance(kind, str) else None)
    try:
        return config_of(found, task), task, notes
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"{path}: {e}") from e


def first_weights(found: dict):
    """init_lora_weights, which PEFT reads in upper and lower case."""
    initial = found.get("init_lora_weights")
    return initial.lower() if isinstance(initial, str) else initial


def check_unknown(found: dict, path: Path) -> list[str]:
    """A sentence about options that PEFT has added since. Raises InputError for one that is a switch, and on."""
    unknown = {key: value for key, value in found.items() if key not in KNOWN and key not in REFUSED and value}
    for key, value in unknown.items():
        if value is True or key.startswith("use_") or key.endswith("_config"):
            raise InputError(f"{path}: {key} is {value!r}, an option that is not known here; expected none that is on")
    return [f"{path}: options that are not known here, and not used: {', '.join(unknown)}"] if unknown else []


def config_of(found: dict, task: str | None) -> LoRAConfig:
    """The configuration in an adapter_config.json. Raises TypeError, ValueError, AttributeError."""
    for key, (kinds, expected) in KINDS.items():
        value = found.get(key, 0 if kinds == (int, float) else None)  # numbers have no null
        if (value is not None or kinds == (int, float)) and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ValueError(f"{key} is {str(value)[:80]!r}; expected {expected}")
    saved = [*(found.get("modules_to_save") or ()), *(HEADS if task == "classify" else ())]
    targets, layers = found.get("target_modules"), found.get("layers_to_transform")
    alpha, dropout = float(found.get("lora_alpha", 8)), float(found.get("lora_dropout", 0))
    initial, base = first_weights(found), found.get("base_model_name_or_path") or ""
    if not math.isfinite(alpha):
        raise ValueError(f"lora_alpha is {alpha}; expected a number")
    return LoRAConfig(
        rank=int(found.get("r", 8)),
        alpha=alpha,
        dropout=dropout,
        targets=named(targets),
        exclude=named(found.get("exclude_modules")),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        rank_pattern={k: int(v) for k, v in (found.get("rank_pattern") or {}).items()},
        alpha_pattern={k: float(v) for k, v in (found.get("alpha_pattern") or {}).items()},
        rslora=bool(found.get("use_rslora")),
        variant="dora" if found.get("use_dora") else "lora",
        saved=tuple(dict.fromkeys(map(str, saved))),
        base=base,
        initial=initial if initial in SPLIT else "",
    )


def named(value) -> str | tuple[str, ...]:
    """Targets as they are here: a regular expression as it is, a list as a tuple."""
    return value if isinstance(value, str) else tuple(sorted(map(str, value or ())))


def load(model: nn.Module, folder: Path, config: LoRAConfig, found: dict[str, Tensor]) -> None:
    """Puts an adapter around a loaded model's layers. Raises InputError that names the tensor at fault.

    config, found: what read_config and the file of tensors in `folder` say.
    """
    found, is_bare = modern_names(found, model)
    if is_bare and model.head:  # its regular expressions are for names without the body's prefix
        config = replace(config, targets=prefixed(config.targets, model), exclude=prefixed(config.exclude, model))
    heads = [model.hub_name(name) for name, _ in model.named_modules() if name.startswith("head.")]
    embedding = model.hub_name(model.family.EMBEDDING)
    for module in set(config.saved) - set(HEADS):
        if not any(is_within(hub, (module,)) for hub in (*heads, embedding)):
            raise InputError(f"{folder / CONFIG}: modules_to_save names {module}; expected some of {', '.join(heads)}")
    saved = tuple(hub for hub in heads if is_within(hub, config.saved))
    if model.tied and saved:
        model.untie()  # PEFT trains a copy
    config = replace(config, saved=saved, kept=take_embeddings(model, found, config.saved, saved))
    if config.initial:
        config, found = with_initial_part(model, config, found)
    wrap(model, config)
    if config.variant == "dora":
        dora.add(model)
    want = tensors(model)
    faults = []
    for name, parameter in want.items():
        tensor = found.pop(name, None)
        if tensor is None:
            faults.append(f"{name} is missing; expected {tuple(parameter.shape)}")
        elif tensor.shape != parameter.shape:
            faults.append(f"{name} is {tuple(tensor.shape)}; expected {tuple(parameter.shape)}")
        elif not tensor.is_floating_point():
            faults.append(f"{name} is {tensor.dtype}; expected floating-point numbers")
        elif not tensor.isfinite().all():
            faults.append(f"{name} has numbers that are not finite")
        else:
            with torch.no_grad():
                parameter.copy_(tensor)
    faults += [
        f"{name} {tuple(tensor.shape)} belongs to no adapted layer or saved module" for name, tensor in found.items()
    ]
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InputError(f"{folder}: the adapter does not fit the model:\n  " + "\n  ".join(faults[:20]) + more)
    model.report.fresh = [name for name in model.report.fresh if PREFIX + name not in want]
    model.report.adapter = len(want)


def modern_names(found: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """(an adapter's tensors by the names that PEFT writes today, whether it was made for the body alone).

    Files differ: an adapter's name inside (`lora_A.default.weight`), `.weight` behind DoRA's vector, wrappers in front,
    no head around the body (`encoder.layer...`).
    """
    renamed, is_bare = {}, False
    tops = {model.hub_name(name).split(".")[0] for name, _ in model.named_modules() if name.count(".") <= 1}
    for name, tensor in found.items():
        name = re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", name)
        name = re.sub(r"(lora_magnitude_vector|modules_to_save)\.default(?=\.|$)", r"\1", name)
        name = name.replace(".modules_to_save.", ".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        name = re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", name).removeprefix(PREFIX)
        if name.split(".")[0] not in tops:
            name, is_bare = model.family.PREFIX + name, True
        renamed[file_name(model, name)] = tensor
    return renamed, is_bare


def prefixed(names: str | tuple[str, ...], model: nn.Module) -> str | tuple[str, ...]:
    """Targets for names that begin with the body's prefix, of those for names that do not."""
    if not isinstance(names, str) or names == "all-linear":
        return names
    return f"{re.escape(model.family.PREFIX)}(?:{names})"


def file_name(model: nn.Module, hub: str) -> str:
    """How an adapter's file calls what the hub calls `hub`."""
    return PREFIX + name_in(model, hub)


def take_embeddings(
    model: nn.Module, found: dict[str, Tensor], wanted: tuple[str, ...], saved: tuple[str, ...]
) -> tuple[str, ...]:
    """Makes room for the word embedding that came with an adapter, as after its vocabulary was resized.

    wanted: the adapter's modules_to_save; saved: those of the head. Returns what is frozen, but saved with the adapter
    again, by our names.
    """
    name, kept = model.family.EMBEDDING + ".weight", ()
    tensor = found.get(file_name(model, model.hub_name(name)))
    if tensor is not None and tensor.dim() == 2:
        model.resize(tensor.shape[0])
    if tensor is not None or is_within(model.hub_name(name), wanted):
        kept = (name,)
    head = getattr(model.head, "tied", ("",))[0]
    tensor = found.get(PREFIX + model.hub_name(head)) if head else None
    if tensor is None or is_within(model.hub_name(head), saved):
        return kept
    embedding = found.get(file_name(model, model.hub_name(name)), model.get_parameter(name))
    if model.tied and torch.equal(tensor, embedding):
        found.pop(PREFIX + model.hub_name(head))  # the same, written twice
        return kept
    if model.tied:
        model.untie()
    return (*kept, head)


def with_initial_part(model: nn.Module, config: LoRAConfig, found: dict) -> tuple[LoRAConfig, dict]:
    """The same adapter as plain LoRA of twice the rank, for one that was trained beside a changed base.

    PiSSA and OLoRA take the part s B0 A0 out of the weight before they train, and it can be computed again. So

        (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]

    which is what PEFT computes after loading (tuners/lora/layer.py), and how it converts such adapters.
    """
    found = dict(found)
    for name, hub in candidates(model).items():
        keys = [file_name(model, f"{hub}.lora_{letter}.weight") for letter in "AB"]
        if not all(key in found and found[key].dim() == 2 for key in keys):
            continue
        layer = model.get_submodule(name)
        check_float(hub, layer.weight)
        rank = by_pattern(config.rank_pattern, name_in(model, hub), config.rank)
        alpha = by_pattern(config.alpha_pattern, name_in(model, hub), config.alpha)
        scale = alpha / (math.sqrt(rank) if config.rslora else rank)
        a, b = initial_part(layer.matrix(torch.float32), config.initial, rank, scale)
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


def initial_part(weight: Tensor, kind: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A0, B0) of PiSSA or OLoRA: what PEFT takes out of a weight (out, in), times `scale`."""
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


# out


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the file."""
    found = {}
    for name, lora in adapters(model):
        found[file_name(model, f"{name}.lora_A.weight")] = lora.A
        found[file_name(model, f"{name}.lora_B.weight")] = lora.B
    for name, module in model.named_modules():
        if isinstance(module, dora.DoRALinear):
            found[file_name(model, f"{model.hub_name(name)}.lora_magnitude_vector")] = module.magnitude
    for name, parameter in model.head.named_parameters(prefix="head") if model.head else ():
        if is_within(model.hub_name(name), model.adapter.saved):
            found[PREFIX + model.hub_name(name)] = parameter
    for name in model.adapter.kept:
        found[file_name(model, model.hub_name(name))] = model.get_parameter(name)
    return found


def settings(model: nn.Module) -> dict:
    """adapter_config.json: every field that PEFT needs to compute the same."""
    config = model.adapter
    packed = any(not lora.base.weight.is_floating_point() for _, lora in adapters(model))
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(model.task, "FEATURE_EXTRACTION"),
        "base_model_name_or_path": config.base or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "exclude_modules": (config.exclude if isinstance(config.exclude, str) else list(config.exclude)) or None,
        "layers_to_transform": list(config.layers) or None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.rslora,
        "use_dora": config.variant == "dora",
        "modules_to_save": list(config.saved) or None,
        "fan_in_fan_out": bool(model.family.TRANSPOSED) and not packed,  # as PEFT says of Conv1D; it changes nothing
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
