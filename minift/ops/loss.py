"""Linear layer and cross-entropy in one, so that the logits of all rows never exist together.

    z = x W^T + b        loss = sum_m (logsumexp(z_m) - (1 - e) z_m[target_m] - e mean(z_m))
    dz = softmax(z) - (1 - e) onehot(target) - e / V        dx = dz W        dW = dz^T x        db = sum_m dz_m

with label smoothing e (Szegedy et al., https://arxiv.org/abs/1512.00567).

The gradients are made in the forward pass, in place of the logits, a chunk of rows at a time (as llm.c and
Liger-Kernel do, https://arxiv.org/abs/2410.10989); backward only scales them, in place, and so works once.

On tensor cores a product is several times slower where a size is no multiple of eight, as GPT-2's vocabulary of 50,257
is not. So on CUDA classes are added whose weights, and so logits and gradients, are 0; the loss does not see them.
M rows, C width, V classes or vocabulary, P of them with those that are added.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import in_order, native
from .linear import product, weight_gradient

CHUNK = 1 << 24  # logits at hand at once: 64 MB in float32; with 16 MB the products of GPT-2's head take 25 % longer
CHUNK_CUDA = 1 << 26  # 128 MB in bfloat16; each chunk reads and writes all of dW
ALIGNED = 64
CLASSES = 1024  # of a head whose logits may all be there at once


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float = 0.0,
    each: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, correct): the loss summed over rows in float32, and the number of rows whose largest logit is the target.

    x (M, C), weight (V, C), bias (V,) or None, smoothing in [0, 1); targets (M,) int64 in [0, V), or -1 for a row that
    only fills up the batch: its loss and gradients are 0. each (M,): where the loss of each row is written, or None.
    """
    if native.in_order:
        return cross_entropy_in_order(x, weight, bias, targets, smoothing, each)
    return LinearCrossEntropy.apply(x, weight, bias, targets, smoothing, each)


class LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradients of its inputs, nothing of size M x V; backward hands them over."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, smoothing, each) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x.device)
        correct = torch.zeros((), dtype=torch.int64, device=x.device)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad = needs_x or needs_weight or needs_bias
        dx = dw = db = None
        if needs_x:
            dx = torch.empty_like(x)
        if needs_bias:
            db = torch.zeros_like(bias)

        V = len(weight)
        w = with_classes(weight.to(x.dtype), classes_to_add(x, V))  # (P, C)
        most = max(1, (CHUNK_CUDA if x.is_cuda else CHUNK) // V)
        n = -(-x.shape[0] // -(-x.shape[0] // most)) if len(x) else 1  # chunks of one size: their memory is the same
        if native.in_order:
            n += -n % ALIGNED
        for i in range(0, x.shape[0], n):
            xs = x[i : i + n]
            z = product(xs, w)  # (m, P)
            if needs_bias:
                z = z.to(wide)  # so that its gradient is summed over rows in float32
            losses, hits, dz = cross_entropy(z[:, :V], bias, targets[i : i + n], smoothing, grad)
            if len(w) > V:  # the kernel's gradient lies in z, whose other columns are 0
                dz = z
            loss += losses.sum()
            if each is not None:
                each[i : i + n] = losses
            correct += hits
            if needs_bias:
                db += dz[:, :V].sum(0)
            if needs_x:
                dx[i : i + n] = product(dz.to(x.dtype), w.t())
            if needs_weight:
                dw = weight_gradient(dz.to(x.dtype), xs, dw, weight.dtype)
            del z, dz  # before the logits of the next chunk are there

        if needs_weight and dw is None:  # no rows
            dw = torch.zeros_like(weight)
        if needs_weight:
            dw = dw[:V]
        ctx.gradients = dx, dw, db
        ctx.heads_gradient = getattr(weight, "heads_gradient", None)  # for the embedding that is the same table
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _):
        if ctx.gradients is None:
            raise RuntimeError("the first backward pass through this loss took its gradients; compute it again")
        gradients = ctx.gradients
        ctx.gradients = None  # no longer held here, so that they become .grad without a copy
        for g in gradients:
            if g is not None:
                g.mul_(dloss)
        _, dw, _ = gradients
        if dw is not None and ctx.heads_gradient is not None:
            ctx.heads_gradient.append(dw)
        return *gradients, None, None, None


def cross_entropy_in_order(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, each: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same where sums keep to one order (in_order.py)."""
    M = len(x)
    if weight.requires_grad and len(weight) <= CLASSES:
        z = in_order.linear(x, weight, bias)
        losses = F.cross_entropy(z.float(), targets, ignore_index=-1, reduction="none", label_smoothing=smoothing)
        loss = losses.sum()
        correct = (z.argmax(-1) == targets).sum()
    else:  # by a library, which may take another way for few rows than for many
        x = F.pad(x, (0, 0, 0, -M % ALIGNED))
        targets = F.pad(targets, (0, -M % ALIGNED), value=-1)
        losses = torch.empty(len(x), device=x.device)
        loss, correct = LinearCrossEntropy.apply(x, weight, bias, targets, smoothing, losses)
    if each is not None:
        each.copy_(losses[:M].detach())
    return loss, correct


def classes_to_add(x: Tensor, V: int) -> int:
    """How many classes make the products with x faster."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and native.mode != "reference":
        return -V % ALIGNED
    return 0


def with_classes(w: Tensor, more: int) -> Tensor:
    """w (V, C) with that many rows of zeros below; itself where there are none."""
    if not more:
        return w
    return F.pad(w, (0, 0, 0, more))


def cross_entropy(
    z: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(losses, correct, dz) of the logits z (m, V) before their bias, which are overwritten; dz is None without grad.

    losses: (m,), that of each row. The rows of z may be longer than what is asked of them.
    """
    lib = native.kernel("loss", z)
    if lib is None:
        return reference(z, bias, targets, smoothing, grad)
    # on CUDA the loss is NaN instead, so that nobody has to wait for the answer
    if z.is_cpu and not -1 <= targets.min() <= targets.max() < z.shape[1]:
        raise IndexError(f"a target is {targets.min()} or {targets.max()}; expected 0 to {z.shape[1] - 1}, or -1")
    if bias is not None:
        bias = bias.float().contiguous()
    targets = targets.contiguous()
    losses, hits = torch.empty(2, len(z), dtype=torch.float32, device=z.device).unbind()
    M, V = z.shape
    inputs = dict(z=z, bias=bias, targets=targets, smoothing=smoothing, grad=grad)
    lib.cross_entropy(**inputs, loss=losses, hits=hits, M=M, V=V, stride=z.stride(0), dtype=native.CODES[z.dtype])
    return losses, hits.sum().long(), z if grad else None


def reference(
    z: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The equations above, in at least float32."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if bias is not None:
        z += bias
    target = targets[:, None]
    asked = target >= 0
    correct = (z.argmax(-1, keepdim=True) == target).sum()
    target = target.clamp(min=0)
    lse = torch.logsumexp(z, -1, keepdim=True)
    loss = lse - (1 - smoothing) * z.gather(1, target) - smoothing * z.mean(-1, keepdim=True)
    losses = loss.masked_fill(~asked, 0).squeeze(-1)
    if not grad:
        return losses, correct, None
    dz = z.sub_(lse).exp_()
    dz.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=dz.dtype))
    if smoothing:
        dz -= smoothing / z.shape[1]
    return losses, correct, dz.masked_fill_(~asked, 0)
