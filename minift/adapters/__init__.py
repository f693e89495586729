"""What wraps a layer, or freezes it: `--method`.

A method is a file here and a line in tables.METHODS. The file defines

    add(model, options)   makes a loaded model ready to be trained, drawing what is new from options.seed

and, if it wraps layers,

    SAVED_AS       the method as which PEFT knows the result: its own name, or "lora" for a variant of LoRA
    CHANGES_BASE   whether it changes frozen weights, so that a run has to keep them beside the adapter (else False)
    LEARNING_RATE  of a run with `--lr 0`, where it is not LoRA's 5e-4

`add` then leaves model.adapter: a frozen dataclass with the fields variant (the method's name), targets, exclude, saved
(modules of the head that learn, by the hub's names), kept (frozen parameters that are saved with the adapter, by our
names) and base (the folder or hub id that the frozen weights come from). Layers are chosen by targets.py. Numbers that
make no sense raise InputError.

What wraps a layer is a layer itself (layers/__init__.py), whose `matrix` and `bias` say what it computes now: merging
needs no more than these two. It also has

    frozen, set_frozen(layer)  the layer inside, a Linear or PackedLinear; another in its place
    tensors() -> {end of the name in PEFT's file: parameter, or a view of one in the shape that it has there}

Its parameters are float32, and begin where the model computes what it did. Dropout on its input has the number (site)
lora.SITE + that of the layer among all candidates. What several layers share is one module, a part of each. `frozen`
may be packed: its matrix is then made at each call, in memory that the next one takes (layers/packed.py).

A file whose layers are its own, not those of another method, also defines

    wrap(model, config)   puts its layers in place, nothing drawn; they and config.saved become all that is trained.
        Both `add` and the reading of a file come through here. The steps are in targets.py: default_saved where saved
        is None, select, requires_grad_(False), set_submodule for those of candidates, train_saved. What only minift
        understands ("all-linear", numbers of layers) becomes names of layers, for PEFT to read: targets_for_peft

and one that PEFT has a name for (SAVED_AS is its own; files.py helps to read and write its files)

    PEFT_TYPE      peft_type in adapter_config.json
    PATTERNS       the fields of its configuration that name layers, each a tuple or a regular expression
    read(found, heads) -> (config, notes) from adapter_config.json, what is unusual in a sentence each; heads: modules
        that PEFT trains without being told. Raises ValueError for what is not supported, by its name in the file
    settings(model) -> adapter_config.json, but for what is the same for all (checkpoints/peft.py)
    modern_name(name) -> how PEFT writes the name of a tensor today
    options(model) -> the options of `minift train` that made such an adapter, for config.json of a run
    on_base(model, config, found) -> (config, tensors) for the base as it is, if training may have changed it. It also
        takes out of `found`, by their names today, what belongs to no layer: VeRA's "base_model.vera_A". (None is
        written: what all layers share has to follow from the configuration, as from a seed)
"""

import importlib
from dataclasses import dataclass, field, replace
from types import ModuleType

from torch import nn

from ..errors import InputError
from ..tables import METHODS, method_named
from .targets import Names, names


@dataclass(frozen=True)
class Options:
    """What a method is told: the options of `minift train` about adapters. What a method has no use for, it ignores."""

    method: str = "lora"
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: Names = ()  # names, a regular expression, or "all-linear"; () the method's default
    exclude: Names = ()  # names or a regular expression
    layers: tuple[int, ...] = ()  # numbers of the transformer layers; () all
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    seed: int = 42


def method_file(name: str) -> ModuleType:
    """The file of the method that `--method` calls `name`."""
    return importlib.import_module(f"{__name__}.{method_named(name).file}")


def saved_as(method: str) -> str:
    """The method as which PEFT knows the adapters of `method`; "" where it wraps no layer."""
    return getattr(method_file(method), "SAVED_AS", "")


def changes_base(method: str) -> bool:
    """Whether a method changes frozen weights, which a run then keeps beside the adapter."""
    return getattr(method_file(method), "CHANGES_BASE", False)


def learning_rate(method: str) -> float:
    """The learning rate of an adapter run that is given none."""
    return getattr(method_file(method), "LEARNING_RATE", 5e-4)


def peft_types() -> dict[str, ModuleType]:
    """PEFT's peft_type -> the file of the method that has this name there."""
    files = [importlib.import_module(f"{__name__}.{method.file}") for method in METHODS.values()]
    return {file.PEFT_TYPE: file for file in files if hasattr(file, "PEFT_TYPE")}


def adapt(model: nn.Module, method: str, **options) -> nn.Module:
    """Makes a loaded model ready to be trained by a method, in place: `adapt(model, "dora", rank=4)`. Returns it.

    options: fields of Options; names may also be a string, with commas between. An adapter that came with the model is
    trained further as it is. Raises InputError where that is of another kind.
    """
    if method_named(method) is None:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    if model.adapter is None:
        told = Options(method=method, **options)
        told = replace(told, targets=names(told.targets), exclude=names(told.exclude))
        method_file(method).add(model, told)
        return model
    own = saved_as(model.adapter.variant)
    if saved_as(method) != own:
        raise InputError(f"--method is {method}, but the model has an adapter; expected {own}, or the merged model")
    return model
