"""What is said to a user: the error for bad input, and text from outside made safe to show."""


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
