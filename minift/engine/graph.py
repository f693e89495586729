"""A step as CUDA graphs (--graph): recorded once for each size of batch, then replayed.

A step of a small model is some thousand kernels, and Python takes longer to launch them than a large GPU to run them. A
graph launches all at once (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). What is recorded are
addresses and sizes, so

- batches are filled up to few sizes (`fill_up`): tokens with one sequence that nobody asks about, sequences with empty
  ones, rows with some whose target is -1. Nothing that anybody asks about changes;
- what differs from step to step lies in tensors: the batch, the word of dropout, 1 / targets, the learning rate, the
  numbers of AdamW;
- nothing is read back before the end of the step. An update from a loss that is not finite is left out on the device.

Two graphs make a step: forward and backward of a micro-batch, then clipping and AdamW. All share one pool of memory.
N tokens, M rows, S sequences.
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ..data.batch import Batch, Sequence, pack
from ..ops.dropout import Noise, mix, signed
from ..ops.rematerialise import rematerialise
from ..tasks import TASKS


def size_for(n: int, most: int) -> int:
    """The size to fill n up to: a multiple of an eighth of the power of two at or below n, `most` at most apart."""
    grain = min(max(1, 1 << n.bit_length() >> 4), most)
    return -(-n // grain) * grain


def fill_up(batch: Batch, sequences: int, longest: int) -> Batch:
    """The batch with tokens, rows and sequences added that ask nothing, at a size of few. All losses stay the same.

    sequences: the most that a batch has. longest: the most tokens that a sequence has; of that order are the steps from
    size to size.
    """
    n, m = len(batch.ids), len(batch.rows)
    more = size_for(n + 1, longest) - n  # one at least: rows that are added need a token of their own
    rows = size_for(m, longest) - m
    ends = batch.offsets.new_full((1 + sequences - batch.offsets.numel() + 1,), n + more)

    def longer(x: Tensor | None, added: int, value: int = 0) -> Tensor | None:
        return None if x is None else torch.cat([x, x.new_full((added,), value)])

    return Batch(
        ids=longer(batch.ids, more),
        positions=torch.cat([batch.positions, torch.arange(more, device=batch.ids.device)]),
        types=longer(batch.types, more),
        offsets=torch.cat([batch.offsets, ends]),
        longest=longest,
        keys=longer(batch.keys, more),
        rows=longer(batch.rows, rows, n + more - 1),
        targets=longer(batch.targets, rows, -1),
        n_targets=batch.n_targets,
    )


class Graphs:
    """The recorded parts of the steps of one job (setup.py)."""

    def __init__(self, job, longest: int):
        """longest: tokens of the longest sequence there can be."""
        self.job, self.longest, device = job, longest, job.model.device
        self.batches: dict[tuple, tuple[Batch, Callable]] = {}  # by size: the tensors it reads, and what replays it
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.base = torch.zeros(1, dtype=torch.int32, device=device)  # the word of (seed, step)
        self.share = torch.zeros((), device=device)  # 1 / targets of the step
        self.found = torch.zeros(3, dtype=torch.float64, device=device)  # loss, targets predicted right, gradient norm
        self.parameters = [p for p in job.model.parameters() if p.requires_grad]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
            if p not in job.optimizer.state:
                job.optimizer.begin(p)
        for group in job.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)
        self.replay_update: Callable | None = None

    def step(self, micros: list[list[Sequence]], noise: Noise, n_targets: int, lr: float) -> tuple[float, float, float]:
        """(loss summed, targets predicted right, gradient norm) of an update, left out where the loss is not finite."""
        word = noise.word()
        self.base.fill_(signed(word))
        self.share.fill_(1 / max(1, n_targets))
        self.found.zero_()
        for group in self.job.optimizer.param_groups:
            group["lr"].fill_(lr * group["ratio"])
        for i, micro in enumerate(micros):
            batch = fill_up(pack(micro), self.job.config.batch, self.longest)
            size = len(batch.ids), len(batch.rows), batch.types is None
            if size not in self.batches:
                held = batch.to(self.job.model.device)
                self.batches[size] = held, self.record(lambda held=held: self.accumulate(held), warm_up=True)
            held, replay = self.batches[size]
            for f in fields(Batch):
                if isinstance(value := getattr(batch, f.name), Tensor):
                    getattr(held, f.name).copy_(value, non_blocking=True)
            self.seed(mix(word) << 32 | mix(word ^ i + 1))
            replay()
        if self.replay_update is None:
            self.replay_update = self.record(self.update)
        self.replay_update()
        return tuple(self.found.tolist())  # the one place where the host waits

    def seed(self, seed: int) -> None:
        """Seeds the flash kernel's dropout, which a replay takes from the device's generator."""
        if self.pool:
            torch.cuda.default_generators[self.base.device.index].manual_seed(seed)

    def accumulate(self, batch: Batch) -> None:
        """Forward and backward of a micro-batch: adds to the gradients and to `found`."""
        job = self.job
        noise = Noise(keys=batch.keys, seed_word=self.base)
        with rematerialise():
            loss, right = TASKS[job.config.task].loss(job.model, batch, noise, job.config.label_smoothing)
        (loss * self.share).backward()
        self.found[:2] += torch.stack([loss.detach().double(), right.double()])

    def update(self) -> None:
        """Clips, updates and clears the gradients; the norm goes to `found`."""
        grads, limit = [p.grad for p in self.parameters], self.job.config.clip or torch.inf
        self.found[2] = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.job.optimizer.step(skip=(~self.found[0].isfinite()).float())
        torch._foreach_zero_(grads)

    def record(self, function: Callable[[], None], warm_up: bool = False) -> Callable[[], None]:
        """What runs `function` again. Recording runs nothing; on another device than CUDA it is the function itself.

        warm_up: runs it first, so that kernels are compiled and scratch memory is there, but adds zeros.
        """
        if not self.pool:
            return function
        if warm_up:
            share, found = self.share.clone(), self.found.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.share.zero_()
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            self.share.copy_(share)
            self.found.copy_(found)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            function()
        return graph.replay
