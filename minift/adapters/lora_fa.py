"""LoRA-FA: A stays as it was drawn and B alone learns (Zhang et al., https://arxiv.org/abs/2308.03303).

Then backward needs h = drop(x) A^T, R numbers a token, and no x: ops/lora.py saves x only where A learns.
"""

from torch import nn

from .lora import adapters


def add(model: nn.Module) -> None:
    """Freezes every A."""
    for _, lora in adapters(model):
        lora.A.requires_grad_(False)
