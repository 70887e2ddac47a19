"""Targets of the Makefile that need no network."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, pytest_runtest_call


def test_tests_of_a_gpu_install_nothing_where_all_packages_are(tmp_path: Path) -> None:
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$*" >> {called}\n')
    python.chmod(0o755)
    subprocess.run(["make", "test-gpu", f"PYTHON={python}"], cwd=ROOT, check=True, timeout=60)
    assert called.read_text().splitlines() == [
        "-m pytest -m gpu --collect-only -q -p no:cacheprovider",
        "-m pytest -m gpu -p no:cacheprovider",
    ]


@pytest.mark.parametrize("markers", ["gpu", "slow"])
@pytest.mark.parametrize("module", ["nvidia.dali", "zarr"])
def test_tests_of_a_gpu_are_skipped_where_dali_alone_is_missing(markers: str, module: str) -> None:
    item = SimpleNamespace(config=SimpleNamespace(option=SimpleNamespace(markexpr=markers)))
    call = pytest_runtest_call(item)
    next(call)
    is_skipped = (markers, module) == ("gpu", "nvidia.dali")
    with pytest.raises(pytest.skip.Exception if is_skipped else ModuleNotFoundError):
        call.throw(ModuleNotFoundError(name=module))


def test_the_device_check_follows_the_doctor_whatever_it_reports(tmp_path: Path) -> None:
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$*" >> {called}\n[ "$2" != trainer.runtime.doctor ]\n')
    python.chmod(0o755)
    command = ["make", "device-check", f"PYTHON={python}", "MINUTES=2"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert called.read_text().splitlines() == [
        "-c import pydantic, timm, torch",
        "-m trainer.runtime.doctor",
        "benchmarks/device_check.py --minutes 2",
    ]
