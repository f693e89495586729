"""Makes the models that ship with minift, from text alone: `python benchmarks/builtin.py bert-nano --imdb FOLDER`.

    FOLDER      unsup.txt.gz, 50,000 film reviews without labels, one a line (Maas et al. 2011); and train.jsonl.gz and
                test.jsonl.gz, whose reviews are left out, so that they can still be learned from and tested on
    --work      where text, tokenizer and run go; a run that was stopped there goes on
    --publish   writes minift/demo/models/NAME from the run in --work, and trains nothing

The commands below are all there is to it: text written out, `minift new`, `minift train`, weights in 16 bits.
"""

import argparse
import datetime
import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HELD_OUT = 1000  # reviews, the last ones
MODELS = Path(__file__).parents[1] / "minift" / "demo" / "models"

# what each is made by: "text" is what the reviews are written out to, "train" its trainings, each from where the one
# before ended. From long texts a BERT learns nothing but how frequent words are for a long time (LOG.md, 2026-11-26).
# From ten tokens at a time it soon learns to look at the neighbours; it finds them in longer texts too, where positions
# began as sines.
RECIPES = {
    "bert-nano": {
        "text": "jsonl",
        "new": "--family bert --lowercase --vocab 8192 --width 192 --layers 4 --heads 3 --positions 512",
        "start": "--model start --task fill",
        "train": [
            "--max-length 10 --batch 400 --steps 800 --limit 5000 --seed 1",
            "--max-length 24 --batch 170 --steps 800 --limit 8000 --seed 2",
            "--max-length 64 --batch 128 --steps 1000 --limit 20000 --seed 3",
            "--max-length 160 --batch 64 --steps 1400 --seed 4",
            "--max-length 512 --batch 32 --steps 4000 --seed 5 --schedule cosine",
        ],
        "always": "--lr 4e-3 --beta2 0.98 --warmup 20 --schedule constant",
    },
    "gpt2-nano": {
        "text": "txt",
        "new": "--family gpt2 --vocab 4096 --width 192 --layers 4 --heads 3 --positions 256",
        "start": "--model new --init random --task complete",
        "train": ["--max-length 256 --batch 64 --steps 2000"],
        "always": "--lr 8e-3 --beta2 0.95 --warmup 100 --schedule cosine",
    },
}
ALWAYS = (
    "--optimizer muon --weight-decay 0.1 --dropout 0 --precision auto --tokens 4096 --eval-every 200 --save-every 200"
)
STD = 0.05  # of the weights that BERT starts from, and the height of its sines


def reviews(folder: Path) -> list[str]:
    """The unlabelled reviews, each once, without those that are among the labelled ones too."""
    labelled = set()
    for name in ("train.jsonl.gz", "test.jsonl.gz"):
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            labelled |= {json.loads(line)["text"].strip() for line in file}
    with gzip.open(folder / "unsup.txt.gz", "rt", encoding="utf-8") as file:
        found = dict.fromkeys(line.strip() for line in file)
    return [text for text in found if text and text not in labelled]


def write_text(texts: list[str], kind: str, path: Path) -> None:
    """Running text with an end after each review, or a JSON object a line. <br /> was a line end on the web page."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text in texts:
            text = re.sub(r"\s*(<br />\s*)+", "\n", text).strip()
            if kind == "txt":
                file.write(text + "\n<|endoftext|>")
            else:
                file.write(json.dumps({"text": text.replace("\n", " ")}, ensure_ascii=False) + "\n")


def make(name: str, imdb: Path, work: Path) -> None:
    """Everything up to the trained model, in `work`/run-N/last of its last training."""
    recipe = RECIPES[name]
    kind = recipe["text"]
    work.mkdir(parents=True, exist_ok=True)
    if not (work / f"valid.{kind}").exists():
        texts = reviews(imdb)
        write_text(texts[:-HELD_OUT], kind, work / f"train.{kind}")
        write_text(texts[-HELD_OUT:], kind, work / f"valid.{kind}")
    if not (work / "new").exists():
        minift(f"new --data train.{kind} --out new {recipe['new']}", work)
    if name == "bert-nano" and not (work / "start").exists():
        write_start(work / "new", work / "start")
    for number, command in enumerate(train_commands(name), 1):
        if (work / f"run-{number}" / "last").exists():
            continue
        if (work / f"run-{number}" / "checkpoints").exists():
            command = f"train --resume --out run-{number}"
        minift(command, work)


def train_commands(name: str) -> list[str]:
    """What trains it, in its working folder."""
    recipe = RECIPES[name]
    kind = recipe["text"]
    commands = []
    start = recipe["start"]
    for number, options in enumerate(recipe["train"], 1):
        data = f"--data train.{kind} --valid valid.{kind} --out run-{number}"
        commands.append(f"train {start} {data} {ALWAYS} {recipe['always']} {options}")
        start = f"--model run-{number}/last --task {start.rpartition(' ')[2]}"
    return commands


def write_start(new: Path, out: Path) -> None:
    """The weights that BERT starts from: drawn, and positions as sines (Vaswani et al., https://arxiv.org/abs/1706.03762)."""
    from minift import load, save

    model, tokenizer = load(new, task="fill", init="random")
    positions = model.body.embeddings.position.weight
    count, width = positions.shape
    angles = torch.arange(count)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(STD / model.config.initializer_range)
        positions[:, 0::2] = STD * angles.sin()
        positions[:, 1::2] = STD * angles.cos()
    save(model, tokenizer, out)


def publish(name: str, work: Path) -> None:
    """Writes minift/demo/models/NAME: the trained weights in 16 bits, config.json, the tokenizer, and a card."""
    from minift import EvalConfig, evaluate, load

    last = work / f"run-{len(RECIPES[name]['train'])}" / "last"
    out = MODELS / name
    out.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.half() for key, tensor in load_file(last / "model.safetensors").items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((last / "config.json").read_text()) | {"dtype": "float16"}
    settings.pop("minift", None)
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((last / file).read_bytes())
    task = RECIPES[name]["start"].rpartition(" ")[2]
    model, tokenizer = load(out, task=task)
    held_out = evaluate(model, tokenizer, EvalConfig(data=str(work / f"valid.{RECIPES[name]['text']}")))
    (out / "README.md").write_text(card(name, work, held_out, model.size()))


def card(name: str, work: Path, held_out: dict, size: int) -> str:
    """What stands beside a model: where it comes from, how it was made, how it learned, what it is for."""
    recipe = RECIPES[name]
    commands = [f"minift new --data train.{recipe['text']} --out new {recipe['new']}"]
    commands += [f"minift {command}" for command in train_commands(name)]
    rows = []
    for number in range(1, len(recipe["train"]) + 1):
        lines = (work / f"run-{number}" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["train/loss"] for line in lines]
        tokens = sum(json.loads(line)["train/tokens"] for line in lines)
        marks = [losses[max(0, i - 20) : i] for i in range(20, len(losses) + 1, max(1, len(losses) // 6))]
        curve = ", ".join(f"{sum(mark) / len(mark):.2f}" for mark in marks)
        rows.append(f"| {number} | {len(losses):,} | {tokens / 1e6:.1f} | {curve} |")
    told = ", ".join(f"{key} {value:.4g}" for key, value in held_out.items() if isinstance(value, float))
    return CARD.format(
        name=name,
        size=f"{size:,}",
        commands="\n".join(commands),
        rows="\n".join(rows),
        held_out=told,
        date=datetime.date.today(),
        torch=torch.__version__.partition("+")[0],
        can=CAN[name],
    )


CAN = {
    "bert-nano": (
        "It is there to be fine-tuned: for the demo, for tests, for trying a new adapter in seconds. It knows the "
        "English of film reviews and little else, reads no capitals, and takes 512 tokens at most."
    ),
    "gpt2-nano": (
        "It is there to be fine-tuned: for the demo, for tests, for trying a new adapter in seconds. On its own it "
        "writes sentences as in film reviews, seldom with a thought behind them; what it says of persons and films is "
        "made up. It takes 256 tokens at most."
    ),
}
CARD = """# {name}

{size} weights, made by minift from random numbers, {date}, torch {torch}.

**Data**: the 50,000 unlabelled reviews of the Large Movie Review Dataset (Maas et al. 2011,
https://ai.stanford.edu/~amaas/data/sentiment/), published for research without a licence of its own; those that are
among the labelled reviews too were left out, and the last 1,000 held out. None of their text is in this folder.

**Made by** `python benchmarks/builtin.py {name}`, which writes the reviews to a file and runs

```sh
{commands}
```

**Loss in training** (means of 20 steps, from the first to the last):

| training | steps | million tokens | loss |
|---|---|---|---|
{rows}

**On the held-out reviews**: {held_out}.

**What it can do**: {can}
"""


def minift(arguments: str, folder: Path) -> None:
    """Runs a command of minift in a folder."""
    print(f"minift {arguments}", flush=True)
    subprocess.run([sys.executable, "-m", "minift", *shlex.split(arguments)], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--imdb", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    if options.publish:
        publish(options.model, options.work)
    else:
        make(options.model, options.imdb, options.work)


if __name__ == "__main__":
    main()
