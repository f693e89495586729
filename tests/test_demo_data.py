"""The data that minift brings along: counts, form, balance, and nothing said twice.

Alone: pytest tests/test_demo_data.py
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import minift
from minift.data.passages import read_passages

DATA = Path(minift.__file__).parent / "demo" / "data"

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
