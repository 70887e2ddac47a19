"""GPUs and driver of this machine, from the NVIDIA Management Library (NVML), without CUDA or torch."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from pathlib import Path
from typing import NamedTuple

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_KERNEL_MODULE = Path("/proc/driver/nvidia")
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_TEXT_BYTES = 96  # NVML's longest name of a device


class Gpu(NamedTuple):
    """A GPU; None stands for what the driver does not tell.

    Attributes:
        name: Name of the product.
        total: Bytes of memory.
        free: Bytes that no process uses.
        capability: CUDA compute capability, major and minor.
    """

    name: str
    total: int | None = None
    free: int | None = None
    capability: tuple[int, int] | None = None


class Driver(NamedTuple):
    """The NVIDIA driver.

    Attributes:
        version: For instance `570.86.15`; None without a driver.
        cuda: Newest CUDA version that it supports, major and minor; None if unknown.
        gpus: The GPUs of this machine.
        problem: Why there is no answer of NVML, or None.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


class DriverQuery:
    """Asks NVML in a thread: without persistence mode, a driver takes seconds to answer the first question."""

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._thread = threading.Thread(target=self._run, name="NVML", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._driver = _query(ctypes.CDLL(_LIBRARY))
        except (OSError, AttributeError) as error:  # no library, a refusal, or a library without these functions
            self._driver = _from_kernel(str(error))

    def result(self, timeout: float) -> Driver:
        """Return the answer, or what the kernel module tells if there is none within `timeout` seconds."""
        self._thread.join(timeout)
        return self._driver or _from_kernel("the driver has not answered in time")


def has_nvidia_device() -> bool:
    """Whether the PCI bus has a display controller of NVIDIA, with or without a driver."""
    devices = _PCI_DEVICES.glob("*") if _PCI_DEVICES.is_dir() else ()
    return any(_read(path / "vendor") == "0x10de" and _read(path / "class").startswith("0x03") for path in devices)


def _query(nvml: ctypes.CDLL) -> Driver:
    nvml.nvmlErrorString.restype = ctypes.c_char_p

    def call(function: str, *arguments: object) -> None:
        status = getattr(nvml, function)(*arguments)
        if status:
            raise OSError(f"{nvml.nvmlErrorString(status).decode()} ({function})")

    def text(function: str, *arguments: object) -> str:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        call(function, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value.decode()

    def gpu(index: int) -> Gpu:
        device = ctypes.c_void_p()
        call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        memory, major, minor = (ctypes.c_ulonglong * 3)(), ctypes.c_int(), ctypes.c_int()  # total, free, used
        call("nvmlDeviceGetMemoryInfo", device, memory)
        call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        return Gpu(text("nvmlDeviceGetName", device), memory[0], memory[1], (major.value, minor.value))

    call("nvmlInit_v2")
    try:
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        newest = (cuda.value // 1000, cuda.value % 1000 // 10)
        return Driver(text("nvmlSystemGetDriverVersion"), newest, tuple(map(gpu, range(count.value))))
    finally:
        nvml.nvmlShutdown()


def _from_kernel(problem: str) -> Driver:
    version = re.search(r"\d+\.\d+(?:\.\d+)?", _read(_KERNEL_MODULE / "version"))
    models = [
        re.search(r"^Model:\s*(.+)", _read(path), re.MULTILINE) for path in _KERNEL_MODULE.glob("gpus/*/information")
    ]
    gpus = tuple(Gpu(model[1].strip()) for model in models if model)
    return Driver(version[0] if version else None, None, gpus, problem)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
