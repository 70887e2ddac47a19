"""Loading of recipes: YAML file and command line to checked settings, with an error and a hint for each mistake."""

from __future__ import annotations

import difflib
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shards.atomic import read_file
from shards.errors import UserError, printable, quote
from shards.manifest import REQUIRED_SPLITS, has_split
from trainer.config.base import describe_settings
from trainer.config.schema import Config

RECIPES = Path(__file__).parents[2] / "configs"
MAX_YAML_BYTES = 100_000  # of a YAML file
_MAX_BRACKETS = 1000
_MAX_EXPANDED = 1_000_000
_MAX_VALUE = 200  # characters of a value in a message
SETTINGS = describe_settings(Config)
"""Description of every setting, by dotted name."""


def load(path: Path, overrides: list[str]) -> Config:
    """Load a recipe with its chain of bases, and apply overrides.

    Args:
        path: YAML file, or the name of a recipe in `configs/`.
        overrides: Settings as `key.key=value`, which replace those of the files.

    Raises:
        UserError: The recipe or a base does not exist, the bases form a circle, or a setting is wrong.
    """
    path = find_recipe(path)
    content = _read_with_bases(path, [])
    for override in overrides:
        apply_override(content, override)
    config = validate(content, f"{path} or the command line" if overrides else str(path))
    if not config.run.name:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": path.stem})})
    return config


def find_recipe(recipe: Path, directory: Path = Path(), source: str = "") -> Path:
    """Return the file of a recipe.

    Args:
        recipe: File relative to `directory`, with or without its suffix, or the name of a recipe in `configs/` of the
            checkout or installation.
        directory: Directory of relative paths.
        source: Where the name comes from, for error messages.

    Raises:
        UserError: There is no such recipe.
    """
    path = directory / recipe
    for candidate in (path, path.with_name(f"{path.name}.yaml"), RECIPES / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    is_run = (path / "config.yaml").is_file()
    if is_run or any(has_split(path, split) for split in ("", *REQUIRED_SPLITS)):
        raise UserError(
            found=f"{recipe}, {'the directory of a run' if is_run else 'a packed data set'}"
            + (f" ({source})" if source else ""),
            expected="a YAML file of settings, or the name of a recipe",
            hint=f"name its settings: {quote(path / 'config.yaml')}"
            if is_run
            else f"name a recipe, for example: quickstart {quote(f'data.shards={recipe}')}",
        )
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    near = difflib.get_close_matches(recipe.stem, names, n=3, cutoff=0.5)
    raise UserError(
        found=f"no recipe {recipe}" + (f" ({source})" if source else ""),
        expected="a YAML file of settings, or the name of a recipe",
        hint=f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(names)}",
    )


def _read_with_bases(path: Path, derived: list[Path]) -> dict[str, Any]:
    """Read a recipe on top of its base. `derived` lists the recipes that led here, the first one first."""
    content = read_yaml(path)
    base = content.pop("base", None)
    if base is None:
        return content
    base_path = find_recipe(Path(str(base)), path.parent, f"base: {base} in {path}")
    chain = [*derived, path.resolve()]
    if base_path.resolve() in chain:
        raise UserError(
            found=f"a circle of bases: {' -> '.join(recipe.stem for recipe in [*chain, base_path])}",
            expected="a chain of bases that ends",
            hint=f"remove base: {base} from {quote(path)}",
        )
    merged = _read_with_bases(base_path, chain)
    for name, value in content.items():
        if isinstance(merged.get(name), dict) and (value is None or isinstance(value, dict)):
            value = merged[name] | (value or {})
        merged[name] = value
    return merged


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, control characters, and aliases that multiply the content."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is not None and _expanded_size(node, {}) > _MAX_EXPANDED:
            raise yaml.YAMLError(f"aliases that expand to more than {_MAX_EXPANDED:,} characters")
        return None if node is None else self.construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if printable(text) != text:
            raise yaml.YAMLError(f"control characters in {text!r}, line {node.start_mark.line + 1}")
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            first = lines.setdefault(key.value, line) if isinstance(key, yaml.ScalarNode) else line
            if first != line:
                raise yaml.YAMLError(f"{key.value} twice, in lines {first} and {line}")
        return super().construct_mapping(node, deep)


# YAML 1.2, unlike 1.1, has numbers without a point or a sign of the exponent (1e-6).
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _expanded_size(node: yaml.Node, sizes: dict[yaml.Node, float]) -> float:
    """Characters and nodes of a value with all aliases written out, infinite for a value that contains itself."""
    if node not in sizes:
        sizes[node] = math.inf
        if isinstance(node, yaml.ScalarNode):
            inner = float(len(node.value))
        else:
            parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            inner = sum(_expanded_size(part, sizes) for part in parts)
        sizes[node] = 1 + inner
    return sizes[node]


def parse_yaml(text: str) -> Any:
    """Parse YAML that someone else may have written, in bounded time and memory.

    Raises:
        ValueError: It is not YAML, too deep, has duplicate keys or control characters, or multiplies its content.
    """
    try:
        if text.count("[") + text.count("{") > _MAX_BRACKETS:  # the scanner takes quadratic time for them
            raise ValueError(f"more than {_MAX_BRACKETS:,} brackets")
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: numbers of thousands of digits, impossible dates
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_yaml(path: Path, example: Path = RECIPES / "quickstart.yaml") -> dict[str, Any]:
    """Read the sections of a YAML file.

    Args:
        path: The file.
        example: A file of the same kind, which error messages refer to.

    Raises:
        UserError: The file does not exist, is not YAML, has a duplicate key or holds no settings.
    """
    hint = f"compare it with {example}"
    try:
        content = parse_yaml(read_file(path, MAX_YAML_BYTES).decode())
    except FileNotFoundError:
        raise UserError(
            found=f"no configuration file {path}",
            expected="a YAML file of settings",
            hint=f"one of {', '.join(map(str, sorted(example.parent.glob('*.yaml'))))}",
        ) from None
    except ValueError as error:
        raise UserError(
            found=f"{path}, which is not YAML: {error}", expected="a YAML file without duplicate keys", hint=hint
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            found=f"{path}, which holds no settings", expected="sections of settings (data, model, ...)", hint=hint
        )
    return content


def validate(content: dict[str, Any], source: str) -> Config:
    """Check nested settings.

    Args:
        content: Settings by section.
        source: Where they come from, for error messages.

    Raises:
        UserError: A setting is unknown, missing or wrong. Only the first such setting is reported.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        raise unknown_setting_error(name, source)
    # Pydantic appends the alternative of a union (`int | None`) to the name of the setting.
    while name not in SETTINGS and name not in Config.model_fields and "." in name:
        name = name.rpartition(".")[0]
    if first["type"] == "missing":
        raise UserError(found=f"no {name} in {source}", expected="a value for it", hint=f"add it, or pass {name}=...")
    reason = first["msg"].removeprefix("Value error, ")
    raise UserError(
        found=f"{name}={_brief(first['input'])}" if name else reason,
        expected=reason[0].lower() + reason[1:] if name else "settings that agree with each other",
        hint=f"{name}: {SETTINGS[name]}" if name in SETTINGS else f"change one of them in {source}",
    )


def _brief(value: Any) -> str:
    try:
        text = str(value)
    except ValueError:  # a number of thousands of digits
        text = f"{value:#x}"
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def replace_settings(config: Config, values: dict[str, Any], source: str) -> Config:
    """Return a configuration with some settings replaced, checked again.

    Args:
        config: The configuration, which does not change.
        values: New values by dotted name.
        source: Where they come from, for error messages.

    Raises:
        UserError: A setting is unknown or a value is wrong.
    """
    content = config.model_dump(mode="json", exclude_unset=True)
    for name, value in values.items():
        _set(content, name, value, source)
    return validate(content, source)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set a nested setting of `content` to the value of an override of the command line, `key.key=value`.

    Raises:
        UserError: The override has another form, or its section is unknown.
    """
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(
            found=f"{override!r}", expected="an override like optim.lr=1e-4", hint="write setting=value, without spaces"
        )
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    _set(content, name, value, "the command line")


def _set(content: dict[str, Any], name: str, value: Any, source: str) -> None:
    *sections, last = name.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise unknown_setting_error(name, source)
    content[last] = value


def unknown_setting_error(name: str, source: str) -> UserError:
    """Return the error for an unknown setting, which suggests the closest known one."""
    last = name.rpartition(".")[2]
    words = last.replace("_", " ")
    near = (
        [setting for setting in SETTINGS if setting.rpartition(".")[2] == last]
        or difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.8)
        # optim.lr, whose description is "Peak learning rate.", for learning_rate
        or [setting for setting, description in SETTINGS.items() if f" {words}." in description]
        or difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
    )
    return UserError(
        found=f"unknown setting {name} in {source}",
        expected="one of the settings listed by python -m trainer.run --help",
        hint=f"did you mean {near[0]}?" if near else "remove it",
    )
