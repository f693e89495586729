"""LoRA-FA: A stays as it was drawn and B alone learns (Zhang et al., https://arxiv.org/abs/2308.03303).

Then backward needs h = drop(x) A^T, R numbers a token, and no x: ops/lora.py saves x only where A learns.
"""

from torch import nn

from . import Options
from .lora import adapters
from .lora import add as add_plain

SAVED_AS = "lora"


def add(model: nn.Module, options: Options) -> None:
    """Plain LoRA, and every A frozen."""
    add_plain(model, options)
    for _, lora in adapters(model):
        lora.A.requires_grad_(False)
