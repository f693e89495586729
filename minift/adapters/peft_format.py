"""PEFT adapter folders, in and out: adapter_config.json and adapter_model.safetensors; LoRA and DoRA, saved heads.

    base_model.model.<layer>.lora_A.weight (R, in)          base_model.model.<layer>.lora_B.weight (out, R)
    base_model.model.<layer>.lora_magnitude_vector (out,)   base_model.model.<saved module>.weight, .bias

Layers have the hub's names. What PEFT can and this engine cannot is refused by its name in the file, never passed over.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import InputError
from . import dora
from .lora import LoRAConfig, adapters, is_within, wrap

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
            *(
                "alora_invocation_tokens",
                "arrow_config",
                "corda_config",
                "eva_config",
                "kasa_config",
                "layer_replication",
            ),
            *("lora_ga_config", "monteclora_config", "target_parameters", "trainable_token_indices", "velora_config"),
            *("layers_pattern", "megatron_config"),
        )
    ),
}


# in


def read_config(folder: Path) -> tuple[LoRAConfig, str | None]:
    """(the configuration, the task it is for) of an adapter folder. Raises InputError."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from e
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path}: peft_type is {kind!r}; expected 'LORA'")
    for key, only in REFUSED.items():
        if found.get(key, only) not in (only, {}, [], only or None):
            raise InputError(f"{path}: {key} is {found[key]!r}; expected {only!r}, the rest is not supported")
    task = {kind: task for task, kind in TASK_TYPES.items()}.get(found.get("task_type"))
    saved = [*(found.get("modules_to_save") or ()), *(HEADS if task == "classify" else ())]
    try:
        targets, layers = found.get("target_modules"), found.get("layers_to_transform")
        config = LoRAConfig(
            rank=int(found.get("r", 8)),
            alpha=float(found.get("lora_alpha", 8)),
            dropout=float(found.get("lora_dropout", 0)),
            targets=named(targets),
            exclude=named(found.get("exclude_modules")),
            layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
            rank_pattern={k: int(v) for k, v in (found.get("rank_pattern") or {}).items()},
            alpha_pattern={k: float(v) for k, v in (found.get("alpha_pattern") or {}).items()},
            rslora=bool(found.get("use_rslora")),
            variant="dora" if found.get("use_dora") else "lora",
            saved=tuple(dict.fromkeys(saved)),
            base=found.get("base_model_name_or_path") or "",
        )
    except (TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{path}: {e}") from e
    return config, task


def named(value) -> str | tuple[str, ...]:
    """Targets as they are here: a regular expression as it is, a list as a tuple."""
    return value if isinstance(value, str) else tuple(sorted(map(str, value or ())))


def load(model: nn.Module, folder: Path) -> None:
    """Puts the adapter in `folder` around a loaded model's layers. Raises InputError that names the tensor at fault."""
    config, _ = read_config(folder)
    found = read_weights(folder / WEIGHTS)
    heads = [model.hub_name(name) for name, _ in model.named_modules() if name.startswith("head.")]
    for module in set(config.saved) - set(HEADS):
        if not any(is_within(hub, (module,)) for hub in heads):
            raise InputError(f"{folder / CONFIG}: modules_to_save names {module}; expected some of {', '.join(heads)}")
    saved = tuple(hub for hub in heads if is_within(hub, config.saved))
    if model.tied and saved:
        model.untie()  # PEFT trains a copy
    wrap(model, LoRAConfig(**vars(config) | {"saved": saved}))
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
        raise InputError(f"{folder / WEIGHTS}: does not fit the model:\n  " + "\n  ".join(faults[:20]) + more)
    model.report.fresh = [name for name in model.report.fresh if PREFIX + name not in want]
    model.report.adapter = len(want)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, a DoRA vector under the one of its two names that is written today."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e})") from e
    return {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): t for name, t in found.items()}


# out


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the file."""
    found = {}
    for name, lora in adapters(model):
        found[f"{PREFIX}{name}.lora_A.weight"], found[f"{PREFIX}{name}.lora_B.weight"] = lora.A, lora.B
    for name, module in model.named_modules():
        if isinstance(module, dora.DoRALinear):
            found[f"{PREFIX}{model.hub_name(name)}.lora_magnitude_vector"] = module.magnitude
    for name, parameter in model.head.named_parameters(prefix="head") if model.head else ():
        if is_within(model.hub_name(name), model.adapter.saved):
            found[PREFIX + model.hub_name(name)] = parameter
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
