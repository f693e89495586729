"""On an NVIDIA GPU: every CUDA test, then training steps of minift, of transformers, and of both in fewer launches.

    python benchmarks/gpu.py --write benchmarks/RESULTS.md              about ten minutes
    python benchmarks/gpu.py --quick --engines minift,graph,eager,compiled   small, on the CPU: does it run?

bert-128    BERT-base, one label a sequence, 32 sequences of 128 random tokens: no padding, the peers' best case
bert-imdb   the same on 32 IMDB reviews, cut at 512 tokens: the peers pad each batch to its longest (needs --assets)
gpt2-1024   GPT-2, the next token, 8 sequences of 1,024 random tokens, all asked about

full, lora (r=8, PEFT's default targets) and nf4 (lora over a base in NF4 with double quantisation), dropout 0.1, random
weights of the published sizes, bfloat16: minift as --precision bf16 has it, the peers under autocast (the base of lora
in bfloat16; bitsandbytes for nf4), scaled-dot-product attention, fused AdamW, gradients clipped; a plain loop, no
Trainer.

minift, graph (minift with --graph), eager and compiled (transformers without and with torch.compile): each runs in a
fresh process, takes its first step (which compiles) beside the runs before it, waits for its turn to have the device
alone, and sees every batch once before it is timed. Time is the median step, all of it; tokens are real ones.
MFU: model FLOPs (no recomputation, nothing for padding) over the device's peak. Launches, of kernels and graphs, are
counted by torch.profiler in one step.
"""

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import (
    SEED,
    attempt,
    command,
    failures,
    make_parser,
    parse,
    peer_model,
    plain_step,
    random_model,
    read_rows,
    seconds,
    table,
    told,
    write_section,
)

CASES = {
    "bert-128": dict(family="bert", batch=32, length=128),
    "bert-imdb": dict(family="bert", batch=32, length=512),
    "gpt2-1024": dict(family="gpt2", batch=8, length=1024),
}
METHODS, ENGINES = ("full", "lora", "nf4"), ("minift", "graph", "eager", "compiled")
LAYERS, WIDTH, VOCABULARY = 12, 768, {"bert": 30522, "gpt2": 50257}
PEAK = {"H100": 989, "H200": 989, "GH200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "L4": 121}  # bf16 TFLOP/s
LAUNCHES = "cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"
COLUMNS = ["case", "method", "engine", "ms a step", "tokens/s", "MFU", "peak MB", "launches a step"]

Step = Callable[[int], int]  # number of the step -> its real tokens


def batches(case: dict, steps: int, a: argparse.Namespace) -> list[list[np.ndarray]]:
    """The token ids of the sequences of each step."""
    rng, n, length = np.random.default_rng(SEED), steps * case["batch"], case["length"]
    if case is CASES["bert-imdb"] and a.assets:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(
            str(a.assets / "weights/tokenizers/bert-base-uncased/tokenizer.json")
        )
        tokenizer.enable_truncation(length)
        texts = [row["text"] for row in read_rows(a.assets, "imdb")]
        chosen = rng.permutation(len(texts))[:n]
        rows = [np.array(e.ids, np.int32) for e in tokenizer.encode_batch([texts[i] for i in chosen])]
    else:
        rows = [rng.integers(5, VOCABULARY[case["family"]], length, dtype=np.int32) for _ in range(n)]
    if a.quick:
        rows = [row[:16] for row in rows]
    return [rows[i : i + case["batch"]] for i in range(0, n, case["batch"])]


def minift_step(case: dict, method: str, folder: Path, rows: list, device: torch.device, graph: bool) -> Step:
    """Steps by minift's own train_step. (On the CPU, in a quick run, a graph is the function that it would record.)"""
    import minift
    from minift.data.batch import Sequence
    from minift.ops import native
    from minift.setup import Engine, load_model, make_job
    from minift.training import train_step

    bert = case["family"] == "bert"
    config = minift.TrainConfig(
        model=str(folder),
        task="classify" if bert else "complete",
        method="full" if method == "full" else "lora",
        base="nf4" if method == "nf4" else "auto",
        batch=case["batch"],
        max_length=case["length"],
        weight_decay=0.01,
        seed=SEED,
        precision="auto",
        graph=graph,
    )
    model, _ = load_model(config, ["0", "1"] if bert else None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(native.use("auto", device), file=sys.stderr)
    job = make_job(model, config, Engine(device, dtype))

    def sequence(number: int, ids: np.ndarray) -> Sequence:
        n = 1 if bert else len(ids) - 1
        targets = np.array([number % 2]) if bert else ids[1:].astype(np.int64)
        return Sequence(number, ids, None, np.arange(n, dtype=np.int32), targets)

    def step(i: int) -> int:
        train_step(job, [sequence(i * case["batch"] + j, ids) for j, ids in enumerate(rows[i])], i, 5e-5)
        return sum(map(len, rows[i]))

    return step


def peer_step(case: dict, method: str, folder: Path, rows: list, device: torch.device, compiled: bool) -> Step:
    """Steps by transformers, PEFT and bitsandbytes."""
    bert = case["family"] == "bert"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = peer_model(case["family"], method, folder, dtype, device.type)
    update = plain_step(model, compiled, dtype, weight_decay=0.01)

    def step(i: int) -> int:
        longest = max(map(len, rows[i]))
        ids = torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows[i]])).long()
        mask = torch.from_numpy(np.stack([np.arange(longest) < len(row) for row in rows[i]])).long()
        labels = torch.arange(len(rows[i])) % 2 if bert else ids
        update({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return int(mask.sum())

    return step


def flops(case: dict, method: str, rows: list[np.ndarray]) -> float:
    """Model FLOPs of a step: linear layers, attention, head; forward, gradients of inputs, and, full, of weights."""
    n, causal = sum(map(len, rows)), 0.5 if case["family"] == "gpt2" else 1.0
    linear, head = 24 * WIDTH**2 * LAYERS * n, 2 * WIDTH * VOCABULARY["gpt2"] * n if case["family"] == "gpt2" else 0
    attention = sum(4 * len(row) ** 2 * WIDTH * LAYERS * causal for row in rows)
    return (3 if method == "full" else 2) * (linear + head) + 3 * attention


def peak(device: torch.device) -> float:
    """FLOP/s of bfloat16 products: the data sheet's, else those of a large product here."""
    name = torch.cuda.get_device_name(device)
    if known := [p for n, p in PEAK.items() if n in name]:
        return max(known) * 1e12
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = [timed(lambda: x @ x, device) for _ in range(10)]
    return 2 * 8192**3 / min(times)


def timed(f: Callable, device: torch.device) -> float:
    """Seconds of f, all its kernels included."""

    def whole() -> None:
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds(whole)


def launches(f: Callable) -> int:
    """Kernels, and graphs of kernels, that f launches."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=activities) as profile:
        f()
    return sum(e.count for e in profile.key_averages() if e.key.startswith(LAUNCHES))


def measure(name: str, method: str, engine: str, folder: Path, a: argparse.Namespace) -> dict:
    """One engine on one case, in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() and not a.quick else torch.device("cpu")
    case, steps = CASES[name], a.steps + 1
    rows = batches(case, steps, a)
    given = case, method, folder / case["family"], rows, device
    ours, fewer = engine in ("minift", "graph"), engine in ("graph", "compiled")
    step = minift_step(*given, fewer) if ours else peer_step(*given, fewer)
    step(0)  # compiles, beside the runs before it
    with turn(Path(a.here["work"], "turn")):
        return time_steps(step, rows, a, device, case, method)


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """The device for this process alone: the others wait before their own."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_steps(step: Step, rows: list, a: argparse.Namespace, device: torch.device, case: dict, method: str) -> dict:
    """The figures of an engine whose step 0 is done."""
    for i in range(1, len(rows)):
        step(i)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    timing = [timed(lambda i=i: step(i), device) for i in range(a.steps)]
    tokens = statistics.mean(sum(map(len, rows[i])) for i in range(a.steps))
    found = {"ms": statistics.median(timing) * 1e3, "tokens_per_second": tokens * a.steps / sum(timing)}
    if device.type == "cuda":
        work = statistics.mean(flops(case, method, rows[i]) for i in range(a.steps))
        found["mfu"] = work * a.steps / sum(timing) / peak(device)
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return found | {"launches": launches(lambda: step(a.steps))}


def figures(row: dict) -> list[str]:
    """A line of the table; dashes for what could not be measured."""
    forms = {"ms": ".1f", "tokens_per_second": ",.0f", "mfu": ".1%", "peak_mb": ",.0f", "launches": ","}
    return [
        *(row[key] for key in COLUMNS[:3]),
        *(format(row[key], form) if key in row else "-" for key, form in forms.items()),
    ]


def plan(a: argparse.Namespace) -> list[tuple[str, str, str]]:
    """The runs, what matters most first: compiling takes longest."""
    engines, cases, methods = (x.split(",") for x in (a.engines, a.cases, a.methods))
    skipped = set() if a.assets or a.quick else {"bert-imdb"}
    return [(c, m, e) for e in engines for c in cases for m in methods if c not in skipped]


def run_tests() -> str:
    """Every test that uses the device; pytest's last line. Those that fail are printed."""
    files = ["tests/ops/test_cuda.py", "tests/test_graph.py"]
    words = [sys.executable, "-m", "pytest", "-q", "-k", "not emulated", *files]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines() or ["nothing printed"]
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))) or lines[-1], flush=True)
    return lines[-1]


def run_one(row: dict, work: str, until: float) -> dict:
    """The row with its figures, by a process of its own, or with why there are none."""
    if time.monotonic() > until:
        return told(row | {"why": "not run: time was over"})
    return told(row | attempt(row | {"work": work}))


def main() -> None:
    p = make_parser(__doc__, needs_assets=False)
    p.add_argument("--cases", default=",".join(CASES))
    p.add_argument("--methods", default=",".join(METHODS))
    p.add_argument("--engines", default=",".join(ENGINES))
    p.add_argument("--steps", type=int, default=20, help="timed, each on its batch (default %(default)s)")
    p.add_argument("--minutes", type=float, default=10, help="after which no further run begins (default %(default)s)")
    p.add_argument("--ahead", type=int, default=4, help="runs in preparation at a time (default %(default)s)")
    a = parse(p, cases="bert-128,gpt2-1024", methods="lora", engines="minift,eager", steps=2, ahead=1)
    if a.here:
        print(json.dumps(measure(a.here["case"], a.here["method"], a.here["engine"], Path(a.here["work"]), a)))
        return
    if not a.quick and not torch.cuda.is_available():
        p.error("torch finds no CUDA device; expected one, or --quick")
    until = time.monotonic() + 60 * a.minutes
    tests = "not run" if a.quick else run_tests()
    with tempfile.TemporaryDirectory() as work:
        for family in VOCABULARY:
            random_model(family, Path(work, family), small=a.quick)
        planned = [dict(zip(COLUMNS, names, strict=False)) for names in plan(a)]
        with ThreadPoolExecutor(a.ahead) as pool:
            rows = list(pool.map(lambda row: run_one(row, work, until), planned))
    found = table(COLUMNS, [figures(row) for row in rows], left=3) + failures(rows, *COLUMNS[:3])
    print(found)
    if a.write:
        title = "On a GPU: minift, minift as graphs, transformers, and transformers compiled"
        text = f"bfloat16, dropout 0.1.\nTests: {tests}\n\n{found}"
        write_section(a.write, "gpu", title, command(p, a), rows, text, (torch.cuda.get_device_name(),))


if __name__ == "__main__":
    main()
