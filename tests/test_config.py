"""Alone: pytest tests/test_config.py"""

from hypothesis import given
from hypothesis import strategies as st

from minift.errors import printable


def test_what_a_terminal_would_act_on_is_shown_as_an_escape():
    assert printable("\x1b[31mred\x07 \x9b2J\r\n\t\x7f") == r"\x1b[31mred\x07 \x9b2J\r\n\t\x7f"
    assert printable("a\u202eb\u2028c\ud83dd\udcff\xa0") == r"a\u202eb\u2028c\ud83dd\udcff\xa0"
    assert printable("Füße, 日本語 😀 back\\slash 'quoted'") == "Füße, 日本語 😀 back\\slash 'quoted'"


@given(st.text(st.characters()))
def test_what_is_shown_is_printable_and_has_utf8(text):
    shown = printable(text)
    assert shown.isprintable() and shown.encode().decode() == shown
    assert printable(shown) == shown
