"""Optimizers, a file each: how a parameter is updated from its gradient.

To add one, write a file here and give it a line in tables.OPTIMIZERS. The file has:

    DEFAULTS   its settings and their values, as {"beta1": 0.9}: what --beta1, --beta2 and --eps are where they are not
               given. A setting that is not among them is refused.
    LR         the default learning rate as a multiple of AdamW's. If it is not 1, the line in the table says it.
    MATRICES   whether it treats hidden matrices otherwise than the rest: the two-dimensional weights between embeddings
               and head. They are then in groups of their own, with group["matrices"] True.
    RECORDABLE whether an update can be recorded as a CUDA graph (--graph): it reads nothing back to the host, and
               allows group["lr"] to be a tensor.

    begin(p, group) -> dict[str, Tensor]
        The state of a parameter before its first update, on its device. Names, shapes and dtypes may depend on the
        parameter's shape, dtype and group, and on nothing else: called with a parameter on the meta device, begin tells
        what a checkpoint has to hold. A name has no "/". It may be empty.

    update(params, grads, states, group, skip) -> None
        Updates the parameters of a group that have a gradient, and their states, all in place and without autograd. At
        least one is given, float32, of any shape; some numbers of elements may be 0. The gradients are scratch.
        group: "lr" (float, or () tensor), "weight_decay" (0 where nothing decays), "matrices", and all of DEFAULTS.
        skip: None, or a () float32 tensor on their device: where it is 1 the gradients may be anything and nothing may
        change. A fused operator of torch takes it as found_inf; others do their work inside `unless`.

Sharded runs (--shard) need nothing more: every process updates its own part of each tensor, so update must be
elementwise; but where group["matrices"] is True, tensors are gathered one parameter at a time, updated whole by every
process, and split again. So they must come out the same on each: update draws no random numbers.

`Optimizer` is what all share. Steps, checkpoints and torch.amp.GradScaler know nothing but this class.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..distributed import like, local, whole


class Optimizer:
    """Groups of parameters, the state of each parameter, and the rule (a file of this folder) that updates them.

    Not a torch.optim.Optimizer: making one imports torch's compiler, 75 MB and over a second. It has what
    torch.amp.GradScaler and checkpoints ask for: `param_groups`, `state` by parameter, and `step`.
    """

    def __init__(self, rule: ModuleType, param_groups: list[dict], lr: float, **settings: float):
        """param_groups: each with "params" and "weight_decay". A step's learning rate is set as group["lr"], which is
        to be that of the step times group["ratio"]. settings: where they are not the rule's DEFAULTS."""
        self.rule = rule
        defaults = {"lr": lr, "ratio": 1.0, "matrices": False} | rule.DEFAULTS | settings
        self.param_groups = [defaults | group for group in param_groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient; none where skip, () float32 on their device, is 1."""
        if skip is not None and skip.is_cpu:  # looking at it costs nothing here, and keeping a copy of all would
            if skip.item():
                return
            skip = None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state.get(p) or self.begin(p) for p in params]
            if not params:
                continue
            if group["matrices"] and hasattr(params[0], "full_tensor"):
                for p, state in zip(params, states, strict=True):
                    self.update_whole(p, state, group, skip)
                continue
            # of a sharded parameter, this process's part
            grads = [local(p.grad) for p in params]
            states = [{name: local(value) for name, value in state.items()} for state in states]
            self.rule.update([local(p) for p in params], grads, states, group, skip)

    def update_whole(self, p: nn.Parameter, state: dict[str, Tensor], group: dict, skip: Tensor | None) -> None:
        """Updates one sharded parameter by a rule that needs the whole matrix."""
        weight = whole(p)
        wholes = {name: whole(value) for name, value in state.items()}
        self.rule.update([weight], [whole(p.grad)], [wholes], group, skip)
        p.copy_(like(weight, p))
        for name, value in state.items():
            value.copy_(like(wholes[name], value))

    def begin(self, p: nn.Parameter) -> dict[str, Tensor]:
        """Makes and returns the state of a parameter before its first update."""
        self.state[p] = self.rule.begin(p, self.group_of[p])
        return self.state[p]

    def expected_state(self, p: nn.Parameter) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Name -> (shape, dtype) of a parameter's state; of a sharded one, of the whole."""
        state = self.rule.begin(torch.empty(p.shape, dtype=p.dtype, device="meta"), self.group_of[p])
        return {name: (value.shape, value.dtype) for name, value in state.items()}

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def rule_named(name: str) -> ModuleType:
    """The file of an optimizer by its name in tables.OPTIMIZERS."""
    return import_module("." + name.replace("-", "_"), __name__)


def choose_settings(name: str, given: dict[str, float]) -> dict[str, float]:
    """All settings of an optimizer: those given, and its own where -1 is given. Raises InputError for one it lacks."""
    defaults = rule_named(name).DEFAULTS
    settings = {setting: value for setting, value in given.items() if value != -1}
    for setting, value in settings.items():
        if setting not in defaults:
            known = ", ".join(f"--{known}" for known in defaults) or "no setting"
            found = f"--{setting} is {value:g} with --optimizer {name}"
            raise InputError(f"{found}, which does not use it; it has: {known}")
    return defaults | settings


@contextmanager
def unless(skip: Tensor | None, *tensors: Tensor) -> Iterator[None]:
    """Puts the tensors back afterwards as they were where skip, () float32, is 1; nothing is read back to the host."""
    if skip is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(skip.bool(), old, tensor))
