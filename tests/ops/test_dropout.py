"""Dropout by hashing: the specification in numpy, statistics of the mask, and the gradient.

python -m pytest tests/ops/test_dropout.py
"""

import itertools
import math

import numpy as np
import pytest
import torch

from minift.data.batch import token_keys
from minift.ops.dropout import Noise, dropout, mix, mix_tensor, signed

KEYS = token_keys(torch.arange(20).repeat_interleave(50), torch.arange(50).repeat(20))  # 1,000 tokens
CHANNELS = 500
RATES = (0.1, 0.5)

# for test_kernels.py: functions of one matrix
OPERATORS = {"dropout": lambda x: dropout(x, 0.1, Noise(5, 6, KEYS[: len(x)]), 1)}


def mask(p, seed=42, step=0, site=3, keys=KEYS, channels=CHANNELS):
    """Kept or not, as float64. (N, C)"""
    return (dropout(torch.ones(len(keys), channels), p, Noise(seed, step, keys), site) != 0).double()


def correlated(a, b, p):
    """Correlation of two masks in standard errors."""
    a, b = (a - (1 - p)).flatten(), (b - (1 - p)).flatten()
    return abs((a * b).mean().item()) / (p * (1 - p)) * math.sqrt(a.numel())


def numpy_mix(x, last=True):
    """lowbias32 as published, on uint32."""
    x = x.astype(np.uint32)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16)) if last else x


def test_the_hash_is_lowbias32():
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint64).astype(np.uint32)
    want = numpy_mix(words)
    assert np.array_equal(mix_tensor(torch.from_numpy(words.view(np.int32))).numpy().view(np.uint32), want)
    assert [mix(int(w)) for w in words] == want.tolist()
    assert [signed(int(w)) for w in words] == words.view(np.int32).tolist()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_is_the_specified_one(p):
    """The equations at the top of dropout.py, in unsigned numpy: what C++ and CUDA have to give."""
    seed, step, site = 2**40 + 5, 17, 9
    base = mix(mix(mix(seed & 0xFFFFFFFF) ^ (seed >> 32)) ^ step)
    k0, k1 = (mix((base + 2 * site + i) & 0xFFFFFFFF) for i in (0, 1))
    row = numpy_mix(KEYS.numpy().view(np.uint32) ^ np.uint32(k0))
    with np.errstate(over="ignore"):
        col = numpy_mix(np.arange(CHANNELS, dtype=np.uint32) * np.uint32(0x9E3779B1) ^ np.uint32(k1))
    words = numpy_mix(row[:, None] ^ col, last=False).view(np.int32)
    want = words < round((1 - p) * 2**32) - 2**31
    assert np.array_equal(mask(p, seed, step, site).numpy() != 0, want)


@pytest.mark.parametrize("p", RATES)
def test_kept_fraction(p):
    """Over all, in each row and in each column, within five standard errors."""
    m = mask(p)
    for dim, n in ((None, m.numel()), (0, m.shape[0]), (1, m.shape[1])):
        error = (m.mean() if dim is None else m.mean(dim)) - (1 - p)
        assert error.abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    spread = m.mean(1).var().item() / (p * (1 - p) / m.shape[1])  # of the rows' fractions, 1 if independent
    assert 0.8 < spread < 1.2


@pytest.mark.parametrize("p", RATES)
def test_rows_columns_steps_sites_and_seeds_are_uncorrelated(p):
    m = mask(p)
    others = [
        mask(p, step=1),
        mask(p, step=1000),
        mask(p, site=4),
        mask(p, site=0),
        mask(p, seed=43),
        mask(p, seed=42 + 2**32),
    ]
    assert max(correlated(a, b, p) for a, b in itertools.combinations([m, *others], 2)) < 5
    for shift in (1, 2, 3, 50, 100):  # neighbours in a row, in a column, on the diagonals
        assert correlated(m[:, shift:], m[:, :-shift], p) < 5
        assert correlated(m[shift:], m[:-shift], p) < 5
        assert correlated(m[shift:, shift:], m[:-shift, :-shift], p) < 5
        assert correlated(m[shift:, :-shift], m[:-shift, shift:], p) < 5


@pytest.mark.parametrize("p", RATES)
def test_any_two_rows_and_any_two_columns_are_independent(p):
    """The largest of half a million correlations is what chance gives; so is the mean of their squares."""
    for m in (mask(p), mask(p).t()):
        z = (m - (1 - p)) / math.sqrt(p * (1 - p))
        c = torch.triu(z @ z.t() / math.sqrt(z.shape[1]), 1)[tuple(torch.triu_indices(len(z), len(z), 1))]
        assert c.abs().max() < 6.5
        assert (c**2).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("p", RATES)
def test_squares_of_two_rows_and_two_columns_are_independent(p):
    """row ^ col has a linear structure (four words of a square cancel); after the hash none of it is left."""
    z = (mask(p) - (1 - p)) / math.sqrt(p * (1 - p))
    for i, j in itertools.product((1, 2, 7), repeat=2):
        square = z[i:, j:] * z[:-i, j:] * z[i:, :-j] * z[:-i, :-j]
        assert abs(square.mean().item()) * math.sqrt(square.numel()) < 5 * square.std().item()


def test_the_mask_of_a_token_is_its_own():
    """However tokens are shuffled, split or repeated."""
    whole = mask(0.3)
    chosen = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))[:333]
    assert torch.equal(mask(0.3, keys=KEYS[chosen]), whole[chosen])
    assert torch.equal(mask(0.3, channels=7), whole[:, :7])
    noise = Noise(42, 0, KEYS)
    assert torch.equal(noise.at(chosen).keys, KEYS[chosen]) and noise.at(None) is noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradient(dtype):
    x = torch.randn(len(KEYS), 33, dtype=dtype, requires_grad=True)
    noise = Noise(1, 2, KEYS)
    y = dropout(x, 0.25, noise, 1)
    kept = dropout(torch.ones(len(KEYS), 33), 0.25, noise, 1) != 0
    assert y.dtype == dtype
    assert torch.allclose(y, x * kept / 0.75, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(x.grad, dy * kept / 0.75, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_off():
    x = torch.randn(4, 3)
    assert dropout(x, 0.5, Noise(), 0) is x
    assert dropout(x, 0.0, Noise(1, 1, KEYS[:4]), 0) is x


def test_nothing_of_the_size_of_x_is_saved():
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        dropout(torch.randn(len(KEYS), 300, requires_grad=True), 0.5, Noise(1, 1, KEYS), 0)
    assert sorted(sizes) == [300, 1000]


def test_empty_and_odd_shapes():
    assert dropout(torch.ones(0, 5), 0.5, Noise(1, 1, KEYS[:0]), 0).shape == (0, 5)
    assert dropout(torch.ones(3, 0), 0.5, Noise(1, 1, KEYS[:3]), 0).shape == (3, 0)
    strided = torch.ones(20, 1000).t()
    assert torch.equal(
        dropout(strided, 0.5, Noise(1, 1, KEYS), 0), dropout(strided.contiguous(), 0.5, Noise(1, 1, KEYS), 0)
    )
