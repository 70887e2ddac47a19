"""`inkstream doctor` on machines of all kinds: without a GPU, with one, without DALI, with a full disk."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from support.control_groups import show_tree

from trainer.runtime import doctor
from trainer.runtime.doctor import Finding
from trainer.runtime.env_info import collect_env_info
from trainer.runtime.nvml import Driver, Gpu

H200 = Driver("570.86.15", (13, 0), (Gpu("NVIDIA H200", 150 << 30, 149 << 30, (9, 0)),))
NO_DRIVER = Driver(problem="libnvidia-ml.so.1: cannot open shared object file")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine: no variables, no key, a cache of its own."""
    for name in ("CUDA_VISIBLE_DEVICES", "WANDB_API_KEY", "WANDB_BASE_URL", "INKSTREAM_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "has_nvidia_device", lambda: False)
    monkeypatch.setattr(doctor, "_check_version", lambda: [])  # git takes its time
    monkeypatch.setattr(sys, "argv", ["doctor"])


def diagnose(monkeypatch: pytest.MonkeyPatch, driver: Driver = NO_DRIVER) -> dict[str, list[Finding]]:
    """The findings on a machine with this driver, by subject."""

    class Query:
        def result(self, timeout: float) -> Driver:
            assert timeout < 1.5
            return driver

    monkeypatch.setattr(doctor, "DriverQuery", Query)
    found: dict[str, list[Finding]] = {}
    for finding in doctor.diagnose():
        assert finding.status != "ok" or not finding.fix
        found.setdefault(finding.subject, []).append(finding)
    return found


def pretend_torch(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None) -> None:
    monkeypatch.setattr(doctor.runpy, "run_path", lambda path: {"__version__": version, "cuda": cuda})


def test_the_command_works_without_importing_torch(tmp_path: Path) -> None:
    program = (
        "import atexit, sys, inkstream\n"
        "heavy = {'torch', 'timm', 'scipy', 'nvidia.dali', 'wandb', 'matplotlib'}\n"
        "atexit.register(lambda: print(heavy & set(sys.modules), file=sys.stderr))\n"
        "sys.argv = ['inkstream', 'doctor']\n"
        "inkstream.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": "f00d" * 10}
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, "set()\n")
    lines = process.stdout.splitlines()
    assert lines[0].startswith("ok       inkstream  ")
    assert lines[-1].startswith("0 errors, ")
    assert "f00d" not in process.stdout
    assert "present in WANDB_API_KEY" in process.stdout


def test_lines_are_aligned_and_fixes_stand_below() -> None:
    findings = [Finding("ok", "cores", "2"), Finding("warning", "W&B key", "none", "wandb login")]
    assert doctor.format_report(findings).splitlines() == [
        "ok       cores    2",
        "warning  W&B key  none",
        "                  fix: wandb login",
        "0 errors, 1 warning",
    ]


def test_without_a_gpu_training_works_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(monkeypatch)
    assert found["GPU"] == [Finding("warning", "GPU", "no NVIDIA GPU: training uses the CPU")]
    assert "driver" not in found
    assert found["backend"][0].text.startswith("torch (")
    assert not any(finding.status == "error" for group in found.values() for finding in group)
    assert doctor.main() == 0


def test_a_gpu_is_described_and_decides_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(monkeypatch, "2.11.0+cu130", "13.0")
    found = diagnose(monkeypatch, H200)
    text = "NVIDIA H200, 149.0 GiB free of 150.0 GiB, compute capability 9.0"
    assert found["GPU"] == [Finding("ok", "GPU", text)]
    assert found["driver"] == [Finding("ok", "driver", "570.86.15, for CUDA 13.0 and older")]
    assert found["torch"] == [Finding("ok", "torch", "2.11.0+cu130, built for CUDA 13.0")]
    assert found["backend"][0].text.startswith("dali (")


def test_what_compilation_for_the_gpu_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(monkeypatch, "2.11.0+cu126", "12.6")
    pascal = H200._replace(gpus=(Gpu("Tesla P100", 1, 1, (6, 0)),))
    (too_old,) = diagnose(monkeypatch, pascal)["compiler"]
    assert (too_old.status, too_old.fix) == ("warning", "use another GPU")
    assert too_old.text == "a GPU of compute capability 6.0, below 7.0: models are not compiled (trainer.compile)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert diagnose(monkeypatch, pascal)["compiler"][0].status == "ok"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    (without_triton,) = diagnose(monkeypatch, H200)["compiler"]
    assert without_triton.status == "warning"
    assert re.fullmatch(r"python -m pip install triton[=~]=[\d.]+", without_triton.fix)  # the version of this torch
    assert without_triton.text.startswith("no package triton")
    (of_unknown_gpu,) = diagnose(monkeypatch, H200._replace(gpus=(Gpu("GPU"),)))["compiler"]
    assert of_unknown_gpu == without_triton


@pytest.mark.parametrize(
    ("cuda", "driver", "problem", "index"),
    [
        (None, H200, "built for the CPU only: cannot use the GPU", "cu130"),
        ("13.2", H200._replace(cuda=(12, 8)), "the driver supports CUDA 12.8 and older", "cu126"),
        (
            "13.0",
            H200._replace(gpus=(Gpu("Tesla V100", 1, 1, (7, 0)),)),
            "CUDA 13 needs compute capability 7.5",
            "cu126",
        ),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_replaced(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, driver: Driver, problem: str, index: str
) -> None:
    pretend_torch(monkeypatch, "2.11.0", cuda)
    found = diagnose(monkeypatch, driver)
    (finding,) = found["torch"]
    assert finding.status == "warning"
    assert finding.text.endswith(problem)
    assert finding.fix.endswith(f"pip install torch torchvision --index-url https://download.pytorch.org/whl/{index}")
    assert found["backend"][0].text.startswith("torch ("), "torch runs on the CPU"


def test_any_driver_of_the_same_major_version_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(monkeypatch, "2.15.0+cu132", "13.2")
    assert diagnose(monkeypatch, H200)["torch"][0].status == "ok"


def test_a_gpu_without_a_driver_gets_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_nvidia_device", lambda: True)
    (finding,) = diagnose(monkeypatch)["GPU"]
    assert "cannot be used: libnvidia-ml.so.1" in finding.text
    assert "ubuntu-drivers install" in finding.fix and "--gpus all" in finding.fix


def test_a_slow_driver_is_still_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(monkeypatch, "2.11.0", "13.0")
    found = diagnose(monkeypatch, Driver("570.86.15", None, (Gpu("NVIDIA H200"),), "no answer in time"))
    assert found["GPU"] == [Finding("ok", "GPU", "NVIDIA H200")]
    assert "nvidia-smi -pm 1" in found["driver"][0].fix
    assert found["backend"][0].text.startswith("dali (")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    pretend_torch(monkeypatch, "2.11.0", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = diagnose(monkeypatch, H200)
    assert found["GPU"][-1].fix == "unset CUDA_VISIBLE_DEVICES"
    assert found["backend"][0].text.startswith("torch (")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert diagnose(monkeypatch, H200)["GPU"][-1].text == "CUDA_VISIBLE_DEVICES=0 selects among them"


@pytest.mark.parametrize(
    ("visible", "order", "backend"),
    [("0", None, "dali"), ("GPU-5a", None, "dali"), ("1", "PCI_BUS_ID", "dali"), ("0", "PCI_BUS_ID", "torch")],
)
def test_a_gpu_that_is_not_selected_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, visible: str, order: str | None, backend: str
) -> None:
    """A display adapter beside the GPU of the training is too old for CUDA 13."""
    pretend_torch(monkeypatch, "2.11.0", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    found = diagnose(monkeypatch, H200._replace(gpus=(Gpu("Quadro P400", 2 << 30, 1 << 30, (6, 1)), *H200.gpus)))
    assert [finding.text.split(",")[0] for finding in found["GPU"][:2]] == ["Quadro P400", "NVIDIA H200"]
    assert found["backend"][0].text.startswith(f"{backend} (")
    assert (found["torch"][0].status == "ok") == (backend == "dali")


def test_missing_and_outdated_packages_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "isal":
            raise metadata.PackageNotFoundError(name)
        return "0.4.1" if name == "timm" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    (finding,) = diagnose(monkeypatch)["packages"]
    assert (finding.status, finding.text) == ("error", "isal is missing, timm 0.4.1")
    assert re.fullmatch(r"python -m pip install 'isal>=1\.6' 'timm>=1\.[0-9.]+'", finding.fix)
    monkeypatch.setattr(doctor, "quote", '"{}"'.format)  # as on Windows
    assert diagnose(monkeypatch)["packages"][0].fix.startswith('python -m pip install "isal>=1.6" "timm')
    assert doctor.main() == 1


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ModuleNotFoundError("No module named 'psutil'")

    monkeypatch.setattr(doctor, "_check_memory", fail)
    (finding,) = diagnose(monkeypatch)["memory"]
    assert finding == Finding("error", "memory", "not checked: ModuleNotFoundError: No module named 'psutil'")


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("350000 50000", 7), ("max 100000", 64)])
def test_cores_are_those_of_the_container(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    show_tree(monkeypatch, tmp_path, "0::/\n", {"cpu.max": quota})
    (finding,) = diagnose(monkeypatch)["cores"]
    assert finding.text.startswith(f"{cores} of 96, ")
    assert collect_env_info(torch.device("cpu"))["cores"] == cores


def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nvidia.dali" else real(name))


def test_without_dali_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    without_dali(monkeypatch)
    monkeypatch.setattr(metadata, "distributions", lambda: [])
    pretend_torch(monkeypatch, "2.11.0", "13.0")
    found = diagnose(monkeypatch, H200)
    fix = "python -m pip install nvidia-dali-cuda120"
    assert found["DALI"] == [Finding("warning", "DALI", "not installed", fix)]
    text = "torch (DALI is not installed); none for image files of different sizes"
    assert found["backend"] == [Finding("ok", "backend", text)]


def test_a_system_without_dali_is_told_what_it_cannot_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    (finding,) = doctor._check_dali(NO_DRIVER)
    assert finding.status == "ok" and "images of one size" in finding.text


def test_a_hidden_dali_is_found_after_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another directory's nvidia/__init__.py hides one without."""
    site, other = tmp_path / "site packages", tmp_path / "other"
    (site / "nvidia" / "dali").mkdir(parents=True)
    (site / "nvidia" / "dali" / "__init__.py").touch()
    (other / "nvidia").mkdir(parents=True)
    (other / "nvidia" / "__init__.py").touch()
    finding = doctor._missing_dali(site / "nvidia")
    find = f"{sys.executable} -S -c \"import importlib.util as u; print(u.find_spec('nvidia.dali'))\""
    environment = {**os.environ, "PYTHONPATH": f"{other}:{site}"}
    command = ["bash", "-c", f"{find}; {finding.fix}; {find}"]
    before, after = subprocess.check_output(command, env=environment, text=True).splitlines()
    assert before == "None"
    assert str(site / "nvidia" / "dali") in after
    assert finding.text.startswith(f"installed in {site / 'nvidia'}, but hidden by ")


def test_dali_for_another_python_or_driver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("no DALI")
    pretend_torch(monkeypatch, "2.6.0", "11.8")
    assert "the driver supports CUDA 11.4" in diagnose(monkeypatch, H200._replace(cuda=(11, 4)))["DALI"][0].text
    monkeypatch.setattr(doctor, "EXTENSION_SUFFIXES", [".cpython-399-x86_64-linux-gnu.so"])
    (finding,) = diagnose(monkeypatch)["DALI"]
    assert finding.status == "error" and "no code for Python" in finding.text


def test_a_small_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 << 30, 9 << 30, 1 << 30))
    (finding,) = diagnose(monkeypatch)["disk"]
    assert finding.status == "warning"
    assert finding.text == f"1.0 GiB free of 10.0 GiB in {Path.cwd()}"
    assert "run.dir=DIR" in finding.fix


def test_the_cache_tells_size_limit_and_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("a", 3 << 30), ("b", 1 << 30)):
        entry = tmp_path / "cache" / "sets" / name
        entry.mkdir(parents=True)
        (entry / ".use").write_text(str(size))
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "16GiB")
    (finding,) = diagnose(monkeypatch)["cache"]
    assert finding == Finding("ok", "cache", f"4.0 GiB of at most 16.0 GiB in {tmp_path / 'cache'}")
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "many")
    (finding,) = diagnose(monkeypatch)["cache"]
    assert (finding.status, finding.text) == ("error", "INKSTREAM_CACHE_SIZE=many")
    (tmp_path / "file").touch()
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "file" / "cache"))
    (finding,) = diagnose(monkeypatch)["cache"]
    assert (finding.status, finding.fix) == ("warning", "export INKSTREAM_CACHE=$PWD/cache")


def test_a_cache_without_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    (finding,) = diagnose(monkeypatch)["cache"]
    assert finding.text == f"{tmp_path / 'cache'} is not writable: only remote data sets that it holds can be used"


def test_the_wandb_key_is_found_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = diagnose(monkeypatch)["W&B key"]
    assert (finding.status, finding.fix) == ("warning", "wandb login")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 5ecret\n")
    assert diagnose(monkeypatch)["W&B key"] == [Finding("ok", "W&B key", f"present in {tmp_path / 'netrc'}")]
    (tmp_path / "netrc").write_text("machine other.org login user password 5ecret\n")
    assert diagnose(monkeypatch)["W&B key"][0].status == "warning"
    (tmp_path / "netrc").write_text('machine "\n')
    assert diagnose(monkeypatch)["W&B key"][0].status == "warning"
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "_netrc").write_text("machine api.wandb.ai login user password 5ecret\n")  # its name on Windows
    assert diagnose(monkeypatch)["W&B key"] == [Finding("ok", "W&B key", f"present in {tmp_path / '_netrc'}")]
    monkeypatch.setenv("WANDB_API_KEY", "5ecret")
    assert diagnose(monkeypatch)["W&B key"] == [Finding("ok", "W&B key", "present in WANDB_API_KEY")]
