"""Container, examples for Slurm and Kubernetes, and the notebook."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from inkstream import COMMANDS
from shards.remote.cache import DIRECTORY_VARIABLE, cache_directory
from trainer.config.load import load

DEPLOY = ROOT / "docs" / "deploy"
SLURM = DEPLOY / "slurm.sbatch"
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as pairs of an instruction and its arguments, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line]


def ignored(path: str) -> bool:
    """Whether .dockerignore excludes a path: the last pattern that matches it or a directory above decides."""
    result = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            parts = path.split("/")
            above = {"/".join(parts[: count + 1]) for count in range(len(parts))} | {"*"}
            if pattern.removeprefix("!") in above or (pattern.startswith("**/") and pattern[3:] in parts):
                result = not pattern.startswith("!")
    return result


def test_the_image_contains_the_packages_and_nothing_else() -> None:
    copied = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/__init__.py")}
    assert packages | {"configs", "pyproject.toml", "constraints.txt", "inkstream.py", "README.md"} == set(copied)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    needed = [
        name
        for name in tracked.stdout.splitlines()
        if name.split("/")[0] in copied and not name.startswith("benchmarks/results/")
    ]
    assert len(needed) > 200 and not [name for name in needed if ignored(name)]
    for name in (".git", ".venv", "runs/first/config.yaml", "data", "tests", "shards/__pycache__/x.pyc", ".env"):
        assert ignored(name), name


def test_workflows_find_the_constrained_versions_on_pypi() -> None:
    """The index of the CPU builds has other packages only in some versions, so it must not replace PyPI."""
    found = 0
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        for command in (step.get("run", "") for job in jobs for step in job["steps"]):
            if "--constraint" in command:
                assert "--index-url" not in shlex.split(command), command
                found += "--extra-index-url" in command
    assert found == 3


def test_the_wheel_is_used_on_every_system() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "wheel.yml").read_text())["jobs"].values()
    assert job["runs-on"] == "${{ matrix.os }}" and job["defaults"]["run"]["shell"] == "bash"
    systems = {name.partition("-")[0] for name in job["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu", "macos", "windows"}


def test_every_installation_in_the_image_is_constrained() -> None:
    assert {name for name, _ in instructions()} == INSTRUCTIONS
    commands = [command for name, rest in instructions() if name == "RUN" for command in rest.split("&&")]
    installs = [shlex.split(command) for command in commands if "pip install" in command]
    assert len(installs) == 3
    for words in installs:
        assert words[words.index("--constraint") + 1] == "constraints.txt" and "--no-cache-dir" in words
    extras = re.search(r"\.\[([\w,-]+)\]", " ".join(map(" ".join, installs)))
    assert extras is not None
    available = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= set(available)


def test_the_image_runs_without_privileges_on_a_cuda_base() -> None:
    last = dict(instructions())
    assert last["FROM"] == "${CUDA_IMAGE}" and re.search(r"=nvidia/cuda:\d+\.\d+\.\d+-base-", last["ARG"])
    assert int(last["USER"]) > 0 and f"--uid {last['USER']} " in last["RUN"]
    assert json.loads(last["CMD"])[0] == "inkstream"


def test_the_caches_of_the_image_outlive_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie below the working directory, where the user mounts a directory: also where a library has a default."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", DIRECTORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for pair in (word for name, rest in instructions() if name == "ENV" for word in shlex.split(rest)):
        monkeypatch.setenv(*pair.replace("$PATH", os.environ["PATH"]).split("=", 1))
    mounted = dict(instructions())["WORKDIR"]
    caches = {
        "torch.compile": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(),
        "remote data sets": cache_directory(),
        "pretrained weights": Path("~/.cache").expanduser(),
        "Triton": Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton").expanduser(),
    }
    assert {name: path for name, path in caches.items() if not Path(path).is_relative_to(mounted)} == {}


def settings_of(words: list[str]) -> list[str]:
    """The recipe and settings of a `torchrun ... -m trainer.run` command."""
    assert words[words.index("-m") + 1] == "trainer.run"
    return words[words.index("-m") + 2 :]


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a batch job whose srun and scontrol write their arguments to `calls`."""
    programs = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; fi',
        "srun": 'trap "echo checkpoint >> calls; exit 143" TERM; sleep "$STEP_SECONDS" & wait $!; exit "$STEP_STATUS"',
    }
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> calls\n{body}\n')
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "1042", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    return os.environ | job | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STEP_SECONDS": "0"}


@pytest.mark.parametrize(("status", "cpus"), [(0, "64"), (2, "7")])
def test_a_slurm_job_trains_with_its_cpus_and_has_the_status_of_its_step(
    tmp_path: Path, cluster: dict[str, str], status: int, cpus: str
) -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    command = ["bash", SLURM, "byclass", "optim.lr=1e-3"]
    environment = cluster | {"STEP_STATUS": str(status), "SLURM_CPUS_PER_TASK": cpus}
    process = subprocess.run(command, cwd=tmp_path, env=environment, timeout=60)
    assert process.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "scontrol show hostnames node[7-8]" and len(calls) == 2
    words = calls[1].split()
    assert words[:3] == ["srun", f"--cpus-per-task={cpus}", "torchrun"]
    assert {"--nnodes=2", "--rdzv-endpoint=node7:21042", "--rdzv-id=1042"} <= set(words)
    recipe, *settings = settings_of(words)
    config = load(Path(recipe), settings)
    assert (config.optim.lr, config.resume, config.run.dir) == (1e-3, "auto", Path("runs/slurm-1042"))


def test_a_slurm_job_at_its_time_limit_writes_a_checkpoint_and_is_queued_again(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    process = subprocess.Popen(["bash", SLURM], cwd=tmp_path, env=cluster | {"STEP_SECONDS": "60"})
    calls = tmp_path / "calls"
    deadline = time.monotonic() + 60
    while not calls.exists() or "srun" not in calls.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert calls.read_text().splitlines()[2:] == ["checkpoint", "scontrol requeue 1042"]


def test_the_kubernetes_job_trains_a_recipe_in_the_image() -> None:
    service, job = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert (service["kind"], job["apiVersion"], job["kind"]) == ("Service", "batch/v1", "Job")
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words: list[Any] = container["command"] + container["args"]
    assert words[0] == "torchrun" and all(isinstance(word, str) for word in words)
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29500" in words
    assert f"--nnodes={job['spec']['completions']}" in words and job["spec"]["completionMode"] == "Indexed"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    recipe, *settings = settings_of(words)
    config = load(Path(recipe), settings)
    assert config.resume == "auto" and config.run.dir is not None
    assert pod["terminationGracePeriodSeconds"] > config.checkpoint.grace_seconds
    assert pod["securityContext"]["runAsUser"] == int(dict(instructions())["USER"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_notebook_packs_trains_inspects_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells run in order, in one namespace; a line `!inkstream ...` runs the command in this process."""
    import matplotlib

    def inkstream(line: str) -> None:
        command, *arguments = shlex.split(line)[1:]
        monkeypatch.setattr("sys.argv", [command, *arguments])
        module = importlib.import_module(COMMANDS[command][0])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{module.__name__}.__main__")
        assert module.main() == 0, line

    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"_inkstream": inkstream}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            code = re.sub(r"^!(inkstream .*)$", r"_inkstream('\1')", "".join(cell["source"]), flags=re.MULTILINE)
            exec(compile(code, f"cell {cell['id']}", "exec"), namespace)
    namespace["plt"].close("all")
    output = capsys.readouterr().out
    assert namespace["summary"]["accuracy"] > 0.9 and len(namespace["epochs"]) == 2
    assert f"test accuracy {namespace['summary']['accuracy']:.2%}" in output
    assert len(namespace["wrong"]) == round(359 * (1 - namespace["summary"]["accuracy"]))
    assert re.search(r"^digit\.png\s+\d\s", output, re.MULTILINE) and namespace["accuracy"] > 0.9
    assert (tmp_path / "runs" / "tutorial" / "report.html").exists()
