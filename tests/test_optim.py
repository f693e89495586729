"""Groups, schedules and clipping beside the peer's.

python -m pytest tests/test_optim.py
"""

import math
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import peer, small_bert
from transformers import BertForSequenceClassification, GPT2ForSequenceClassification, get_scheduler

import minift
from minift import tables
from minift.checkpoints import weights
from minift.engine.optim import clip, make_optimizer, schedule, warmup_steps
from minift.engine.optimizers import Optimizer, adamw


@pytest.mark.parametrize(
    "kind, name", [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("total, warmup", [(22, 0), (22, 5), (1, 0), (10, 10), (7, 1)])
def test_schedule_is_the_peers(kind, name, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert schedule(kind, step, total, warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("value, total", [(0, 100), (0.1, 101), (0.06, 434), (7, 100), (1, 100)])
def test_warmup_is_the_peers(value, total, tmp_path):
    arguments = transformers.TrainingArguments(output_dir=tmp_path, warmup_steps=value, use_cpu=True)
    assert warmup_steps(value, total) == arguments.get_warmup_steps(total)


@pytest.mark.parametrize("cls", [BertForSequenceClassification, GPT2ForSequenceClassification])
def test_what_decays_is_what_the_trainer_decays(cls, tmp_path):
    theirs = peer(cls, tmp_path / "model", num_labels=2)
    arguments = transformers.TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    decayed = set(transformers.Trainer(model=theirs, args=arguments).get_decay_parameter_names(theirs))
    model, _ = minift.load(tmp_path / "model", task="classify")
    optimizer = make_optimizer(model, 1e-3, 0.1)
    names, by_id = weights.hub_names(model), {id(p): name for name, p in model.named_parameters()}
    ours = [{names[by_id[id(p)]] for p in group["params"]} for group in optimizer.param_groups]
    assert ours[0] == decayed and ours[0] | ours[1] == {name for name, _ in theirs.named_parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_clip():
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    for limit, scale in ((1.0, 1 / 13), (100.0, 1.0), (0, 1.0)):
        p.grad, q.grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 12.0])
        assert clip([p, q], limit) == pytest.approx(13)
        assert math.isclose(q.grad[1].item(), 12 * scale, rel_tol=1e-5)


def test_frozen_parameters_are_left_out(tmp_path):
    peer(BertForSequenceClassification, tmp_path)
    model, _ = minift.load(tmp_path, task="classify")
    model.body.requires_grad_(False)
    held = {id(p) for group in make_optimizer(model, 1e-3, 0.1).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.head.parameters()}


def test_lora_plus_gives_b_its_own_rate(tmp_path):
    """As PEFT's create_loraplus_optimizer: B learns `ratio` times as fast as A."""
    model, _ = minift.load(small_bert(tmp_path), task="classify")
    minift.add_lora(model)
    rates = {}
    for group in make_optimizer(model, 1e-3, 0.1, lora_plus=16).param_groups:
        for p in group["params"]:
            rates[id(p)] = group["ratio"]
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates.pop(id(p)) == (16 if name.endswith(".B") else 1), name
    assert not rates


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs_to_the_bit(decay):
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours = Optimizer(adamw, [{"params": mine, "weight_decay": decay}], lr=1e-2)
    peers = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay, fused=True)
    for step in range(5):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        if step == 2:  # a parameter without a gradient is left alone
            mine[1].grad = theirs[1].grad = None
        ours.step()
        peers.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    for p, q in zip(mine, theirs, strict=True):
        assert ours.state[p].keys() == peers.state[q].keys()
        assert all(torch.equal(ours.state[p][k], peers.state[q][k]) for k in ours.state[p])
    ours.zero_grad()
    assert all(p.grad is None for p in mine)


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.OPTIMIZERS)
def test_a_step_does_not_import_the_compiler(name):
    code = (
        "import sys, torch; from minift.engine.optim import clip;"
        "from minift.engine.optimizers import Optimizer, rule_named;"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); clip([p], 1.0);"
        f"Optimizer(rule_named({name!r}), [{{'params': [p], 'weight_decay': 0.0}}], 0.1).step();"
        "assert 'torch._dynamo' not in sys.modules and p.max() < 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
