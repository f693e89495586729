"""AdamW with parameter groups, the learning rate as a function of the step, and gradient clipping."""

import math

import torch
from torch import Tensor, nn

from .distributed import whole


class AdamW:
    """AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101), with g the gradient and t the number of updates:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p - lr decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    The update is PyTorch's fused one, to the bit as in torch.optim.AdamW; that class is not used because making one
    imports torch's compiler: 75 MB and over a second. It has what torch.amp.GradScaler and checkpoints ask for:
    param_groups (with the keys of `make_optimizer`) and state, by parameter.
    """

    def __init__(self, param_groups: list[dict], lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        self.param_groups = [{"lr": lr, "betas": betas, "eps": eps} | group for group in param_groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient; none where skip, () float32 on their device, is 1."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state.get(p) or self.begin(p) for p in params]
            steps, m, v = ([s[name] for s in states] for name in ("step", "exp_avg", "exp_avg_sq"))
            if not params:
                continue
            torch._foreach_add_(steps, 1)
            b1, b2 = group["betas"]
            settings = dict(beta1=b1, beta2=b2, weight_decay=group["weight_decay"], eps=group["eps"], lr=group["lr"])
            settings |= dict(amsgrad=False, maximize=False, found_inf=skip)
            torch._fused_adamw_(params, [p.grad for p in params], m, v, [], steps, **settings)

    def begin(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter before its first update, under torch.optim's names."""
        moments = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        self.state[p] = dict(zip(("step", "exp_avg", "exp_avg_sq"), (step, *moments), strict=True))
        return self.state[p]

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, lora_plus: float = 1.0) -> AdamW:
    """AdamW over what is trainable.

    Vectors are not decayed: biases, layer norms, an adapter's lengths or factors. Matrices are, embeddings too, as in
    transformers.
    lora_plus: a group's learning rate is its "ratio" times the step's: this for an adapter's B (LoRA+, Hayou et al.,
    https://arxiv.org/abs/2402.12354), else 1.
    """
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = p.dim() > 1
            ratio = lora_plus if name.endswith(".B") else 1.0
            groups.setdefault((weight_decay if decayed else 0.0, ratio), []).append(p)
    return AdamW([{"params": ps, "weight_decay": decay, "ratio": ratio} for (decay, ratio), ps in groups.items()], lr)


def warmup_steps(warmup: float, total: int) -> int:
    """`--warmup` in steps: a number of them, or below 1 a fraction of all, rounded up."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """Factor on the peak learning rate for step number `step` (from 0) of `total`."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[kind]


def clip(parameters: list, limit: float) -> Tensor:
    """Scales the gradients down to a joint norm of at most `limit` (0: never); returns the norm before, ()."""
    return whole(nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf))
