"""A language model of characters from nothing, beside a plain PyTorch loop: `python benchmarks/chars.py`

The small recipe for a CPU that nanoGPT publishes (https://github.com/karpathy/nanoGPT, validation loss 1.88): GPT-2 of
4 layers of width 128, 4 heads, 12 blocks of 64 characters a step, 2,000 steps, AdamW with a learning rate of 1e-3 after
100 steps of warm-up, a cosine, no dropout, on the first nine tenths of tinyshakespeare; the rest is for validation.

minift      the recipe by `minift new` (a vocabulary of bytes) and `minift train --init random`
warmer      the same with three times the learning rate
muon        the same with Muon instead of AdamW
plain       the model and the recipe in plain PyTorch as one would write them, in this file: float32, blocks drawn at
            random, scaled-dot-product attention, fused AdamW, no compiler

Loss is over the whole validation text, in blocks of 64 predictions. Time is that of the steps: the engines take turns,
a fresh process each time, and the median counts.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import command, fresh, make_parser, parse, table, told, write_section
from torch import Tensor, nn

import minift

LAYERS, WIDTH, HEADS, BLOCK, BATCH, WARMUP = 4, 128, 4, 64, 12, 100
LR, LAST_LR, DECAY, BETAS = 1e-3, 1e-4, 0.1, (0.9, 0.99)
RECIPE = f"--batch {BATCH} --max-length {BLOCK + 1} --warmup {WARMUP} --schedule cosine --dropout 0 --beta2 0.99"
RECIPE += f" --weight-decay {DECAY} --precision fp32"
ENGINES = {
    "minift": f"{RECIPE} --lr {LR}",
    "warmer": f"{RECIPE} --lr {3 * LR}",
    "muon": f"{RECIPE} --lr 5e-3 --optimizer muon",
    "plain": "",
}


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Plain(nn.Module):
    """A GPT-2 in plain PyTorch, its head tied to its embedding."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("out.weight", "narrow.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets (B, T) -> the mean loss, ()."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x) @ self.tokens.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def run_plain(train: str, valid: str, steps: int) -> dict:
    """Seconds of the steps, and the loss on the validation text."""
    letters = {letter: i for i, letter in enumerate(sorted(set(train + valid)))}
    learned, held_out = (torch.tensor([letters[letter] for letter in text]) for text in (train, valid))
    torch.manual_seed(1337)
    model = Plain(len(letters))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    start = time.perf_counter()
    for step in range(steps):
        done = max(0, step - WARMUP) / (steps - WARMUP)
        cosine = LAST_LR + (LR - LAST_LR) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR * step / WARMUP if step < WARMUP else cosine
        begins = torch.randint(len(learned) - BLOCK, (BATCH,))
        ids = torch.stack([learned[i : i + BLOCK] for i in begins])
        targets = torch.stack([learned[i + 1 : i + 1 + BLOCK] for i in begins])
        loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # as a log line would
    seconds = time.perf_counter() - start
    n = (len(held_out) - 1) // BLOCK * BLOCK
    with torch.no_grad():
        loss = model(held_out[:n].view(-1, BLOCK), held_out[1 : n + 1].view(-1, BLOCK))
    return {"seconds": seconds, "loss": loss.item()}


def run_minift(options: str, train: str, valid: str, steps: int) -> dict:
    """The same by the command line."""
    with tempfile.TemporaryDirectory() as work:
        for name, text in (("train.txt", train), ("valid.txt", valid)):
            Path(work, name).write_text(text)
        sizes = f"--family gpt2 --vocab 257 --layers {LAYERS} --width {WIDTH} --heads {HEADS} --positions {BLOCK + 1}"
        call(f"new --data train.txt --out new {sizes}", work)
        call(
            f"train --model new --init random --task complete --data train.txt {options} --steps {steps} --out run",
            work,
        )
        steps_made = [json.loads(line) for line in Path(work, "run/metrics.jsonl").read_text().splitlines()]
        seconds = sum(step["train/tokens"] / step["train/tokens_per_second"] for step in steps_made)
        model, tokenizer = minift.load(Path(work, "run"), task="complete")
        given = minift.EvalConfig(data=str(Path(work, "valid.txt")), task="complete", max_length=BLOCK + 1)
        return {"seconds": seconds, "loss": minift.evaluate(model, tokenizer, given)["loss"]}


def call(line: str, folder: str) -> None:
    """`minift LINE` in a folder."""
    subprocess.run([sys.executable, "-m", "minift", *line.split()], cwd=folder, check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--steps", type=int, default=2000, help="(default %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="of each engine (default %(default)s)")
    p.add_argument("--engines", default=",".join(ENGINES), help="what to run (default %(default)s)")
    a = parse(p, steps=WARMUP + 10, rounds=1, engines="minift,plain")
    text = (a.assets / "data/tinyshakespeare/input.txt").read_text()
    if a.quick:
        text = text[:50_000]
    cut = len(text) * 9 // 10
    if a.here:
        engine = a.here["engine"]
        given = text[:cut], text[cut:], a.steps
        print(json.dumps(run_minift(ENGINES[engine], *given) if ENGINES[engine] else run_plain(*given)))
        return
    found: dict[str, list[dict]] = {engine: [] for engine in a.engines.split(",")}
    for _ in range(a.rounds):
        for engine, runs in found.items():
            runs.append(told({"engine": engine} | fresh({"engine": engine})))
    lines = []
    for engine, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        loss = statistics.median(run["loss"] for run in runs)
        lines.append([engine, f"{loss:.3f}", f"{seconds:.1f}", f"{1e3 * seconds / a.steps:.1f}"])
    shown = table(["engine", "validation loss", "seconds", "ms a step"], lines)
    print(shown)
    if a.write:
        title = "A GPT-2 of 4 layers x 128 on tinyshakespeare's characters"
        rows = [run for runs in found.values() for run in runs]
        write_section(a.write, "chars", title, command(p, a), rows, shown)


if __name__ == "__main__":
    main()
