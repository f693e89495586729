"""A batch is a bag of tokens: sequences laid end to end, never padded, with the offsets where each begins.

The order of examples is a function of (seed, epoch); which of them share a batch changes nothing that is computed.
N tokens, S sequences, M rows.
"""

from bisect import bisect_left
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..ops.dropout import GOLDEN, MUL1, mix_tensor, signed


@dataclass(slots=True)
class Sequence:
    """One encoded example: a sequence of tokens or, where one has to be set against another, several pieces."""

    number: int  # of the example in its file: names its noise
    ids: np.ndarray  # (n,) int32 tokens
    types: np.ndarray | None  # (n,) int8 token types, or None where all are 0
    rows: np.ndarray  # (m,) int32 indices of the tokens asked about, ascending
    targets: np.ndarray  # (t, ...) what is right there, as the task keeps it: one a row, or one for all of them
    cut: bool = False  # whether the example was longer than the maximum length
    starts: np.ndarray | None = None  # (pieces,) where each begins, the first at 0; None: it is one

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Batch:
    """Sequences as one bag of N tokens. What a model, a task and an operator see."""

    ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, from 0 in each sequence
    types: Tensor | None  # (N,) int64, or None where all are 0
    offsets: Tensor  # (S + 1,) int64: sequence s is tokens offsets[s] to offsets[s + 1]
    longest: int  # tokens of the longest sequence
    keys: Tensor  # (N,) int32: the token's name for dropout, whatever the batch
    rows: Tensor  # (M,) int64 tokens asked about, ascending
    targets: Tensor  # (T, ...) the task's own; int64 of (M,) in most
    n_targets: int  # T
    n_examples: int  # sequences that were packed, whatever pieces they have
    losses: Tensor | None = None  # (T,) float32: where a task's loss leaves that of each target, if somebody asks

    def to(self, device: torch.device) -> "Batch":
        """This batch with its tensors on `device`."""
        values = (getattr(self, f.name) for f in fields(self))
        return Batch(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in values))


def pack(sequences: list[Sequence]) -> Batch:
    """Lays sequences end to end. Each piece is a sequence of its own to attention, and has positions from 0."""
    sizes = np.array([len(s) for s in sequences])
    begins = sizes.cumsum() - sizes  # (S,) where each example begins
    if any(s.starts is not None for s in sequences):
        pieces = [begin + (s.starts if s.starts is not None else 0) for s, begin in zip(sequences, begins, strict=True)]
        offsets = np.append(np.hstack(pieces), sizes.sum())
    else:
        offsets = np.append(begins, sizes.sum())
    lengths = np.diff(offsets)
    positions = torch.from_numpy(np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths))

    # a token's name is its example's number and its index there, not its position: pieces must not drop the same
    numbers = torch.from_numpy(np.repeat(np.array([s.number for s in sequences], dtype=np.int64), sizes))
    indices = torch.from_numpy(np.arange(offsets[-1]) - np.repeat(begins, sizes))

    types = None
    if any(s.types is not None for s in sequences):
        types = np.concatenate([np.zeros(len(s), np.int8) if s.types is None else s.types for s in sequences])
        types = torch.from_numpy(types).long()
    rows = np.concatenate([s.rows + begin for s, begin in zip(sequences, begins, strict=True)])
    targets = np.concatenate([s.targets for s in sequences])
    return Batch(
        ids=torch.from_numpy(np.concatenate([s.ids for s in sequences])).long(),
        positions=positions,
        types=types,
        offsets=torch.from_numpy(offsets),
        longest=int(lengths.max()),
        keys=token_keys(numbers, indices),
        rows=torch.from_numpy(rows).long(),
        targets=torch.from_numpy(targets),
        n_targets=len(targets),
        n_examples=len(sequences),
    )


def mean_losses(losses: Tensor, sequences: list[Sequence], places: dict[int, int], onto: Tensor) -> None:
    """Adds the mean loss of each example's targets to its place in `onto`.

    losses: (T,) of the targets of these sequences; places: by the example's number.
    """
    counts = np.array([len(s.targets) for s in sequences])
    place_of_each = np.repeat([places[s.number] for s in sequences], counts)
    shares = torch.from_numpy(1 / np.repeat(counts, counts)).to(losses.device, non_blocking=True)
    onto.index_add_(0, torch.from_numpy(place_of_each).to(losses.device, non_blocking=True), losses * shares)


def token_keys(numbers: Tensor, indices: Tensor) -> Tensor:
    """The 32-bit name of each token: a hash of its example's number and its index. (N,) int64 both -> (N,) int32."""
    number = mix_tensor(numbers.to(torch.int32) * signed(GOLDEN))
    index = mix_tensor(indices.to(torch.int32) * signed(MUL1))  # another multiplier: (3, 5) is not (5, 3)
    return mix_tensor(number ^ index)


@lru_cache(maxsize=1)  # every step of an epoch asks for it
def order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n examples in an epoch, (n,): the one that transformers' Trainer draws."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))


def split(sequences: list[Sequence], tokens: int) -> list[list[Sequence]]:
    """Micro-batches of at most `tokens` tokens each (0: no limit), of about equal size.

    Longest first, each into the emptiest micro-batch; a sequence longer than `tokens` is one of its own.
    """
    total = sum(map(len, sequences))
    if not tokens or total <= tokens:
        return [sequences] if sequences else []
    groups: list[list[Sequence]] = [[] for _ in range(-(-total // tokens))]
    sizes = [0] * len(groups)
    for sequence in sorted(sequences, key=len, reverse=True):
        i = min(range(len(groups)), key=sizes.__getitem__)
        if sizes[i] and sizes[i] + len(sequence) > tokens:
            groups.append([])
            sizes.append(0)
            i = -1
        groups[i].append(sequence)
        sizes[i] += len(sequence)
    return [g for g in groups if g]


def cut(sequences: list[Sequence], tokens: int) -> list[list[Sequence]]:
    """The same with the sequences in one order, whatever `tokens` is: the longest first.

    There may be more micro-batches than `split` makes.
    """
    ordered = sorted(sequences, key=len, reverse=True)
    if not tokens:
        return [ordered] if ordered else []
    fewest = len(consecutive(ordered, tokens))
    # as many of them, of about equal size: with the least limit that needs no more
    limits = range(1, tokens)
    i = bisect_left(limits, -fewest, key=lambda limit: -len(consecutive(ordered, limit)))
    return consecutive(ordered, i + 1)


def consecutive(sequences: list[Sequence], tokens: int) -> list[list[Sequence]]:
    """Sequences that follow each other in groups of at most `tokens` tokens, or of one that is longer."""
    groups: list[list[Sequence]] = []
    size = 0
    for sequence in sequences:
        if not groups or size + len(sequence) > tokens:
            groups.append([])
            size = 0
        groups[-1].append(sequence)
        size += len(sequence)
    return groups
