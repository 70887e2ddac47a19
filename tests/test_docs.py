"""README and docs: the code runs, and the commands, files, settings and links they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from support.parsers import parser_of

from inkstream import COMMANDS
from trainer.config.base import describe_settings
from trainer.config.schema import Config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
CURRENT = [page for page in PAGES if page.name != "log.md"]  # the log quotes commands of their time
SETTINGS = set(describe_settings(Config))
PACKAGES = ("shards", "pipeline", "trainer", "benchmarks")
RECIPE_COMMANDS = ("trainer.run", "trainer.predict.preview", "trainer.loop.find_batch_size", "trainer.loop.find_lr")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands_of(page: Path) -> Iterator[list[str]]:
    """Words of each command line in console blocks and indented blocks, and of each command in inline code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |    )((?:inkstream|python|torchrun|make|pip) .*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:inkstream|python|torchrun|make|pip) [^`]*)`", text)
    for line in lines:
        yield shlex.split(line, comments=True)


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module or script that a command line runs, and its arguments."""
    if words[0] == "inkstream":
        return (COMMANDS[words[1]][0], words[2:]) if words[1] in COMMANDS else None
    if words[0] in ("python", "torchrun") and "-m" in words:
        place = words.index("-m")
        return words[place + 1], words[place + 2 :]
    scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
    return (words[scripts[0]], words[scripts[0] + 1 :]) if words[0] == "python" and scripts else None


def test_python_snippets_run_in_a_fresh_interpreter(tmp_path: Path) -> None:
    """Snippets share a directory, as a reader's would, but no variables."""
    snippets = [
        (name_of(page), code)
        for page in CURRENT
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert len(snippets) >= 3
    for page, code in snippets:
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert process.returncode == 0, f"{page}:\n{code}\n{process.stderr}"


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands_of(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        if words[0] == "inkstream" and not words[1].startswith("-") and words[1] != "COMMAND":
            assert words[1] in COMMANDS, words
        found = module_of(words)
        if found is None or found[0] in ("venv", "pip", "build"):
            continue
        module, arguments = found
        if module.partition(".")[0].partition("/")[0] in PACKAGES:
            options = parser_of(module.removesuffix(".py").replace("/", "."))._option_string_actions
            for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
                assert option in options, f"{words}: {module} has no option {option}"
        else:
            assert (ROOT / module).is_file() or find_spec(module) is not None, words
        if module in RECIPE_COMMANDS:
            recipe = arguments[0] if arguments and "=" not in arguments[0] else ""
            if recipe and not recipe.isupper() and not recipe.startswith("-"):
                path = ROOT / recipe if recipe.endswith(".yaml") else ROOT / "configs" / f"{recipe}.yaml"
                assert path.exists(), words


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_extras_are_quoted_for_every_shell(page: Path) -> None:
    """For cmd.exe a single quote is a letter."""
    assert "'.[" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_settings_exist(page: Path) -> None:
    sections = {name.partition(".")[0] for name in SETTINGS if "." in name}
    text = page.read_text(encoding="utf-8")
    for name in re.findall(rf"\b((?:{'|'.join(sections)})\.[a-z_]+)=", text):
        assert name in SETTINGS, name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"(?<![\w/])(?:configs|pipeline|shards|trainer|benchmarks)/[\w/]+\.(?:py|yaml|md|png)", text
    ):
        assert (ROOT / name).exists(), name


def test_readme_fits_the_limit() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_settings_page_is_current() -> None:
    program = "import runpy; print(runpy.run_path('docs/make_config.py')['settings_page'](), end='')"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout == (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), (
        "run: python docs/make_config.py"
    )
