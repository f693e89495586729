"""What wraps a layer, or freezes it: `--method`."""

from torch import nn

from ..errors import InputError
from . import dora, loftq, lora_fa, pissa
from .freeze import freeze
from .lora import add_lora

# what makes a variant of freshly added LoRA
VARIANTS = {
    "lora": lambda model: None,
    "dora": dora.add,
    "pissa": pissa.add,
    "loftq": loftq.add,
    "lora-fa": lora_fa.add,
}
CHANGES_BASE = ("pissa", "loftq")  # variants whose frozen weights are not the checkpoint's


def apply(model: nn.Module, method: str, **lora) -> None:
    """Makes a loaded model ready to be trained by `method`: full, one of VARIANTS, or a policy of freeze.py.

    lora: the arguments of add_lora.
    """
    if model.adapter and method in VARIANTS:
        return  # it came with the model, and is trained further as it is
    if model.adapter:
        raise InputError(f"--method is {method}, but the model has an adapter; expected lora, or the merged model")
    if method in VARIANTS:
        add_lora(model, variant=method, **lora)
        VARIANTS[method](model)
    elif method != "full":
        freeze(model, method)
