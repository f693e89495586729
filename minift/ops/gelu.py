"""Activations by the names that config.json files use.

erf:   x * (1 + erf(x / sqrt(2))) / 2                                       (Hendrycks & Gimpel, arXiv 1606.08415)
tanh:  x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2                its approximation; GPT-2's weights want it
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_erf(x: Tensor) -> Tensor:
    """The exact GELU."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The GELU with tanh for erf; differs from the exact one by up to 4.7e-4."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), gelu_erf),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), gelu_tanh),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    **dict.fromkeys(("silu", "swish"), F.silu),
    "tanh": torch.tanh,
}
