"""The optimizer's parameter groups, the learning rate as a function of the step, and gradient clipping."""

import math

from torch import Tensor, nn

from ..adapters.lora import LoRALinear
from ..layers import Embedding
from . import optimizers, schedules
from .distributed import whole
from .optimizers import Optimizer


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, lora_plus: float = 1.0, name: str = "adamw", **settings: float
) -> Optimizer:
    """The optimizer called `name` in tables.OPTIMIZERS, over all parameters of the model that are trained.

    Vectors are not decayed: biases, layer norms, an adapter's lengths or factors. Matrices are, embeddings too, as in
    transformers.
    lora_plus: a group's learning rate is its "ratio" times the step's: this for an adapter's B (LoRA+, Hayou et al.,
    https://arxiv.org/abs/2402.12354), else 1. settings: beta1, beta2, eps where they are not the optimizer's own.
    """
    rule = optimizers.rule_named(name)
    embeddings = {id(p) for m in model.modules() if isinstance(m, Embedding) for p in m.parameters()}
    fast = {id(m.B) for m in model.modules() if isinstance(m, LoRALinear)}
    groups: dict[tuple[float, float, bool], list] = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            decayed = p.ndim > 1
            ratio = lora_plus if id(p) in fast else 1.0
            hidden = p.ndim == 2 and id(p) not in embeddings and not key.startswith("head.")
            kind = (weight_decay if decayed else 0.0, ratio, hidden and rule.MATRICES)
            groups.setdefault(kind, []).append(p)
    made = [
        {"params": params, "weight_decay": decay, "ratio": ratio, "matrices": matrices}
        for (decay, ratio, matrices), params in groups.items()
    ]
    return Optimizer(rule, made, lr, **settings)


def warmup_steps(warmup: float, total: int) -> int:
    """`--warmup` in steps: a number of them, or below 1 a fraction of all, rounded up."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """Factor on the peak learning rate for step number `step` (from 0) of `total`; kind: of tables.SCHEDULES."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return getattr(schedules, kind.replace("-", "_"))(done)


def clip(parameters: list, limit: float) -> Tensor:
    """Scales the gradients down to a joint norm of at most `limit` (0: never); returns the norm before, ()."""
    return whole(nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf))
