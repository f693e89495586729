"""What the models that ship with minift are worth: `python benchmarks/nano.py --write benchmarks/RESULTS.md`

reviews     builtin:bert-nano fine-tuned on 2,000 IMDB reviews and tested on 2,000 others; the same model from random
            weights, by the same options and by those that are best for it; logistic regression on tf-idf of words and
            pairs of words, its C by cross-validation. Each seed draws its own reviews, the same for all; the models
            read 512 tokens of one.
text        builtin:gpt2-nano's perplexity on 1,000 test reviews, and that of a modified Kneser-Ney 5-gram model of the
            same tokens (ngrams.py), counted on the text that gpt2-nano was made from. Each seed draws its own reviews.

Learning rates and epochs were chosen on a thousand other training reviews (LOG.md, 2026-11-26). The pretraining text
has none of these reviews: builtin.py leaves out what is among the labelled ones.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from builtin import HELD_OUT, reviews, write_text
from common import command, make_parser, parse, read_rows, table, told, write_rows, write_section
from ngrams import kneser_ney, perplexity

import minift

TRAIN, TEST, TEXTS = 2000, 2000, 1000
FINE_TUNED = "--precision auto --batch 16 --epochs 4 --lr 5e-4 --optimizer muon"
FROM_RANDOM = "--precision auto --batch 16 --epochs 6 --lr 2e-4"
QUICK = "--precision auto --batch 16 --epochs 1 --max-length 64 --lr 5e-4"


def seeds_of(a: argparse.Namespace) -> list[int]:
    return [int(seed) for seed in a.seeds.split(",")]


def balanced(rows: list[dict], n: int, seed: int) -> list[dict]:
    """n of the rows at random, as many of each label."""
    rng = random.Random(seed)
    found = []
    for label in (0, 1):
        found += rng.sample([row for row in rows if row["label"] == label], n // 2)
    rng.shuffle(found)
    return found


def fine_tuned(options: str, train: Path, test: Path, out: Path, seed: int) -> float:
    """Accuracy of builtin:bert-nano after a training."""
    words = f"train --model builtin:bert-nano {options} --seed {seed} --data {train} --out {out}"
    subprocess.run([sys.executable, "-m", "minift", *words.split()], check=True, stderr=subprocess.DEVNULL)
    model, tokenizer = minift.load(out, task="classify", fresh_head=False)
    return minift.evaluate(model, tokenizer, minift.EvalConfig(data=str(test)))["accuracy"]


def regression(train: list[dict], test: list[dict]) -> float:
    """Accuracy of logistic regression on words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    x = features.fit_transform([row["text"] for row in train])
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": [1, 10, 100, 1000]}, cv=5)
    search.fit(x, [row["label"] for row in train])
    return search.score(features.transform([row["text"] for row in test]), [row["label"] for row in test])


def on_reviews(a: argparse.Namespace, work: Path) -> list[dict]:
    """Accuracies of the three, seed by seed."""
    every, tests = read_rows(a.assets, "imdb"), read_rows(a.assets, "imdb", "test")
    found = []
    for seed in seeds_of(a):
        train, test = balanced(every, a.train, seed), balanced(tests, a.test, seed)
        files = [write_rows(work / f"{name}-{seed}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
        accuracies = {
            "bert-nano, fine-tuned": fine_tuned(a.fine_tuned, *files, work / f"fine-tuned-{seed}", seed),
            "from random weights, the same options": fine_tuned(
                a.fine_tuned + " --init random", *files, work / f"random-{seed}", seed
            ),
            "from random weights, its own options": fine_tuned(
                a.from_random + " --init random", *files, work / f"own-{seed}", seed
            ),
            "logistic regression, words and pairs": regression(train, test),
        }
        found += [told({"what": what, "seed": seed, "accuracy": value}) for what, value in accuracies.items()]
    return found


def stream(tokenizer, texts: list[str], work: Path) -> np.ndarray:
    """The tokens of texts, one after the other with an end between, as gpt2-nano reads them."""
    path = work / "text.txt"
    write_text(texts, "txt", path)
    whole = path.read_text(encoding="utf-8")
    pieces = [piece + "<|endoftext|>" for piece in whole.split("<|endoftext|>") if piece]
    return np.concatenate([np.array(found.ids, np.int64) for found in tokenizer.encode(pieces, special=False)])


def on_text(a: argparse.Namespace, work: Path) -> list[dict]:
    """Perplexities of the two, seed by seed."""
    model, tokenizer = minift.load("builtin:gpt2-nano", task="complete")
    learned = reviews(a.assets / "data/imdb")[:-HELD_OUT]
    if a.quick:
        learned = learned[:500]
    orders = kneser_ney(stream(tokenizer, learned, work), 5)
    tests = [row["text"] for row in read_rows(a.assets, "imdb", "test")]
    found = []
    for seed in seeds_of(a):
        texts = random.Random(seed).sample(tests, a.texts)
        path = work / f"held-out-{seed}.txt"
        write_text(texts, "txt", path)
        ours = minift.evaluate(model, tokenizer, minift.EvalConfig(data=str(path), task="complete"))["perplexity"]
        theirs = perplexity(orders, stream(tokenizer, texts, work))
        found.append(told({"what": "gpt2-nano", "seed": seed, "perplexity": ours}))
        found.append(told({"what": "Kneser-Ney, 5 tokens", "seed": seed, "perplexity": theirs}))
    return found


def lines(found: list[dict], measure: str, form: str) -> list[list[str]]:
    """A line of the table for each of those compared."""
    made = []
    for what in dict.fromkeys(row["what"] for row in found):
        values = [row[measure] for row in found if row["what"] == what]
        made.append([what, measure, *(format(v, form) for v in (*values, statistics.mean(values)))])
    return made


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--train", type=int, default=TRAIN, help="reviews (default %(default)s)")
    p.add_argument("--test", type=int, default=TEST, help="reviews (default %(default)s)")
    p.add_argument("--fine-tuned", default=FINE_TUNED, help="options of the training (default %(default)s)")
    p.add_argument("--from-random", default=FROM_RANDOM, help="the same (default %(default)s)")
    p.add_argument("--texts", type=int, default=TEXTS, help="reviews to read (default %(default)s)")
    p.add_argument("--seeds", default="1,2,3")
    a = parse(p, train=64, test=32, texts=20, seeds="1", fine_tuned=QUICK, from_random=QUICK)
    with tempfile.TemporaryDirectory() as work:
        on_both = on_reviews(a, Path(work)), on_text(a, Path(work))
    rows = lines(on_both[0], "accuracy", ".1%") + lines(on_both[1], "perplexity", ".1f")
    columns = ["what", "measure", *(f"seed {seed}" for seed in seeds_of(a)), "mean"]
    found = table(columns, rows, left=2)
    print(found)
    if a.write:
        text = f"Fine-tuned: {a.fine_tuned}; from random weights: {a.from_random}.\n\n{found}"
        write_section(a.write, "nano", "The models that ship with minift", command(p, a), sum(on_both, []), text)


if __name__ == "__main__":
    main()
