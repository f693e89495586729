"""Dropout whose mask is a function, not a state.

    y[i, c] = x[i, c] / (1 - p)  if keep(i, c)  else 0
    keep(i, c) = signed(hash(row[i] ^ col[c])) < (1 - p) * 2^32 - 2^31
    row[i] = mix(key[i] ^ k0)      col[c] = mix(c * 0x9E3779B1 ^ k1)      k0, k1 = mixes of (seed, step, site)

`key` is a token's 32-bit name (data/batch.py makes it from the example's number and the token's position), so the mask
of a token is the same however examples are packed, split or dealt out, and backward recomputes it instead of saving it.
`mix` is the lowbias32 integer hash (https://nullprogram.com/blog/2018/07/31/); `hash` is `mix` without its last
xor-shift, which changes only low bits. All arithmetic is on 32-bit integers that wrap, the same in C++, CUDA and here.

N tokens, C channels.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .sources import Within

GOLDEN, MUL1, MUL2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
MASK = 0xFFFFFFFF
BLOCK = 1 << 17  # elements hashed at once: two int32 scratch blocks stay in the L2 caches


def signed(x: int) -> int:
    """The int32 with the bits of the unsigned 32-bit `x`."""
    return x - (1 << 32) if x >> 31 else x


def mix(x: int) -> int:
    """lowbias32 of a Python integer; a bijection of 32-bit words."""
    x = (x ^ x >> 16) * MUL1 & MASK
    x = (x ^ x >> 15) * MUL2 & MASK
    return x ^ x >> 16


def hash_(x: Tensor, scratch: Tensor) -> Tensor:
    """lowbias32 without its last step, of int32 words, in place. `scratch` has the shape of x."""
    for shift, multiplier in ((16, MUL1), (15, MUL2)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch &= (1 << 32 - shift) - 1  # int32 shifts copy the sign bit in: clear it
        x ^= scratch
        x *= signed(multiplier)
    return x


def mix_tensor(x: Tensor, salt: int = 0, seed_word: Tensor | None = None) -> Tensor:
    """lowbias32 of int32 words ^ salt, as a new tensor. seed_word (1,): the salt is mix(seed_word + salt)."""
    lib = native.kernel("dropout", x)
    if lib is None:
        k = signed(salt) if seed_word is None else mix_tensor(seed_word + salt)
        x = hash_(x ^ k, torch.empty_like(x))
        return x ^ (x >> 16 & 0xFFFF)
    x = x.contiguous()
    y = torch.empty_like(x)
    lib.mix_words(x=x, y=y, seed_word=seed_word, salt=salt, n=x.numel())
    return y


class Drop(NamedTuple):
    """What one dropout place drops: its rate, and the words of the tokens and channels at hand."""

    row: Tensor  # (N,) int32
    col: Tensor  # (C,) int32
    p: float


@dataclass(frozen=True)
class Noise:
    """Where randomness comes from: the run's seed, the step, and the keys of the tokens at hand.

    SILENT, without keys, turns every dropout off (evaluation).
    """

    seed: int = 0
    step: int = 0
    keys: Tensor | None = None  # (N,) int32
    seed_word: Tensor | None = None  # (1,) int32: word() in memory, for steps that are replayed (engine/graph.py)

    def at(self, rows: Tensor | None) -> "Noise":
        """The noise of these tokens alone. rows (M,), or None for all."""
        if self.keys is None or rows is None:
            return self
        return replace(self, keys=self.keys[rows])

    def drops(self, p: float) -> bool:
        """Whether a dropout place of rate p drops anything: nowhere else is this decided."""
        return self.keys is not None and p > 0

    def drop(self, p: float, site: int, channels: int) -> Drop | None:
        """What the dropout place number `site` drops of so many channels; None where it drops nothing."""
        if not self.drops(p):
            return None
        return Drop(self.rows(site), self.cols(site, channels), p)

    def word(self) -> int:
        """The 32-bit word of (seed, step), from which those of dropout places are made."""
        return mix(mix(mix(self.seed & MASK) ^ self.seed >> 32 & MASK) ^ self.step & MASK)

    def salts(self, site: int) -> tuple[int, int]:
        """(k0, k1): two 32-bit words for the dropout place number `site` in this step."""
        word = self.word() if self.seed_word is None else self.seed_word.item() & MASK
        return mix(word + 2 * site & MASK), mix(word + 2 * site + 1 & MASK)

    def rows(self, site: int) -> Tensor:
        """The words of the tokens, (N,) int32."""
        salt = self.salts(site)[0] if self.seed_word is None else 2 * site
        return mix_tensor(self.keys, salt, self.seed_word)

    def cols(self, site: int, n: int) -> Tensor:
        """The words of the first n channels, (n,) int32."""
        salt = self.salts(site)[1] if self.seed_word is None else 2 * site + 1
        y = self.keys.new_empty(n)
        lib = native.kernel("dropout", y)
        if lib is None:
            channels = torch.arange(n, dtype=torch.int32, device=y.device)
            return mix_tensor(channels * signed(GOLDEN), salt, self.seed_word)
        lib.mix_words(x=None, y=y, seed_word=self.seed_word, salt=salt, n=n)
        return y


SILENT = Noise()


def threshold(p: float) -> int:
    """What a kept element's signed hash is below."""
    return min(round((1 - p) * 2**32) - 2**31, 2**31 - 1)


def keep(row: Tensor, col: Tensor, p: float) -> Tensor:
    """Which elements stay: bool, of the shape that row and col (int32) broadcast to."""
    x = row ^ col
    return hash_(x, torch.empty_like(x)) < threshold(p)


def for_kernels(drop: Drop | None) -> Within:
    """`struct Drop` of kernels/shared.h; its row is null where nothing is dropped."""
    if drop is None:
        return Within((0, 0, 0, 0.0), ())
    values = drop.row.data_ptr(), drop.col.data_ptr(), threshold(drop.p), 1 / (1 - drop.p)
    return Within(values, (drop.row, drop.col))


class Dropout(torch.autograd.Function):
    """Saves the words of rows and channels, (N,) and (C,); the mask is hashed again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, drop: Drop) -> Tensor:
        ctx.save_for_backward(drop.row, drop.col)
        ctx.p = drop.p
        return dropped(x, drop)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dropped(dy, Drop(*ctx.saved_tensors, ctx.p)), None


def dropped(x: Tensor, drop: Drop) -> Tensor:
    """The equation above, (N, C), by the kernel or by the reference, which give the same values. x (N, C)."""
    lib = native.kernel("dropout", x)
    if lib is None:
        return reference(x, drop)
    x = x.contiguous()
    y = torch.empty_like(x)
    N, C = x.shape
    lib.dropout(x=x, y=y, drop=for_kernels(drop), N=N, C=C, dtype=native.CODES[x.dtype])
    return y


def reference(x: Tensor, drop: Drop) -> Tensor:
    """The equation above, a block of rows at a time. x (N, C)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n = max(1, BLOCK // max(1, x.shape[1]))
    for i in range(0, x.shape[0], n):
        kept = keep(drop.row[i : i + n, None], drop.col, drop.p)
        torch.mul(x[i : i + n], kept, out=y[i : i + n]).mul_(1 / (1 - drop.p))
    return y


def dropout(x: Tensor, p: float, noise: Noise, site: int) -> Tensor:
    """x with a fraction p of its elements set to 0 and the rest scaled by 1 / (1 - p); x itself without noise.

    x (N, C), with noise.keys (N,); `site` numbers the dropout place in the model.
    """
    drop = noise.drop(p, site, x.shape[1])
    if drop is None:
        return x
    return Dropout.apply(x, drop)
