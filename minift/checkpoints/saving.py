"""A model -> a folder that minift, transformers, PEFT and bitsandbytes load."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.targets import wrappers
from ..data.tokenizer import Tokenizer
from ..engine.distributed import whole
from ..files import check_folder, write_folder
from ..layers import Linear
from ..layers.packed import packed_as, way_named
from ..models import LAST, Model
from ..tasks import task_named
from . import peft as peft_format
from .hub import address
from .weights import MODEL, can_pack, hub_names, is_transposed, layer_of, leaf_of


def save(model: Model, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Writes a folder that minift and transformers load: config.json, model.safetensors, the tokenizer's files.

    Of a model with an adapter, the adapter alone: a PEFT folder, with minift-model.json (what config.json is of a whole
    model) and the tokenizer's files beside it. Packed layers are written as bitsandbytes writes them.
    minift.json lists what was written. An older model that minift saved there is replaced, and everything else in the
    folder stays. Raises InputError where a file that minift did not write would be replaced, OSError on a full disk.
    """
    folder = Path(folder)
    names = {MODEL, "config.json"}
    if model.adapter:
        names = {peft_format.WEIGHTS, peft_format.CONFIG, peft_format.SETTINGS}
    if tokenizer:
        names |= set(tokenizer.files)
    check_folder(folder, names)
    write_model(model, tokenizer, folder)


def write_model(model: Model, tokenizer: Tokenizer | None, folder: Path, write: bool = True) -> None:
    """What `save` writes, over whatever has these names: for a run's own folders.

    write: whether this process does; of a sharded model, all have to give their parts.
    """
    if model.adapter:
        parameters = peft_format.tensors(model)
        state = {name: whole(p.detach()).cpu().contiguous() for name, p in parameters.items()}
        weights = peft_format.WEIGHTS
        texts = {peft_format.CONFIG: peft_format.settings(model), peft_format.SETTINGS: settings_of(model)}
    else:
        state = weights_of(model)
        weights = MODEL
        texts = {"config.json": settings_of(model)}

    def put_files(aside: Path) -> None:
        for name, content in texts.items():
            (aside / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(state, aside / weights, metadata={"format": "pt"})
        if tokenizer:
            tokenizer.save(aside)

    if not write:
        return
    try:
        write_folder(folder, put_files)
    except (OSError, SafetensorError) as e:
        raise OSError(f"{folder}: the model could not be written ({e}); what was there before is whole") from e


def save_base(model: Model, tokenizer: Tokenizer | None, folder: Path, write: bool = True) -> None:
    """Saves the frozen model under an adapter, and makes its folder the adapter's base."""
    adapter = model.adapter
    layers = wrappers(model)
    model.adapter = None
    for name, layer in layers.items():
        model.set_submodule(name, layer.frozen)
    write_model(model, tokenizer, folder, write)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.adapter = replace(adapter, base=address(folder))


def weights_of(model: Model) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    state = {}
    layers = dict(model.named_modules())
    for name, hub in hub_names(model).items():
        tensor = whole(leaf_of(layers, name).detach())
        packed = can_pack(layers, name)
        if is_transposed(model, hub) and not packed:
            tensor = tensor.t()
        state[hub] = tensor.contiguous().cpu()
        if packed:
            layer = layer_of(layers, name)
            state |= {layer.part_name(hub, part): tensor.clone().cpu() for part, tensor in layer.parts().items()}
    if model.bias_twin and not model.tied:
        state[model.bias_twin] = state[model.hub_name(f"{LAST}.bias")].clone()
    return state


def settings_of(model: Model) -> dict:
    """config.json: the checkpoint's own, with the architecture and labels of this model."""
    settings = {k: v for k, v in model.settings.items() if k not in ("_name_or_path", "torch_dtype", "num_labels")}
    architecture = model.family.ARCHITECTURE
    linears_of_head = []
    if model.head:
        architecture = model.head.architecture
        layers = model.head.named_modules(prefix="head")
        linears_of_head = [model.hub_name(name) for name, layer in layers if isinstance(layer, Linear)]
    settings |= {"architectures": [architecture], "dtype": "float32"}
    if model.task:
        settings |= task_named(model.task).settings(model)

    # what transformers has no place for is in a part of its own
    own = {}
    if model.max_length:
        own["max_length"] = model.max_length
    base = packed_as(model)
    if base and model.adapter:  # the base is packed as it is loaded
        own["base"] = base
    elif base:  # and the head is not
        settings["quantization_config"] = way_named(base).quantization_config(linears_of_head)
    if own:
        settings["minift"] = own
    return settings
