"""AdamW with parameter groups, the learning rate as a function of the step, and gradient clipping."""

import math

import torch
from torch import nn

from .distributed import whole
from .layers import LayerNorm


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, lora_plus: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101) over what is trainable.

    Biases, layer norms and DoRA's lengths are not decayed; embeddings are, as in transformers.
    lora_plus: a group's learning rate is its "ratio" times the step's: this for an adapter's B (LoRA+, Hayou et al.,
    https://arxiv.org/abs/2402.12354), else 1.
    """
    plain = {id(p) for m in model.modules() if isinstance(m, LayerNorm) for p in m.parameters()}
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = not name.endswith(("bias", "magnitude")) and id(p) not in plain
            ratio = lora_plus if name.endswith(".B") else 1.0
            groups.setdefault((weight_decay if decayed else 0.0, ratio), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay, "ratio": ratio} for (decay, ratio), ps in groups.items()],
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
