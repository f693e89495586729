"""What a run learned: the size and the rank of each layer's update.

    dW = s B A, or W - W before        sigma: its singular values        p = sigma / sum(sigma)
    effective rank = exp(-sum p log p)

(Roy & Vetterli, The effective rank, 2007.) The singular values of B A (out, in) are those of the R x R matrix R_B
R_A^T where B = Q_B R_B and A^T = Q_A R_A, so nothing of W's size is decomposed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .lora import adapters
from .targets import candidates


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
    for name, lora in adapters(model):
        sigma = singular_values(lora.A, lora.B) * lora.scale
        frozen = lora.base.matrix(torch.float32).norm()
        yield Learned(name, len(lora.A), effective_rank(sigma), (sigma.norm() / frozen).item(), sigma.tolist())


@torch.no_grad()
def learned_in_full(model: nn.Module, before: nn.Module) -> Iterator[Learned]:
    """The update of each linear layer that a run without an adapter changed."""
    for name, hub in candidates(model).items():
        old = before.get_submodule(name).matrix(torch.float32)
        update = model.get_submodule(name).matrix(torch.float32) - old
        if update.any():
            sigma = torch.linalg.svdvals(update)
            yield Learned(hub, len(sigma), effective_rank(sigma), (sigma.norm() / old.norm()).item(), sigma.tolist())


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
