"""Rule 10 of the house, for any operator: its error against float64 is at most twice that of plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minift.ops import compile, native


def needs_compiler(**options) -> None:
    """Skips the test, or with allow_module_level=True all of a file, where there is no C++ compiler."""
    try:
        compile.compiler()
    except compile.Unavailable as e:
        pytest.skip(str(e), **options)


def in_mode(mode: str, f: Callable, *args):
    """f(*args) by the kernels (mode native) or by PyTorch (reference)."""
    before = native.mode
    native.mode = mode
    try:
        return f(*args)
    finally:
        native.mode = before


def in_both_modes(f: Callable, *args) -> list:
    """f(*args) by the kernels, and by PyTorch."""
    return [in_mode(mode, f, *args) for mode in ("native", "reference")]


def results(f: Callable, inputs: list[Tensor], dout: list[Tensor]) -> list[Tensor]:
    """Outputs of f and gradients of all inputs that want one."""
    outputs = f(*inputs)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    wanted = [t for t in inputs if t.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [d.to(o) for o, d in zip(outputs, dout, strict=True)])
    return [*outputs, *gradients]


def judge(f: Callable, inputs: list[Tensor], dout: list[Tensor], largest: float = 0.0) -> None:
    """Checks the error of every output and gradient of f, in the dtype of the inputs.

    largest: the largest intermediate value, where it is larger than the results. A result is made of such numbers,
    each rounded to a unit in its last place, and which way PyTorch's own few roundings fall depends on the CPU:
    where there are few numbers, its error alone is no bound.
    """
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact = in_mode("reference", results, f, doubles, dout)
    ours, plain = in_both_modes(results, f, inputs, dout)
    for i, (a, b, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        if a.numel():
            unit = torch.finfo(torch.float32).eps * max(largest, greatest(e))
            at_most_twice(a, b, e, unit, name=f"result {i}")


def at_most_twice(
    ours: Tensor, plain: Tensor, exact: Tensor, unit: float = 0.0, size: Callable | None = None, name: str = "result"
) -> None:
    """The rule itself. An error below `unit` passes as well, for PyTorch may happen to be all but exact.

    size: of an error; the greatest by default.
    """
    size = size or greatest
    error = size(ours.double() - exact)
    allowed = size(plain.double() - exact)
    assert error <= 2 * max(allowed, unit), f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"


def greatest(t: Tensor) -> float:
    return t.abs().max().item()


def root_mean_square(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def equal_bits(found: list[Tensor], want: list[Tensor]) -> bool:
    """Whether all tensors of two lists are the same."""
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
