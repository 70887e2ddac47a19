"""The base class of all sections of settings, and their description for `--help` and the documentation."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

from shards.credentials import hide


class BaseConfig(BaseModel):
    """A section of settings: immutable, without unknown keys, each field described by the string below it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, content: Any) -> Any:
        """Hide credentials. YAML reads a section whose lines are all commented out (`mixup:`) as None."""
        return {} if content is None else hide(content)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `config` (a path) and `overrides` (a list of key=value)."""
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="YAML file, or the name of a recipe in configs/ (quickstart)")
    add("overrides", nargs="*", default=[], metavar="key=value", help="replace settings of the file")


def iterate_fields(config: type[BaseConfig], prefix: str = "") -> Iterable[tuple[str, FieldInfo]]:
    """Yield the dotted name and the field of every setting, including those of inner sections."""
    for name, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseConfig):
            yield from iterate_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def describe_settings(config: type[BaseConfig]) -> dict[str, str]:
    """Return the description of every setting by its dotted name."""
    return {name: " ".join((field.description or "").split()) for name, field in iterate_fields(config)}


def type_and_default(field: FieldInfo) -> tuple[str, str]:
    """Return the type or choices of a setting, and its default as typed on the command line ("" if required)."""
    default = "" if field.is_required() else _as_typed(field.get_default(call_default_factory=True))
    return _type_name(field.annotation), default


def settings_help(config: type[BaseConfig]) -> str:
    """Format every setting with its type, default and description for `--help`.

    The settings are grouped by section and wrapped at the width of the terminal.
    """
    width = shutil.get_terminal_size().columns - 2  # as argparse does
    indent = " " * 6
    descriptions = describe_settings(config)
    groups: dict[str, list[str]] = {}
    for name, field in iterate_fields(config):
        kind, default = type_and_default(field)
        title = f"  {name}  {kind} ({f'default: {default}' if default else 'required'})"
        text = textwrap.fill(descriptions[name], width, initial_indent=indent, subsequent_indent=indent)
        groups.setdefault(name.rpartition(".")[0], []).append(f"{title}\n{text}")
    return "\n\n".join(
        (f"{section}:\n" if section else "") + "\n".join(settings) for section, settings in groups.items()
    )


def _as_typed(value: Any) -> str:
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
