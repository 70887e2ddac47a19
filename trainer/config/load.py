"""From a YAML file and the command line to checked settings; what is wrong becomes a message with a hint."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shards.errors import UserError
from trainer.config.base import described
from trainer.config.schema import Config

_RECIPES = Path(__file__).parents[2] / "configs"
_EXAMPLE = Path("configs/quickstart.yaml")


def load(path: Path, overrides: list[str]) -> Config:
    """Read a recipe with all that it inherits, and apply `key.key=value` overrides.

    Args:
        path: YAML file; its `base` names another recipe, whose settings it replaces or adds to.
        overrides: Settings that replace those of the files.

    Raises:
        UserError: For an unknown base, bases in a circle, and whatever is wrong with the settings.
    """
    content = _inherited(path, [])
    for override in overrides:
        _apply(content, override)
    config = validate(content, f"{path} or the command line" if overrides else str(path))
    if not config.run.name:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": path.stem})})
    return config


def _inherited(path: Path, derived: list[Path]) -> dict[str, Any]:
    """The settings of a recipe on top of those of its base. derived: the recipes that led here, the first one first."""
    content = read(path, [], _EXAMPLE)
    base = content.pop("base", None)
    if base is None:
        return content
    near = path.parent / str(base)
    candidates = (near, near.with_name(f"{near.name}.yaml"), _RECIPES / f"{base}.yaml")
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            found=f"base: {base} in {path}, and no such recipe",
            expected="a file, relative to this one, or the name of a recipe",
            hint=f"one of {', '.join(sorted(recipe.stem for recipe in _RECIPES.glob('*.yaml')))}",
        )
    chain = [*derived, path.resolve()]
    if found.resolve() in chain:
        raise UserError(
            found=f"a circle of bases: {' -> '.join(recipe.stem for recipe in [*chain, found])}",
            expected="a chain of bases that ends",
            hint=f"remove base: {base} from {path}",
        )
    return _merged(_inherited(found, chain), content)


def _merged(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Settings of `base` with those of `content` in their place, section by section; an empty section changes none."""
    merged = dict(base)
    for name, value in content.items():
        if isinstance(base.get(name), dict) and (value is None or isinstance(value, dict)):
            value = base[name] | (value or {})
        merged[name] = value
    return merged


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key that a mapping holds twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            first = lines.setdefault(key.value, line) if isinstance(key, yaml.ScalarNode) else line
            if first != line:
                raise _Duplicate(f"{key.value} twice, in lines {first} and {line}")
        return super().construct_mapping(node, deep)


class _Duplicate(Exception):
    pass


def read(path: Path, overrides: list[str], example: Path) -> dict[str, Any]:
    """The content of a YAML file with `key.key=value` overrides. Raises `UserError` for what is not settings at all.

    example: a file of the same kind, which a user can compare with.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except _Duplicate as error:
        raise UserError(found=f"{path} with {error}", expected="each key once", hint="remove one of them") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(
            found=f"no configuration file {path}",
            expected="a YAML file of settings",
            hint=f"those that come with Inkstream: {', '.join(map(str, sorted(example.parent.glob('*.yaml'))))}",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise UserError(
            found=f"{path}, which is not YAML: {reason}",
            expected="a YAML file of settings",
            hint=f"compare it with {example}",
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            found=f"{path}, which holds no settings",
            expected="sections of settings (data, model, ...)",
            hint=f"compare it with {example}",
        )
    for override in overrides:
        _apply(content, override)
    return content


def validate(content: dict[str, Any], place: str) -> Config:
    """Turn nested settings into a `Config`; the first thing that is wrong becomes a `UserError`."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        # Alternatives of a type (`int | None`) stand behind the setting's own name; they mean nothing to a user.
        known = {name for name, _ in settings()} | set(Config.model_fields)
        name = ".".join(str(part) for part in first["loc"])
        while first["type"] != "extra_forbidden" and name not in known and "." in name:
            name = name.rpartition(".")[0]
        if first["type"] == "extra_forbidden":
            raise unknown_setting(name, place) from None
        if first["type"] == "missing":
            raise UserError(
                found=f"no {name} in {place}", expected="a value for it", hint=f"add it, or pass {name}=..."
            ) from None
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(
            found=f"{name}={first['input']}" if name else reason,
            expected=reason[0].lower() + reason[1:] if name else "settings that agree with each other",
            hint=f"{name}: {dict(settings())[name]}" if name in dict(settings()) else f"change one of them in {place}",
        ) from None


def changed(config: Config, values: dict[str, Any], place: str) -> Config:
    """The same settings with others in some places, by dotted name; checked as `validate` does, and given as in it."""
    content = config.model_dump(mode="json", exclude_unset=True)
    for name, value in values.items():
        *sections, last = name.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise unknown_setting(name, place)
        inner[last] = value
    return validate(content, place)


def settings() -> list[tuple[str, str]]:
    """Every setting's dotted name and the sentence about it."""
    return described(Config)


def _apply(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(
            found=f"{override!r}", expected="an override like optim.lr=1e-4", hint="write setting=value, without spaces"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *sections, last = name.split(".")
    place = content
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise unknown_setting(name, "the command line")
    place[last] = value


def unknown_setting(name: str, place: str) -> UserError:
    known = [setting for setting, _ in settings()]
    same_end = [setting for setting in known if setting.rpartition(".")[2] == name.rpartition(".")[2]]
    near = (
        same_end
        or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        or _described_as(name)
        or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        or _near_ends(name, known)
    )
    return UserError(
        found=f"unknown setting {name} in {place}",
        expected="one of the settings that python -m trainer.run --help lists",
        hint=f"did you mean {near[0]}?" if near else "remove it",
    )


def _described_as(name: str) -> list[str]:
    """Settings whose sentence begins with the words of the name: learning_rate is optim.lr."""
    words = name.rpartition(".")[2].replace("_", " ") + " "
    return [setting for setting, sentence in settings() if sentence.lower().startswith(words)]


def _near_ends(name: str, known: list[str]) -> list[str]:
    """Settings whose last word is like the name's last word."""
    ends = {setting.rpartition(".")[2]: setting for setting in known}
    return [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.6)]
