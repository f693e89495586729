"""The built-in data sets, minift/demo/data: what its README says of them is so.

python -m pytest tests/test_demo_data.py
"""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

DATA = Path(__file__).parents[1] / "minift" / "demo" / "data"
REVIEWS = {"reviews.train.jsonl": 440, "reviews.test.jsonl": 160}  # file: its number of reviews


def read_reviews(name: str) -> list[dict]:
    """The rows of a file; its lines have to end in a line feed alone."""
    content = (DATA / name).read_bytes()
    assert b"\r" not in content and content.endswith(b"\n")
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def runs_of_words(text: str, length: int = 6) -> set[tuple[str, ...]]:
    """Every run of so many words; a shorter text is one run."""
    found = words(text)
    last = max(len(found) - length, 0)
    return {tuple(found[start : start + length]) for start in range(last + 1)}


@pytest.mark.parametrize("name, count", REVIEWS.items())
def test_reviews_are_counted_and_balanced(name, count):
    rows = read_reviews(name)
    assert all(list(row) == ["text", "label"] for row in rows)
    labels = Counter(row["label"] for row in rows)
    assert labels == {"positive": count // 2, "negative": count // 2}


@pytest.mark.parametrize("name", REVIEWS)
def test_reviews_are_plain_text_of_many_lengths(name):
    texts = [row["text"] for row in read_reviews(name)]
    for text in texts:
        assert re.fullmatch(r"[A-Za-z0-9 .,:;!?'-]+", text), text
        assert text == " ".join(text.split()), text
    lengths = [len(words(text)) for text in texts]
    assert min(lengths) >= 4 and max(lengths) <= 61
    assert 18 <= median(lengths) <= 22


@pytest.mark.parametrize("name", REVIEWS)
def test_reviews_do_not_tell_their_label_by_length_or_opening(name):
    rows = read_reviews(name)
    openings = Counter(tuple(words(row["text"])[:2]) for row in rows)
    assert max(openings.values()) <= 0.03 * len(rows)
    positive = [len(words(row["text"])) for row in rows if row["label"] == "positive"]
    negative = [len(words(row["text"])) for row in rows if row["label"] == "negative"]
    assert abs(sum(positive) - sum(negative)) < 0.05 * sum(positive + negative)


def test_reviews_share_no_six_words():
    seen = {}
    for name in REVIEWS:
        for row in read_reviews(name):
            for run in runs_of_words(row["text"]):
                assert run not in seen, f"{seen.get(run)!r} and {row['text']!r}"
                seen[run] = row["text"]
