"""Packing, order, token keys and micro-batches.

python -m pytest tests/test_batch.py
"""

import numpy as np
import torch
from helpers import random_ids, sequence
from hypothesis import given
from hypothesis import strategies as st

from minift.data.batch import cut, order, pack, split, token_keys

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def make(sizes):
    return [sequence(i, x, rows=[0], targets=[i]) for i, x in enumerate(random_ids(sizes))]


@given(lengths)
def test_pack_lays_sequences_end_to_end(sizes):
    sequences = make(sizes)
    batch = pack(sequences)
    assert batch.ids.tolist() == [i for s in sequences for i in s.ids]
    assert batch.positions.tolist() == [i for n in sizes for i in range(n)]
    assert batch.offsets.diff().tolist() == sizes and batch.offsets[0] == 0
    assert batch.longest == max(sizes)
    assert batch.rows.tolist() == batch.offsets[:-1].tolist()
    assert batch.targets.tolist() == list(range(len(sizes))) and batch.n_targets == len(sizes)
    assert batch.types is None


def test_types_where_some_sequence_has_them():
    batch = pack([sequence(0, [5, 6]), sequence(1, [7, 8, 9], types=[0, 1, 1])])
    assert batch.types.tolist() == [0, 0, 0, 1, 1]


def test_sequences_without_rows():
    batch = pack([sequence(0, [5, 6], rows=[]), sequence(1, [7, 8], rows=[1])])
    assert batch.rows.tolist() == [3] and batch.n_targets == 1


@given(lengths, st.randoms())
def test_keys_do_not_depend_on_the_packing(sizes, random):
    sequences = make(sizes)
    shuffled = sequences[:]
    random.shuffle(shuffled)

    def by_number(part):
        return {s.number: k.tolist() for s, k in zip(part, pack(part).keys.split([len(s) for s in part]), strict=True)}

    assert by_number(sequences) == by_number(shuffled)


def test_keys_are_distinct():
    """A million tokens of 2,000 examples: as few collisions as a random 32-bit function would have (about 116)."""
    numbers = torch.arange(2000).repeat_interleave(500)
    positions = torch.arange(500).repeat(2000)
    keys = token_keys(numbers, positions)
    assert len(keys) - len(keys.unique()) < 200
    n, p = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    assert len(token_keys(n.flatten(), p.flatten()).unique()) > 90_000 - 10  # (3, 5) is not (5, 3)
    assert len(token_keys(torch.zeros(60_000, dtype=torch.int64), torch.arange(60_000)).unique()) == 60_000


def test_order_is_the_peers():
    """What transformers' RandomSampler draws through accelerate for seed 42 in epochs 0, 1 and 2."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(101), generator=torch.Generator(), data_seed=42)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert order(101, 42, epoch).tolist() == list(sampler)


@given(lengths, st.integers(1, 120))
def test_split_keeps_everything_within_the_limit(sizes, tokens):
    sequences = make(sizes)
    groups = split(sequences, tokens)
    assert sorted(s.number for g in groups for s in g) == list(range(len(sizes)))
    for group in groups:
        assert sum(map(len, group)) <= tokens or len(group) == 1
    assert all(groups)


def test_split_is_balanced():
    rng = np.random.default_rng(0)
    groups = split(make(rng.integers(5, 60, 64).tolist()), 512)
    sizes = [sum(map(len, g)) for g in groups]
    assert max(sizes) - min(sizes) < 60


@given(lengths, st.integers(1, 120), st.integers(1, 120))
def test_cut_keeps_one_order(sizes, tokens, more):
    """The longest first, whatever the limit; never more at once, and no more micro-batches than that takes."""
    sequences = make(sizes)
    groups = cut(sequences, tokens)
    assert [s.number for g in groups for s in g] == [s.number for s in cut(sequences, 0)[0]]
    assert [len(s) for g in groups for s in g] == sorted(sizes, reverse=True)
    for group in groups:
        assert sum(map(len, group)) <= tokens or len(group) == 1
    assert all(groups) and len(cut(sequences, tokens + more)) <= len(groups)


def test_cut_is_balanced():
    """A remainder is no micro-batch of its own."""
    sizes = [sum(map(len, g)) for g in cut(make([20] * 33), 330)]
    assert sizes == [220, 220, 220]
    assert cut([], 0) == cut([], 5) == []
