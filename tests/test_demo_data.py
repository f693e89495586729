"""The data that minift brings along, minift/demo/data: what its README says of them is so.

Alone: pytest tests/test_demo_data.py
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from folders import read_passages

import minift

DATA = Path(minift.__file__).parent / "demo" / "data"

# ---- reviews

REVIEWS = {"reviews.train.jsonl": 440, "reviews.test.jsonl": 160}  # file: its number of reviews


def read_reviews(name: str) -> list[dict]:
    """The rows of a file; its lines have to end in a line feed alone."""
    content = (DATA / name).read_bytes()
    assert b"\r" not in content and content.endswith(b"\n")
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def runs_of_words(text: str, length: int = 6) -> set[tuple[str, ...]]:
    """Every run of so many words; a shorter text is one run."""
    found = words_of(text)
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
    lengths = [len(words_of(text)) for text in texts]
    assert min(lengths) >= 4 and max(lengths) <= 61
    assert 18 <= median(lengths) <= 22


@pytest.mark.parametrize("name", REVIEWS)
def test_reviews_do_not_tell_their_label_by_length_or_opening(name):
    rows = read_reviews(name)
    openings = Counter(tuple(words_of(row["text"])[:2]) for row in rows)
    assert max(openings.values()) <= 0.03 * len(rows)
    positive = [len(words_of(row["text"])) for row in rows if row["label"] == "positive"]
    negative = [len(words_of(row["text"])) for row in rows if row["label"] == "negative"]
    assert abs(sum(positive) - sum(negative)) < 0.05 * sum(positive + negative)


def test_reviews_share_no_six_words():
    seen = {}
    for name in REVIEWS:
        for row in read_reviews(name):
            for run in runs_of_words(row["text"]):
                assert run not in seen, f"{seen.get(run)!r} and {row['text']!r}"
                seen[run] = row["text"]


# ---- prompts

PROMPTS = {"train": 360, "test": 90}  # lines of each file
GENRES = "drama|comedy|thriller|horror film|western|documentary|romance|war film|musical|science fiction film"
GENRES += "|family film|crime film|cartoon|mystery|adventure"
PROMPT = re.compile(rf"Film: (an?) ({GENRES}) about ([a-z' -]+)\. Stars: ([1-5])\.\nReview:")
COMPLETION = re.compile(r" [A-Z][A-Za-z',-]*( [A-Za-z',-]+)*\.( [A-Z][A-Za-z',-]*( [A-Za-z',-]+)*\.)?")  # 1-2 sentences
# words that prompt and completion share by chance
PLAIN = set("film and the that who with from for her his not was has one two three on in at no all over".split())


def prompt_rows(part: str) -> list[dict]:
    text = (DATA / f"prompts.{part}.jsonl").read_bytes().decode("utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def facts(row: dict) -> tuple[str, str, str, int]:
    """Article, genre, subject and stars of a prompt."""
    article, genre, subject, stars = PROMPT.fullmatch(row["prompt"]).groups()
    return article, genre, subject, int(stars)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z'-]+", text.lower())


def stems(text: str) -> set[str]:
    """The first four letters of each word that says something, so that baker and bakery are one."""
    found = [word.removesuffix("'s") for word in words(text)]
    return {word[:4] for word in found if len(word) >= 3 and word not in PLAIN}


@pytest.fixture(scope="module")
def all_prompts():
    return prompt_rows("train") + prompt_rows("test")


@pytest.mark.parametrize("part", PROMPTS)
def test_prompts_are_lines_that_minift_reads(part):
    path = DATA / f"prompts.{part}.jsonl"
    assert len(read_passages(path)) == PROMPTS[part]
    assert b"\r" not in path.read_bytes() and path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("part", PROMPTS)
def test_prompts_have_one_form(part):
    for row in prompt_rows(part):
        assert list(row) == ["prompt", "completion"]
        assert PROMPT.fullmatch(row["prompt"]), row
        assert COMPLETION.fullmatch(row["completion"]), row
        assert 12 <= len(words(row["completion"])) <= 35, row
        article, genre, _, _ = facts(row)
        assert article == ("an" if genre == "adventure" else "a")


@pytest.mark.parametrize("part", PROMPTS)
def test_prompts_are_balanced(part):
    """Every number of stars is as frequent as any other, every genre too, and each genre has each number of stars."""
    rows = [facts(row) for row in prompt_rows(part)]
    assert set(Counter(stars for *_, stars in rows).values()) == {PROMPTS[part] // 5}
    assert set(Counter(genre for _, genre, *_ in rows).values()) == {PROMPTS[part] // 15}
    assert len({(genre, stars) for _, genre, _, stars in rows}) == 15 * 5


def test_prompts_have_a_subject_each(all_prompts):
    """So no subject of the test file is known from the training file."""
    subjects = [facts(row)[2] for row in all_prompts]
    assert [subject for subject, count in Counter(subjects).items() if count > 1] == []


def test_prompts_completions_speak_of_their_film(all_prompts):
    """A word of genre or subject comes back, up to its ending."""
    for row in all_prompts:
        _, genre, subject, _ = facts(row)
        assert stems(f"{genre} {subject}") & stems(row["completion"]), row


def test_prompts_completions_share_no_seven_words(all_prompts):
    """No two of them follow a template; nor does one word open too many."""
    seen = {}
    for number, row in enumerate(all_prompts):
        said = words(row["completion"])
        for start in range(len(said) - 6):
            run = tuple(said[start : start + 7])
            assert seen.setdefault(run, number) == number, " ".join(run)
    openings = Counter(tuple(words(row["completion"])[:2]) for row in all_prompts)
    assert openings.most_common(1)[0][1] <= len(all_prompts) // 50


def test_prompts_completions_go_with_their_stars(all_prompts):
    """More stars, more words of praise and fewer words of blame: their difference grows with every star."""
    praise = "wonderful superb brilliant perfect amazing great lovely beautiful good excellent charming fine loved"
    blame = "awful terrible horrible dreadful worst stupid weak dull boring bad tired slow thin"
    balance = Counter()
    for row in all_prompts:
        said = words(row["completion"])
        stars = facts(row)[3]
        balance[stars] += sum(word in praise.split() for word in said)
        balance[stars] -= sum(word in blame.split() for word in said)
    assert all(balance[fewer] < balance[more] for fewer, more in pairwise(range(1, 6))), balance
