"""SGD beside torch.optim.SGD, to the bit.

python -m pytest tests/parity/test_sgd.py
"""

import pytest
import torch

from minift.engine.optimizers import Optimizer, sgd

SHAPES = [(7, 5), (3, 11), (4,), (1,), (2, 3, 5)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.0])
def test_twenty_steps_are_torchs(beta1, decay):
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours = Optimizer(sgd, [{"params": mine, "weight_decay": decay}], lr=0.1, beta1=beta1)
    peer = torch.optim.SGD(theirs, lr=0.1, momentum=beta1, weight_decay=decay, fused=True)
    for step in range(20):
        ours.param_groups[0]["lr"] = peer.param_groups[0]["lr"] = 0.1 / (1 + step)
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            # some have none, but at the first step, where torch's fused one then fails
            p.grad = None if step and (step + i) % 4 == 0 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        peer.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    for p, q in zip(mine, theirs, strict=True):
        state = {key: value for key, value in peer.state[q].items() if value is not None}
        assert ours.state[p].keys() == state.keys() == ({"momentum_buffer"} if beta1 else set())
        assert all(torch.equal(ours.state[p][key], state[key]) for key in state)


def test_without_momentum_checkpoints_have_no_state():
    p = torch.nn.Parameter(torch.ones(3, 2))
    assert Optimizer(sgd, [{"params": [p], "weight_decay": 0.0}], lr=0.1, beta1=0.0).expected_state(p) == {}
