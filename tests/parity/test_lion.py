"""Lion beside the paper's equations in float64.

python -m pytest tests/parity/test_lion.py
"""

import pytest
import torch

from minift.engine.optimizers import Optimizer, lion

SHAPES = [(7, 5), (3, 11), (4,), (1,), (2, 3, 5)]


def paper(p, m, g, lr, b1, b2, decay):
    """Algorithm 2 of arXiv 2302.06675: the next (p, m)."""
    c = b1 * m + (1 - b1) * g
    p = p - lr * (torch.sign(c) + decay * p)
    return p, b2 * m + (1 - b2) * g


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5)])
def test_twenty_steps_are_the_papers(betas, decay):
    torch.manual_seed(0)
    b1, b2 = betas
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Optimizer(lion, [{"params": params, "weight_decay": decay}], lr=1.0, beta1=b1, beta2=b2)
    expected = [(p.detach().double(), torch.zeros(p.shape).double()) for p in params]
    for step in range(20):
        lr = 0.01 / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) if (step + i) % 4 else None
            if p.grad is not None:
                p.grad[..., 0] = 0 if step % 2 else p.grad[..., 0]  # sign(0) is 0
                expected[i] = paper(*expected[i], p.grad.double(), lr, b1, b2, decay)
        optimizer.step()
        for p, (weight, m) in zip(params, expected, strict=True):
            assert (p - weight).abs().max() < 1e-6
            if p in optimizer.state:
                assert (optimizer.state[p]["exp_avg"] - m).abs().max() < 1e-6


def test_a_zero_gradient_moves_nothing_at_first():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer(lion, [{"params": [p], "weight_decay": 0.0}], lr=0.5)
    p.grad = torch.tensor([0.0, 2.0, -1e-20])
    optimizer.step()
    assert torch.equal(p, torch.tensor([1.0, 0.5, 1.5]))
    assert optimizer.state[p].keys() == {"exp_avg"}
