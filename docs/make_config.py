"""Write docs/config.md, the reference of all settings, from their definitions: `python docs/make_config.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic.fields import FieldInfo  # noqa: E402  after sys.path, as the next lines

from trainer.config.base import BaseConfig, type_and_default  # noqa: E402  the checkout comes first
from trainer.config.schema import Config  # noqa: E402

HEAD = """# Settings

<!-- Written by `python docs/make_config.py` from trainer/config. Do not edit. -->

Every setting can stand in a recipe (`optim: {lr: 1e-3}`) or on the command line (`optim.lr=1e-3`). Unknown names are
refused with the closest known one. [Training](training.md#recipes) explains recipes and `base:`.
"""


def settings_page() -> str:
    """The page as Markdown: one list per section."""
    general: dict[str, FieldInfo] = {}
    sections: dict[str, type[BaseConfig]] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseConfig):
            sections[name] = field.annotation
        else:
            general[name] = field
    parts = [HEAD, _section("General", "", general)]
    parts += [_section(f"`{name}`", f"{name}.", section.model_fields) for name, section in sections.items()]
    return "\n".join(parts)


def _section(title: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    lines = [f"## {title}", ""]
    for name, field in fields.items():
        kind, default = type_and_default(field)
        description = " ".join((field.description or "").split())
        lines.append(f"- **`{prefix}{name}`** · `{kind}` · {f'default `{default}`' if default else 'required'}\\")
        lines.append(f"  {description}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(settings_page(), encoding="utf-8")
