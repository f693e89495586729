"""AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101), with g the gradient and t the number of updates:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = p - lr decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The update is PyTorch's fused one, to the bit as in torch.optim.AdamW, and the state has the names it has there.
"""

import torch
from torch import Tensor

DEFAULTS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
LR = 1.0
MATRICES = False
RECORDABLE = True


def begin(p: Tensor, group: dict) -> dict[str, Tensor]:
    """t, m and v."""
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def update(params: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, skip: Tensor | None) -> None:
    """One update, in place."""
    steps = [state["step"] for state in states]
    m = [state["exp_avg"] for state in states]
    v = [state["exp_avg_sq"] for state in states]
    if skip is None:
        torch._foreach_add_(steps, 1)
    else:  # one tensor for each: a single one would be read back to the host
        torch._foreach_add_(steps, [1 - skip] * len(steps))
    settings = {name: group[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
    torch._fused_adamw_(params, grads, m, v, [], steps, **settings, amsgrad=False, maximize=False, found_inf=skip)
