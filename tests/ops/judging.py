"""Rule 10 of the house, for any operator: its error against float64 is at most twice that of plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from minift.ops import native


def both(f: Callable, inputs: list[Tensor], dout: list[Tensor], mode: str) -> list[Tensor]:
    """Outputs of f and gradients of all inputs that want one, by a kernel (mode native) or by PyTorch (reference)."""
    before = native.mode
    native.mode = mode
    try:
        outputs = f(*inputs)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        wanted = [t for t in inputs if t.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, [d.to(o) for o, d in zip(outputs, dout, strict=True)])
    finally:
        native.mode = before
    return [*outputs, *gradients]


def judge(f: Callable, inputs: list[Tensor], dout: list[Tensor], largest: float = 0.0) -> None:
    """Checks the error of every output and gradient of f, in the dtype of the inputs.

    largest: the largest intermediate value, where it is larger than the results. A result is made of such numbers,
    each rounded to a unit in its last place, and which way PyTorch's own few roundings fall depends on the CPU:
    where there are few numbers, its error alone is no bound.
    """
    exact = both(f, [t.detach().double().requires_grad_(t.requires_grad) for t in inputs], dout, "reference")
    ours = both(f, inputs, dout, "native")
    plain = both(f, inputs, dout, "reference")
    for i, (a, b, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        if a.numel():
            unit = torch.finfo(torch.float32).eps * max(largest, e.abs().max().item())
            error = (a.double() - e).abs().max().item()
            allowed = (b.double() - e).abs().max().item()
            assert error <= 2 * max(allowed, unit), f"{i}: {error:.2e}, PyTorch {allowed:.2e}"
