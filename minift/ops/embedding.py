"""Rows of a table, and a gradient that is no second table where there is one already.

    y = W[ids]        dW[i] = sum over the n with ids[n] = i of dy[n]

A gradient of the whole table is zero in all but a few rows. So these rows are added to the gradient of an earlier
micro-batch or, in a language model whose head is the same table, to the head's, which is made just before in the same
backward pass: `linear_cross_entropy` leaves it in `weight.heads_gradient`. Elsewhere, and on CUDA (where counting the
rows would wait for the device), it is PyTorch's own. N tokens, C width, V rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

dense_gradient = torch.ops.aten.embedding_dense_backward  # (dy, ids, V, padding_idx, scale_grad_by_freq) -> (V, C)


def rows(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids], (N, C). ids (N,) int64, weight (V, C)."""
    if weight.is_cuda:
        return F.embedding(ids, weight)
    if torch.is_grad_enabled() and weight.requires_grad:
        weight.heads_gradient = []
    return Rows.apply(ids, weight)


class Rows(torch.autograd.Function):
    """Saves ids."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        ctx.heads_gradient = getattr(weight, "heads_gradient", None)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        is_first = weight.grad is None or weight.is_meta  # where rows cannot be added one by one
        if not ctx.heads_gradient and is_first:
            return None, dense_gradient(dy, ids, len(weight), -1, False)

        # one row for each id that occurs, summed before it is added: the same bits as by two tables
        if ids.is_meta:
            found, few = ids, dy
        else:
            found, places = ids.unique(return_inverse=True)
            few = dense_gradient(dy, places, len(found), -1, False)
        if ctx.heads_gradient:
            ctx.heads_gradient.pop().index_add_(0, found, few)
            return None, None
        return None, torch.sparse_coo_tensor(found[None], few, weight.shape, is_coalesced=True, check_invariants=False)
