"""Render report pages and charts from Jinja templates."""

from __future__ import annotations

import base64
import functools
import math
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from pipeline.preview import to_png
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
    environment.filters |= {"duration": duration, "percent": percent, "thousands": "{:,}".format}
    return environment


def render(template: str, directory: Path = _TEMPLATES, **content: Any) -> str:
    """Render a template, with HTML escaping unless it is Markdown; undefined names raise an error.

    Args:
        template: File name of the template, which may extend `base.html.j2`.
        directory: Directory of the template.
        content: Variables of the template.
    """
    return _environment(directory).get_template(template).render(**content)


def image_url(picture: Image.Image) -> str:
    """Encode a picture as the `data:` URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()


def percent(fraction: float | None) -> str:
    """Format a fraction as `83.12%`, or as a dash if it is None or NaN."""
    return "-" if fraction is None or math.isnan(fraction) else f"{fraction:.2%}"
