"""Messages of errors: foreign text cannot control the terminal."""

from __future__ import annotations

import os

import pytest

from shards.errors import UserError, errors_as_corrupt, printable, quote


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


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (r"C:\photos\new-1.png", r"C:\photos\new-1.png"),
        (r"C:\my photos", r'"C:\my photos"'),
        ("my photos\\", r'"my photos\\"'),
        ("it's", '"it\'s"'),
        ("numpy>=2.1", '"numpy>=2.1"'),
        ("a&b|c^d<e", '"a&b|c^d<e"'),
        ("", '""'),
        ("-x", "./-x"),
    ],
)
def test_words_are_quoted_as_the_shells_of_windows_read_them(
    monkeypatch: pytest.MonkeyPatch, word: str, expected: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        quoted = quote(word)
    assert quoted == expected


def test_a_limit_of_threads_is_no_damage() -> None:
    with pytest.raises(RuntimeError), errors_as_corrupt("shard", "none"):
        raise RuntimeError("can't start new thread")
