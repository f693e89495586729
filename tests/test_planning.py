"""The ledger of a step, and the plan that is made with it: against real steps, real processes and torch's own counter.

python -m pytest tests/test_planning.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import write
from helpers import examples, fails, metrics, python, small_model, works
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import minift
from minift import planning
from minift.config import PlanConfig, size_of
from minift.data.batch import pack
from minift.engine import memory
from minift.measure import ledger, rates
from minift.measure.ledger import (
    CASTS,
    FROZEN,
    GRADIENTS,
    MOMENTS,
    SAVED,
    SMALL,
    SMALL_CASTS,
    TRAINED,
    Heap,
    Kernel,
    Ledger,
    Shape,
)
from minift.ops import attention, native
from minift.ops.dropout import Noise
from minift.ops.linear import product, weight_gradient
from minift.planning import forecast, run_on_meta
from minift.setup import Engine, make_job
from minift.training import accumulate, update

FORECASTS = True  # conftest.py
CPU = torch.device("cpu")
META = torch.device("meta")
LENGTHS = [40, 7, 23, 31]


def job_of(family, folder, method, device, width=64, dtype=torch.float32):
    """A job on a small model, with or without an adapter, and the examples of its step."""
    model, task = small_model(family, folder, width)
    if method == "lora":
        minift.add_lora(model)
    config = minift.TrainConfig(task=task, method=method, precision="auto")
    if device == META:
        model = model.to(META)
        model.tie()
    return make_job(model, config, Engine(device, dtype)), examples(task, LENGTHS)


@pytest.fixture(autouse=True)
def as_it_begins(monkeypatch):
    """Whatever mode another test has left; and working memory of earlier calls would not be counted a second time."""
    monkeypatch.setattr(native, "mode", "auto")
    vars(attention.kept).clear()


@pytest.fixture
def compiled():
    """Only where kernels can be compiled: a reference's products are other ones."""
    if native.load_kernel("attention") is None:
        pytest.skip("there is no compiler")


def real_steps(job, sequences) -> Ledger:
    """What planning.run_on_meta does, with numbers."""
    ledger = Ledger(job.model)
    with ledger:
        for step in range(2):
            ledger.restart()
            batch = pack(sequences)
            accumulate(job, batch, Noise(job.config.seed, step, batch.keys), 1)
            ledger.own(GRADIENTS, (p.grad for p in job.parameters if p.grad is not None))
            update(job, skip=torch.zeros(()))
            for state in job.optimizer.state.values():
                ledger.own(MOMENTS, state.values())
            job.optimizer.zero_grad()
    return ledger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_step_without_memory_holds_what_a_real_one_does(family, method, dtype, tmp_path, compiled):
    real = real_steps(*job_of(family, tmp_path, method, CPU, dtype=dtype))
    vars(attention.kept).clear()
    job, sequences = job_of(family, tmp_path, method, META, dtype=dtype)
    found = run_on_meta(job, [sequences])
    assert found.peak == pytest.approx(real.peak, rel=0.02)
    assert sum(found.at_peak().values()) == found.peak
    # an embedding's gradient is sparse on the CPU from the second micro-batch on, and its product no product
    assert sum(found.flops.values()) == pytest.approx(sum(real.flops.values()), rel=0.02)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_moments_and_gradients_are_counted_to_the_byte(method, tmp_path):
    job, sequences = job_of("bert", tmp_path, method, META)
    kinds = run_on_meta(job, [sequences]).at_peak()
    learned = 4 * sum(p.numel() for p in job.parameters)
    every = 4 * sum(p.numel() for p in job.model.parameters())
    assert kinds[TRAINED] == learned and kinds[FROZEN] == every - learned
    assert kinds[MOMENTS] == 2 * learned + 4 * len(job.parameters)  # AdamW's, and its counts
    assert 0 < kinds[GRADIENTS] + kinds[SAVED]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_flops_are_torchs_own_count(family, tmp_path, monkeypatch, compiled):
    """Of everything but attention, which is a kernel of ours, or pieces of products in its reference."""
    job, sequences = job_of(family, tmp_path, "full", CPU)
    batch = pack(sequences)
    ledger = Ledger(job.model)
    with ledger:
        accumulate(job, batch, Noise(1, 0, batch.keys), 1)
    monkeypatch.setattr(native, "mode", "reference")
    job.optimizer.zero_grad()
    with FlopCounterMode(display=False) as counter:
        accumulate(job, batch, Noise(1, 0, batch.keys), 1)
    theirs = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    ours = sum(n for name, n in ledger.flops.items() if name != "attention")
    assert ours == pytest.approx(sum(n for name, n in theirs.items() if name != "aten.bmm"), rel=0.01)


def test_products_that_torchs_own_counter_does_not_know():
    """In place, and oneDNN's."""
    x, y = torch.randn(30, 256), torch.randn(30, 512)
    with Ledger(torch.nn.Linear(1, 1)) as ledger:
        torch.zeros(512, 256).addmm_(y.t(), x)
        weight_gradient(y, x)
        product(x, torch.randn(512, 256))
    assert ledger.flops.total() == 3 * 2 * 30 * 256 * 512


def test_attentions_flops_by_hand(tmp_path, compiled):
    """Two products forward and five backward, for each pair of tokens of a sequence; the last layer asks for few."""
    job, _ = job_of("gpt2", tmp_path, "full", CPU)
    sequences = examples("complete", [10])
    sequences[0].rows, sequences[0].targets = sequences[0].rows[:0], sequences[0].targets[:0]
    batch = pack(sequences)
    ledger = Ledger(job.model)
    with ledger, torch.no_grad():
        job.model(batch)
    layers = len(job.model.body.h) - 1
    assert ledger.flops["attention"] == layers * 2 * 2 * 64 * (10 * 11 // 2)


def test_what_is_saved_is_said_by_module(tmp_path):
    job, sequences = job_of("bert", tmp_path, "full", CPU)
    ledger = real_steps(job, sequences)
    assert sum(ledger.saved.values()) > 0 and all(
        name.startswith(("body", "head")) or not name for name in ledger.saved
    )
    mlp = {name: n for name, n in ledger.saved.items() if ".mlp" in name}
    inner = job.model.config.intermediate_size
    assert max(mlp.values()) >= 4 * sum(LENGTHS) * inner


# ---- the heap


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 9)), min_size=1, max_size=60))
def test_blocks_of_the_heap_never_overlap(calls):
    """Each call takes a block, and gives back one of those before it if its second number says so."""
    heap, blocks = Heap(), []
    for size, back in calls:
        begin = heap.take(size)
        assert all(begin + size <= b or b + n <= begin for b, n in blocks)
        blocks.append((begin, size))
        if back < len(blocks):
            heap.give_back(*blocks.pop(back))
    assert heap.most >= sum(n for _, n in blocks)
    for block in blocks:
        heap.give_back(*block)
    assert heap.top == 0 and not heap.sizes and not heap.begins and not heap.ends


def test_a_hole_is_held_and_used():
    heap = Heap()
    a, b = heap.take(1000), heap.take(1000)
    heap.give_back(a, 1000)
    assert heap.take(400) == a and heap.take(2000) > b
    large = heap.take(1 << 26)
    most = heap.most
    heap.give_back(large, 1 << 26)
    heap.take(1 << 26)
    assert large == -1 and heap.most == most


# ---- whole plans


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """A model of a size that shows in a process, and data."""
    folder = tmp_path_factory.mktemp("middling")
    words = "a good film with a bad end and no plot at all but a lovely cast".split()
    rows = [{"text": " ".join(words * 12), "label": i % 2} for i in range(32)]
    write(folder / "data.jsonl", *rows)
    write(folder / "text.txt", *(" ".join(words) for _ in range(40)))
    works("new --data {f}/text.txt --out {f}/bert --width 384 --layers 6 --heads 6 --positions 256", f=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--tokens 512", "--recompute", "--method head"])
def test_memory_of_a_process_is_as_planned(options, middling, tmp_path):
    """Within five per cent, of a run from random weights in a process of its own."""
    line = f"--model {middling}/bert --init random --data {middling}/data.jsonl --batch 16 --steps 2 {options}"
    line += " --precision fp32"
    run = [sys.executable, "-m", "minift", "train", *line.split(), "--out", str(tmp_path / "run")]
    subprocess.run(run, check=True, capture_output=True)
    peak = metrics(tmp_path / "run")[-1]["train/peak_memory"]
    code = f"""
from minift.cli import parse
from minift.config import PlanConfig, from_args
from minift.planning import forecast
print(forecast(from_args(PlanConfig, parse(["plan", *{line.split()!r}])[1])).memory)
"""
    assert int(python(code).split()[-1]) == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "dora", "pissa", "lora --base nf4", "loftq --base nf4", "head"])
def test_every_method_has_a_plan(method, middling, tmp_path):
    said = works(f"plan --data {middling}/data.jsonl --method {method}")
    assert "all, at the peak" in said.out and "GFLOP" in said.out


@pytest.fixture(scope="module")
def trained(middling):
    """The same model with weights in its folder."""
    works("train --model {f}/bert --init random --data {f}/data.jsonl --steps 1 --out {f}/trained", f=middling)
    return middling / "trained/last"


@pytest.mark.slow
@pytest.mark.parametrize("options, part", [("--batch 16", 0.8), ("--method lora --batch 32", 0.6)])
def test_a_run_is_made_to_fit(options, part, trained, middling, tmp_path):
    """It takes no more than it may, of which its forecast leaves a twentieth, and says what was chosen."""
    line = f"--model {trained} --data {middling}/data.jsonl --steps 2 --precision fp32 {options}"
    command = [sys.executable, "-m", "minift"]
    plan = subprocess.run([*command, "plan", *line.split(), "--json"], check=True, capture_output=True, text=True)
    limit = round(json.loads(plan.stdout.splitlines()[-1])["memory"] * part / 1e6)
    run = [*command, "train", *line.split(), "--fit", f"{limit}MB", "--out", str(tmp_path / "run")]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert metrics(tmp_path / "run")[-1]["train/peak_memory"] <= limit * 1e6
    chosen = json.loads((tmp_path / "run/config.json").read_text())
    assert chosen["fit"] == "" and f"--fit: --tokens {chosen['tokens']}" in done.stderr
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert ledger["measured"]["memory"] == pytest.approx(ledger["forecast"]["memory"], rel=0.05)


@pytest.mark.slow
def test_what_cannot_fit_is_refused_before_anything_is_read(middling, tmp_path):
    line = f"train --model {middling}/bert --data {middling}/data.jsonl --out {tmp_path}/run --fit"
    said = fails(f"{line} 20MB", "--fit: expected at least", "found 20.0")
    assert "tensors loaded" not in said.err and not (tmp_path / "run").exists()
    fails(f"{line} much", "--fit is 'much'; expected a size, as 2GB, 900MB or 1.5GiB", code=2)


def test_products_are_told_apart_by_what_they_are_for(tmp_path, compiled):
    """Each layer's three, of the sizes that it has; their FLOPs are those that torch counts."""
    job, sequences = job_of("bert", tmp_path, "full", META)
    ledger = run_on_meta(job, [sequences])
    kinds = {product.kind for product in ledger.products}
    assert kinds == {"layer", "input gradient", "weight gradient"}
    counted = sum(product.flops * n for product, n in ledger.products.items())
    assert counted == sum(n for name, n in ledger.flops.items() if name != "attention")
    inner = job.model.config.intermediate_size
    width = job.model.config.hidden_size
    sides = {(p.inner, p.outer) for p in ledger.products if p.kind == "layer"}
    assert {(width, inner), (inner, width), (width, width)} <= sides


@pytest.mark.slow
def test_seconds_grow_with_the_step(middling):
    """And are of the order of those that a step takes: the machine that tests run on may be busy."""
    small = forecast(PlanConfig(model=f"{middling}/bert", data=f"{middling}/data.jsonl", batch=2, init="random"))
    large = forecast(PlanConfig(model=f"{middling}/bert", data=f"{middling}/data.jsonl", batch=16, init="random"))
    assert 2 < large.seconds / small.seconds < 24 and large.flops == pytest.approx(8 * small.flops, rel=0.01)
    assert large.bound[1] <= large.seconds * 1.5


@pytest.mark.slow
def test_many_micro_batches_are_told_from_some(middling, monkeypatch):
    """Sequences have one length here: the count is that of all micro-batches, or as many times that of some."""
    options = dict(model=f"{middling}/bert", data=f"{middling}/data.jsonl", batch=32, init="random", tokens=150)
    of_some = forecast(PlanConfig(**options))
    monkeypatch.setattr(planning, "SOME", 1000)
    of_all = forecast(PlanConfig(**options))
    assert of_some.micro_batches == of_all.micro_batches > 4
    assert of_some.flops == pytest.approx(of_all.flops, rel=0.01)
    assert of_some.held == pytest.approx(of_all.held, rel=0.01)


WITHOUT_COMPILER = """
import sys
from minift.config import PlanConfig
from minift.planning import forecast
forecast(PlanConfig(model=sys.argv[1] + "/bert", data=sys.argv[1] + "/data.jsonl", batch=2, init="random"))
assert "torch._dynamo" not in sys.modules
import torch
double = torch.compile(lambda x: 2 * x, backend="eager")  # which is there for whoever wants it
assert double(torch.ones(1)).item() == 2 and "torch._dynamo" in sys.modules
print("done")
"""


@pytest.mark.slow
def test_a_plan_does_not_import_torchs_compiler(middling):
    assert python(WITHOUT_COMPILER, middling) == "done\n"


GIVES_WAY = """
import sys, torch
from minift import planning
with planning.without_compiler():
    assert torch._dynamo.disable(len, recursive=True) is len and isinstance(torch._dynamo, planning.NoCompiler)
    assert torch._dynamo.is_compiling() is False  # which a stand-in does not know
    assert not isinstance(sys.modules["torch._dynamo"], planning.NoCompiler)
with planning.without_compiler():
    assert not isinstance(torch._dynamo, planning.NoCompiler)
print("done")
"""


@pytest.mark.slow
def test_a_stand_in_for_the_compiler_gives_way():
    assert python(GIVES_WAY) == "done\n"


@pytest.mark.parametrize(
    "text, size", [("2GB", 2 * 10**9), ("900 mb", 9 * 10**8), ("1.5GiB", 3 * 2**29), ("0.5kB", 500)]
)
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.slow
def test_a_plan_allocates_and_writes_nothing(middling, tmp_path, monkeypatch):
    """Weights of 80 GB are planned for as any others."""
    monkeypatch.chdir(tmp_path)
    config = json.loads((middling / "bert/config.json").read_text())
    config |= {"hidden_size": 12288, "intermediate_size": 49152, "num_hidden_layers": 12, "num_attention_heads": 96}
    folder = tmp_path / "huge"
    folder.mkdir()
    for path in (middling / "bert").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    plan = forecast(PlanConfig(model=str(folder), data=str(middling / "data.jsonl"), device="cpu"))
    assert plan.kinds[TRAINED] > 80e9 and plan.memory > 4 * plan.kinds[TRAINED]
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]


def test_bad_input_is_said_as_in_training(middling, tmp_path):
    fails("plan --data {f}/none.jsonl", "none.jsonl", f=middling)
    fails("plan", "--data is missing", code=2)


def test_what_control_groups_leave(tmp_path, monkeypatch):
    """Both versions, a group within a limited one, files that were read; a limit that is none."""
    folder = tmp_path / "cgroup"
    inner = folder / "memory/outer/inner"
    inner.mkdir(parents=True)
    groups = tmp_path / "groups"
    groups.write_text("4:memory:/outer/inner\n3:cpu:/other\n0::/none\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4000 kB\n")
    places = {"/sys/fs/cgroup": folder, "/proc/self/cgroup": groups, "/proc/meminfo": tmp_path / "meminfo"}
    monkeypatch.setattr(memory, "Path", lambda path: Path(places.get(str(path), path)))
    cpu = torch.device("cpu")
    assert memory.available(cpu) == 4_096_000

    def limit(group: Path, name: str, most: str, used: int, stat: str) -> None:
        (group / f"memory.{name}").write_text(most)
        (group / ("memory.current" if name == "max" else "memory.usage_in_bytes")).write_text(str(used))
        (group / "memory.stat").write_text(stat)

    limit(inner.parent, "limit_in_bytes", "3000", 1000, "cache 7\ntotal_inactive_file 500\n")
    assert memory.available(cpu) == 2500
    limit(inner, "limit_in_bytes", "1500", 1000, "total_inactive_file 0\n")
    assert memory.available(cpu) == 500
    limit(folder, "max", "max", 1000, "inactive_file 5\n")
    assert memory.available(cpu) == 500
    limit(folder, "max", "1100", 1000, "inactive_file 50\n")
    assert memory.available(cpu) == 150
    limit(inner, "limit_in_bytes", "10", 1000, "total_inactive_file 0\n")
    assert memory.available(cpu) == 0


@pytest.mark.slow
def test_no_forecast_where_there_is_no_memory_for_one(middling, tmp_path, monkeypatch):
    """A run that fits ends well, whatever a forecast of it would take."""
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    line = f"train --model {middling}/bert --init random --data {middling}/data.jsonl --steps 1 --out {tmp_path}/run"
    assert "no forecast: it would take 268 MB" in works(line).err
    assert (tmp_path / "run/last").is_dir() and not (tmp_path / "run/ledger.json").exists()


def test_a_kernel_that_is_timed_finds_nothing_in_the_cache():
    """Each call works on other memory, as much of it as caches hold, than the one before."""
    places = []

    class Library:
        @staticmethod
        def f(x, n, words):
            places.append((x.data_ptr(), words[0].data_ptr()))
            assert x.shape == (1024, 1024) and n == 3 and (x == 0.5).all() and not words[0].any()

    row = Shape(torch.float32, (1024, 1024), (1024, 1))
    words = Shape(torch.int32, (7,), (1,))
    kernel = Kernel(Library, "f", {"x": row, "n": 3, "words": (words, 0)})
    assert rates.kernel_seconds(kernel, CPU) > 0
    # what is timed takes no more memory than a forecast may
    assert all(rates.copies_of(n) * n <= planning.TIMING for n in (1, 1 << 20, 1 << 25, (1 << 26) - 1, rates.MOST))
    assert len(set(places)) == min(len(places), rates.REPEATS + 1) > 3
    assert all(here[i] != there[i] for here, there in zip(places, places[1:], strict=False) for i in (0, 1))


def test_a_cast_is_in_the_cache_only_where_products_go_by_floats(monkeypatch):
    """On another CPU a cast to float32 is a gradient, which stays; one to bfloat16 is a weight anywhere."""
    floats = torch.zeros(64)
    for hardware, gone in (("", SMALL_CASTS), ("AMX", CASTS)):
        monkeypatch.setattr(ledger, "cpu_bfloat16", lambda hardware=hardware: hardware)
        with Ledger(torch.nn.Linear(1, 1)) as seen:
            halves = floats.bfloat16()
            assert seen.moved == {CASTS: 64 * 6}
            seen.restart()
            halves.float()
            torch.zeros(SMALL, dtype=torch.bfloat16).float()  # larger than what a cache keeps
        assert seen.moved[gone] >= 64 * 6 and seen.moved[CASTS] >= SMALL * 6
        assert sum(seen.moved[kind] for kind in (CASTS, SMALL_CASTS)) == (64 + SMALL) * 6
