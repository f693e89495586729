"""The embedding's gradient: the rows of this batch are added to what is there.

python -m pytest tests/test_layers.py
"""

import torch
import torch.nn.functional as F

from minift.layers import Embedding


def embedding(rows=50, width=7):
    layer = Embedding(rows, width)
    torch.nn.init.normal_(layer.weight)
    return layer


def test_gradients_add_up_over_micro_batches():
    """Dense all along, whether or not there was one before, and where the table is used a second time (a tied head)."""
    torch.manual_seed(0)
    layer, other = embedding(), embedding()
    other.load_state_dict(layer.state_dict())
    for tied in (False, True, False):
        ids, dy = torch.randint(50, (33,)), torch.randn(33, 7)
        for x, table in ((layer(ids), layer.weight), (F.embedding(ids, other.weight), other.weight)):
            ((x * dy).sum() + (x @ table.t()).square().sum() * tied).backward()
        assert layer.weight.grad.layout == torch.strided
        assert torch.allclose(layer.weight.grad, other.weight.grad, rtol=1e-5, atol=1e-4)


def test_the_first_gradient_is_dense_and_later_ones_name_their_rows():
    layer = embedding()
    for layout in (torch.strided, torch.sparse_coo):
        (g,) = torch.autograd.grad(layer(torch.tensor([3, 3, 5])).sum(), layer.weight)
        assert g.layout == layout and g.to_dense().sum(1).nonzero().flatten().tolist() == [3, 5]
        layer.weight.grad = torch.zeros_like(layer.weight)


def test_the_gradient_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    layer, ids, dy = embedding(500, 64), torch.randint(500, (4000,)), torch.randn(4000, 64)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer(ids).backward(dy)
        results.append(layer.weight.grad)
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])
