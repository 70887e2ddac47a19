"""Environment of a result: package versions, processor, device and revision of the code."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.limits import available_cpus

if TYPE_CHECKING:  # the functions that `inkstream doctor` calls do without torch
    import torch

_ROOT = Path(__file__).parents[2]
_PACKAGES = (
    "inkstream",
    "torch",
    "nvidia-dali-cuda120",
    "timm",
    "numpy",
    "torchvision",
)  # their versions can change results
_COMPILERS = ("cc", "gcc", "clang", "cl")
_TRITON_CAPABILITY = (7, 0)  # the lowest compute capability of a GPU


def collect_env_info(device: torch.device) -> dict[str, Any]:
    """Collect the environment as plain values, for the JSON files of results."""
    import psutil
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := installed_version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": available_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "revision": git_revision(),
    }


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def find_c_compiler() -> str | None:
    """Return the C compiler that builds Inductor's kernels and Triton's launchers, or None."""
    return os.environ.get("CXX") or os.environ.get("CC") or next(filter(None, map(shutil.which, _COMPILERS)), None)


def missing_for_compilation(capability: tuple[int, int] | None = None) -> tuple[str, str] | None:
    """Return what torch.compile lacks on this machine and how to get it; None if it lacks nothing.

    Args:
        capability: Compute capability of the GPU, whose kernels Triton compiles; None for a CPU.
    """
    if find_c_compiler() is None:
        return "no C compiler", f"{_apt_install()} gcc g++"
    header = Path(sysconfig.get_path("include"), "Python.h")
    elsewhere = {"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"} & os.environ.keys()  # a compiler searches them, too
    if sys.platform == "linux" and not header.exists() and not elsewhere:  # a package of its own in distributions
        return f"no {header}", f"{_apt_install()} python{sys.version_info[0]}.{sys.version_info[1]}-dev"
    if capability is not None and capability < _TRITON_CAPABILITY:
        return "a GPU of compute capability {}.{}, below 7.0".format(*capability), "use another GPU"
    if capability is not None and importlib.util.find_spec("triton") is None:
        requirements = metadata.requires("torch") or ()
        pinned = next((one for one in requirements if one.startswith("triton")), "triton").partition(";")[0]
        return "no package triton", f"python -m pip install {pinned.strip()}"
    return None


def _apt_install() -> str:
    # Root needs no sudo, which containers often lack.
    return "apt install" if hasattr(os, "geteuid") and os.geteuid() == 0 else "sudo apt install"


def git_revision() -> str | None:
    """Return the git revision of the code, with a + if tracked files have changed; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None  # git would describe a repository around an installed package
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run([*command, "--dirty=+"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
