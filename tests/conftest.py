"""What the tests share: real and synthetic data sets, packed once, and commands run as a user runs them."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: threads of each would only be in the way of the others. Read when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import multiprocessing
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _pytest.assertion import rewrite
from hypothesis import HealthCheck, settings
from support import warm_process

from pipeline.datasets import find_source
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.limits import available_cpus
from shards.manifest import RawFile, StoreKind

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, and so would every command that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup

MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4e9:
    # Directories of tests lie in memory, where there is enough: a disk makes every short file wait.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Property tests do not test durations, and other tests use the processors at the same time.
settings.register_profile("inkstream", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("inkstream")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


# With --dist=loadfile a file runs in one process. The longest files start first, so that none runs alone at the end.
LONGEST_FILES = (
    "remote/test_storage.py",
    "trainer/test_training.py",
    "tune/test_tune.py",
    "benchmarks/test_resolution_sweep.py",
    "loop/test_elastic.py",
    "benchmarks/test_shuffle_quality.py",
    "benchmarks/test_loader_throughput.py",
    "shards/test_verify.py",
    "dedup/test_near_duplicates.py",
    "pipeline/test_hostile_input.py",
    "loop/test_resume.py",
    "packing/test_pack.py",
    "export/test_export.py",
    "stores/test_store_contract.py",
    "shards/test_convert.py",
    "shards/test_atomic.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, files without such tests are not imported: a machine with a GPU may lack what they need."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    if config.option.markexpr == "gpu" and is_test and "mark.gpu" not in collection_path.read_text():
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """With `-m gpu`, tests of DALI are skipped on a machine without it, or without its decoders."""
    try:
        return (yield)
    except (ModuleNotFoundError, RuntimeError) as error:
        if item.config.option.markexpr == "gpu":
            if str(getattr(error, "name", "")).startswith("nvidia"):
                pytest.skip("DALI is not installed")
            if "libnvimgcodec.so failed" in str(error):
                pytest.skip("nvidia-nvimgcodec-cu12 is not installed")
        raise


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are processors: tests also wait, for processes and for time to pass."""
    return min(8, available_cpus() + 2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Test processes are warm as well: they need not import what the tests of all files import."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for spec in specs:
        spec.python = warm_process.executable()
    _rewrite_assertions(config)


def _rewrite_assertions(config: pytest.Config) -> None:
    """Compile the test files as pytest does, while the server of warm processes imports its libraries.

    In a fresh clone, or with PYTHONDONTWRITEBYTECODE, each test process would compile all of them.
    """
    for path in Path(__file__).parent.rglob("test_*.py"):
        compiled = rewrite.get_cache_dir(path) / (path.stem + rewrite.PYC_TAIL)
        if rewrite._read_pyc(path, compiled) is None and rewrite.try_makedirs(compiled.parent):
            source, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source, compiled)


if "PYTEST_XDIST_WORKER" in os.environ:
    # What the tests start by its name is a fresh interpreter; what multiprocessing spawns is forked.
    sys.executable = sys.orig_argv[0]
    multiprocessing.set_executable(warm_process.executable())


def pytest_collection_finish() -> None:
    """The garbage collector need not search the imported modules and the list of tests again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((number for number, name in enumerate(LONGEST_FILES) if path.endswith(name)), len(LONGEST_FILES))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Genuine EMNIST and MNIST files, where there are any beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no data beside the project")
    return SHARED_DATA


def synthetic_splits(
    train: int = 700,
    test: int = 90,
    classes: int = 5,
    shape: tuple[int, int, int] = (28, 28, 1),
    transposed: bool = True,
    seed: int = 0,
) -> tuple[RawSplit, ...]:
    """Random images sorted by class, each with a bright band (in the upright image) that tells its class."""
    parts = []
    for name, count in (("train", train), ("test", test)):
        random = np.random.default_rng([seed, count])
        labels = np.sort(random.integers(0, classes, count)).astype(np.int64)
        images = random.integers(0, 100, (count, *shape), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            lines = slice(label * shape[0] // classes, (label + 1) * shape[0] // classes)
            image[lines] = 255
        if transposed:
            images = np.ascontiguousarray(images.swapaxes(1, 2))
        names = tuple(f"class {number}" for number in range(classes))
        record = RawFile(name=f"synthetic {name}", bytes=images.nbytes, sha256="0" * 64)
        parts.append(RawSplit.from_arrays(name, images, labels, names, transposed=transposed, files=(record,)))
    return tuple(parts)


def pack_splits(
    parts: tuple[RawSplit, ...],
    out: Path,
    block_size: int = 64,
    seed: int = 0,
    store: StoreKind = "tar",
    compression: str = "zstd",
) -> Path:
    settings = {"block_size": block_size, "seed": seed, "store": store, "compression": compression}
    pack(lambda: parts, out, PackSettings("synthetic", **settings))
    return out


@pytest.fixture(scope="session")
def synthetic_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 700 + 90 synthetic images of five classes, 28x28, transposed. Not to be changed."""
    return pack_splits(synthetic_splits(), tmp_path_factory.mktemp("synthetic") / "set")


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 144 + 30 synthetic images of three classes, 12x12, in blocks of 16. Not to be changed."""
    parts = synthetic_splits(train=144, test=30, classes=3, shape=(12, 12, 1), transposed=False)
    return pack_splits(parts, tmp_path_factory.mktemp("small") / "set", block_size=16)


@pytest.fixture(scope="session")
def digits_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed digits of scikit-learn. Not to be changed."""
    out = tmp_path_factory.mktemp("digits") / "digits"
    source = find_source("digits")
    pack(lambda: source.load(SourceOptions(out)), out, PackSettings("digits"))
    return out


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, digits_set: Path) -> Path:
    """A run on the digits at 16x16, some seconds long, that has learned them. Not to be changed."""
    from trainer.run import main as run_main

    directory = tmp_path_factory.mktemp("digits-run") / "run"
    recipe = directory.parent / "digits.yaml"
    recipe.write_text(
        f"data: {{shards: '{digits_set}', resolution: 16}}\nmodel: {{name: three_block_cnn}}\n"
        "loader: {batch_size: 64}\noptim: {lr: 3.0e-3}\ntrainer: {epochs: 3, precision: fp32}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory}"])
        assert run_main() == 0
    return directory


def run_module(
    module: str, *arguments: object, cwd: Path | None = None, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in a process of its own; returns it, finished, with its output as text.

    `module` may also be the path of a script, for `python script.py arguments`.
    """
    command = [sys.executable, *([] if module.endswith(".py") else ["-m"]), module, *arguments]
    environment = os.environ | env
    return warm_process.run(command, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_user_error(process: subprocess.CompletedProcess, *words: str) -> None:
    """Assert one message (error, expected, hint) with all the words, exit status 2 and no traceback."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    for word in ("error: ", "\nexpected: ", "\nhint: ", *words):
        assert word in process.stderr, process.stderr
    assert process.stderr.count("\nexpected: ") == 1
