"""Files -> plain texts, whatever else stands in them: running text, or the texts of examples without their labels."""

from collections.abc import Iterator
from pathlib import Path

from ..config import LONGEST
from . import corpus
from .corpus import Piece
from .examples import Example, Stream, examples_from, stream_examples
from .passages import Passage, is_running_text, stream_passages


def stream_texts(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> Stream:
    """Texts to learn a language from: a .txt of running text (passages), or what stream_examples() reads (examples).

    Labels may be absent, and pairs are not read. need_label: of no meaning, since a text is its own answer.
    Raises InputError: file, line, what was found, what was expected.
    """
    if is_running_text(Path(path)):
        return stream_passages(path, columns, True, header, max_line)
    return stream_examples(path, columns, False, header, max_line)


def read_texts(
    path: str | Path, columns: str = "", need_label: bool = True, header: str = "auto", max_line: int = LONGEST
) -> list[Example] | list[Piece]:
    """stream_texts(), all at once; of running text the numbers of its pieces, whose words stay in the file."""
    stream = stream_texts(path, columns, need_label, header, max_line)
    if is_running_text(Path(path)):
        return corpus.read_pieces(stream)
    return list(stream)


def texts_from(rows: list) -> list[Example]:
    """The texts in a list: "a text", or {"text": ...}. Raises InputError."""
    return examples_from(rows, need_label=False)


def text_of(example: Example | Passage) -> str:
    """Its text alone."""
    if isinstance(example, Example):
        return example.text
    return "".join(text for text, _ in example.parts)


def just_texts(path: str | Path, columns: str = "", header: str = "auto", max_line: int = LONGEST) -> Iterator[str]:
    """The texts of a file one after the other, of running text in pieces."""
    for example in stream_texts(path, columns, False, header, max_line):
        yield text_of(example)
