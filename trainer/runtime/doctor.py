"""Report what this machine offers for training, and the command that fixes whatever is missing.

    inkstream doctor

The report covers GPU, driver, versions and limits. It takes less than two seconds, so neither torch nor DALI is
imported: their versions are read from their files. The exit status is 1 if training cannot work, and 0 if it can, for
instance without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import platform
import re
import runpy
import shlex
import shutil
import sys
import time
import tomllib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

from shards.cli import command_parser, plural, run_command
from shards.errors import UserError, first_line, quote
from shards.limits import available_cpus
from trainer.runtime.env_info import (
    find_c_compiler,
    git_revision,
    installed_version,
    missing_for_compilation,
    processor_name,
)
from trainer.runtime.nvml import Driver, DriverQuery, Gpu, has_nvidia_device

_ROOT = Path(__file__).parents[2]
_DRIVER_SECONDS = 1.2
_MIN_DISK = 2 << 30  # bytes: EMNIST as downloaded and packed takes 1.3 GB
_DRIVER_FIX = (
    "install the driver (on Ubuntu: sudo ubuntu-drivers install; others: https://www.nvidia.com/drivers); "
    "start a container with --gpus all"
)
# CUDA 13 dropped the GPUs before Turing.
_MIN_CAPABILITY = {13: (7, 5)}
_ASSUMED_CAPABILITY = (9, 0)  # if the driver does not tell it


class Finding(NamedTuple):
    """A line of the report.

    Attributes:
        status: `ok`, `warning` (training works) or `error` (it does not).
        subject: What was checked.
        text: The result.
        fix: Command or instruction; empty if there is nothing to do.
    """

    status: str
    subject: str
    text: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """Check this machine and installation."""
    start = time.monotonic()
    query = DriverQuery()
    findings = [
        *_guarded("inkstream", _check_version),
        *_guarded("packages", _check_packages),
        *_guarded("cores", _check_cores),
        *_guarded("memory", _check_memory),
        *_guarded("disk", _check_disk),
        *_guarded("cache", _check_cache),
        *_guarded("W&B key", _check_wandb_key),
    ]
    driver = query.result(_DRIVER_SECONDS - (time.monotonic() - start))
    selected = driver._replace(gpus=_selected_gpus(driver.gpus))
    torch_findings = list(_guarded("torch", lambda: _check_torch(selected)))
    on_gpu = bool(selected.gpus) and not _hides_gpus() and [one.status for one in torch_findings] == ["ok"]
    capability = min(gpu.capability or _ASSUMED_CAPABILITY for gpu in selected.gpus) if on_gpu else None
    findings[2:2] = [
        *_guarded("GPU", lambda: _check_gpus(driver)),
        *torch_findings,
        *_guarded("DALI", lambda: _check_dali(selected)),
        *_guarded("backend", lambda: _check_backend("cuda" if on_gpu else "cpu")),
        *_guarded("compiler", lambda: _check_compiler(capability)),
    ]
    return findings


def format_report(findings: list[Finding]) -> str:
    """Format the report: aligned lines, each fix below its line."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for status, subject, text, fix in findings:
        lines.append(f"{status:7}  {subject:{width}}  {text}")
        if fix:
            lines.append(f"{'':7}  {'':{width}}  fix: {fix}")
    counts = [sum(finding.status == status for finding in findings) for status in ("error", "warning")]
    return "\n".join([*lines, f"{plural(counts[0], 'error')}, {plural(counts[1], 'warning')}"])


def _guarded(subject: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run a check. What prevents it, such as a missing package, is its result."""
    try:
        return list(check())
    except UserError as error:
        return [Finding("error", subject, error.found, error.hint)]
    except Exception as error:
        return [Finding("error", subject, f"not checked: {type(error).__name__}: {first_line(error)}")]


def _check_version() -> Iterator[Finding]:
    version = installed_version("inkstream") or "not installed"
    python = f"Python {platform.python_version()} ({sys.executable})"
    revision = git_revision()
    at = f" at {revision}" if revision else ""
    yield Finding("ok", "inkstream", f"{version}{at}, {python}, {platform.system()} {platform.machine()}")


def _check_packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    project = _ROOT / "pyproject.toml"
    if project.exists():
        texts = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        texts = metadata.requires("inkstream") or []
    requirements = [one for one in map(Requirement, texts) if one.marker is None or one.marker.evaluate({"extra": ""})]
    requirements = [one for one in requirements if not one.name.startswith("nvidia-dali")]  # see _check_dali
    versions = {one.name: installed_version(one.name) for one in requirements}
    wrong = [
        one
        for one in requirements
        if not versions[one.name] or not one.specifier.contains(versions[one.name] or "", prereleases=True)
    ]
    if wrong:
        text = ", ".join(f"{one.name} {versions[one.name] or 'is missing'}" for one in wrong)
        wanted = " ".join(quote(f"{one.name}{one.specifier}") for one in wrong)
        yield Finding("error", "packages", text, f"python -m pip install {wanted}")
    else:
        yield Finding("ok", "packages", f"the {len(requirements)} required packages are installed")


def _hides_gpus() -> bool:
    """Whether $CUDA_VISIBLE_DEVICES hides all GPUs: CUDA ignores everything from the first invalid number on."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()[:1] in ("", "-")


def _selected_gpus(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Return the GPUs to judge: those that $CUDA_VISIBLE_DEVICES selects, if they can be determined.

    The driver numbers GPUs by bus, CUDA by default from the fastest on. A number without CUDA_DEVICE_ORDER=PCI_BUS_ID
    and a UUID are not resolved: the most capable GPU of the machine is assumed.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    if names == [""] or len(names) >= len(gpus):
        return gpus
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" and all(map(str.isdecimal, names)):
        return tuple(gpus[int(name)] for name in names if int(name) < len(gpus))
    return (max(gpus, key=lambda gpu: gpu.capability or _ASSUMED_CAPABILITY),)


def _check_gpus(driver: Driver) -> Iterator[Finding]:
    if not driver.gpus:
        if has_nvidia_device() or driver.version:
            yield Finding("warning", "GPU", f"cannot be used: {driver.problem or 'the driver finds none'}", _DRIVER_FIX)
        else:
            yield Finding("warning", "GPU", "no NVIDIA GPU: training uses the CPU")
        return
    for gpu in driver.gpus:
        memory = f", {_size(gpu.free)} free of {_size(gpu.total)}" if gpu.total and gpu.free is not None else ""
        capability = f", compute capability {gpu.capability[0]}.{gpu.capability[1]}" if gpu.capability else ""
        yield Finding("ok", "GPU", f"{gpu.name}{memory}{capability}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _hides_gpus():
        text = f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs"
        yield Finding("warning", "GPU", text, "unset CUDA_VISIBLE_DEVICES")
    elif visible is not None:
        yield Finding("ok", "GPU", f"CUDA_VISIBLE_DEVICES={visible} selects among them")
    if driver.problem:
        text = f"{driver.version}, which NVML does not describe: {driver.problem}"
        yield Finding("warning", "driver", text, "sudo nvidia-smi -pm 1; if that fails: sudo reboot")
    else:
        cuda = f", for CUDA {driver.cuda[0]}.{driver.cuda[1]} and older" if driver.cuda else ""
        yield Finding("ok", "driver", f"{driver.version}{cuda}")


def _check_torch(driver: Driver) -> Iterator[Finding]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return  # among the missing packages
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    version, cuda = build["__version__"], build["cuda"]
    text = f"{version}, built for {f'CUDA {cuda}' if cuda else 'the CPU only'}"
    problem = _cuda_problem(cuda, driver) if cuda else "cannot use the GPU"
    if not driver.gpus or not problem:
        yield Finding("ok", "torch", text)
        return
    turing = all((gpu.capability or _ASSUMED_CAPABILITY) >= (7, 5) for gpu in driver.gpus)
    index = "cu130" if turing and driver.cuda and driver.cuda[0] >= 13 else "cu126"
    fix = (
        "python -m pip uninstall -y torch torchvision; "
        f"python -m pip install torch torchvision --index-url https://download.pytorch.org/whl/{index}"
    )
    yield Finding("warning", "torch", f"{text}: {problem}", fix)


def _cuda_problem(cuda: str, driver: Driver) -> str:
    """Return why code of a CUDA version does not run here; empty if it does or nothing is known."""
    major = int(cuda.partition(".")[0])
    if driver.cuda and major > driver.cuda[0]:  # any driver of the same major version will do
        return f"the driver supports CUDA {driver.cuda[0]}.{driver.cuda[1]} and older"
    lowest = _MIN_CAPABILITY.get(major, (0, 0))
    if any(gpu.capability and gpu.capability < lowest for gpu in driver.gpus):
        return f"CUDA {major} needs compute capability {lowest[0]}.{lowest[1]}"
    return ""


def _check_dali(driver: Driver) -> Iterator[Finding]:
    if sys.platform != "linux":
        yield Finding("ok", "DALI", "not available on this system: the torch backend trains on images of one size")
        return
    installed = [one for one in metadata.distributions() if one.name.startswith("nvidia-dali-cuda")]
    spec = importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None
    if spec is None or spec.origin is None:
        yield _missing_dali(Path(str(installed[0].locate_file("nvidia"))) if installed else None)
        return
    directory = Path(spec.origin).parent
    source = Path(spec.origin).read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", source, re.MULTILINE)
    cuda = re.search(r"^__cuda_version__ = int\('(\d+\.\d+)", source, re.MULTILINE)
    text = f"{version[1] if version else 'unknown version'}, built for CUDA {cuda[1] if cuda else 'of unknown version'}"
    problem = _cuda_problem(cuda[1], driver) if cuda and driver.gpus else ""
    if not any((directory / f"backend_impl{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        fix = "python -m pip install --upgrade nvidia-dali-cuda120, or use another Python version"
        yield Finding("error", "DALI", f"{text}: no code for Python {platform.python_version()}", fix)
    elif problem:
        yield Finding("warning", "DALI", f"{text}: {problem}", f"{_DRIVER_FIX}; or set loader.backend=torch")
    else:
        yield Finding("ok", "DALI", text)


def _missing_dali(directory: Path | None) -> Finding:
    """Describe DALI that cannot be imported; `directory` is the `nvidia` in which it is installed, if it is."""
    if directory is None or not (directory / "dali").is_dir():
        return Finding("warning", "DALI", "not installed", "python -m pip install nvidia-dali-cuda120")
    shadow = importlib.util.find_spec("nvidia")
    place = shadow.origin if shadow else None
    marker, site = shlex.quote(str(directory / "__init__.py")), shlex.quote(str(directory.parent))
    fix = f"touch {marker}; export PYTHONPATH={site}${{PYTHONPATH:+:$PYTHONPATH}}"
    return Finding("warning", "DALI", f"installed in {directory}, but hidden by {place}", fix)


def _check_backend(device_type: str) -> Iterator[Finding]:
    from pipeline.transforms.build import choose_backend, has_dali

    backend, reason = choose_backend("auto", device_type, encoded=False)
    of_files = "dali" if has_dali() else "none"
    yield Finding("ok", "backend", f"{backend} ({reason}); {of_files} for image files of different sizes")


def _check_compiler(capability: tuple[int, int] | None) -> Iterator[Finding]:
    if missing := missing_for_compilation(capability):
        found, fix = missing
        yield Finding("warning", "compiler", f"{found}: models are not compiled (trainer.compile)", fix)
    else:
        yield Finding("ok", "compiler", str(find_c_compiler()))


def _check_cores() -> Iterator[Finding]:
    yield Finding("ok", "cores", f"{available_cpus()} of {os.cpu_count()}, {processor_name()}")


def _check_memory() -> Iterator[Finding]:
    from trainer.runtime.memory import available_memory, memory_limit

    yield Finding("ok", "memory", f"{_size(available_memory())} free of {_size(memory_limit())}")


def _check_disk() -> Iterator[Finding]:
    directory = Path.cwd()
    usage = shutil.disk_usage(directory)
    text = f"{_size(usage.free)} free of {_size(usage.total)} in {directory}"
    if not os.access(directory, os.W_OK | os.X_OK):
        text, fix = f"{text}, which is not writable", "change to a writable directory: cd ~"
        yield Finding("warning", "disk", text, fix)
    elif usage.free < _MIN_DISK:
        fix = "free disk space (df -h .), or name directories on another disk (pack --out DIR, train run.dir=DIR)"
        yield Finding("warning", "disk", text, fix)
    else:
        yield Finding("ok", "disk", text)


def _check_cache() -> Iterator[Finding]:
    from shards.remote.cache import DIRECTORY_VARIABLE, cache_directory, cache_limit, cache_used

    directory = cache_directory()
    existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        text = f"{directory} is not writable: only remote data sets that it holds can be used"
        yield Finding("warning", "cache", text, f"export {DIRECTORY_VARIABLE}=$PWD/cache")
        return
    used, free = cache_used(), shutil.disk_usage(existing).free
    limit = cache_limit() or (free + used) // 2
    yield Finding("ok", "cache", f"{_size(used)} of at most {_size(limit)} in {directory}")


def _check_wandb_key() -> Iterator[Finding]:
    source = _wandb_key_source()
    if source:
        yield Finding("ok", "W&B key", f"present in {source}")
    else:
        yield Finding("warning", "W&B key", "none: logging.wandb=auto writes offline runs", "wandb login")


def _wandb_key_source() -> str | None:
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    given = os.environ.get("NETRC")
    places = [os.path.expanduser(name) for name in ([given] if given else ["~/.netrc", "~/_netrc"])]  # as wandb
    path = next(filter(os.path.exists, places), places[0])
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        entry = netrc.netrc(path).authenticators(host)
        return path if entry and entry[2] else None
    return None


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def main() -> int:
    """Run the command."""
    command_parser("trainer.runtime.doctor", __doc__).parse_args()
    findings = diagnose()
    print(format_report(findings))
    return int(any(finding.status == "error" for finding in findings))


if __name__ == "__main__":
    run_command(main)
