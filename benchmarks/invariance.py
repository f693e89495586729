"""How far apart the curves of the same run are when it is split differently: micro-batches, processes, shards.

    python benchmarks/invariance.py --assets ../shared

12 steps of 8 examples at learning rate 1e-3, dropout 0.1, float32: a random BERT (2 layers, width 32) on 60 short
reviews, a random GPT-2 (2 layers, width 32, the real vocabulary) on 60 WebNLG completions of very unequal length.
Printed: the largest difference of any step's loss, and of any final weight but the keys' biases, from the undivided run
on one process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CASES = [(1, 64, []), (1, 512, []), (2, 0, []), (3, 0, []), (2, 64, []), (2, 0, ["--shard"]), (3, 64, ["--shard"])]


def prepare(task: str, folder: Path, assets: Path) -> list[str]:
    """Writes model and data; returns the options that name them."""
    from helpers import peer, reviews, small_bert
    from transformers import GPT2LMHeadModel

    if task == "classify":
        small_bert(folder / "model")
        return ["--data", str(reviews(folder / "train.tsv", 60))]
    peer(GPT2LMHeadModel, folder / "model", scale=0.05, vocab_size=50257, n_positions=128)
    for name in ("vocab.json", "merges.txt"):
        (folder / "model" / name).write_bytes((assets / "weights/tokenizers/gpt2" / name).read_bytes())
    with open(assets / "data/webnlg/train.jsonl") as f:
        (folder / "train.jsonl").write_text("".join(next(f) for _ in range(60)))
    return ["--data", str(folder / "train.jsonl")]


def run(options: list[str], out: Path, processes: int) -> tuple[list[float], dict]:
    """Losses and final weights."""
    from safetensors.torch import load_file

    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "minift", "train", *options, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    losses = [json.loads(line)["train/loss"] for line in open(out / "metrics.jsonl")]
    weights = load_file(out / "last/model.safetensors")
    return losses, {k: v for k, v in weights.items() if not k.endswith(("key.bias", "c_attn.bias"))}


def main() -> None:
    """One row per task and split."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--assets", type=Path, required=True, help="the folder with data/ and weights/")
    assets = p.parse_args().assets
    print("| task | processes | --tokens | | loss | weights |\n|---|---|---|---|---|---|")
    for task in ("classify", "complete"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            fixed = ["--task", task, "--model", str(folder / "model"), "--steps", "12", "--lr", "1e-3"]
            options = fixed + prepare(task, folder, assets)
            losses, weights = run(options, folder / "one", 1)
            for n, tokens, more in CASES:
                found, theirs = run([*options, "--tokens", str(tokens), *more], folder / f"{n}-{tokens}{more}", n)
                loss = max(abs(a - b) for a, b in zip(losses, found, strict=True))
                weight = max((weights[k] - theirs[k]).abs().max().item() for k in weights)
                print(
                    f"| {task} | {n} | {tokens or 'all'} | {' '.join(more)} | {loss:.1e} | {weight:.1e} |", flush=True
                )


if __name__ == "__main__":
    main()
