"""What is said to a user: the error for bad input, text from outside made safe to show, and tables."""


class InputError(ValueError):
    """Something wrong with what the user gave (a file, a folder, a checkpoint); the message says what and where."""


def printable(text: str) -> str:
    """`text` as a terminal may show it: what is not printable stands as its escape, as in repr.

    For names, labels and texts that come from files: their control characters would move the cursor or hide words,
    and half a surrogate pair cannot be written at all.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short_repr(value: object) -> str:
    """A value from a file as a message shows it: repr in at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def table_lines(head: tuple[str, ...], rows: list[tuple[str, ...]], sides: str) -> list[str]:
    """The lines of an aligned table, its head first; sides: < or > for each column."""
    rows = [tuple(printable(cell) for cell in row) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{n}}" for cell, side, n in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
