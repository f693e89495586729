"""`minift demo`: the main job from end to end, on models and data that ship with minift. No network, about a minute.

Each training is a process of its own, so that its memory is its own, and its command can be typed again. Two run at a
time, with half of the threads each: steps of such small models leave much of two cores idle.
"""

import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints.hub import PREFIX
from ..checkpoints.loading import load
from ..config import DemoConfig, EvalConfig, TrainConfig
from ..data.tokenizer import Tokenizer
from ..errors import InputError, printable, table_lines
from ..evaluation import evaluate, predict
from ..files import check_new_folder, real
from ..generation import generate
from ..measure.track import Progress
from ..models import Model

DATA = Path(__file__).parent / "data"
BERT = PREFIX + "bert-nano"
GPT2 = PREFIX + "gpt2-nano"
SEED = 42


@dataclass
class Job:
    """One training of the tour."""

    name: str  # of its run folder
    what: str  # in the table
    data: str  # of DATA
    epochs: int
    options: str

    def command(self, out: Path) -> str:
        """The arguments of minift, as they are typed."""
        files = f"--data {shlex.quote(str(out / self.data))} --out {shlex.quote(str(out / self.name))}"
        return f"train {files} --epochs {self.epochs} {self.options}"

    def steps(self, out: Path) -> int:
        """How many it takes."""
        return self.epochs * math.ceil(lines_in(out / self.data) / TrainConfig.batch)


REVIEWS_TO_LEARN = "reviews.train.jsonl"
PROMPTS_TO_LEARN = "prompts.train.jsonl"
CLASSIFY = (
    Job("reviews-full", "all weights", REVIEWS_TO_LEARN, 5, "--lr 1e-4"),
    Job("reviews-lora", "LoRA", REVIEWS_TO_LEARN, 5, "--lr 1e-3 --method lora"),
    Job("reviews-qlora", "LoRA, 4-bit base", REVIEWS_TO_LEARN, 5, "--lr 1e-3 --method lora --base nf4"),
)
COMPLETE = Job(
    "prompts-lora",
    "LoRA",
    PROMPTS_TO_LEARN,
    3,
    "--lr 3e-3 --task complete --method lora --targets all-linear --rank 16",
)
AT_ONCE = 2  # trainings; `classify` tells

REVIEWS = ("Not a bad film at all.", "I wanted to love it, but I nearly fell asleep.")
PROMPTS = (
    "Film: a thriller about a missing train. Stars: 1.\nReview:",
    "Film: a thriller about a missing train. Stars: 5.\nReview:",
)


def run(config: DemoConfig) -> None:
    """Runs the tour in the folder `config.out`. Raises InputError where that is not free, or where a training fails."""
    out = Path(config.out)
    check_new_folder("--out", out)
    real(out).mkdir(parents=True, exist_ok=True)
    for path in sorted(DATA.glob("*.jsonl")):
        shutil.copy(path, out / path.name)
    start = time.perf_counter()
    trainings = Trainings(out)
    try:
        classify(out, trainings)
        complete(out, trainings)
    finally:
        trainings.stop()
    seconds = time.perf_counter() - start
    print(
        f"\nAll of it took {seconds:.0f} s. {out} has the data, a folder for each run, and what that printed (*.log)."
    )
    print("Your own data next, a file with a text and a label in each line (.csv, .tsv or .jsonl):")
    print("   minift train --data reviews.csv --valid 0.1 --out runs/first")
    print("and a larger model, from the Hugging Face hub or a folder: --model bert-base-uncased")


def classify(out: Path, trainings: "Trainings") -> None:
    """A text's label: by all weights, by LoRA, and by LoRA over 4 bits."""
    test = out / "reviews.test.jsonl"
    print(f"1. {BERT} learns to tell good reviews from bad")
    print(f"   {lines_in(out / REVIEWS_TO_LEARN)} reviews to learn from, {lines_in(test)} others to be asked about\n")
    trainings.tell(CLASSIFY)
    print("\n   Two trainings run at a time, with half of the threads each.", flush=True)
    model, tokenizer = load(BERT, task="classify", labels=["negative", "positive"], seed=SEED)
    before = measure(model, tokenizer, test)
    said = [labels_of(model, tokenizer)]
    rows = [("before", "", f"{before['accuracy']:.1%}", "", "")]
    trainings.start((*CLASSIFY, COMPLETE))  # now that the kernels are compiled, once for all of them
    gains = []
    for job, cost in zip(CLASSIFY, trainings.costs(CLASSIFY), strict=True):
        model, tokenizer = load(out / job.name, task="classify", fresh_head=False)
        after = measure(model, tokenizer, test)
        gains.append(after["accuracy"] - before["accuracy"])
        rows.append(row_of(job, learned_in(model), f"{after['accuracy']:.1%}", cost))
        if job is CLASSIFY[0]:
            said.append(labels_of(model, tokenizer))
    print_rows(("what learns", "weights", "accuracy", "seconds", "memory"), rows)
    print(f"\n   {100 * min(gains):.1f} to {100 * max(gains):.1f} points gained, on reviews that it never saw.")
    print('   Many of them turn on a "not" or a "but".')
    for text, first, second in zip(REVIEWS, *said, strict=True):
        print(f'\n   "{text}"\n     before: {first}\n     after:  {second}')
    print(f'\n   Ask it yourself: minift predict --model {out / CLASSIFY[0].name} --text "..."\n')


def complete(out: Path, trainings: "Trainings") -> None:
    """A text after a prompt, by LoRA."""
    train, test = out / PROMPTS_TO_LEARN, out / "prompts.test.jsonl"
    print(f"2. {GPT2} learns to write a short review from a few facts")
    print(f"   {lines_in(train)} prompts with completions to learn from, {lines_in(test)} others to be asked about\n")
    trainings.tell([COMPLETE])
    model, tokenizer = load(GPT2, task="complete")
    before = measure(model, tokenizer, test)
    texts = {prompt: [text] for prompt, text in completions(model, tokenizer)}
    [cost] = trainings.costs([COMPLETE])
    model, tokenizer = load(out / COMPLETE.name, task="complete")
    after = measure(model, tokenizer, test)
    for prompt, text in completions(model, tokenizer):
        texts[prompt].append(text)
    rows = [("before", "", f"{before['perplexity']:.1f}", "", "")]
    rows.append(row_of(COMPLETE, learned_in(model), f"{after['perplexity']:.1f}", cost))
    print_rows(("what learns", "weights", "perplexity", "seconds", "memory"), rows)
    less = 1 - after["perplexity"] / before["perplexity"]
    print(f"\n   {less:.0%} less perplexed by reviews that it never saw.")
    print("   So small a model learns the form of a review, not its sense.")
    for prompt, (first, second) in texts.items():
        print()
        print_text("   ", prompt.replace("\n", " "))
        print_text("     before: ", first)
        print_text("     after:  ", second)
    prompt = PROMPTS[1].replace("\n", "\\n")
    print(f"\n   Ask it yourself: minift generate --model {out / COMPLETE.name} --prompt $'{prompt}'")


@dataclass
class Cost:
    """What a training took."""

    seconds: float  # of the whole process
    memory: int  # bytes, its peak


class Trainings:
    """Trainings in the folder `out`, each by a process of its own, AT_ONCE at a time."""

    def __init__(self, out: Path):
        self.out = out
        self.pool = ThreadPoolExecutor(AT_ONCE)
        self.started: dict[str, Future] = {}

    def tell(self, jobs: Sequence[Job]) -> None:
        """Prints what they are, as they would be typed."""
        for job in jobs:
            print(f"   $ minift {job.command(self.out)}", flush=True)

    def start(self, jobs: Sequence[Job]) -> None:
        """Starts them in this order, and does not wait."""
        for job in jobs:
            self.started[job.name] = self.pool.submit(train_in_process, job, self.out)

    def costs(self, jobs: Sequence[Job]) -> list[Cost]:
        """What they took; waits for them, with a bar of their steps. Raises InputError as soon as one has failed."""
        futures = [self.started[job.name] for job in jobs]
        curves = [self.out / job.name / "metrics.jsonl" for job in jobs]  # a line a step
        progress = Progress(sum(job.steps(self.out) for job in jobs), "step")
        done, running = wait(futures, timeout=0.0)
        while running and not any(future.exception() for future in done):
            done, running = wait(futures, timeout=0.5)
            progress.add(sum(lines_in(curve) for curve in curves if curve.exists()) - progress.done)
        progress.close()
        return [future.result() for future in futures]

    def stop(self) -> None:
        """Those that wait for others do not begin; those that run end."""
        self.pool.shutdown(cancel_futures=True)


def train_in_process(job: Job, out: Path) -> Cost:
    """`minift train` as a command, whose messages go to a log beside the run. Raises InputError where it fails."""
    threads = max(1, torch.get_num_threads() // AT_ONCE)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "minift", *shlex.split(job.command(out))]
    log = out / f"{job.name}.log"
    start = time.perf_counter()
    with open(log, "wb") as file:
        code = subprocess.run(command, stderr=file, env=environment).returncode
    seconds = time.perf_counter() - start
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise InputError(f"the training ended with exit code {code}; the end of {log}:\n" + "\n".join(last))
    steps = [json.loads(line) for line in (out / job.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Cost(seconds, max(step.get("train/peak_memory", 0) for step in steps))


def measure(model: Model, tokenizer: Tokenizer, data: Path) -> dict:
    """The task's metrics on a file, without a progress bar: it takes a second."""
    with redirect_stderr(io.StringIO()):
        return evaluate(model, tokenizer, EvalConfig(data=str(data)))


def learned_in(model: Model) -> int:
    """How many weights learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def row_of(job: Job, weights: int, result: str, cost: Cost) -> tuple[str, ...]:
    """The row of a training in the table."""
    return job.what, f"{weights:,}", result, f"{cost.seconds:.0f}", f"{cost.memory / 2**20:.0f} MB"


def print_rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """An aligned table."""
    print()
    for line in table_lines(head, rows, "<" + ">" * (len(head) - 1)):
        print("   " + line)


def lines_in(path: Path) -> int:
    """How many examples a .jsonl has."""
    return path.read_bytes().count(b"\n")


def labels_of(model: Model, tokenizer: Tokenizer) -> list[str]:
    """What the model says of each of REVIEWS, with its probability."""
    with redirect_stderr(io.StringIO()):
        found = predict(model, tokenizer, list(REVIEWS))
    return [f"{one['label']} ({one['scores'][one['label']]:.0%})" for one in found]


def completions(model: Model, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(prompt, what the model says) of each prompt."""
    with redirect_stderr(io.StringIO()):
        found = generate(model, tokenizer, list(PROMPTS), max_tokens=48, temperature=0.7, seed=SEED)
    return [(one["prompt"], one["completion"].strip()) for one in found]


def print_text(indent: str, text: str) -> None:
    """A text in lines that fit the terminal, all of them behind the first's beginning."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = textwrap.wrap(printable(text), max(20, width - len(indent))) or ["(nothing)"]
    print(indent + lines[0])
    for line in lines[1:]:
        print(" " * len(indent) + line)
