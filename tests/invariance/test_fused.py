"""The fused operators and their references give one training curve: dropout on, float32, on the CPU.

python -m pytest tests/invariance/test_fused.py
"""

import numpy as np
import pytest
from helpers import examples, small_model

import minift
from minift.ops import native
from minift.training import train_step

pytestmark = pytest.mark.slow

BOUND = 1e-5  # of losses and, relatively, of gradient norms


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_fused_and_reference_curves_are_one(family, method, tmp_path, monkeypatch):
    curves, used = {}, {"native": set(), "reference": set()}
    for mode in used:
        monkeypatch.setattr(native, "mode", mode)
        find = native.kernel

        def kernel(name, *tensors, find=find, names=used[mode]):
            library = find(name, *tensors)
            names.update({name} if library else ())
            return library

        model, task = small_model(family, tmp_path / mode, width=64)
        if method != "full":
            minift.add_lora(minift.quantize(model) if method == "qlora" else model, dropout=0.1)
        job = minift.prepare(model, weight_decay=0.01, base="fp32", kernels=mode, device="cpu")
        rng, curves[mode] = np.random.default_rng(0), []
        with monkeypatch.context() as patch:
            patch.setattr(native, "kernel", kernel)
            for step in range(12):
                batch = examples(task, rng.integers(1, 40, 6).tolist(), 100 * step)
                values, _ = train_step(job, batch, step, 1e-3)
                curves[mode].append((values["train/loss"], values["train/grad_norm"]))
    assert used["native"] >= {"attention", "dropout", "gelu", "norm", "loss"} and not used["reference"]
    assert method != "qlora" or used["native"] >= {"lora", "nf4"}
    np.testing.assert_allclose(curves["native"], curves["reference"], rtol=BOUND, atol=BOUND)
    assert abs(curves["native"][0][0] - curves["native"][-1][0]) > 1e-3  # not the same loss all along
