"""`minift demo`: the main job from end to end, on models and data that ship with minift. No network, about a minute.

Each training is a process of its own, so that its time and memory are its own, and its command can be typed again.
"""

import io
import json
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.hub import PREFIX
from ..checkpoints.loading import load
from ..config import DemoConfig, EvalConfig
from ..data.tokenizer import Tokenizer
from ..errors import InputError, printable, table_lines
from ..evaluation import evaluate, predict
from ..files import check_new_folder, real
from ..generation import generate
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
    options: str


CLASSIFY = (
    Job("reviews-full", "all weights", "--epochs 5 --lr 1e-4"),
    Job("reviews-lora", "LoRA", "--method lora --epochs 5 --lr 1e-3"),
    Job("reviews-qlora", "LoRA, 4-bit base", "--method lora --base nf4 --epochs 5 --lr 1e-3"),
)
COMPLETE = Job(
    "prompts-lora", "LoRA", "--task complete --method lora --targets all-linear --rank 16 --epochs 3 --lr 3e-3"
)

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
    classify(out)
    complete(out)
    seconds = time.perf_counter() - start
    print(
        f"\nAll of it took {seconds:.0f} s. {out} has the data, a folder for each run, and what that printed (*.log)."
    )
    print("Your own data next, a file with a text and a label in each line (.csv, .tsv or .jsonl):")
    print("   minift train --data reviews.csv --valid 0.1 --out runs/first")
    print("and a larger model, from the Hugging Face hub or a folder: --model bert-base-uncased")


def classify(out: Path) -> None:
    """A text's label: by all weights, by LoRA, and by LoRA over 4 bits."""
    train, test = out / "reviews.train.jsonl", out / "reviews.test.jsonl"
    print(f"1. {BERT} learns to tell good reviews from bad")
    print(f"   {lines_in(train)} reviews to learn from, {lines_in(test)} others to be asked about\n")
    model, tokenizer = load(BERT, task="classify", labels=["negative", "positive"], seed=SEED)
    before = measure(model, tokenizer, test)
    said = [labels_of(model, tokenizer)]
    rows = [("before", "", f"{before['accuracy']:.1%}", "", "")]
    gains = []
    for job in CLASSIFY:
        done = train_in_process(job, train, out)
        model, tokenizer = load(out / job.name, task="classify", fresh_head=False)
        after = measure(model, tokenizer, test)
        gains.append(after["accuracy"] - before["accuracy"])
        rows.append(row_of(job, learned_in(model), f"{after['accuracy']:.1%}", done))
        if job is CLASSIFY[0]:
            said.append(labels_of(model, tokenizer))
    print_rows(("what learns", "weights", "accuracy", "seconds", "memory"), rows)
    print(f"\n   {100 * min(gains):.1f} to {100 * max(gains):.1f} points gained, on reviews that it never saw.")
    print('   Many of them turn on a "not" or a "but".')
    for text, first, second in zip(REVIEWS, *said, strict=True):
        print(f'\n   "{text}"\n     before: {first}\n     after:  {second}')
    print(f'\n   Ask it yourself: minift predict --model {out / CLASSIFY[0].name} --text "..."\n')


def complete(out: Path) -> None:
    """A text after a prompt, by LoRA."""
    train, test = out / "prompts.train.jsonl", out / "prompts.test.jsonl"
    print(f"2. {GPT2} learns to write a short review from a few facts")
    print(f"   {lines_in(train)} prompts with completions to learn from, {lines_in(test)} others to be asked about\n")
    model, tokenizer = load(GPT2, task="complete")
    before = measure(model, tokenizer, test)
    texts = {prompt: [text] for prompt, text in completions(model, tokenizer)}
    done = train_in_process(COMPLETE, train, out)
    model, tokenizer = load(out / COMPLETE.name, task="complete")
    after = measure(model, tokenizer, test)
    for prompt, text in completions(model, tokenizer):
        texts[prompt].append(text)
    rows = [("before", "", f"{before['perplexity']:.1f}", "", "")]
    rows.append(row_of(COMPLETE, learned_in(model), f"{after['perplexity']:.1f}", done))
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


def train_in_process(job: Job, data: Path, out: Path) -> Cost:
    """`minift train` as a command, whose messages go to a log beside the run. Raises InputError where it fails."""
    arguments = f"train --data {shlex.quote(str(data))} {job.options} --out {shlex.quote(str(out / job.name))}"
    print(f"   $ minift {arguments}", flush=True)
    log = out / f"{job.name}.log"
    start = time.perf_counter()
    with open(log, "wb") as file:
        code = subprocess.run([sys.executable, "-m", "minift", *shlex.split(arguments)], stderr=file).returncode
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise InputError(f"the training ended with exit code {code}; the end of {log}:\n" + "\n".join(last))
    steps = [json.loads(line) for line in (out / job.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    memory = max(step.get("train/peak_memory", 0) for step in steps)
    return Cost(time.perf_counter() - start, memory)


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
