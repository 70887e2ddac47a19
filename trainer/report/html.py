"""Render report pages and charts from Jinja templates."""

from __future__ import annotations

import base64
import functools
import html
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from pipeline.preview import to_png
from pipeline.transforms.preprocess import format_size
from shards.errors import printable
from trainer.runtime.progress import duration

_TEMPLATES = Path(__file__).with_name("templates")


@functools.cache
def _environment(directory: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([directory, _TEMPLATES]),
        autoescape=jinja2.select_autoescape(disabled_extensions=("md.j2",), default=True),
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": duration, "percent": percent, "thousands": "{:,}".format, "size": format_size}
    environment.filters |= {"md": markdown_text, "code": markdown_code, "fenced": markdown_fenced}
    return environment


def render(template: str, directory: Path = _TEMPLATES, **content: Any) -> str:
    """Render a template, with HTML escaping unless it is Markdown; undefined names raise an error.

    Args:
        template: File name of the template, which may extend `base.html.j2`.
        directory: Directory of the template.
        content: Variables of the template.
    """
    return _environment(directory).get_template(template).render(**content)


def markdown_text(text: object) -> str:
    """Escape foreign text for a line of Markdown, in which HTML is active."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(printable(str(text)), quote=False))


def markdown_code(text: object, in_table: bool = False) -> str:
    """Return foreign text as a code span of Markdown, whatever backticks it contains."""
    line = printable(str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if len(fence) > 1 or not line.strip() else ""
    return f"{fence}{pad}{line.replace('|', chr(92) + '|') if in_table else line}{pad}{fence}"


def markdown_fenced(text: str, language: str) -> str:
    """Return foreign text as a fenced code block of Markdown."""
    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def image_url(picture: Image.Image) -> str:
    """Encode a picture as the `data:` URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()


def percent(fraction: float | None) -> str:
    """Format a fraction as `83.12%`, or as a dash if it is None or NaN."""
    return "-" if fraction is None or math.isnan(fraction) else f"{fraction:.2%}"
