"""One job by minift and by the Hugging Face Trainer: test accuracy, time and peak memory, a fresh process per case.

    python benchmarks/peers.py --data sst2 --assets ../shared --engines minift,trainer --seeds 42,43,44
    python benchmarks/peers.py --data imdb --assets ../shared --engines minift,trainer --seeds 42

sst2: MiniLM (6 layers, width 384), SST-2 sentences, 2 epochs, batch 32, lr 5e-5; the Trainer pads each batch to its
longest.
imdb: MiniLM, 2,000 reviews to train and 500 to test (drawn by torch.randperm, seed 42), maximum length 512, batch 8,
one epoch; the Trainer pads to 512, as the tutorial does.

Engines take turns (seed by seed), so a slow hour of the machine hits all of them. Time is the whole job, from the start
of training to the end of the test evaluation, without imports and downloads; memory is VmHWM of the process.
"""

import argparse
import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "sst2": dict(epochs=2, batch=32, lr=5e-5, max_length=128, padding="longest"),
    "imdb": dict(epochs=1, batch=8, lr=5e-5, max_length=512, padding="max_length"),
}


def sst2(assets: Path) -> tuple[list, list]:
    """(text, label) pairs of the train and the test split."""

    def read(name):
        with open(assets / "data/sst2-sentences" / name, newline="", encoding="utf-8") as f:
            return [(text, int(label)) for text, label in csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]

    return read("train.tsv"), read("test.tsv")


def imdb(assets: Path) -> tuple[list, list]:
    """2,000 reviews to train on and 500 to test on, drawn with seed 42 from the two halves of the data set."""
    import torch

    def read(name, n):
        with gzip.open(assets / "data/imdb" / name, "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42))[:n].tolist()
        return [(rows[i]["text"], rows[i]["label"]) for i in chosen]

    return read("train.jsonl.gz", 2000), read("test.jsonl.gz", 500)


def peak_mb() -> float:
    """Peak resident memory of this process in MB (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run_trainer(data: str, assets: Path, seed: int, steps: int, adapt=lambda model: model, lr: float = 0) -> dict:
    """The job with transformers.Trainer, on what `adapt` makes of the model.

    Dropout 0.1 as in the model's config, fused AdamW, linear schedule.
    """
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    case, folder = CASES[data], assets / "weights/all-MiniLM-L6-v2"
    train, test = {"sst2": sst2, "imdb": imdb}[data](assets)
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = adapt(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32))

    class Rows(torch.utils.data.Dataset):
        def __init__(self, rows):
            padding = "max_length" if case["padding"] == "max_length" else False
            self.x = tokenizer([t for t, _ in rows], truncation=True, max_length=case["max_length"], padding=padding)
            self.y = [y for _, y in rows]

        def __len__(self):
            return len(self.y)

        def __getitem__(self, i):
            return {**{k: v[i] for k, v in self.x.items()}, "labels": self.y[i]}

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=out,
                num_train_epochs=case["epochs"],
                max_steps=steps or -1,
                learning_rate=lr or case["lr"],
                seed=seed,
                per_device_train_batch_size=case["batch"],
                per_device_eval_batch_size=case["batch"],
                save_strategy="no",
                report_to=[],
                logging_steps=50,
                disable_tqdm=True,
            ),
            train_dataset=Rows(train),
            eval_dataset=Rows(test),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        start = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        accuracy = None if steps else trainer.evaluate()["eval_accuracy"]
    loss = next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry)
    return measured(accuracy, trainer.state.global_step, start, trained) | {"train_loss": loss}


def run_minift(data: str, assets: Path, seed: int, steps: int, **options) -> dict:
    """The same job with minift, with other options of its train command where given.

    The config's dropout 0.1, fused AdamW, linear schedule, the same order of examples.
    """
    import minift
    from minift.setup import load_model

    case, folder = CASES[data], assets / "weights/all-MiniLM-L6-v2"
    train, test = {"sst2": sst2, "imdb": imdb}[data](assets)
    with tempfile.TemporaryDirectory() as temporary:
        files = []
        for name, rows in (("train.jsonl", train), ("test.jsonl", test)):
            files.append(Path(temporary, name))
            files[-1].write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
        common = {key: case[key] for key in ("epochs", "batch", "lr", "max_length")}
        config = minift.TrainConfig(
            model=str(folder),
            data=str(files[0]),
            out=str(Path(temporary, "run")),
            steps=steps,
            seed=seed,
            **common | options,
        )
        model, tokenizer = load_model(config, ["0", "1"])
        start = time.perf_counter()
        run = minift.train(model, tokenizer, config)
        trained = time.perf_counter()
        test = minift.EvalConfig(data=str(files[1]))
        accuracy = None if steps else minift.evaluate(model, tokenizer, test)["accuracy"]
        losses = [json.loads(line)["train/loss"] for line in open(run.out / "metrics.jsonl")]
    return measured(accuracy, run.steps, start, trained) | {"train_loss": sum(losses) / len(losses)}


def measured(accuracy: float | None, steps: int, start: float, trained: float) -> dict:
    """One case's row; `start` and `trained` by time.perf_counter()."""
    train_s, total_s = trained - start, time.perf_counter() - start
    return {
        "accuracy": accuracy,
        "step_s": train_s / steps,
        "train_s": train_s,
        "total_s": total_s,
        "peak_mb": peak_mb(),
    }


def table(rows: list[dict]) -> str:
    """A row per case, then per engine the mean and spread of accuracy and the medians of the rest."""
    lines = [
        "| engine | seed | test accuracy | s a step | training s | whole job s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]

    def cost(step_s, train_s, total_s, peak_mb) -> str:
        return f"{step_s:.3f} | {train_s:.0f} | {total_s:.0f} | {peak_mb:,.0f} |"

    keys = ("step_s", "train_s", "total_s", "peak_mb")
    for r in rows:
        accuracy = "-" if r["accuracy"] is None else f"{r['accuracy']:.4f}"
        lines.append(f"| {r['engine']} | {r['seed']} | {accuracy} | {cost(*(r[k] for k in keys))}")
    for engine in dict.fromkeys(r["engine"] for r in rows):
        mine = [r for r in rows if r["engine"] == engine]
        if len(mine) > 1:
            found = [r["accuracy"] for r in mine]
            spread = "-" if None in found else f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}"
            medians = (statistics.median(r[k] for r in mine) for k in keys)
            lines.append(f"| **{engine}** | all | {spread} | {cost(*medians)}")
    return "\n".join(lines)


def write(path: Path, data: str, steps: int, rows: list[dict]) -> None:
    """Replaces this data set's section of the results file."""
    engines, seeds = (",".join(dict.fromkeys(str(r[k]) for r in rows)) for k in ("engine", "seed"))
    command = f"python benchmarks/peers.py --data {data} --assets ../shared --engines {engines} --seeds {seeds}"
    command += f" --steps {steps}" if steps else ""
    title = f"{data}: minift and the Hugging Face Trainer{f', {steps} steps' if steps else ''}"
    text = f"`{command}` on {machine()}; float32, dropout 0.1. {CASES[data]}\n\n{table(rows)}"
    replace_section(path, f"peers {data} {steps}", f"## {title}\n\n{text}")


def machine() -> str:
    """The day, the machine and the libraries that figures belong to."""
    import torch
    import transformers

    cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    day = time.strftime("%Y-%m-%d")
    return f"{day}: {cpu}, {os.cpu_count()} cores; torch {torch.__version__}, transformers {transformers.__version__}"


def replace_section(path: Path, key: str, text: str) -> None:
    """Puts `text` where an older section of that key stands in a results file, or at its end."""
    begin, end = f"<!-- {key} -->", f"<!-- end {key} -->"
    section = f"{begin}\n{text}\n{end}\n"
    old = path.read_text() if path.exists() else "# Results\n\nWritten by the scripts in this folder; do not edit.\n\n"
    before, _, rest = old.partition(begin)
    path.write_text(before + section + (rest.partition(end)[2].lstrip("\n") if rest else ""))


def main() -> None:
    """Run every engine and seed in a process of its own, print one JSON line each and a table at the end."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=CASES, required=True)
    p.add_argument("--assets", type=Path, required=True, help="the folder with data/ and weights/")
    p.add_argument("--engines", default="minift,trainer")
    p.add_argument("--seeds", default="42")
    p.add_argument("--steps", type=int, default=0, help="time N steps alone, without the test; 0: the whole job")
    p.add_argument("--write", type=Path, help="the results file whose section to replace, as benchmarks/RESULTS.md")
    p.add_argument(
        "--here", action="store_true", help="run one case in this process (what the script calls itself with)"
    )
    a = p.parse_args()
    if a.here:
        run = {"minift": run_minift, "trainer": run_trainer}[a.engines]
        print(
            json.dumps(
                {
                    "engine": a.engines,
                    "data": a.data,
                    "seed": int(a.seeds),
                    **run(a.data, a.assets, int(a.seeds), a.steps),
                }
            )
        )
        return
    rows = []
    for seed in a.seeds.split(","):
        for engine in a.engines.split(","):
            command = [
                sys.executable,
                __file__,
                "--data",
                a.data,
                "--assets",
                str(a.assets),
                "--engines",
                engine,
                "--seeds",
                seed,
                "--steps",
                str(a.steps),
                "--here",
            ]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append(json.loads(out.strip().splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if a.write:
        write(a.write, a.data, a.steps, rows)


if __name__ == "__main__":
    main()
