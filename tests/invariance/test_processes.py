"""One, two and three processes give one curve: replicas over gloo, dropout on.

python -m pytest tests/invariance/test_processes.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from folders import put, weights_in
from helpers import (
    Said,
    arguments,
    losses,
    metrics,
    model_and_data,
    random_ids,
    real_gpt2,
    sequence,
    works,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minift.checkpoints import resume as checkpoint
from minift.engine.distributed import World, deal

BOUND = 1e-5  # of losses and weights


TRAIN = (
    "train --model {f}/model --data {f}/train.tsv --valid {f}/valid.tsv --out {out} --steps 12 --lr 1e-3 --save-every 2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with model/, train.tsv, valid.tsv, and one/, the run of one process."""
    folder = model_and_data(tmp_path_factory.mktemp("processes"), 60, valid=21)
    works(TRAIN, f=folder, out=folder / "one")
    return folder


def start(n: int, line: str, **places) -> subprocess.Popen:
    """Starts n processes of `minift LINE`."""
    launch = "-m torch.distributed.run --nproc-per-node {n} --master-port 0 --rdzv-backend c10d"
    launch = arguments(f"{launch} --rdzv-endpoint 127.0.0.1:0 -m minift", n=n)
    command = [sys.executable, *launch, *arguments(line, **places)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def torchrun(n: int, line: str, **places) -> Said:
    """Runs n processes of `minift LINE`, which must end well."""
    process = start(n, line, **places)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return Said(0, out, err)


def check_weights(one: Path, many: Path, file: str = "model.safetensors") -> None:
    """The last weights of two runs are one."""
    theirs = load_file(many / "last" / file)
    for key, weight in load_file(one / "last" / file).items():
        if not key.endswith("key.bias"):  # no true gradient: see test_split.py
            assert (weight - theirs[key]).abs().max() < BOUND, key


SHARD = pytest.mark.parametrize("shard", ["", "--shard"])


@pytest.fixture(scope="module")
def lora(folder):
    """The run of one process with an adapter over four bits."""
    works(f"{TRAIN} --method dora --base nf4", f=folder, out=folder / "lora")
    return folder / "lora"


@pytest.mark.slow
@SHARD
def test_adapters_over_four_bits_too(folder, lora, tmp_path, shard):
    torchrun(2, f"{TRAIN} --method dora --base nf4 {shard}", f=folder, out=tmp_path)
    assert losses(lora) == pytest.approx(losses(tmp_path), abs=BOUND)
    check_weights(lora, tmp_path, "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("n, tokens, shard", [(2, 0, ""), (3, 40, ""), (2, 40, "--shard"), (3, 0, "--shard")])
def test_processes_change_nothing(folder, tmp_path, n, tokens, shard):
    """60 examples in steps of 8: the last step of an epoch has 4."""
    said = torchrun(n, f"{TRAIN} --tokens {tokens} {shard}", f=folder, out=tmp_path)
    one, many = metrics(folder / "one"), metrics(tmp_path)
    assert len(one) == len(many) == 12
    for a, b in zip(one, many, strict=True):
        for key in ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "eval/macro_f1", "train/grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=BOUND)
    check_weights(folder / "one", tmp_path)
    assert said.err.count("examples to train on") == 1 and said.out.count("valid accuracy") == 1  # one process speaks


COMPLETE = "train --task complete --model {f}/gpt2 --data {f}/train.jsonl --steps 6 --lr 1e-3 --out {out}"


@pytest.fixture(scope="module")
def completions(assets, tmp_path_factory):
    """GPT-2 with its tied head, completions of very unequal length, and one/, the run of one process on them."""
    folder = tmp_path_factory.mktemp("completions")
    real_gpt2(folder / "gpt2", assets, scale=0.05, n_positions=128)
    with open(assets / "data/webnlg/train.jsonl") as f:
        put(folder / "train.jsonl", "".join(next(f) for _ in range(30)))
    works(COMPLETE, f=folder, out=folder / "one")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("n, tokens, shard", [(2, 64, ""), (3, 512, ""), (2, 200, "--shard"), (3, 0, "--shard")])
def test_completions_too(completions, tmp_path, n, tokens, shard):
    torchrun(n, f"{COMPLETE} --tokens {tokens} {shard}", f=completions, out=tmp_path)
    assert losses(completions / "one") == pytest.approx(losses(tmp_path), abs=BOUND)
    one, many = weights_in(completions / "one/last"), weights_in(tmp_path / "last")
    assert one.keys() == many.keys()
    for key in one.keys() - {k for k in one if k.endswith("c_attn.bias")}:  # has the keys' bias
        difference = (one[key] - many[key]).abs().flatten()
        assert difference.quantile(0.999) < 1e-6, key
        assert difference.max() < 1e-4, key  # of one element in thousands, whose gradient is nearly 0: AdamW (LOG.md)


@pytest.mark.slow
def test_checkpoints_are_whole_whoever_wrote_them(folder, tmp_path):
    """Begun by two with half the weights each, continued alone, and by two again: one curve."""
    torchrun(2, f"{TRAIN} --shard", f=folder, out=tmp_path)
    assert checkpoint.steps(tmp_path) == [10, 12]
    for again in (works, partial(torchrun, 2)):
        shutil.rmtree(tmp_path / "checkpoints/step-12")
        again("train --resume --out {out}", out=tmp_path)
        assert len(losses(tmp_path)) == 12 and losses(folder / "one") == pytest.approx(losses(tmp_path), abs=BOUND)
        check_weights(folder / "one", tmp_path)


@pytest.fixture
def endless(folder, tmp_path):
    """A run of two processes that would take long, after its first checkpoint."""
    process = start(2, f"{TRAIN} --steps 100000", f=folder, out=tmp_path)
    deadline = time.monotonic() + 60
    while not checkpoint.steps(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_a_process_that_dies_takes_the_run_down(endless, tmp_path):
    """kill -9 of one: the other says so, and the last checkpoint goes on."""
    workers = subprocess.run(["pgrep", "-P", str(endless.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = endless.communicate(timeout=60)
    assert endless.returncode == 1 and ("another process of the run is gone" in err or "SIGKILL" in err), err
    for step in checkpoint.steps(tmp_path):
        assert checkpoint.is_whole(tmp_path / f"checkpoints/step-{step}")


@pytest.mark.slow
def test_sigterm_stops_all_after_a_checkpoint(endless, tmp_path):
    endless.send_signal(signal.SIGTERM)
    _, err = endless.communicate(timeout=60)
    assert endless.returncode != 0 and "minift train --resume" in err, err
    assert len(metrics(tmp_path)) == checkpoint.steps(tmp_path)[-1]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=32), st.integers(1, 4))
def test_shares_are_a_partition_of_about_equal_size(sizes, n):
    sequences = [sequence(i, x) for i, x in enumerate(random_ids(sizes))]
    shares = deal(sequences, n)
    assert sorted(s.number for share in shares for s in share) == list(range(len(sizes)))
    tokens = [sum(map(len, share)) for share in shares]
    assert max(tokens) - min(tokens) <= max(sizes)


def test_alone_nothing_is_sent():
    values = torch.ones(3)
    assert World().add_up(values) is values and World().first
