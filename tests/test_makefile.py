"""Targets of the Makefile that need no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, pytest_runtest_call

ABSENT = {"flask", "mlflow", "moto", "msgspec", "numcodecs", "optuna", "playwright", "wandb", "webdataset", "zarr"}


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
@pytest.mark.parametrize(
    ("error", "is_of_dali"),
    [
        (ModuleNotFoundError(name="nvidia.dali"), True),
        (RuntimeError("dlopen libnvimgcodec.so failed!. Please install nvimagecodec"), True),
        (ModuleNotFoundError(name="zarr"), False),
        (RuntimeError("CUDA error"), False),
    ],
)
def test_tests_of_a_gpu_are_skipped_where_dali_alone_is_missing(
    markers: str, error: Exception, is_of_dali: bool
) -> None:
    item = SimpleNamespace(config=SimpleNamespace(option=SimpleNamespace(markexpr=markers)))
    call = pytest_runtest_call(item)
    next(call)
    is_skipped = markers == "gpu" and is_of_dali
    with pytest.raises(pytest.skip.Exception if is_skipped else type(error)):
        call.throw(error)


def test_tests_of_a_gpu_need_few_packages() -> None:
    """A machine with a GPU may have no network: it has torch, timm and what they need, and a few carried packages."""
    program = (
        "import sys, pytest\n"
        f"absent = {ABSENT}\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in absent or name.startswith('nvidia.dali'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert process.stdout.count("::") > 500


def test_the_device_check_follows_the_doctor_whatever_it_reports(tmp_path: Path) -> None:
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $*" >> {called}\n[ "$2" != trainer.runtime.doctor ]\n')
    python.chmod(0o755)
    command = ["make", "device-check", f"PYTHON={python}", "MINUTES=2", "OUT=results"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "packages"}, check=True, timeout=60)
    assert called.read_text().splitlines() == [
        ".:packages -c import benchmarks.device_check",
        ".:packages -m trainer.runtime.doctor",
        ".:packages benchmarks/device_check.py --minutes 2 --out results",
    ]
