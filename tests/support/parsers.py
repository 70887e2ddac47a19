"""The parsers of commands."""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import cache
from typing import Any

import pytest


class _Parser(Exception):
    """Carries the parser of a command out of its main function."""


@cache
def parser_of(module: str) -> argparse.ArgumentParser:
    """The real parser of a command."""

    def stop(self: argparse.ArgumentParser, *_: Any) -> None:
        raise _Parser(self)

    loaded: Any = importlib.import_module(module)
    if hasattr(loaded, "__path__"):
        loaded = importlib.import_module(f"{module}.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module])
        for name in ("parse_args", "parse_intermixed_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(_Parser) as caught:
            loaded.main()
    return caught.value.args[0]
