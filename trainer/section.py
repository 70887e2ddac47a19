"""What all sections of settings have in common."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_all_defaults(cls, content: Any) -> Any:
        """A section without settings (`mixup:`, all of it commented out) is None in YAML."""
        return {} if content is None else content


def described(settings: type[Section]) -> list[tuple[str, str]]:
    """Every setting's name, dotted where it stands in a section, and the sentence about it."""
    found = []
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += [(f"{name}.{inner}", sentence) for inner, sentence in described(field.annotation)]
        else:
            found.append((name, " ".join((field.description or "").split())))
    return found


def listing(described: Iterable[tuple[str, str]]) -> str:
    """Names, each with its sentence below it, as wide as the terminal: for `--help`."""
    width = shutil.get_terminal_size().columns - 2  # as argparse has it
    indent = " " * 6
    return "\n".join(
        f"  {name}\n{textwrap.fill(sentence, width, initial_indent=indent, subsequent_indent=indent)}"
        for name, sentence in described
    )
