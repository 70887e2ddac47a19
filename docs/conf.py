"""Sphinx configuration of the documentation site: `make docs`."""

from __future__ import annotations

import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

project = "Inkstream"
author = "The Inkstream contributors"
html_show_copyright = False
release = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
# Pages link to files of the repository, which are no pages of the site.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = "Inkstream"
