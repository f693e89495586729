"""What is trained, and what it costs: full, LoRA, QLoRA, a linear probe, biases; beside PEFT's LoRA. SST-2, MiniLM.

    python benchmarks/methods.py --assets ../shared --methods lora,qlora,head,bias,peft-lora --seeds 42,43,44

Two epochs, batch 32; LoRA with r=8, alpha=32, dropout 0.1, on query and value, lr 5e-4, classifier trained (as PEFT
does); the probe and biases with lr 1e-3, full fine-tuning with 5e-5. qlora: the base in NF4 with double quantisation.
Every case in a fresh process; time and memory are as in peers.py, whose data this uses.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import CASES, machine, measured, replace_section, sst2, table

CASE = CASES["sst2"]
OPTIONS = {
    "full": dict(method="full", lr=5e-5),
    "lora": dict(method="lora", lr=5e-4),
    "qlora": dict(method="lora", base="nf4", lr=5e-4),
    "dora": dict(method="dora", lr=5e-4),
    "head": dict(method="head", lr=1e-3),
    "bias": dict(method="bias", lr=1e-3),
    "norm": dict(method="norm", lr=1e-3),
}


def run_minift(method: str, assets: Path, seed: int, steps: int) -> dict:
    """One of OPTIONS with minift."""
    import minift
    from minift.train import load_model

    train, test = sst2(assets)
    with tempfile.TemporaryDirectory() as temporary:
        files = []
        for name, rows in (("train.jsonl", train), ("test.jsonl", test)):
            files.append(Path(temporary, name))
            files[-1].write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
        config = minift.TrainConfig(
            model=str(assets / "weights/all-MiniLM-L6-v2"),
            data=str(files[0]),
            out=str(Path(temporary, "run")),
            epochs=CASE["epochs"],
            steps=steps,
            batch=CASE["batch"],
            max_length=CASE["max_length"],
            seed=seed,
            **OPTIONS[method],
        )
        model, tokenizer = load_model(config, ["0", "1"])
        start = time.perf_counter()
        run = minift.train(model, tokenizer, config)
        trained = time.perf_counter()
        test = minift.EvalConfig(data=str(files[1]))
        accuracy = None if steps else minift.evaluate(model, tokenizer, test)["accuracy"]
        losses = [json.loads(line)["train/loss"] for line in open(run.out / "metrics.jsonl")]
    return measured(accuracy, run.steps, start, trained) | {"train_loss": sum(losses) / len(losses)}


def run_peft(assets: Path, seed: int, steps: int) -> dict:
    """LoRA with PEFT and transformers.Trainer, at the same settings; each batch padded to its longest."""
    import peft
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    folder = assets / "weights/all-MiniLM-L6-v2"
    train, test = sst2(assets)
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, task_type="SEQ_CLS"))

    def rows(pairs):
        x = tokenizer([t for t, _ in pairs], truncation=True, max_length=CASE["max_length"])
        return [{**{k: v[i] for k, v in x.items()}, "labels": y} for i, (_, y) in enumerate(pairs)]

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=out,
                num_train_epochs=CASE["epochs"],
                max_steps=steps or -1,
                learning_rate=5e-4,
                seed=seed,
                per_device_train_batch_size=CASE["batch"],
                per_device_eval_batch_size=CASE["batch"],
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows(train),
            eval_dataset=rows(test),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        start = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        accuracy = None if steps else trainer.evaluate()["eval_accuracy"]
    loss = next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry)
    return measured(accuracy, trainer.state.global_step, start, trained) | {"train_loss": loss}


def main() -> None:
    """Run every method and seed in a process of its own, print one JSON line each and a table at the end."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--assets", type=Path, required=True, help="the folder with data/ and weights/")
    p.add_argument("--methods", default="lora,qlora,head,bias,peft-lora")
    p.add_argument("--seeds", default="42")
    p.add_argument("--steps", type=int, default=0, help="time N steps alone, without the test; 0: the whole job")
    p.add_argument("--write", type=Path, help="the results file whose section to replace, as benchmarks/RESULTS.md")
    p.add_argument("--rows", type=Path, help="with --write: JSON lines of earlier runs, to put with those of this one")
    p.add_argument("--note", default="", help="with --write: what a reader should know of the circumstances")
    p.add_argument("--here", action="store_true", help="run one case in this process")
    a = p.parse_args()
    if a.here:
        seed = int(a.seeds)
        peft = a.methods == "peft-lora"
        row = run_peft(a.assets, seed, a.steps) if peft else run_minift(a.methods, a.assets, seed, a.steps)
        print(json.dumps({"engine": a.methods, "seed": seed, **row}))
        return
    rows = [json.loads(line) for line in open(a.rows) if line.startswith('{"engine')] if a.rows else []
    for seed in filter(None, a.seeds.split(",")):
        for method in a.methods.split(","):
            options = [
                "--assets",
                str(a.assets),
                "--methods",
                method,
                "--seeds",
                seed,
                "--steps",
                str(a.steps),
                "--here",
            ]
            out = subprocess.run(
                [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            rows.append(json.loads(out.strip().splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if a.write:
        methods, seeds = (",".join(dict.fromkeys(str(r[k]) for r in rows)) for k in ("engine", "seed"))
        command = f"python benchmarks/methods.py --assets ../shared --methods {methods} --seeds {seeds}"
        text = f"`{command}` on {machine()}; float32, dropout 0.1. {a.note}\n\n{OPTIONS}\n\n{table(rows)}"
        replace_section(a.write, "methods", f"## SST-2: what is trained, beside PEFT\n\n{text}")


if __name__ == "__main__":
    main()
