"""Messages of errors: foreign text cannot control the terminal."""

from __future__ import annotations

import pytest

from shards.errors import UserError, errors_as_corrupt, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("é 漢字 ש", "é 漢字 ש"),
        ("山\u3000川\u00a0\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f680", None),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("a\rb\nc\td\x7f\x9b", "a\\rb\\nc\\td\\x7f\\x9b"),
        ("\u202egpj.exe\u2066\u200b", "\\u202egpj.exe\\u2066\\u200b"),
        ("\udcff", "\\udcff"),
    ],
)
def test_control_and_format_characters_are_escaped(text: str, expected: str | None) -> None:
    expected = text if expected is None else expected
    assert printable(text) == expected
    assert printable(expected) == expected


def test_a_message_is_printable_in_every_part() -> None:
    error = UserError(found="one\x1b[1m\n       two\r", expected="\u202e", hint="\x07")
    assert str(error) == "error: one\\x1b[1m\n       two\\r\nexpected: \\u202e\nhint: \\x07"


def test_a_line_of_a_message_has_a_limit() -> None:
    lines = str(UserError("x" * 10**6, "y", "z")).split("\n")
    assert [len(line) for line in lines] == [2003, 11, 7]


def test_a_limit_of_threads_is_no_damage() -> None:
    with pytest.raises(RuntimeError), errors_as_corrupt("shard", "none"):
        raise RuntimeError("can't start new thread")
