"""Steps that are recorded and replayed: the same curve, from batches filled up to few sizes.

python -m pytest tests/test_graph.py

Without a device nothing is recorded: then the same functions run on the same tensors, which have to be filled anew.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import examples, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift import tables
from minift.data.batch import pack, token_keys
from minift.engine.graph import fill_up, size_for
from minift.errors import InputError
from minift.models import bert, gpt2
from minift.ops import native
from minift.ops.dropout import Noise, signed
from minift.setup import Engine, make_job
from minift.tasks import task_named
from minift.training import accumulate, train_step, update

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_device)]


@given(st.integers(1, 100_000), st.integers(1, 4096))
def test_sizes_are_few_and_close(n, most):
    size = size_for(n, most)
    assert n <= size < n + max(1, min(n / 8, most))
    assert len({size_for(k, 10**6) for k in range(1024, 2048)}) == 9


@pytest.mark.parametrize("mode", ["native", "reference"])
def test_words_from_memory_are_those_of_the_step(mode, monkeypatch):
    monkeypatch.setattr(native, "mode", mode)
    keys = token_keys(torch.arange(50), torch.arange(50))
    for seed, step in ((42, 0), (2**40 + 7, 123456)):
        plain = Noise(seed, step, keys)
        held = Noise(keys=keys, seed_word=torch.tensor([signed(plain.word())], dtype=torch.int32))
        for site in (0, 5, (1 << 16) + 3):
            assert torch.equal(plain.rows(site), held.rows(site)) and torch.equal(
                plain.cols(site, 33), held.cols(site, 33)
            )
            assert plain.salts(site) == held.salts(site)


@pytest.mark.parametrize("mode", ["native", "reference"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_is_filled_up_changes_nothing(family, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "mode", mode)
    model, task = small_model(family, tmp_path)
    names = [name for name, _ in model.named_parameters()]

    def computed(batch):
        model.zero_grad()
        loss, right = task_named(task).loss(model, batch, Noise(1, 2, batch.keys), 0.1)
        loss.backward()
        return loss.item(), right.item(), [p.grad.clone() for p in model.parameters()]

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    def check(lengths):
        batch = pack(examples(task, lengths))
        filled = fill_up(batch, 6, 40)
        assert len(filled.offsets) == 8 and filled.offsets[-1] == len(filled.ids) > len(batch.ids)
        assert filled.positions.max() < 40 and (filled.rows.diff() >= 0).all()
        (loss, right, grads), (more, hits, found) = computed(batch), computed(filled)
        assert more == pytest.approx(loss, rel=1e-6) and hits == right
        for name, a, b in zip(names, grads, found, strict=True):
            assert (a - b).abs().max() <= 2e-6 * max(1.0, a.abs().max().item()), name

    check()


@pytest.mark.parametrize("kept_as", [lambda t: t.float(), lambda t: t[:, None], lambda t: t[:1]])
def test_targets_that_no_class_can_be_added_to_are_refused(kept_as):
    """A number has no value that says "ask nothing": a row that is added would count."""
    batch = pack(examples("classify", [5, 3]))
    with pytest.raises(InputError, match="expected a run without"):
        fill_up(replace(batch, targets=kept_as(batch.targets)), 6, 40)


def keep_attention(model) -> None:
    """No dropout of attention's weights: the flash kernel draws other masks in a graph."""
    for layer in model.modules():
        if isinstance(layer, bert.Attention):
            layer.p_probs = 0.0
        elif isinstance(layer, gpt2.Attention):
            layer.p = 0.0


@needs_device
def test_a_replayed_step_draws_the_masks_of_its_number(tmp_path):
    """The flash kernel's too, which are the device's generator's: it is left where a step begins."""
    model, task = small_model("bert", tmp_path, width=64)
    config = minift.TrainConfig(graph=True, precision="auto")
    job = make_job(model, config, Engine(torch.device("cuda", 0), torch.bfloat16))
    same = examples(task, [5, 9, 30])
    losses = [train_step(job, same, step, 0.0)[0]["train/loss"] for step in (1, 2, 1, 3)]
    assert losses[0] == losses[2] and len(set(losses)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_replayed_run_follows_the_plain_one(family, method, device, tmp_path):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    losses, graphs = {}, None
    for graph in (False, True):
        model, task = small_model(family, tmp_path / f"{graph}", width=64)
        if device == "cuda":
            keep_attention(model)
        if method != "full":
            minift.add_lora(minift.quantize(model) if method == "qlora" else model)
        config = minift.TrainConfig(batch=5, tokens=90, weight_decay=0.01, base="fp32", graph=graph, precision="auto")
        job = make_job(model, config, Engine(torch.device(device), dtype))
        rng, losses[graph] = np.random.default_rng(0), []
        for step in range(8):
            lengths = rng.integers(2, 40, 5 if step % 3 else 4).tolist()
            values, _ = train_step(job, examples(task, lengths, 100 * step), step, 1e-3 * (1 - step / 8))
            losses[graph].append((values["train/loss"], values["train/grad_norm"], values["train/accuracy"]))
        graphs = job.graphs
    assert 2 <= len(graphs.batches) <= 16
    if device == "cpu":
        np.testing.assert_allclose(losses[True], losses[False], rtol=2e-5)
    else:  # in bfloat16
        np.testing.assert_allclose([x[0] for x in losses[True]], [x[0] for x in losses[False]], rtol=0.03)
        assert np.isfinite(losses[True]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_an_update_from_a_loss_that_is_not_finite_is_left_out(device, tmp_path):
    model, task = small_model("bert", tmp_path)
    config = minift.TrainConfig(weight_decay=0.01, out=str(tmp_path), precision="auto", graph=True)
    job = make_job(model, config, Engine(torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16))
    train_step(job, examples(task, [5, 6]), 0, 1e-3)
    with torch.no_grad():
        model.head.out.bias[0] = torch.inf
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="step 2 is nan; its examples, counted from 0: 0, 1"):
        train_step(job, examples(task, [5, 6]), 1, 1e-3)
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


@needs_device
@pytest.mark.parametrize("name", tables.OPTIMIZERS)
def test_a_replayed_update_is_the_plain_one(name, tmp_path):
    """Whatever the optimizer. A plain step reads nothing back between its beginning and its end, either."""
    device, weights = torch.device("cuda", 0), {}
    for graph in (False, True):
        model, task = small_model("bert", tmp_path / f"{graph}", width=64)
        keep_attention(model)
        config = minift.TrainConfig(optimizer=name, weight_decay=0.01, graph=graph, precision="auto")
        job = make_job(model, config, Engine(device, torch.bfloat16))
        start = torch.cat([p.detach().flatten().clone() for p in job.parameters])
        for step in range(3):
            batch = pack(examples(task, [5, 9, 30])).to(device)
            if graph:
                train_step(job, examples(task, [5, 9, 30]), step, 1e-3)
                continue
            accumulate(job, batch, Noise(config.seed, step, batch.keys), 3)  # makes kernels, at first
            job.optimizer.zero_grad()
            for group in job.optimizer.param_groups:
                group["lr"] = 1e-3 * group["ratio"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                accumulate(job, batch, Noise(config.seed, step, batch.keys), 3)
                update(job, skip=torch.zeros((), device=device))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            job.optimizer.zero_grad()
        weights[graph] = torch.cat([p.detach().flatten() for p in job.parameters])
    moved = (weights[False] - start).norm()
    assert moved > 0 and (weights[True] - weights[False]).norm() < 0.2 * moved


def test_graphs_need_what_they_need(tmp_path):
    for change, words in (
        (dict(precision="fp32"), "--graph is True with --precision fp32"),
        (dict(precision="bf16", shard=True), "with --shard"),
        (dict(precision="bf16", recompute=True), "with --recompute"),
    ):
        with pytest.raises(ValueError, match=words):
            minift.TrainConfig(graph=True, **change).check()
    model, _ = small_model("bert", tmp_path)
    config = minift.TrainConfig(out=str(tmp_path / "out"), graph=True, precision="bf16", device="cpu")
    with pytest.raises(minift.InputError, match="--graph is True, with bfloat16 on cpu with 1 process; expected"):
        minift.train(model, None, config)
    assert not (tmp_path / "out").exists()
