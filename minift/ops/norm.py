"""Dropout, residual and layer norm, the three passes between two matrix products.

    h = residual + drop(x)        y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

(Ba et al., https://arxiv.org/abs/1607.06450.) BERT goes on with y alone, GPT-2 with both. N tokens, C width.
"""

import torch.nn.functional as F
from torch import Tensor

from .dropout import Noise, dropout


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (N, C) normalised over its channels, in x's dtype with statistics in float32."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, noise: Noise, site: int
) -> tuple[Tensor, Tensor]:
    """(h, y) of the equations above, both (N, C). x and residual (N, C), weight and bias (C,)."""
    h = residual + dropout(x, p, noise, site)
    return h, layer_norm(h, weight, bias, eps)
