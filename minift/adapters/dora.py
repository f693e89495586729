"""DoRA: length and direction of each row of the weight learn apart (Liu et al., https://arxiv.org/abs/2402.09353).

    V = W + s B A        y = (m / |V|) * (x W^T + s drop(x) A^T B^T) + b        |V| (out,): the length of each row

m begins as |W|. |V| is taken as a constant in backward (4.3 of the paper). Where PEFT also drops x before W, this
drops it before A alone, as the equation has it; without dropout the two agree.
"""

import torch
from torch import Tensor, nn

from ..ops.dropout import SILENT, Noise
from ..ops.lora import lora_linear
from . import Options, lora
from .lora import LoRALinear

SAVED_AS = "lora"


class DoRALinear(nn.Module):
    """A LoRALinear with a trained length for each output. Saves one value of width `out` a token more than LoRA."""

    def __init__(self, lora: LoRALinear):
        super().__init__()
        self.in_features = lora.in_features
        self.out_features = lora.out_features
        self.lora = lora
        self.magnitude = nn.Parameter(lengths(lora))  # (out,), float32

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's."""
        return self.lora.bias

    @property
    def frozen(self) -> nn.Module:
        """The layer that was wrapped."""
        return self.lora.base

    def set_frozen(self, layer: nn.Module) -> None:
        """Wraps another layer instead."""
        self.lora.set_frozen(layer)

    def tensors(self) -> dict[str, nn.Parameter]:
        """What was learned, by the ends of their names in PEFT's file."""
        return self.lora.tensors() | {"lora_magnitude_vector": self.magnitude}

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(m / |V|) * V (out, in)."""
        v = self.lora.matrix(torch.float32)
        return ((self.magnitude / torch.linalg.norm(v, dim=1))[:, None] * v).to(dtype)

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        lora = self.lora
        drop = noise.drop(lora.p, lora.site, lora.in_features)
        y = lora_linear(x, None, lora.A, lora.B, lora.base.products(), lora.scale, drop)
        y = y * (self.magnitude / lengths(lora)).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.no_grad()
def lengths(lora: LoRALinear) -> Tensor:
    """|V|: the length of each row of W + s B A, (out,)."""
    return torch.linalg.norm(lora.matrix(torch.float32), dim=1)


def add(model: nn.Module, options: Options) -> None:
    """Plain LoRA, and a length for each row."""
    lora.add(model, options)
    add_lengths(model)


def wrap(model: nn.Module, config: lora.LoRAConfig) -> None:
    """Puts DoRALinears in place, with nothing drawn yet."""
    lora.wrap(model, config)
    add_lengths(model)


def add_lengths(model: nn.Module) -> None:
    """Turns the LoRALinears of a model into DoRALinears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, DoRALinear(module))
