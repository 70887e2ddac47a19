"""The driver is described by a library with NVML's binary interface, or by the files of the kernel module."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from trainer.runtime import nvml
from trainer.runtime.nvml import Driver, DriverQuery, Gpu

SOURCE = r"""
#include <string.h>
#include <unistd.h>
typedef struct { unsigned long long total, free, used; } memory;
const char *nvmlErrorString(int status) { return "Driver Not Loaded"; }
int nvmlInit_v2(void) { sleep(WAIT); return STATUS; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "570.86.15", length); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12080; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(0x7f0000000000 + index); return 0;
}
int nvmlDeviceGetName(void *device, char *text, unsigned length) { strncpy(text, "NVIDIA H200", length); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory *m) {
    m->total = 150ULL << 30; m->free = (149ULL << 30) + (unsigned long long)device - 0x7f0000000000;
    m->used = 1; return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
"""


def build_library(directory: Path, status: int = 0, wait: int = 0) -> Path:
    """A library that answers as NVML does on a machine with two H200."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = directory / f"libnvidia-ml-{status}-{wait}.so"
    source = path.with_suffix(".c")
    source.write_text(SOURCE)
    options = ["-shared", "-fPIC", f"-DSTATUS={status}", f"-DWAIT={wait}"]
    subprocess.run([compiler, *options, "-o", path, source], check=True)
    return path


@pytest.fixture(autouse=True)
def no_kernel_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_KERNEL_MODULE", tmp_path / "nothing")


def ask(monkeypatch: pytest.MonkeyPatch, library: object, timeout: float = 30) -> Driver:
    monkeypatch.setattr(nvml, "_LIBRARY", str(library))
    return DriverQuery().result(timeout)


def write_kernel_module(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = directory / "gpus" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\nGPU UUID: \t GPU-1\n")
    (directory / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version:  12.2.0\n"
    )
    monkeypatch.setattr(nvml, "_KERNEL_MODULE", directory)


def test_nvml_describes_driver_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = ask(monkeypatch, build_library(tmp_path))
    gpus = tuple(Gpu("NVIDIA H200", 150 << 30, (149 << 30) + index, (9, 0)) for index in range(2))
    assert driver == Driver("570.86.15", (12, 8), gpus)


def test_without_the_library_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = ask(monkeypatch, "libno-such-library.so.1")
    assert driver[:3] == (None, None, ())
    assert "libno-such-library.so.1" in (driver.problem or "")


def test_a_refusal_is_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = ask(monkeypatch, build_library(tmp_path, status=9))
    assert driver == Driver(problem="Driver Not Loaded (nvmlInit_v2)")


def test_a_slow_driver_is_described_by_its_kernel_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kernel_module(tmp_path / "module", monkeypatch)
    library = build_library(tmp_path, wait=1)
    start = time.monotonic()
    driver = ask(monkeypatch, library, timeout=0.05)
    assert time.monotonic() - start < 0.9
    assert driver == Driver("570.86.15", None, (Gpu("NVIDIA H200"),), "the driver has not answered in time")


def test_devices_of_nvidia_are_found_on_the_pci_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_PCI_DEVICES", tmp_path)
    for name, vendor, kind in (("a", "0x10de", "0x040300"), ("b", "0x1002", "0x030000")):  # sound, another maker
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert not nvml.has_nvidia_device()
    (tmp_path / "b" / "vendor").write_text("0x10de\n")
    assert nvml.has_nvidia_device()
