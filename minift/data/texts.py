"""Files -> plain texts, whatever else stands in them: running text, or the texts of examples without their labels."""

from pathlib import Path

from ..config import LONGEST
from .examples import Example, Stream, stream_examples
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


def text_of(example: Example | Passage) -> str:
    """Its text alone."""
    if isinstance(example, Example):
        return example.text
    return "".join(text for text, _ in example.parts)
