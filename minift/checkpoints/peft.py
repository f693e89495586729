"""PEFT adapter folders, in and out: adapter_config.json and adapter_model.safetensors.

    base_model.model.<layer>.<end>    what an adapter learned, as lora_A.weight (R, in)
    base_model.model.<module>.weight  a module that was trained in full, as the head

Layers have the hub's names. What is in these files beside that, each method says itself (adapters/__init__.py). What
PEFT can and minift cannot is refused by its name in the file, never passed over.
"""

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..adapters import method_file, peft_types, saved_as
from ..adapters.files import PREFIX, tensor_name
from ..adapters.targets import is_within, wrappers
from ..config import parse_json
from ..errors import InputError
from ..layers.packed import packed_as
from ..tasks import task_named, task_of_peft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WEIGHT_FILES = (WEIGHTS, "adapter_model.bin")
# config.json of the adapted model. It has another name, for where transformers finds a config.json beside an adapter it
# takes the folder for a whole model's (an older minift wrote one)
SETTINGS = "minift-model.json"


# in


def read_config(folder: Path) -> tuple[object, str | None, list[str]]:
    """(the configuration, the task it is for, what else to tell) of an adapter folder. Raises InputError."""
    path = folder / CONFIG
    found = parse_json(path.read_bytes(), path)
    kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
    files = peft_types()
    if not isinstance(kind, str) or kind not in files:
        raise InputError(f"{path}: peft_type is {kind!r}; expected {' or '.join(map(repr, files))}")
    task = task_of_peft(found.get("task_type"))
    try:
        config, notes = files[kind].read(found, peft_heads(task))
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"{path}: {e}") from e
    return config, task, [f"{path}: {note}" for note in notes]


def peft_heads(task: str | None) -> tuple[str, ...]:
    """The modules that PEFT trains for a task without being told."""
    return task_named(task).PEFT_HEADS if task else ()


def put_adapter(model: nn.Module, folder: Path, config, found: dict[str, Tensor]) -> None:
    """Puts an adapter around a loaded model's layers. Raises InputError that names the tensor at fault.

    config, found: what read_config and the file of tensors in `folder` say.
    """
    file = method_file(saved_as(config.variant))
    found, is_bare = modern_names(found, model, file)
    if is_bare and model.head:  # its regular expressions are for names without the body's prefix
        config = replace(config, **{field: prefixed(getattr(config, field), model) for field in file.PATTERNS})
    config = take_saved(model, folder, config, found)
    if hasattr(file, "on_base"):
        config, found = file.on_base(model, config, found)
    method_file(config.variant).wrap(model, config)

    # every tensor that is expected, and no other
    expected = tensors(model)
    faults = [fault for name, p in expected.items() if (fault := put(name, found.pop(name, None), p))]
    faults += [f"{name} {tuple(t.shape)} belongs to no adapted layer or saved module" for name, t in found.items()]
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InputError(f"{folder}: the adapter does not fit the model:\n  " + "\n  ".join(faults[:20]) + more)
    model.report.fresh = [name for name in model.report.fresh if PREFIX + name not in expected]
    model.report.adapter = len(expected)


def put(name: str, tensor: Tensor | None, parameter: Tensor) -> str:
    """Copies a tensor of the file into the parameter it is for; returns what is wrong with it, or ""."""
    if tensor is None:
        return f"{name} is missing; expected {tuple(parameter.shape)}"
    if tensor.shape != parameter.shape:
        return f"{name} is {tuple(tensor.shape)}; expected {tuple(parameter.shape)}"
    if not tensor.is_floating_point():
        return f"{name} is {tensor.dtype}; expected floating-point numbers"
    if not tensor.isfinite().all():
        return f"{name} has numbers that are not finite"
    with torch.no_grad():
        parameter.copy_(tensor)
    return ""


def modern_names(found: dict[str, Tensor], model: nn.Module, file: ModuleType) -> tuple[dict[str, Tensor], bool]:
    """(an adapter's tensors by the names that PEFT writes today, whether it was made for the body alone).

    Files differ: an adapter's name inside, wrappers in front, no head around the body (`encoder.layer...`).
    file: the method's, which knows its own tensors.
    """
    renamed = {}
    is_bare = False
    tops = {model.hub_name(name).split(".")[0] for name, _ in model.named_modules() if name.count(".") <= 1}
    for name, tensor in found.items():
        name = re.sub(r"modules_to_save\.default(?=\.|$)", "modules_to_save", file.modern_name(name))
        name = name.replace(".modules_to_save.", ".")
        name = re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", name).removeprefix(PREFIX)
        if name.startswith("base_model."):  # of no layer, but of the adapter as a whole: for the method's on_base
            renamed[name] = tensor
            continue
        if name.split(".")[0] not in tops:
            name = model.family.PREFIX + name
            is_bare = True
        renamed[tensor_name(model, name)] = tensor
    return renamed, is_bare


def prefixed(names: str | tuple[str, ...], model: nn.Module) -> str | tuple[str, ...]:
    """Targets for names that begin with the body's prefix, of those for names that do not."""
    if not isinstance(names, str) or names == "all-linear":
        return names
    return f"{re.escape(model.family.PREFIX)}(?:{names})"


def take_saved(model: nn.Module, folder: Path, config, found: dict[str, Tensor]):
    """Makes room for what was saved beside the adapter: modules of the head, and the word embedding.

    Returns the configuration with their names. Raises InputError for a module that cannot be trained here.
    """
    heads = [model.hub_name(name) for name, _ in model.named_modules() if name.startswith("head.")]
    embedding = model.hub_name(model.family.EMBEDDING)
    for module in set(config.saved) - set(peft_heads(model.task)):
        if not any(is_within(hub, (module,)) for hub in (*heads, embedding)):
            raise InputError(f"{folder / CONFIG}: modules_to_save names {module}; expected some of {', '.join(heads)}")
    saved = tuple(module for module in config.saved if any(is_within(hub, (module,)) for hub in heads))
    if model.tied and saved:
        model.untie()  # PEFT trains a copy
    return replace(config, saved=saved, kept=take_embeddings(model, found, config.saved, saved))


def take_embeddings(
    model: nn.Module, found: dict[str, Tensor], wanted: tuple[str, ...], saved: tuple[str, ...]
) -> tuple[str, ...]:
    """Makes room for the word embedding that came with an adapter, as after its vocabulary was resized.

    wanted: the adapter's modules_to_save; saved: those of the head. Returns what is frozen, but saved with the adapter
    again, by our names.
    """
    name = model.family.EMBEDDING + ".weight"
    kept = ()
    tensor = found.get(tensor_name(model, model.hub_name(name)))
    if tensor is not None and tensor.dim() == 2:
        model.resize(tensor.shape[0])
    if tensor is not None or is_within(model.hub_name(name), wanted):
        kept = (name,)
    head = getattr(model.head, "tied", ("",))[0]
    tensor = found.get(PREFIX + model.hub_name(head)) if head else None
    if tensor is None or is_within(model.hub_name(head), saved):
        return kept
    embedding = found.get(tensor_name(model, model.hub_name(name)), model.get_parameter(name))
    if model.tied and torch.equal(tensor, embedding):
        found.pop(PREFIX + model.hub_name(head))  # the same, written twice
        return kept
    if model.tied:
        model.untie()
    return (*kept, head)


# out


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by their names in the file."""
    found = {}
    for name, layer in wrappers(model).items():
        for end, parameter in layer.tensors().items():
            found[tensor_name(model, f"{model.hub_name(name)}.{end}")] = parameter
    if model.head:
        for name, parameter in model.head.named_parameters(prefix="head"):
            if is_within(model.hub_name(name), model.adapter.saved):
                found[PREFIX + model.hub_name(name)] = parameter
    for name in model.adapter.kept:
        found[tensor_name(model, model.hub_name(name))] = model.get_parameter(name)
    return found


def settings(model: nn.Module) -> dict:
    """adapter_config.json: every field that PEFT needs to compute the same."""
    config = model.adapter
    file = method_file(saved_as(config.variant))
    is_conv1d = bool(model.family.TRANSPOSED) and not packed_as(model)  # as PEFT says; it changes nothing
    common = {
        "peft_type": file.PEFT_TYPE,
        "task_type": task_named(model.task).PEFT_TYPE if model.task else "FEATURE_EXTRACTION",
        "base_model_name_or_path": config.base or None,
        "target_modules": config.targets,
        "exclude_modules": config.exclude or None,
        "modules_to_save": config.saved or None,
        "fan_in_fan_out": is_conv1d,
        "inference_mode": True,
    }
    return common | file.settings(model)
