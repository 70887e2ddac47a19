"""Command-line values that several benchmarks parse.

Measured processes import the scripts, so this module imports nothing heavy.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from shards.errors import UserError
from shards.manifest import Manifest

DEFAULT_OUT = Path("benchmarks/out")

_N = TypeVar("_N", int, float)


def add_shards_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument `shards`, a text or None, for `choose_set`."""
    description = "packed data set, a directory or an address (default: packed EMNIST ByClass if present, else digits)"
    parser.add_argument("--shards", metavar="DIR", help=description)


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument `out`, a path."""
    description = f"output directory (default: {DEFAULT_OUT})"
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=description)


def positive(kind: type[_N], at_least: _N | None = None) -> Callable[[str], _N]:
    """Return an argparse type for finite numbers above 0, or from `at_least`."""

    def parse(text: str) -> _N:
        number = kind(text)
        if not 0 < number < float("inf") or (at_least is not None and number < at_least):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above 0' if at_least is None else f'{at_least} or more'}"
            )
        return number

    parse.__name__ = kind.__name__  # argparse names the type in its errors
    return parse


def parse_numbers(
    option: str,
    text: str,
    kind: type[_N],
    expected: str,
    example: str,
    lowest: float = 0,
    highest: float = float("inf"),
) -> list[_N]:
    """Parse comma-separated numbers above 0 and drop repetitions.

    Args:
        option: Option that the text belongs to.
        text: Value of the option.
        kind: `int` or `float`.
        expected: Description of valid values.
        example: Valid value, for the hint.
        lowest: Smallest valid number.
        highest: Largest valid number; infinity is never valid.

    Raises:
        UserError: The text is not such a list.
    """
    try:
        numbers = [kind(word) for word in text.split(",")]
        if not all(0 < number < float("inf") and lowest <= number <= highest for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(found=f"{option} {text}", expected=expected, hint=f"{option} {example}") from None
    return list(dict.fromkeys(numbers))


def select_names(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Parse comma-separated names; None selects all known ones.

    Raises:
        UserError: A name is unknown.
    """
    known = list(known)
    names = known if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                found=f"{option} {name}",
                expected=f"one or more of {', '.join(known)}",
                hint=f"did you mean {close[0]}?" if close else f"omit {option} to run all",
            )
    return list(dict.fromkeys(names))


def fraction_of(images: int | None, shards: Path) -> float:
    """Fraction of the training split that makes up `images` images; 1 for None."""
    return min(1.0, images / Manifest.read(shards / "train").samples) if images else 1.0
