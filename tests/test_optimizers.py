"""Whatever tables.OPTIMIZERS has: what engine/optimizers/__init__.py promises of each, and whole runs with it.

python -m pytest tests/test_optimizers.py
"""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import losses, reviews, small_bert
from safetensors.torch import load_file, save_file

import minift
from minift import tables
from minift.checkpoints import resume as checkpoint
from minift.cli import main
from minift.engine import optim, optimizers
from minift.engine.optimizers import Optimizer
from minift.measure import track

pytestmark = pytest.mark.slow

BOUND = 1e-5  # of losses
SHAPES = [(7, 5), (3, 11), (1, 6), (9, 1), (4,), (1,), (0, 3), (2, 3, 5)]

each = pytest.mark.parametrize("name", tables.OPTIMIZERS)


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make(name: str, params: list, **more) -> Optimizer:
    """An optimizer over two groups as make_optimizer makes them: matrices apart where it wants them so."""
    rule = optimizers.rule_named(name)
    matrices = [p for p in params if rule.MATRICES and p.ndim == 2]
    rest = [p for p in params if not (rule.MATRICES and p.ndim == 2)]
    groups = [{"params": matrices, "weight_decay": 0.1, "matrices": True}, {"params": rest, "weight_decay": 0.1}]
    return Optimizer(rule, groups, lr=1e-2, **more)


def give_gradients(params: list, step: int, missing: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = None if i in missing else gradient


def everything(optimizer: Optimizer, params: list) -> list[torch.Tensor]:
    """Copies of all parameters and of their states."""
    states = [value for p in params for value in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*params, *states)]


def same(first: list, second: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- one update


@each
def test_the_file_declares_what_the_contract_says(name):
    rule = optimizers.rule_named(name)
    assert rule.DEFAULTS.keys() <= {"beta1", "beta2", "eps"} and rule.LR > 0
    assert type(rule.MATRICES) is bool and type(rule.RECORDABLE) is bool
    assert rule.LR == 1 or f"{rule.LR:g} times" in tables.OPTIMIZERS[name], "the line in the table says LR"


@each
def test_the_state_is_the_expected_one(name):
    params = parameters()
    optimizer = make(name, params)
    give_gradients(params, 0)
    optimizer.step()
    for p in params:
        found = {key: (value.shape, value.dtype) for key, value in optimizer.state[p].items()}
        assert found == optimizer.expected_state(p) and not any("/" in key for key in found)
        assert all(value.device == p.device for value in optimizer.state[p].values())


@each
def test_without_a_gradient_nothing_changes(name):
    params = parameters()
    optimizer = make(name, params)
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0, missing=(0, 4))
    optimizer.step()
    for i in (0, 4):
        assert torch.equal(params[i], before[i]) and params[i] not in optimizer.state
    assert not torch.equal(params[1], before[1]) and not torch.equal(params[5], before[5])
    give_gradients(params, 1, missing=tuple(range(len(params))))
    before = everything(optimizer, params)
    optimizer.step()
    assert same(before, everything(optimizer, params))


@each
def test_a_skipped_update_changes_nothing(name):
    """Not even where gradients are not finite; and one that is not skipped is the plain one, to the bit."""
    plain, skipped = parameters(), parameters()
    one, other = make(name, plain), make(name, skipped)
    for step in range(4):
        give_gradients(plain, step)
        give_gradients(skipped, step)
        one.step()
        other.step(skip=torch.zeros(()))
        assert same(everything(one, plain), everything(other, skipped))
        before = everything(other, skipped)
        for p in skipped:
            p.grad = torch.full_like(p, torch.nan if step % 2 else torch.inf)
        other.step(skip=torch.ones(()))
        assert same(before, everything(other, skipped))
    one.zero_grad()
    assert all(p.grad is None for p in plain)


@each
def test_a_learning_rate_in_a_tensor_is_the_same(name):
    """As --graph has it."""
    plain, held = parameters(), parameters()
    one, other = make(name, plain), make(name, held)
    for group in other.param_groups:
        group["lr"] = torch.zeros(())
    for step in range(5):
        lr = 1e-2 / (1 + step)
        for group in one.param_groups:
            group["lr"] = lr
        for group in other.param_groups:
            group["lr"].fill_(lr)
        give_gradients(plain, step)
        give_gradients(held, step)
        one.step()
        other.step(skip=torch.zeros(()))
    for p, q in zip(plain, held, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no device")
@each
def test_a_recorded_update_is_the_plain_one(name):
    if not optimizers.rule_named(name).RECORDABLE:
        pytest.skip("says that it cannot be recorded")
    plain = [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]
    replayed = [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]
    one, other = make(name, plain), make(name, replayed)
    for p in replayed:
        p.grad = torch.zeros_like(p)
        other.begin(p)
    for group in other.param_groups:
        group["lr"] = torch.full((), 1e-2, device="cuda")
    skip = torch.zeros((), device="cuda")
    torch.ones(8, 8, device="cuda", dtype=torch.bfloat16) @ torch.ones(8, 8, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.step(skip=skip)
    for step in range(5):
        for p, q in zip(plain, replayed, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).cuda()
            q.grad.copy_(p.grad)
        skip.fill_(step == 3)
        graph.replay()
        if step != 3:
            one.step()
    for p, q in zip(plain, replayed, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


@each
def test_an_overflow_of_float16_skips_the_update(name):
    params = parameters()
    optimizer = make(name, params)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        give_gradients(params, step)
        scaler.scale(torch.ones(()))  # makes the scale
        if step == 1:
            params[0].grad[0] = torch.inf
        before = [p.detach().clone() for p in params]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0], before[0]) == (step == 1)
    assert scaler.get_scale() == 4


# ---- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    small_bert(folder / "model")
    reviews(folder / "train.tsv", 64)
    for name in tables.OPTIMIZERS:
        assert main(command(folder, name, name)) == 0
    return folder


def command(folder, name: str, out: str, *more: str) -> list[str]:
    """12 steps of 16 examples, a checkpoint after every third, at 40 times the default learning rate."""
    lr = 40 * 5e-5 * optimizers.rule_named(name).LR
    return ["train", "--model", str(folder / "model"), "--data", str(folder / "train.tsv"), "--out", str(folder / out),
            "--optimizer", name, "--lr", str(lr), "--steps", "12", "--batch", "16", "--save-every", "3",
            "--weight-decay", "0.01", "--kernels", "reference", *more]  # fmt: skip


def check_equal(run, whole) -> None:
    """The same losses, weights and optimizer states, to the bit."""
    assert losses(run) == losses(whole)
    for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        mine, theirs = (load_file(checkpoint.latest(out) / file) for out in (run, whole))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.slow
@each
def test_a_run_learns(folder, tmp_path, name):
    """120 steps of 64 examples, without dropout, at a rate that suits so small a model: of Lion, whose steps do not
    grow with the gradient, four times what suits the others beside AdamW's."""
    data = str(reviews(tmp_path / "train.tsv", 256))
    model, tokenizer = minift.load(folder / "model", task="classify", labels=["blame", "praise"], dropout=0.0)
    lr = (160 if name == "lion" else 40) * 5e-5 * optimizers.rule_named(name).LR
    config = minift.TrainConfig(
        data=data, valid="0.2", out=str(tmp_path / "run"), epochs=30, batch=64, lr=lr, optimizer=name
    )
    assert minift.train(model, tokenizer, config).metrics["accuracy"] > 0.95
    found = losses(tmp_path / "run")
    assert sum(found[-10:]) < 0.2 * sum(found[:10])


@each
def test_stopped_and_resumed_to_the_bit(folder, name, monkeypatch):
    written = track.Tracker.step

    def step(self, values, evaluated=None):
        written(self, values, evaluated)
        if values["train/global_step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(track.Tracker, "step", step)
    assert main(command(folder, name, f"{name}-stopped")) == 143
    monkeypatch.undo()
    assert main(["train", "--resume", "--out", str(folder / f"{name}-stopped")]) == 0
    check_equal(folder / f"{name}-stopped", folder / name)


@each
def test_micro_batches_change_nothing(folder, name):
    assert main(command(folder, name, f"{name}-split", "--tokens", "30")) == 0
    assert losses(folder / f"{name}-split") == pytest.approx(losses(folder / name), abs=BOUND)


@each
def test_float16_too(folder, name):
    assert main(command(folder, name, f"{name}-fp16", "--precision", "fp16")) == 0
    assert losses(folder / f"{name}-fp16") == pytest.approx(losses(folder / name), abs=0.05)


@each
def test_adapters_too(folder, name):
    """Whose B, with another learning rate, is in a group of its own; split, the curve is the same."""
    more = ["--method", "dora", "--base", "nf4", "--lora-plus", "4"]
    for out, tokens in (("dora", "0"), ("dora-split", "30")):
        assert main(command(folder, name, f"{name}-{out}", *more, "--tokens", tokens)) == 0
    assert losses(folder / f"{name}-dora-split") == pytest.approx(losses(folder / f"{name}-dora"), abs=BOUND)


@pytest.mark.slow
@each
def test_two_processes_with_half_the_weights_each(folder, name):
    """And one alone goes on from what they saved."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "minift"]  # fmt: skip
    run = folder / f"{name}-shard"
    line = command(folder, name, run.name, "--shard", "--precision", "fp32")
    done = subprocess.run([*torchrun, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(losses(folder / name), abs=BOUND)
    shutil.rmtree(run / "checkpoints/step-12")
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert losses(run) == pytest.approx(losses(folder / name), abs=BOUND)


@each
def test_the_default_learning_rate_and_settings(folder, name):
    arguments = command(folder, name, f"{name}-default", "--schedule", "constant", "--steps", "1")
    at = arguments.index("--lr")
    assert main([*arguments[:at], *arguments[at + 2 :]]) == 0
    line = json.loads((folder / f"{name}-default/metrics.jsonl").read_text())
    assert line["train/learning_rate"] == pytest.approx(5e-5 * optimizers.rule_named(name).LR)
    given = {"beta1": -1, "beta2": -1, "eps": -1}
    assert optimizers.choose_settings(name, given) == optimizers.rule_named(name).DEFAULTS


# ---- what is refused


@each
def test_a_setting_is_used_or_refused(folder, name, capsys):
    """Each that the optimizer has changes the run (0 is a value too), and no other is taken."""
    defaults = optimizers.rule_named(name).DEFAULTS
    for setting, value in {"beta1": "0", "beta2": "0.7", "eps": "0.01"}.items():
        out = f"{name}-{setting}"
        code = main(command(folder, name, out, f"--{setting}", value, "--steps", "4"))
        said = capsys.readouterr().err
        if setting in defaults:
            assert code == 0, said
            assert losses(folder / out)[3] != losses(folder / name)[3]
        else:
            assert code == 1 and f"--{setting} is {float(value):g} with --optimizer {name}, which does not use" in said
            assert not (folder / out).exists()


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--beta1", "1", "--beta1 is 1.0; expected -1, or at least 0 and below 1"),
        ("--beta1", "-0.5", "--beta1 is -0.5; expected -1, or at least 0 and below 1"),
        ("--beta2", "2", "--beta2 is 2.0; expected -1, or at least 0 and below 1"),
        ("--beta2", "nan", "--beta2 is nan; expected a finite number"),
        ("--eps", "-2", "--eps is -2.0; expected -1, or at least 0"),
        ("--optimizer", "adamw_torch", "expected one of adamw"),
        ("--optimizer", "adam", "did you mean adamw?"),
        ("--schedule", "lienar", "did you mean linear?"),
    ],
)
def test_options_that_are_refused(folder, option, value, words, capsys):
    with pytest.raises(SystemExit) as e:
        main(command(folder, "adamw", "refused", option, value))
    assert e.value.code == 2 and words in capsys.readouterr().err and not (folder / "refused").exists()


def test_one_that_cannot_be_recorded_is_refused_with_graphs(folder, monkeypatch, capsys):
    monkeypatch.setattr(optimizers.rule_named("adamw"), "RECORDABLE", False)
    assert main(command(folder, "adamw", "refused", "--graph", "--precision", "bf16")) == 1
    assert "--graph is True with --optimizer adamw, whose updates cannot be recorded" in capsys.readouterr().err
    assert not (folder / "refused").exists()


@pytest.fixture
def half(folder, tmp_path):
    """A function: a copy of an optimizer's run as it was after nine steps."""

    def copy(name: str):
        shutil.copytree(folder / name, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/step-12")
        return tmp_path / name

    return copy


def change(path, **values) -> None:
    """Other values in a JSON file, and none for those that are None."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@each
@pytest.mark.parametrize("what", ["gone", "renamed", "another shape", "another dtype"])
def test_a_state_that_does_not_fit_is_refused(half, name, what, capsys):
    """In a checkpoint without checksums. A parameter without any state is one that never had a gradient."""
    run = half(name)
    path = run / "checkpoints/step-9" / checkpoint.MOMENTS
    (path.parent / "minift.json").unlink()
    tensors = load_file(path)
    for key in {key.rpartition("/")[2]: key for key in tensors}.values():  # one of each name
        changed = dict(tensors)
        tensor = changed.pop(key)
        parameter = key.rpartition("/")[0]
        if what == "gone" and not any(other.startswith(f"{parameter}/") for other in changed):
            continue
        if what == "renamed":
            changed[f"{key}_2"] = tensor
        elif what == "another shape":
            changed[key] = torch.zeros(*tensor.shape, 2)
        elif what == "another dtype":
            changed[key] = tensor.double()
        save_file(changed, path)
        assert main(["train", "--resume", "--out", str(run)]) == 1
        said = capsys.readouterr().err
        assert str(path) in said and key in said and not (run / "checkpoints/step-12").exists()


@pytest.mark.parametrize("setting, value", [("beta1", 0.5), ("beta2", 0.5), ("eps", 1e-4)])
def test_a_run_goes_on_with_the_settings_it_began_with(half, setting, value, capsys):
    run = half("adamw")
    change(run / "config.json", **{setting: value})
    assert main(["train", "--resume", "--out", str(run)]) == 1
    assert f"--{setting} is {value!r} in the run's config.json, but" in capsys.readouterr().err


def test_a_run_of_an_older_minift_is_resumed(half, folder):
    """One that knew of AdamW alone."""
    run, unknown = half("adamw"), dict.fromkeys(("optimizer", "beta1", "beta2", "eps"))
    change(run / "config.json", **unknown)
    (run / "checkpoints/step-9/minift.json").unlink()
    state = run / "checkpoints/step-9" / checkpoint.STATE
    options = json.loads(state.read_text())["options"]
    change(state, options={key: value for key, value in options.items() if key not in unknown})
    assert main(["train", "--resume", "--out", str(run)]) == 0
    check_equal(run, folder / "adamw")


@each
def test_another_optimizers_checkpoint_is_refused(folder, half, name, capsys):
    """Told by the option; and where an older minift wrote no options, by the names of the tensors."""
    run = half("adamw")
    if name == "adamw":
        pytest.skip("is the one")
    change(run / "config.json", optimizer=name)
    assert main(["train", "--resume", "--out", str(run)]) == 1
    assert f"--optimizer is {name!r} in the run's config.json, but" in capsys.readouterr().err
    (run / "checkpoints/step-9/minift.json").unlink()
    change(run / "checkpoints/step-9" / checkpoint.STATE, options=None)
    assert main(["train", "--resume", "--out", str(run)]) == 1
    assert "optimizer.safetensors: not a checkpoint of this" in capsys.readouterr().err


# ---- which parameters are matrices


def test_hidden_matrices_are_in_groups_of_their_own(tmp_path, monkeypatch):
    """For an optimizer that asks for it: neither embeddings, nor the head, nor what has one dimension."""
    monkeypatch.setattr(optimizers.rule_named("adamw"), "MATRICES", True)
    model, _ = minift.load(small_bert(tmp_path), task="classify")
    minift.add_lora(model)
    model.requires_grad_(True)
    groups = optim.make_optimizer(model, 1e-3, 0.1).param_groups
    matrices = {id(p) for group in groups if group["matrices"] for p in group["params"]}
    for key, p in model.named_parameters():
        hidden = p.ndim == 2 and "embeddings" not in key and not key.startswith("head")
        assert (id(p) in matrices) == hidden, key
    assert matrices and sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
