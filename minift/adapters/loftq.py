"""LoftQ: LoRA that begins by undoing what four bits lose (Li et al., https://arxiv.org/abs/2310.08659).

    five times:   Q = nf4(W - s B A)        s B A = the best rank-R approximation of W - Q

On CPU and CUDA alike (PEFT's needs CUDA). The weight is left as the last W - s B A, which quantize() then packs into
that Q.
"""

import torch
from torch import Tensor, nn

from ..ops import nf4
from . import Options
from .lora import adapters, begin_at, check_splits
from .lora import add as add_plain

SAVED_AS = "lora"
CHANGES_BASE = True

ROUNDS = 5


@torch.no_grad()
def add(model: nn.Module, options: Options) -> None:
    """Splits each adapted weight into what will be packed and an adapter that makes up for its error."""
    add_plain(model, options)
    for name, lora in adapters(model):
        check_splits(name, lora)
        w = lora.base.matrix(torch.float32)
        for _ in range(ROUNDS):
            rest = w - lora.delta()
            begin_at(lora, w - roundtrip(rest))
        lora.base.weight.copy_(rest)


def roundtrip(w: Tensor) -> Tensor:
    """What four bits keep of a matrix, with double quantisation."""
    codes, absmax = nf4.quantize(w)
    d, *scales = nf4.compress(absmax)
    return nf4.dequantize(codes, d, torch.empty_like(w), *scales)
