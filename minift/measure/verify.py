"""Kernels beside their references, on what a step calls them with: `minift trace --verify`.

    with Verifier() as verifier:
        ...a step...
    verifier.checks                     # by operator: the largest error, and that of PyTorch in the same dtype

When a kernel is about to run, the stack says which operator of ops/ it is in, and with which arguments. That operator
is run three times more: with its kernels, by its reference, and by its reference in float64, to which the others are
compared. When a kernel of its backward pass runs, so is that, for the gradient that has come.

The error of a result is its largest, relative to the largest number of the result; of integers, the share that is
wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from ..layers import Again
from ..ops import native
from ..ops.rematerialise import Recipe
from .ledger import Seen
from .trace import file_of, innermost, minift_frames

OPERATORS = "minift/ops/"
AGAIN = (Again.compute.__code__, Recipe.__call__.__code__)  # who computes what was compared already


@dataclass
class Check:
    """What was found of one operator."""

    name: str
    where: str  # its file and line
    calls: int = 0  # forward and backward
    error: float = 0.0  # the largest
    plain: float = 0.0  # the largest of PyTorch in the same dtype


@dataclass
class Call:
    """An operator, as it was called."""

    function: Callable
    args: list
    check: Check


class Verifier:
    """Looks on at a step, as a ledger does, and compares."""

    def __init__(self) -> None:
        self.found: dict[str, Check] = {}
        self.by_kernel: dict[str, set[str]] = {}  # the operators that call a function of a kernel
        self.calls: dict[int, Call] = {}  # by the context of their autograd function, until its backward pass
        self.last: FrameType | None = None  # of the operator that was compared last

    @property
    def checks(self) -> list[Check]:
        """What was found, the largest error first."""
        return sorted(self.found.values(), key=lambda check: -check.error)

    def __enter__(self):
        native.watch = self.kernel
        return self

    def __exit__(self, *_) -> None:
        native.watch = None
        self.last = None

    def kernel(self, name: str, library) -> Any:
        """What stands before a kernel of minift's meanwhile."""
        return Seen(self, name, library)

    def launch(self, name: str, function: str, library, /, **given) -> None:
        """A kernel, before which the operator around it is compared."""
        frames = minift_frames()
        if not any(frame.f_code in AGAIN for frame in frames):
            self.look(frames, function)
        getattr(library, function)(**given)

    def look(self, frames: list[FrameType], kernel: str) -> None:
        """Compares the operator that the innermost frames are of, unless that was done."""
        run = innermost(frames, OPERATORS)
        outer = run[-1]
        inner = next((frame for frame in run if frame.f_code.co_varnames[:1] == ("ctx",)), None)
        if inner is not None and inner.f_code.co_name == "backward":
            call = self.calls.get(id(inner.f_locals["ctx"]))
            if call is not None and inner is not self.last:
                self.last = inner
                self.compare(call, gradients_of(inner))
        else:
            call = call_of(outer, self.found)
            if outer is not self.last:
                self.last = outer
                self.compare(call, None)
            if inner is not None:
                self.calls[id(inner.f_locals["ctx"])] = call
        if call is not None:
            self.by_kernel.setdefault(kernel, set()).add(call.check.name)

    def compare(self, call: Call, gradients: list[Tensor | None] | None) -> None:
        """Runs the operator in three ways, and backward from these gradients, if there are any."""
        before = native.mode, native.watch
        native.watch = None
        try:
            ours = results(call, gradients, None)
            native.mode = "reference"
            plain = results(call, gradients, None)
            exact = results(call, gradients, torch.float64)
        finally:
            native.mode, native.watch = before
        check = call.check
        check.calls += 1
        for a, b, e in zip(ours, plain, exact, strict=True):
            check.error = max(check.error, error_of(a, e))
            check.plain = max(check.plain, error_of(b, e))


def call_of(frame: FrameType, found: dict[str, Check]) -> Call:
    """A function that is under way, with its arguments."""
    code = frame.f_code
    function: Any = None
    for word in code.co_qualname.split("."):
        function = getattr(function, word) if function is not None else frame.f_globals[word]
    args = [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]]
    where = f"{file_of(code)}:{code.co_firstlineno}"
    check = found.setdefault(code.co_qualname, Check(code.co_qualname, where))
    return Call(function, args, check)


def gradients_of(frame: FrameType) -> list[Tensor | None]:
    """What the backward pass of an autograd function was given: backward(ctx, *gradients)."""
    names = frame.f_code.co_varnames[1 : frame.f_code.co_argcount]
    return [frame.f_locals[name] for name in names]


def results(call: Call, gradients: list[Tensor | None] | None, dtype: torch.dtype | None) -> list[Tensor]:
    """The outputs of an operator, and the gradients of its inputs. dtype: what floating-point inputs are made.

    A single number that is an output, as a loss is, has 1 as its gradient where none is given.
    """
    inputs = [converted(arg, dtype) for arg in call.args]
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):  # whatever hooks there are outside
        outputs = [t for t in tree_leaves(call.function(*inputs)) if isinstance(t, Tensor)]
        learned = [t for t in outputs if t.requires_grad]
        if gradients is None:
            gradients = [torch.ones_like(t) if t.dim() == 0 else None for t in learned]
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(learned, gradients, strict=False) if dy is not None]
        found: list[Tensor] = []
        if pairs and wanted:
            ys, dys = zip(*pairs, strict=True)
            found = [g for g in torch.autograd.grad(ys, wanted, dys, allow_unused=True) if g is not None]
    return [t.detach().clone() for t in (*outputs, *found)]  # clones, for outputs may be an input's memory


def converted(arg: Any, dtype: torch.dtype | None) -> Any:
    """An argument that is no part of the step's graph."""
    if not isinstance(arg, Tensor):
        return arg
    is_learned = arg.requires_grad
    arg = arg.detach()
    if dtype is not None and arg.is_floating_point():
        arg = arg.to(dtype)
    return arg.requires_grad_(is_learned)


def error_of(found: Tensor, exact: Tensor) -> float:
    """How far off a result is."""
    if not found.numel():
        return 0.0
    if not found.is_floating_point():
        return (found != exact).double().mean().item()
    largest = exact.abs().max().double().item()
    return (found.double() - exact.double()).abs().max().item() / (largest or 1.0)
