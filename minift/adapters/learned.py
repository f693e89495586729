"""What a run learned: the size and the rank of each layer's update.

    dW = s B A, or W - W before        sigma: its singular values        p = sigma / sum(sigma)
    effective rank = exp(-sum p log p)

(Roy & Vetterli, The effective rank, 2007.) The singular values of B A (out, in) are those of the R x R matrix R_B
R_A^T where B = Q_B R_B and A^T = Q_A R_A, so for LoRA (and for what it learns inside a variant) nothing of W's size is
decomposed. For any other adapter W is the layer's matrix, and W before that of the layer inside.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .lora import LoRALinear
from .targets import candidates, wrappers


@dataclass
class Learned:
    """One layer's update."""

    layer: str  # its hub name
    rank: int  # the most it can have
    effective_rank: float  # 1 where one direction is all, `rank` where all are equal, 0 where nothing was learned
    norm: float  # Frobenius norm of the update over that of the frozen weight
    singular: list[float]  # descending


@torch.no_grad()
def learned(model: nn.Module) -> Iterator[Learned]:
    """The update of each adapted layer, in the model's order."""
    for name, layer in wrappers(model).items():
        hub = model.hub_name(name)
        lora = next((m for m in layer.modules() if isinstance(m, LoRALinear)), None)
        if lora:
            sigma = singular_values(lora.A, lora.B) * lora.scale
            yield summary(hub, len(lora.A), sigma, lora.base.matrix(torch.float32))
        else:
            now = layer.matrix(torch.float32)  # before the frozen one, whose memory may be lent (layers/packed.py)
            yield between(hub, layer.frozen.matrix(torch.float32), now)


@torch.no_grad()
def learned_in_full(model: nn.Module, before: nn.Module) -> Iterator[Learned]:
    """The update of each linear layer that a run without an adapter changed."""
    for name, hub in candidates(model).items():
        old = before.get_submodule(name).matrix(torch.float32)
        now = model.get_submodule(name).matrix(torch.float32)
        if not torch.equal(now, old):
            yield between(hub, old, now)


def between(hub: str, old: Tensor, now: Tensor) -> Learned:
    """What changed from one matrix (out, in) to another."""
    sigma = torch.linalg.svdvals(now - old)
    return summary(hub, len(sigma), sigma, old)


def summary(hub: str, rank: int, sigma: Tensor, frozen: Tensor) -> Learned:
    """A layer's update by its singular values, beside its frozen matrix."""
    norm = sigma.norm() / frozen.norm()
    return Learned(hub, rank, effective_rank(sigma), norm.item(), sigma.tolist())


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The min(R, in, out) largest singular values of B A, descending. A (R, in), B (out, R)."""
    ra, rb = torch.linalg.qr(A.double().t(), mode="r").R, torch.linalg.qr(B.double(), mode="r").R
    return torch.linalg.svdvals(rb @ ra.t())


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the singular values' shares."""
    if not sigma.sum() > 0:
        return 0.0
    p = sigma / sigma.sum()
    return torch.special.entr(p).sum().exp().item()
