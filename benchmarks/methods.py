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
from pathlib import Path

from peers import machine, replace_section, run_minift, run_trainer, table

OPTIONS = {
    "full": dict(method="full", lr=5e-5),
    "lora": dict(method="lora", lr=5e-4),
    "qlora": dict(method="lora", base="nf4", lr=5e-4),
    "dora": dict(method="dora", lr=5e-4),
    "head": dict(method="head", lr=1e-3),
    "bias": dict(method="bias", lr=1e-3),
    "norm": dict(method="norm", lr=1e-3),
}


def with_lora(model):
    """PEFT's LoRA at the same settings."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, task_type="SEQ_CLS"))


def run(method: str, assets: Path, seed: int, steps: int) -> dict:
    """One of OPTIONS with minift, or PEFT's LoRA with transformers.Trainer."""
    if method == "peft-lora":
        return run_trainer("sst2", assets, seed, steps, with_lora, lr=5e-4)
    return run_minift("sst2", assets, seed, steps, **OPTIONS[method])


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
        row = run(a.methods, a.assets, seed, a.steps)
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
