"""Several processes, one run: `torchrun --nproc-per-node N -m minift train ...`.

Each process computes its share of each step. Because the loss is a sum over targets and dropout a function of the
token, adding up the gradients gives the update of one process, to rounding. Replicas hold the whole model each; with
`--shard` every process holds 1/N of weights, gradients and moments, and gathers a layer when it is needed (torch's
fully_shard). The collectives are torch.distributed's own: gloo on the CPU, NCCL on CUDA.
"""

import os
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batch import Sequence, cut, split


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    def micro_batches(self, sequences: list[Sequence], tokens: int, in_order: bool = False) -> list[list[Sequence]]:
        """This process's part of a step, in micro-batches of `tokens` tokens (0: no limit).

        in_order: the sequences follow in one order, however many micro-batches there are.

        Sharded, all have the same number of them, for every forward pass is a conversation of all: who has fewer does a
        sequence again that is asked nothing.
        """
        divide = cut if in_order else split
        parts = [divide(share, tokens) for share in deal(sequences, self.size)]
        mine = parts[self.rank]
        if not self.sharded:
            return mine
        most = max(map(len, parts))
        first = sequences[0]
        idle = replace(first, rows=first.rows[:0], targets=first.targets[:0])
        return mine + [[idle]] * (most - len(mine))

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place. Raises ConnectionError where a process is gone."""
        if self.size > 1:
            try:
                dist.all_reduce(values)
            except RuntimeError as e:
                reason = str(e).strip().splitlines()[0]
                raise ConnectionError(f"process {self.rank}: another process of the run is gone ({reason})") from e
        return values

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sums the gradients over all processes, in one message; a process without examples adds zeros."""
        if self.size == 1 or self.sharded:  # fully_shard has summed them
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.add_up(torch.cat([g.flatten() for g in grads]))
        for p, g in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = g.view_as(p).clone()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def shard(self, model: nn.Module, units: tuple[type, ...]) -> None:
        """Splits the parameters over the processes: those of each module in `units` together, then the rest."""
        if self.sharded:
            from torch.distributed.fsdp import fully_shard  # takes a while to import

            for module in [*(m for m in model.modules() if isinstance(m, units)), model]:
                fully_shard(module)
                module.set_gradient_divide_factor(1.0)  # a sum, not a mean
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def settle(self, model: nn.Module) -> None:
        """After an evaluation: frees what was gathered for it, which no backward pass has freed."""
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


ALONE = World()


def join(device: torch.device, shard: bool) -> World:
    """The world that torchrun made of its processes, or one process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), shard)


def leave() -> None:
    """Ends the conversation; a process that exits in the middle of it may be aborted by its own threads."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deal(sequences: list[Sequence], n: int) -> list[list[Sequence]]:
    """The shares of n processes: longest first, each sequence to the share with the fewest tokens."""
    if n == 1:
        return [sequences]
    shares: list[list[Sequence]] = [[] for _ in range(n)]
    tokens = [0] * n
    for sequence in sorted(sequences, key=len, reverse=True):
        i = tokens.index(min(tokens))
        shares[i].append(sequence)
        tokens[i] += len(sequence)
    return shares


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; then all processes have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded; it shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` (the whole) on the device of `other`, sharded as that is if it has its shape."""
    if hasattr(other, "device_mesh") and tensor.shape == other.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return tensor.to(other.device)
