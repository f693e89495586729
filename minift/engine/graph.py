"""A step as CUDA graphs (--graph): recorded once for each size of batch, then replayed.

A step of a small model is some thousand kernels, and Python takes longer to launch them than a large GPU to run them. A
graph launches all at once (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). What is recorded are
addresses and sizes, so

- batches are filled up to few sizes (`fill_up`): tokens with one sequence that nobody asks about, sequences with empty
  ones, rows with some whose target is -1. Nothing that anybody asks about changes;
- what differs from step to step lies in tensors: the batch, the word of dropout, the number of targets, the learning
  rate, the state of the optimizer;
- nothing is read back before the end of the step. An update from a loss that is not finite is left out on the device.

Two graphs make a step: forward and backward of a micro-batch, then clipping and the update. All share one pool of
memory. N tokens, M rows, S sequences.
"""

import signal
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..data.batch import Batch, Sequence, pack
from ..errors import InputError
from ..measure.track import stop_signal
from ..ops.dropout import Noise, mix, signed


def size_for(n: int, most: int) -> int:
    """The size to fill n up to: a multiple of an eighth of the power of two at or below n, `most` at most apart."""
    grain = min(max(1, 1 << n.bit_length() >> 4), most)
    return -(-n // grain) * grain


def fill_up(batch: Batch, sequences: int, longest: int) -> Batch:
    """The batch with tokens, rows and sequences added that ask nothing, at a size of few. All losses stay the same.

    sequences: the most that a batch has. longest: the most tokens that a sequence has; sizes grow in steps of at most
    this.
    """
    if batch.targets.shape != batch.rows.shape or batch.targets.is_floating_point():
        raise InputError("--graph is True, with a task whose targets are not one class a row; expected a run without")
    n, m = len(batch.ids), len(batch.rows)
    more = size_for(n + 1, longest) - n  # one at least: rows that are added need a token of their own
    rows = size_for(m, longest) - m
    ends = batch.offsets.new_full((1 + sequences - batch.offsets.numel() + 1,), n + more)

    def longer(x: Tensor | None, added: int, value: int = 0) -> Tensor | None:
        return None if x is None else torch.cat([x, x.new_full((added,), value)])

    return replace(
        batch,
        ids=longer(batch.ids, more),
        positions=torch.cat([batch.positions, torch.arange(more, device=batch.ids.device)]),
        types=longer(batch.types, more),
        offsets=torch.cat([batch.offsets, ends]),
        longest=longest,
        keys=longer(batch.keys, more),
        rows=longer(batch.rows, rows, n + more - 1),
        targets=longer(batch.targets, rows, -1),
    )


class Graphs:
    """The recorded parts of the steps of one job (setup.py)."""

    def __init__(self, job, accumulate: Callable, update: Callable):
        """accumulate, update: the two parts of a step (training.py), of which each is recorded."""
        self.accumulate = accumulate
        self.update = update
        self.longest = job.model.max_length  # tokens of the longest sequence there can be
        self.batches: dict[tuple, tuple[Batch, Callable]] = {}  # by size: the tensors it reads, and what replays it
        self.replay_update: Callable | None = None

        # what differs from step to step, in memory that the graphs read
        device = job.model.device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.word = torch.zeros(1, dtype=torch.int32, device=device)  # the word of (seed, step)
        self.n_targets = torch.ones((), device=device)  # of the step
        self.found = torch.zeros(3, dtype=torch.float64, device=device)  # loss, what the task counts, gradient norm
        for p in job.parameters:
            p.grad = torch.zeros_like(p)
            if p not in job.optimizer.state:
                job.optimizer.begin(p)
        for group in job.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)

    def step(
        self, job, micros: list[list[Sequence]], step: int, n_targets: int, lr: float, _: dict
    ) -> tuple[float, float, float, int, list[float]]:
        """What training.plain_step does and returns, but no loss of each example.

        Nothing is updated where the loss is not finite.
        """
        word = Noise(job.config.seed, step).word()
        self.word.fill_(signed(word))
        self.n_targets.fill_(n_targets)
        self.found.zero_()
        for group in job.optimizer.param_groups:
            group["lr"].fill_(lr * group["ratio"])
        for i, micro in enumerate(micros):
            batch = fill_up(pack(micro), job.config.batch, self.longest)
            replay = self.replay_for(job, batch)
            self.seed(mix(word) << 32 | mix(word ^ i + 1))
            replay()
        if self.replay_update is None:
            self.replay_update = self.record(lambda: self.finish(job))
        self.replay_update()
        loss, counted, norm = self.found.tolist()  # the one place where the host waits
        return loss, counted, norm, stop_signal(signal.SIGINT in job.caught, signal.SIGTERM in job.caught), []

    def replay_for(self, job, batch: Batch) -> Callable[[], None]:
        """What replays forward and backward of batches of this size, with this one in the memory that it reads."""
        size = len(batch.ids), len(batch.rows), batch.types is None
        if size not in self.batches:
            held = batch.to(job.model.device)
            self.batches[size] = held, self.record(lambda: self.add(job, held), warm_up=True)
        held, replay = self.batches[size]
        for f in fields(Batch):
            value = getattr(batch, f.name)
            if isinstance(value, Tensor):
                getattr(held, f.name).copy_(value, non_blocking=True)
        return replay

    def seed(self, seed: int) -> None:
        """Seeds the flash kernel's dropout, which a replay takes from the device's generator."""
        if self.pool:
            torch.cuda.default_generators[self.word.device.index].manual_seed(seed)

    def add(self, job, batch: Batch) -> None:
        """Forward and backward of a micro-batch: adds to the gradients and to `found`."""
        noise = Noise(keys=batch.keys, seed_word=self.word)
        self.found[:2] += self.accumulate(job, batch, noise, self.n_targets)

    def finish(self, job) -> None:
        """Clips, updates and clears the gradients; the norm goes to `found`."""
        self.found[2] = self.update(job, skip=(~self.found[0].isfinite()).float())
        torch._foreach_zero_([p.grad for p in job.parameters])

    def record(self, function: Callable[[], None], warm_up: bool = False) -> Callable[[], None]:
        """What runs `function` again. Recording runs nothing; on another device than CUDA it is the function itself.

        warm_up: runs it first, so that kernels are compiled and scratch memory is there, but adds zeros.
        """
        if not self.pool:
            return function
        if warm_up:
            found = self.found.clone()
            n_targets = self.n_targets.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.n_targets.fill_(torch.inf)  # which every gradient is divided by
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            self.n_targets.copy_(n_targets)
            self.found.copy_(found)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            function()
        return graph.replay
