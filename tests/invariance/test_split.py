"""The same examples give the same curve however a step is split: dropout on, `--tokens` small, large and unlimited.

python -m pytest tests/invariance/test_split.py
"""

import pytest
import torch
from helpers import losses, model_and_data, train

import minift
from minift import setup, training
from minift.data.batch import pack

BOUND = 1e-5  # of losses and weights; seen: about 3e-7


def final(model):
    """All weights but the keys' biases: their true gradient is 0 (softmax does not see them), and AdamW makes steps of
    the size of the learning rate out of its rounding errors."""
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if not n.endswith("key.bias")])


def run(folder, tokens):
    """Losses and final weights of 12 steps of 16 examples."""
    model, tokenizer = minift.load(folder / "model", task="classify", labels=["blame", "praise"])
    assert model.config.hidden_dropout_prob == 0.1 and model.config.attention_probs_dropout_prob == 0.1
    out = folder / f"run-{tokens}"
    train(model, tokenizer, folder / "train.tsv", out, steps=12, batch=16, lr=1e-3, tokens=tokens)
    return losses(out), final(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = model_and_data(tmp_path_factory.mktemp("split"), 100)
    return folder, *run(folder, 0)


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 32, 100])
def test_micro_batches_change_nothing(whole, tokens):
    folder, curve, weights = whole
    some_curve, some_weights = run(folder, tokens)
    assert curve == pytest.approx(some_curve, abs=BOUND)
    assert (weights - some_weights).abs().max() < BOUND
    assert curve[0] != pytest.approx(curve[-1], abs=1e-3)  # it did learn something


def test_a_rerun_is_equal_to_the_bit(whole, tmp_path):
    folder, curve, weights = whole
    again_curve, again = run(folder, 10_000)
    assert again_curve == curve and torch.equal(again, weights)


@pytest.mark.parametrize("options, base, tokens", [
    ({}, 1, 0),
    ({"method": "lora"}, 1, 512),
    ({"method": "lora"}, 109_000_000, 0),  # a model this small is not split
    ({"method": "lora", "base": "nf4"}, 1, 0),
    ({"method": "lora", "precision": "bf16"}, 1, 512),  # by floats, on a CPU without instructions for it
    ({"method": "lora", "precision": "bf16", "cpu": "AVX512-BF16"}, 1, 1024),
    ({"method": "lora", "precision": "bf16", "cpu": "AMX"}, 1, 2048),
    ({"method": "lora", "cpu": "AMX"}, 1, 512),  # float32's products are no faster there
])  # fmt: skip
def test_adapters_on_a_cpu_split_by_themselves(tmp_path, monkeypatch, options, base, tokens):
    """300 reviews a step are more than 2,048 tokens; the largest micro-batch that the model is given."""
    model_and_data(tmp_path, 300)
    sizes = []
    options = dict(options)
    cpu = options.pop("cpu", "")
    monkeypatch.setattr(setup, "cpu_bfloat16", lambda: cpu)
    monkeypatch.setattr(setup, "BASE", base)
    monkeypatch.setattr(training, "pack", lambda sequences: sizes.append(sum(map(len, sequences))) or pack(sequences))
    shared = dict(data=str(tmp_path / "train.tsv"), steps=1, batch=300, device="cpu", **options)
    for name, more in (("a", {}), ("b", {"tokens": 100_000})):
        config = minift.TrainConfig(out=str(tmp_path / name), model=str(tmp_path / "model"), **shared, **more)
        minift.train(*setup.load_model(config, ["blame", "praise"]), config)
    whole = sizes.pop()
    assert whole == sum(sizes) > 2048
    assert tokens / 2 < max(sizes) <= tokens if tokens else sizes == [whole]
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=BOUND)
