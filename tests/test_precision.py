"""bfloat16, float16 with a loss scale, recomputed layers, and the choice between dtypes.

python -m pytest tests/test_precision.py
"""

import json
import shutil
import signal

import pytest
import torch
from helpers import cli, losses, metrics, model_and_data, peer, random_ids, reviews, sequence, small_bert, train, works
from transformers import BertForSequenceClassification, GPT2LMHeadModel

import minift
from minift import runs
from minift.data.batch import pack
from minift.engine import precision
from minift.engine.precision import native_bf16
from minift.measure.track import Tracker
from minift.ops.dropout import Noise
from minift.tasks import task_named
from minift.training import train_step

CASES = [(BertForSequenceClassification, "classify"), (GPT2LMHeadModel, "complete")]


@pytest.fixture(params=CASES, ids=["bert", "gpt2"])
def model(request, tmp_path):
    cls, task = request.param
    peer(cls, tmp_path)
    return minift.load(tmp_path, task=task, dropout=0.2)[0]


def examples(model):
    """Six sequences; the language model is asked for all but the first token, the classifier for one label."""
    rows = {
        "classify": lambda x: dict(rows=[0], targets=[len(x) % 2]),
        "complete": lambda x: dict(rows=range(len(x) - 1), targets=x[1:]),
    }
    return [sequence(i, x, **rows[model.task](x)) for i, x in enumerate(random_ids([5, 40, 7, 2, 13, 9]))]


def gradients(model):
    """Loss and gradients of one pack, dropout on."""
    model.zero_grad()
    batch = pack(examples(model))
    loss, _ = task_named(model.task).loss(model, batch, Noise(1, 2, batch.keys))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_recomputing_is_exact_and_saves_less(model):
    """Bit-equal gradients with dropout on, though nothing inside a layer is kept."""

    def run():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            return gradients(model), sum(sizes)

    plain, size = run()
    model.body.recompute = True
    again, smaller = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert smaller < size / 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision_is_near_float32(model, dtype, tolerance):
    """Gradients as a whole within a few units of the dtype; parameters, their gradients and the loss stay float32."""
    want = gradients(model)
    model.body.dtype = dtype
    found = gradients(model)
    assert {t.dtype for t in found} == {torch.float32} == {p.dtype for p in model.parameters()}
    assert found[0].item() == pytest.approx(want[0].item(), rel=tolerance)
    a, b = (torch.cat([g.flatten() for g in part[1:]]) for part in (found, want))
    assert (a - b).norm() < tolerance * b.norm()


def test_an_overflow_skips_the_step_and_halves_the_scale(model):
    """A loss scale at which float16 gradients overflow: nothing changes but the scale, until it fits."""
    job = minift.prepare(model, precision="fp16", device="cpu")
    job.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = [p.detach().clone() for p in model.parameters()]
    scales, changed = [], False
    for step in range(30):
        values, _ = train_step(job, examples(model), step, 1e-3)
        scales.append(values["train/loss_scale"])
        changed = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert changed == (values["train/grad_norm"] is not None)
        if changed:
            break
    assert changed and len(scales) > 1
    assert scales[:-1] == [2.0 ** (23 - i) for i in range(len(scales) - 1)] and scales[-1] == scales[-2]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_all_learn_the_same(kind, tmp_path, capsys):
    small_bert(tmp_path / "model")
    data = reviews(tmp_path / "train.tsv", 256)
    model, tokenizer = minift.load(tmp_path / "model", task="classify", labels=["blame", "praise"])
    options = dict(valid="0.2", epochs=8, batch=16, lr=2e-3, precision=kind)
    run = train(model, tokenizer, data, tmp_path / "run", **options)
    assert run.metrics["accuracy"] > 0.95
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[kind]
    assert f", {dtype} (" in capsys.readouterr().err
    assert ("train/loss_scale" in metrics(tmp_path / "run")[0]) == (kind == "fp16")


@pytest.mark.parametrize("wanted, amx, avx, dtype, word", [
    ("auto", False, False, torch.float32, "neither"),
    ("auto", True, False, torch.bfloat16, "AMX"),
    ("auto", False, True, torch.bfloat16, "AVX512-BF16"),
    ("bf16", False, False, torch.bfloat16, "no faster"),
    ("bf16", False, True, torch.bfloat16, "asked for"),
    ("fp32", True, True, torch.float32, "asked for"),
    ("fp16", False, False, torch.float16, "asked for"),
])  # fmt: skip
def test_the_choice_on_a_cpu(wanted, amx, avx, dtype, word, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(precision, "native_bf16", native_bf16)  # the real one, not conftest.py's
    found, reason = precision.choose_dtype(wanted, torch.device("cpu"))
    assert found == dtype and word in reason


def test_a_run_goes_on_in_the_dtype_that_it_began_in(tmp_path, monkeypatch):
    """--precision auto where bfloat16 is fast, stopped, and gone on with where it is not."""
    folder = model_and_data(tmp_path, 32)
    line = "train --precision auto --model {f}/model --data {f}/train.tsv --steps 4 --out {f}/"
    with monkeypatch.context() as fast:
        fast.setattr(precision, "native_bf16", lambda device: (True, "a fast CPU"))
        said = works(f"{line}whole", f=folder).err
        assert "bfloat16 (a fast CPU; --precision fp32 is" in said

        written = Tracker.step

        def step(self, *values):
            written(self, *values)
            signal.raise_signal(signal.SIGINT)

        fast.setattr(Tracker, "step", step)
        assert cli(f"{line}part", f=folder).code == 130
    assert json.loads((folder / "part/config.json").read_text())["precision"] == "bf16"
    works("train --resume --out {f}/part", f=folder)
    assert losses(folder / "part") == losses(folder / "whole")


def test_an_older_run_did_not_write_down_what_auto_was(tmp_path, monkeypatch):
    """Its config.json and its checkpoints say auto: it goes on in what auto is here."""
    folder = model_and_data(tmp_path, 32)
    monkeypatch.setattr(runs, "name_of", lambda dtype: "auto")
    works(
        "train --precision auto --model {f}/model --data {f}/train.tsv --steps 4 --save-every 2 --out {f}/run", f=folder
    )
    whole = losses(folder / "run")
    monkeypatch.undo()
    shutil.rmtree(folder / "run/checkpoints/step-4")
    works("train --resume --out {f}/run", f=folder)
    assert losses(folder / "run") == whole


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_choice_on_cuda(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found, reason = precision.choose_dtype("auto", torch.device("cuda"))
    assert found == dtype and f"sm_{capability[0]}{capability[1]}" in reason
