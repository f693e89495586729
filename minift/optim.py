"""AdamW with parameter groups, the learning rate as a function of the step, and gradient clipping."""

import math

import torch
from torch import nn

from .distributed import whole
from .layers import LayerNorm


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101) over what is trainable.

    Biases and layer norms are not decayed; embeddings are, as in transformers.
    """
    plain = {id(p) for m in model.modules() if isinstance(m, LayerNorm) for p in m.parameters()}
    groups: dict[bool, list] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[not name.endswith("bias") and id(p) not in plain].append(p)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )


def warmup_steps(warmup: float, total: int) -> int:
    """`--warmup` in steps: a number of them, or below 1 a fraction of all, rounded up."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """Factor on the peak learning rate for step number `step` (from 0) of `total`."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[kind]


def clip(parameters: list, limit: float) -> float:
    """Scales the gradients down to a joint norm of at most `limit` (0: never); returns the norm before."""
    return whole(nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)).item()
