"""The `inkstream` command, from the checkout and from a wheel."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, run_module

from inkstream import COMMANDS
from shards.manifest import Manifest


def run_inkstream(*arguments: str, cwd: Path, paths: tuple[Path, ...] = (ROOT,)) -> subprocess.CompletedProcess[str]:
    """Run the command from another directory, with `paths` in front of the installed packages."""
    return subprocess.run(
        [sys.executable, "-m", "inkstream", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_lists_every_command(tmp_path: Path) -> None:
    process = run_inkstream("--help", cwd=tmp_path)
    assert process.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in process.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["pack", "--help"]])
def test_help_imports_no_heavy_library(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import atexit, sys, inkstream\n"
        "heavy = {'torch', 'timm', 'scipy', 'nvidia.dali'}\n"
        "atexit.register(lambda: print(heavy & set(sys.modules), file=sys.stderr))\n"
        f"sys.argv = ['inkstream', *{arguments}]\n"
        "inkstream.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0
    assert process.stderr == "set()\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_main(command: str) -> None:
    module = importlib.import_module(COMMANDS[command][0])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    assert callable(module.main)


def test_an_unknown_command_names_the_closest(tmp_path: Path) -> None:
    process = run_inkstream("trian", cwd=tmp_path)
    assert process.returncode == 2
    assert "hint: inkstream train --help" in process.stderr


@pytest.mark.parametrize("name", ["trainer", "shards"])
def test_a_package_that_shadows_ours_is_reported(name: str, tmp_path: Path) -> None:
    other = tmp_path / "other" / name
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    process = run_inkstream("verify", "--help", cwd=tmp_path, paths=(tmp_path / "other", ROOT))
    assert process.returncode == 2
    assert f"error: the package {name} is imported from {other}" in process.stderr
    assert "hint: " in process.stderr


def test_a_mistake_ends_with_one_message(tmp_path: Path) -> None:
    process = run_module("inkstream", "train", "quickstrat", cwd=tmp_path)
    assert process.returncode == 2
    assert "quickstart" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_checkout_that_is_not_installed_packs_and_trains(tmp_path: Path) -> None:
    """As on a machine without a network: the packages lie in a directory on PYTHONPATH, Inkstream is not among them."""
    site = tmp_path / "site"
    site.mkdir()
    for path in {Path(directory) for name in ("purelib", "platlib") for directory in [sysconfig.get_path(name)]}:
        for entry in path.iterdir():
            if not entry.name.startswith(("inkstream", "__editable__")):
                (site / entry.name).symlink_to(entry)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    for arguments in (
        ["-m", "pipeline.shard", "digits"],
        ["-m", "trainer.run", "quickstart", "run.dir=runs/first", "trainer.epochs=1"],
    ):
        process = subprocess.run(
            [sys.executable, "-S", *arguments], cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stderr
    manifest = Manifest.read(work / "data" / "shards" / "digits" / "train")
    assert manifest.versions["inkstream"] == "unknown" and "numpy" in manifest.versions


@pytest.mark.slow
def test_a_wheel_packs_and_trains_from_another_directory(tmp_path: Path) -> None:
    copy, site = tmp_path / "copy", tmp_path / "site"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    build = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*build, str(copy)], check=True)
    work = tmp_path / "work"
    work.mkdir()
    for arguments in (
        ["pack", "digits"],
        ["verify", "data/shards/digits"],
        ["train", "quickstart", "run.dir=runs/wheel", "trainer.epochs=2"],
        ["evaluate", "runs/wheel", "data/shards/digits"],
        ["report", "runs/wheel"],
    ):
        process = run_inkstream(*arguments, cwd=work, paths=(site,))
        assert process.returncode == 0, process.stderr
    assert (work / "runs" / "wheel" / "report.html").exists()
