"""One, two and three processes give one curve: replicas over gloo, dropout on.

python -m pytest tests/invariance/test_processes.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import peer, random_ids, reviews, sequence, small_bert
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from minift.checkpoints import resume as checkpoint
from minift.cli import main
from minift.engine.distributed import World, deal

BOUND = 1e-5  # of losses and weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    small_bert(folder / "model")
    reviews(folder / "train.tsv", 60)
    reviews(folder / "valid.tsv", 21, seed=1)
    assert main(["train", *options(folder, "one")]) == 0
    return folder


def options(folder, name, *more):
    return [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "train.tsv"),
        "--valid",
        str(folder / "valid.tsv"),
        "--out",
        str(folder / name),
        "--steps",
        "12",
        "--lr",
        "1e-3",
        "--save-every",
        "2",
        *more,
    ]


def torchrun(n, arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "-m",
        "minift",
        "train",
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def curve(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_adapters_over_four_bits_too(folder, shard):
    more = ["--method", "dora", "--base", "nf4"]
    if not (folder / "lora").exists():
        assert main(["train", *options(folder, "lora", *more)]) == 0
    name = f"lora-2{''.join(shard)}"
    process = torchrun(2, options(folder, name, *more, *shard))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for a, b in zip(curve(folder / "lora"), curve(folder / name), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=BOUND)
    theirs = load_file(folder / name / "last/adapter_model.safetensors")
    for key, weight in load_file(folder / "lora/last/adapter_model.safetensors").items():
        assert (weight - theirs[key]).abs().max() < BOUND, key


@pytest.mark.slow
@pytest.mark.parametrize("n, tokens, more", [(2, 0, []), (3, 40, []), (2, 40, ["--shard"]), (3, 0, ["--shard"])])
def test_processes_change_nothing(folder, n, tokens, more):
    """60 examples in steps of 8: the last step of an epoch has 4."""
    name = f"{n}-processes{''.join(more)}"
    process = torchrun(n, options(folder, name, "--tokens", str(tokens), *more))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    one, many = curve(folder / "one"), curve(folder / name)
    assert len(one) == len(many) == 12
    for a, b in zip(one, many, strict=True):
        for key in ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "eval/macro_f1", "train/grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=BOUND)
    theirs = load_file(folder / name / "last/model.safetensors")
    for key, weight in load_file(folder / "one/last/model.safetensors").items():
        if not key.endswith("key.bias"):  # no true gradient: see test_split.py
            assert (weight - theirs[key]).abs().max() < BOUND, key
    assert err.count("examples to train on") == 1 and out.count("valid accuracy") == 1  # one process speaks


@pytest.fixture(scope="module")
def completions(assets, tmp_path_factory):
    """Options of a run of GPT-2 with its tied head on completions of very unequal length, and where its results are."""
    folder = tmp_path_factory.mktemp("completions")
    peer(GPT2LMHeadModel, folder / "gpt2", scale=0.05, vocab_size=50257, n_positions=128)
    for name in ("vocab.json", "merges.txt"):
        (folder / "gpt2" / name).write_bytes((assets / "weights/tokenizers/gpt2" / name).read_bytes())
    with open(assets / "data/webnlg/train.jsonl") as f:
        (folder / "train.jsonl").write_text("".join(next(f) for _ in range(30)))
    data = ["--model", str(folder / "gpt2"), "--data", str(folder / "train.jsonl")]
    shared = ["--task", "complete", *data, "--steps", "6", "--lr", "1e-3"]
    assert main(["train", *shared, "--out", str(folder / "one")]) == 0
    return shared, folder


@pytest.mark.slow
@pytest.mark.parametrize("n, tokens, more", [(2, 64, []), (3, 512, []), (2, 200, ["--shard"]), (3, 0, ["--shard"])])
def test_completions_too(completions, n, tokens, more):
    shared, folder = completions
    name = f"{n}{''.join(more)}"
    process = torchrun(n, [*shared, "--out", str(folder / name), "--tokens", str(tokens), *more])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    losses = [[line["train/loss"] for line in curve(folder / run)] for run in ("one", name)]
    assert losses[0] == pytest.approx(losses[1], abs=BOUND)
    one, many = (load_file(folder / run / "last/model.safetensors") for run in ("one", name))
    assert one.keys() == many.keys()
    for key in one.keys() - {k for k in one if k.endswith("c_attn.bias")}:  # has the keys' bias
        difference = (one[key] - many[key]).abs().flatten()
        assert difference.quantile(0.999) < 1e-6, key
        assert difference.max() < 1e-4, key  # of one element in thousands, whose gradient is nearly 0: AdamW (LOG.md)


@pytest.mark.slow
def test_checkpoints_are_whole_whoever_wrote_them(folder):
    """Begun by two with half the weights each, continued alone, and by two again: one curve."""
    process = torchrun(2, options(folder, "handed", "--shard"))
    process.communicate(timeout=120)
    checkpoints = folder / "handed/checkpoints"
    assert checkpoint.steps(folder / "handed") == [10, 12]
    for again in (lambda a: main(["train", *a]), lambda a: torchrun(2, a).wait(timeout=120)):
        shutil.rmtree(checkpoints / "step-12")
        assert again(["--resume", "--out", str(folder / "handed")]) == 0
        losses = [[line["train/loss"] for line in curve(folder / name)] for name in ("one", "handed")]
        assert len(losses[1]) == 12 and losses[0] == pytest.approx(losses[1], abs=BOUND)
        theirs = load_file(folder / "handed/last/model.safetensors")
        for key, weight in load_file(folder / "one/last/model.safetensors").items():
            assert key.endswith("key.bias") or (weight - theirs[key]).abs().max() < BOUND, key


@pytest.mark.slow
def test_a_process_that_dies_takes_the_run_down(folder):
    """kill -9 of one: the other says so, and the last checkpoint goes on."""
    process = torchrun(2, options(folder, "widow", "--steps", "100000"))
    deadline = time.monotonic() + 60
    while not checkpoint.steps(folder / "widow") and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and ("another process of the run is gone" in err or "SIGKILL" in err), err
    for step in checkpoint.steps(folder / "widow"):
        assert checkpoint.is_whole(folder / f"widow/checkpoints/step-{step}")


@pytest.mark.slow
def test_sigterm_stops_all_after_a_checkpoint(folder):
    process = torchrun(2, options(folder, "stopped", "--steps", "100000"))
    deadline = time.monotonic() + 60
    while not checkpoint.steps(folder / "stopped") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "minift train --resume" in err, err
    last = checkpoint.steps(folder / "stopped")[-1]
    assert len(curve(folder / "stopped")) == last


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
