"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) for hidden matrices, AdamW for all else.

With g the gradient of an (A, B) matrix and NS(x) the matrix nearest to x whose singular values are all about 1:

    m = b1 m + (1 - b1) g        p = p - lr decay p - 0.2 sqrt(max(A, B)) lr NS(b1 m + (1 - b1) g)

It is torch.optim.Muon(adjust_lr_fn="match_rms_adamw"): the factor (Liu et al., https://arxiv.org/abs/2502.16982) gives
the update the size of AdamW's, so that one learning rate and one decay serve both. Embeddings, the head, biases and
norms are AdamW's, with its own beta1. The matrices of an adapter are hidden ones too.
"""

import math

import torch
from torch import Tensor

from ..precision import native_bf16
from . import adamw, unless

DEFAULTS = {"beta1": 0.95, "beta2": 0.999, "eps": 1e-8}  # beta1 of the matrices; beta2 and eps of the rest
LR = 1.0
MATRICES = True
RECORDABLE = True

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: steepest at 0, within 0.7 to 1.2 after five steps
SMALLEST = 1e-7  # norm, below which a matrix is as good as 0


def begin(p: Tensor, group: dict) -> dict[str, Tensor]:
    """m under torch.optim's name, or AdamW's state."""
    if not group["matrices"]:
        return adamw.begin(p, group)
    return {"momentum_buffer": torch.zeros_like(p)}


def update(params: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, skip: Tensor | None) -> None:
    """One update, in place."""
    if not group["matrices"]:
        adamw.update(params, grads, states, group | {"beta1": adamw.DEFAULTS["beta1"]}, skip)
        return
    lr, beta1 = group["lr"], group["beta1"]
    for p, g, state in zip(params, grads, states, strict=True):
        m = state["momentum_buffer"]
        with unless(skip, p, m):
            m.lerp_(g, 1 - beta1)
            direction = orthogonalize(g.lerp(m, beta1))
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(direction.mul_(0.2 * math.sqrt(max(p.shape)) * lr))


def orthogonalize(x: Tensor) -> Tensor:
    """NS(x) of a matrix, float32: five Newton-Schulz steps.

    With x = U S V^T a step makes of each singular value s the value a s + b s^3 + c s^5, which takes them all near 1,
    and leaves U and V. Computed in bfloat16, as torch does, where the hardware multiplies it; elsewhere in float32,
    which is 30 times faster there (768 x 3072 on a CPU with AVX2).
    """
    a, b, c = QUINTIC
    fast, _ = native_bf16(x.device)
    tall = x.shape[0] > x.shape[1]
    y = x.bfloat16() if fast else x
    if tall:  # the products of the short side are the small ones
        y = y.T
    y = y / y.norm().clamp(min=SMALLEST)
    for _ in range(5):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    if tall:
        y = y.T
    return y.float()
