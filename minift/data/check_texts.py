"""What a file of labelled texts should hold, for check.py: everything that training reads, and two classes or more."""

from collections.abc import Iterator
from pathlib import Path

from .check import Checks, Findings, Item, Lengths, Seen, repeated
from .columns import parse_columns
from .examples import labelled_rows, make_example
from .tokenizer import Tokenizer


def read(path: Path, columns: str, header: str, findings: Findings, most: int) -> Iterator[Item]:
    """What read_examples() reads."""
    wanted = parse_columns(columns, need_label=True, header=header)
    findings.form = "classes"
    for number, (where, fields) in enumerate(labelled_rows(path, wanted, findings, most), 1):
        example = make_example(where, fields, wanted, findings)
        if example is None or findings.where == where:  # a line that is not UTF-8 is told and then read all the same
            continue
        line = number if path.is_dir() else int(where.rpartition(":")[2])
        texts = [example.text] if example.pair is None else [example.text, example.pair]
        yield Item(line, [(text, False) for text in texts], "\n".join(texts), str(example.label))


def count(batch: list[Item], tokenizer: Tokenizer, lengths: Lengths) -> None:
    """Text and pair make one sequence, with the special tokens."""
    texts = [item.parts[0][0] for item in batch]
    pairs = [item.parts[1][0] if len(item.parts) > 1 else None for item in batch]
    for tokens in tokenizer.encode(texts, pairs):
        lengths.add([(len(tokens.ids), False)])


def repeats(seen: Seen, unit: str) -> Iterator[str]:
    """One text with two labels."""
    before, these = repeated(seen.prompts, seen.completions)
    if len(these):
        first = f"{unit}s {seen.lines[before[0]]} and {seen.lines[these[0]]}"
        yield f"same text, different labels: {len(these):,} (first: {first})"


CHECKS = Checks(read, count, repeats, prompts="texts", classes=True)
