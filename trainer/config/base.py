"""What all sections of settings have in common."""

from __future__ import annotations

import json
import shutil
import textwrap
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

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


def settings_help(settings: type[Section]) -> str:
    """Every setting with its type or choices, its default and its sentence, grouped by section: for `--help`."""
    groups: dict[str, list[tuple[str, str]]] = {"": []}
    for name, field in settings.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            groups[f"{name}:\n"] = [_explained(f"{name}.{key}", each) for key, each in inner.model_fields.items()]
        else:
            groups[""].append(_explained(name, field))
    return "\n\n".join(title + listing(explained) for title, explained in groups.items())


def _explained(name: str, field: FieldInfo) -> tuple[str, str]:
    """`optim.name  adam|adamw|lion (default: adamw)`, and the sentence."""
    default = "required" if field.is_required() else f"default: {_yaml(field.get_default(call_default_factory=True))}"
    return f"{name}  {_type_name(field.annotation)} ({default})", " ".join((field.description or "").split())


def _yaml(value: Any) -> str:
    return value or '""' if isinstance(value, str) else json.dumps(value, default=str)


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(map(_type_name, inner)))
    names = {type(None): "null", Path: "path", str: "string", tuple: "list", list: "list"}
    return names.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))
