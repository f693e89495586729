"""Attention on CUDA in bfloat16 and float16: the flash kernel inside PyTorch (Dao, https://arxiv.org/abs/2307.08691).

The equations are those of attention.py, and packed sequences are what the kernel takes. Two things are its own:

- Dropout's mask is drawn by the kernel's generator. This is the one place where noise is not a function of the token:
  the seed comes from (seed, step, site) and the size of the batch, so a rerun, a resumed run and a recomputed layer
  draw the same mask, but another split into micro-batches draws another (and micro-batches of one size the same).
  With --graph the seed comes from (seed, step, micro-batch), and layers go on from there.
- Of fewer queries than keys it takes the causal ones to be the last. So queries at `rows` are put back among all
  tokens, with zeros between, and the answers there are thrown away: exact, and this concerns the last layer alone.

Its backward pass adds up dQ in any order, unless torch.use_deterministic_algorithms is on.

N tokens, M query rows, S sequences, H heads, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .dropout import mix

FORWARD, BACKWARD = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
WIDEST = 128  # head size; beyond, some devices have no backward with dropout


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can work on these. q (M, H, D), k, v (N, H, D)."""
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    return fits and q.shape[2] % 8 == 0 and q.shape[2] <= WIDEST and native.mode != "reference" and there(q.device)


@cache
def there(device: torch.device) -> bool:
    """Whether this torch has the kernel, and the device runs it."""
    new = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return new and torch.backends.cuda.is_flash_attention_available()


def flash(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, rows: Tensor | None, settings) -> Tensor:
    """(M, H, D), as attention.attention."""
    noise = settings.noise
    seed = None
    # a replayed step (engine/graph.py) seeds the generator once, outside
    if noise.drops(settings.p) and noise.seed_word is None:
        k0, k1 = noise.salts(settings.site)
        seed = mix(k0 ^ len(k)) << 32 | mix(k1 ^ len(offsets))
    longest = settings.longest or len(k)
    given = offsets.int(), longest, settings.scale, settings.causal, settings.p, seed
    if rows is None:
        return Flash.apply(q, k, v, *given)
    asked = q.new_zeros(k.shape).index_copy(0, rows, q)  # (N, H, D)
    return Flash.apply(asked, k, v, *given).index_select(0, rows)


class Flash(torch.autograd.Function):
    """Saves q, k, v, the output, one number per query and head, and the state of the generator."""

    @staticmethod
    def forward(ctx, q, k, v, offsets, longest, scale, causal, p, seed) -> Tensor:
        q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
        given = offsets, offsets, longest, longest, p, causal
        with nullcontext() if seed is None else seeded(q.device, seed):
            out, lse, state, more, _ = FORWARD(q, k, v, *given, False, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, state, more, offsets)
        ctx.settings = longest, longest, p, causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        *saved, state, more, offsets = ctx.saved_tensors
        *settings, scale = ctx.settings
        gradients = BACKWARD(dout, *saved, offsets, offsets, *settings, state, more, scale=scale)
        return *gradients, *[None] * 6


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The device's generator with this seed, and afterwards as it was."""
    generator = torch.cuda.default_generators[device.index]
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
