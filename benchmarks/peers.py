"""One job by minift and by the Hugging Face Trainer: test accuracy, time and peak memory, a fresh process per case.

    python benchmarks/peers.py --data sst2 --engines minift,trainer --seeds 42,43,44
    python benchmarks/peers.py --data imdb --engines minift,trainer --seeds 42

sst2: MiniLM (6 layers, width 384), SST-2 sentences, 2 epochs, batch 32, lr 5e-5; the Trainer pads each batch to its
longest.
imdb: MiniLM, 2,000 reviews to train and 500 to test (drawn by torch.randperm, seed 42), maximum length 512, batch 8,
one epoch; the Trainer pads to 512, as the tutorial does.

Engines take turns (seed by seed), so a slow hour of the machine hits all of them. Time is the whole job, from the start
of training to the end of the test evaluation, without imports and downloads; memory is VmHWM of the process.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    classified,
    command,
    draw,
    fresh,
    make_parser,
    make_trainer,
    parse,
    peak_mb,
    read_rows,
    table,
    told,
    write_rows,
    write_section,
)

CASES = {
    "sst2": dict(epochs=2, batch=32, lr=5e-5, max_length=128, padding="longest"),
    "imdb": dict(epochs=1, batch=8, lr=5e-5, max_length=512, padding="max_length"),
}
QUICK = dict(epochs=1, batch=16, max_length=64)  # of 64 rows
COSTS = {"step_s": ".3f", "train_s": ".0f", "total_s": ".0f", "peak_mb": ",.0f"}
HEAD = ["engine", "seed", "test accuracy", "s a step", "training s", "whole job s", "peak MB"]


def case_of(data: str, quick: bool) -> dict:
    """The settings of a job."""
    return CASES[data] | (QUICK if quick else {})


def train_and_test(data: str, a: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows to train on and to test on."""
    train, test = read_rows(a.assets, data), read_rows(a.assets, data, "test")
    if a.quick:
        return draw(train, 64), draw(test, 32)
    return (draw(train, 2000), draw(test, 500)) if data == "imdb" else (train, test)


def run_trainer(data: str, a: argparse.Namespace, seed: int, adapt: Callable = lambda model: model, lr: float = 0):
    """The job with transformers.Trainer, on what `adapt` makes of the model. Dropout 0.1 as in the model's config."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    case, folder = case_of(data, a.quick), a.assets / "weights/all-MiniLM-L6-v2"
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = adapt(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32))
    pad = case["padding"] == "max_length"
    train, test = (classified(tokenizer, rows, case["max_length"], pad) for rows in train_and_test(data, a))
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(
            model,
            tokenizer,
            train,
            out,
            case["batch"],
            lr or case["lr"],
            num_train_epochs=case["epochs"],
            max_steps=a.steps or -1,
            seed=seed,
            logging_steps=50,
            eval_dataset=test,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        start = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        accuracy = None if a.steps else trainer.evaluate()["eval_accuracy"]
    loss = next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry)
    return measured(accuracy, trainer.state.global_step, start, trained) | {"train_loss": loss}


def run_minift(data: str, a: argparse.Namespace, seed: int, **options) -> dict:
    """The same job with minift, with other options of its train command where given.

    The config's dropout 0.1, fused AdamW, linear schedule, the same order of examples.
    """
    import minift
    from minift.setup import load_model

    case = case_of(data, a.quick)
    train, test = train_and_test(data, a)
    with tempfile.TemporaryDirectory() as temporary:
        common = {key: case[key] for key in ("epochs", "batch", "lr", "max_length")}
        config = minift.TrainConfig(
            model=str(a.assets / "weights/all-MiniLM-L6-v2"),
            data=str(write_rows(Path(temporary, "train.jsonl"), train)),
            out=str(Path(temporary, "run")),
            steps=a.steps,
            seed=seed,
            precision="fp32",  # as the Trainer's
            **common | options,
        )
        tested = minift.EvalConfig(data=str(write_rows(Path(temporary, "test.jsonl"), test)))
        model, tokenizer = load_model(config, ["0", "1"])
        start = time.perf_counter()
        run = minift.train(model, tokenizer, config)
        trained = time.perf_counter()
        accuracy = None if a.steps else minift.evaluate(model, tokenizer, tested)["accuracy"]
        losses = [json.loads(line)["train/loss"] for line in open(run.out / "metrics.jsonl")]
    return measured(accuracy, run.steps, start, trained) | {"train_loss": sum(losses) / len(losses)}


def measured(accuracy: float | None, steps: int, start: float, trained: float) -> dict:
    """One case's row; `start` and `trained` by time.perf_counter()."""
    train_s, total_s = trained - start, time.perf_counter() - start
    costs = {"step_s": train_s / steps, "train_s": train_s, "total_s": total_s, "peak_mb": peak_mb()}
    return {"accuracy": accuracy} | costs


def accuracies_and_costs(rows: list[dict]) -> str:
    """A row per case, then per engine the mean and spread of accuracy and the medians of the rest."""
    lines = []
    for r in rows:
        accuracy = "-" if r["accuracy"] is None else f"{r['accuracy']:.4f}"
        lines.append([r["engine"], str(r["seed"]), accuracy, *(format(r[key], form) for key, form in COSTS.items())])
    for engine in dict.fromkeys(r["engine"] for r in rows):
        mine = [r for r in rows if r["engine"] == engine]
        if len(mine) > 1:
            found = [r["accuracy"] for r in mine]
            spread = "-" if None in found else f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}"
            medians = [format(statistics.median(r[key] for r in mine), form) for key, form in COSTS.items()]
            lines.append([f"**{engine}**", "all", spread, *medians])
    return table(HEAD, lines, left=2)


def seeds_parser(doc: str, engines: str) -> argparse.ArgumentParser:
    """The options of a comparison of whole jobs."""
    p = make_parser(doc)
    p.add_argument("--engines", "--methods", default=engines, help="what to run (default %(default)s)")
    p.add_argument("--seeds", default="42")
    p.add_argument("--steps", type=int, default=0, help="time N steps alone, without the test; 0: the whole job")
    p.add_argument("--rows", type=Path, help="what an earlier call printed: rows that are there are not run again")
    return p


def run_all(a: argparse.Namespace) -> list[dict]:
    """A row per engine and seed, each by a process of its own, unless --rows has it."""
    earlier = {}
    if a.rows:
        lines = a.rows.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        earlier = {(row["engine"], row["seed"]): row for row in rows}
    found = []
    for seed in [int(seed) for seed in a.seeds.split(",") if seed]:
        for engine in a.engines.split(","):
            case = {"engine": engine, "seed": seed}
            found.append(earlier.get((engine, seed)) or told(case | fresh(case)))
    return found


def main() -> None:
    p = seeds_parser(__doc__, "minift,trainer")
    p.add_argument("--data", choices=CASES, required=True)
    a = parse(p)
    if a.here:
        run = {"minift": run_minift, "trainer": run_trainer}[a.here["engine"]]
        print(json.dumps(run(a.data, a, a.here["seed"])))
        return
    rows = run_all(a)
    found = accuracies_and_costs(rows)
    print(found)
    if a.write:
        title = f"{a.data}: minift and the Hugging Face Trainer{f', {a.steps} steps' if a.steps else ''}"
        text = f"float32, dropout 0.1. {CASES[a.data]}\n\n{found}"
        write_section(a.write, f"peers {a.data} {a.steps}", title, command(p, a), rows, text)


if __name__ == "__main__":
    main()
