"""PiSSA: LoRA that begins at the principal part of the weight (Meng et al., https://arxiv.org/abs/2404.02948).

    W = U S V^T        A = sqrt(S_R / s) V_R^T        B = U_R sqrt(S_R / s)        the frozen rest: W - s B A

The model computes what it did; what learns are the directions in which W is largest. The frozen weight changes, so a
run keeps it beside the adapter (base/). With `--base nf4` the rest is packed after this, and is smaller than W was.
"""

import torch
from torch import nn

from . import Options
from .lora import adapters, begin_at, check_splits
from .lora import add as add_plain

SAVED_AS = "lora"
CHANGES_BASE = True


@torch.no_grad()
def add(model: nn.Module, options: Options) -> None:
    """Moves the principal part of each adapted weight into its adapter."""
    add_plain(model, options)
    for name, lora in adapters(model):
        check_splits(name, lora)
        begin_at(lora, lora.base.matrix(torch.float32))
        lora.base.weight -= lora.delta().to(lora.base.weight.dtype)
