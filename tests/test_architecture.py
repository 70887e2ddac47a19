"""Rules of docs/architecture.md: import order, import cycles, size of packages, owners of libraries."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("shards", "pipeline", "trainer", "benchmarks")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# `shards <- pipeline <- trainer <- benchmarks`: what each must not know.
FORBIDDEN = {
    "shards": {"pipeline", "trainer", "benchmarks", "torch", "nvidia", "timm"},
    "pipeline": {"trainer", "benchmarks", "timm", "wandb"},
    "trainer": {"benchmarks", "nvidia", "webdataset", "tarfile", "zarr"},
    "benchmarks": set(),
}
# Where the library is imported, and nowhere else in the packages that are the product.
OWNERS = {
    "fsspec": {"shards/remote/fsspec_backend.py"},
    "nvidia": {"pipeline/transforms/dali_backend.py"},
    "onnx": {"trainer/export/formats.py"},
    "onnxruntime": {"trainer/export/formats.py"},
    "mlflow": {"trainer/runtime/loggers/mlflow_logger.py"},
    "wandb": {"trainer/runtime/loggers/wandb_logger.py"},
    "torch.utils.tensorboard": {"trainer/runtime/loggers/tensorboard_logger.py"},
    "timm": {
        "trainer/models/factory.py",
        "trainer/models/weights.py",
        "trainer/models/transfer.py",
        "trainer/models/efficientnet_cifar.py",
        "trainer/config/schema.py",
        "trainer/optim/optimizers.py",
        "trainer/optim/schedules.py",
        "trainer/optim/skippable.py",
    },
    "torchvision": {"trainer/models/squeezenet.py"},
    "zarr": {"shards/stores/zarr_arrays.py"},
    "numcodecs": {"shards/stores/zarr.py"},
    "optuna": {"trainer/tune/study.py"},
}
MAX_ENTRIES = 14
# From bottom to top: a sub-package of trainer imports only those before it, or of its own level.
TRAINER_LEVELS = (
    {"config"},
    {"models", "runtime"},
    {"checkpoint", "data"},
    {"optim"},
    {"evaluate"},
    {"loop", "predict", "export", "report"},
    {"run", "tune"},
)
GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all", "np.random.seed", "random.seed"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Dotted names of all modules that a file imports, wherever in it; relative ones made absolute."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def importers(library: str) -> set[str]:
    return {
        name_of(path)
        for path in MODULES
        if path.relative_to(ROOT).parts[0] != "benchmarks"
        and any(name == library or name.startswith(f"{library}.") for name in imported(path))
    }


def calls(path: Path) -> Iterator[str]:
    """Dotted names of all functions that a file calls."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_the_packages_are_where_they_are_looked_for() -> None:
    for package in PACKAGES:
        assert ROOT / package / "__init__.py" in MODULES


def test_all_packages_are_installed() -> None:
    from setuptools import find_namespace_packages

    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    installed = set(find_namespace_packages(str(ROOT), include=found["include"], exclude=found["exclude"]))
    with_code = {name_of(path.parent).replace("/", ".") for path in MODULES if path.stem == "__init__"}
    assert with_code | {"configs", "configs.search"} <= installed
    assert {name.partition(".")[0] for name in installed} == {*PACKAGES, "configs"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    found = {
        f"{name_of(path)} imports {name}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == package
        for name in imported(path)
        if name.partition(".")[0] in FORBIDDEN[package]
    }
    assert found == set()


def module_name(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """The modules of the four packages that each of them imports, imports inside functions included."""
    names = {module_name(path) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph[module_name(path)] = dependencies = set()
        for name in imported(path):
            while name and name not in names:
                name = name.rpartition(".")[0]
            # `from package import module` also yields the package, which it needs for its path only.
            if name and not any(other.startswith(f"{name}.") and other in names for other in imported(path)):
                dependencies.add(name)
        dependencies.discard(module_name(path))
    return graph


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_modules_import_without_cycles() -> None:
    assert_no_cycle(import_graph())


@pytest.mark.parametrize("depth", [2, 3])
def test_packages_import_without_cycles(depth: int) -> None:
    """Each sub-package, taken as one, with the modules beside it."""
    graph: dict[str, set[str]] = {}
    for module, dependencies in import_graph().items():
        package = ".".join(module.split(".")[:depth])
        inner = {".".join(name.split(".")[:depth]) for name in dependencies} - {package}
        graph.setdefault(package, set()).update(inner)
    assert_no_cycle(graph)


def test_a_cycle_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="a -> b"):
        assert_no_cycle({"a": {"b"}, "b": {"a"}})


def test_the_trainer_imports_from_below() -> None:
    level = {name: number for number, names in enumerate(TRAINER_LEVELS) for name in names}
    found = {
        f"{module} imports {dependency}"
        for module, dependencies in import_graph().items()
        for dependency in dependencies
        if module.startswith("trainer.") and dependency.startswith("trainer.")
        if level[module.split(".")[1]] < level[dependency.split(".")[1]]
    }
    assert found == set()


def test_packages_have_few_entries() -> None:
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    entries: dict[str, set[str]] = {}
    for name in listed.stdout.splitlines():
        if not name.startswith("benchmarks/results/"):
            parts = name.split("/")
            for number in range(1, len(parts)):
                entries.setdefault("/".join(parts[:number]), set()).add(parts[number])
    assert {package: len(names) for package, names in entries.items() if len(names) > MAX_ENTRIES} == {}


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_where_it_belongs(library: str) -> None:
    assert importers(library) == OWNERS[library]


def test_an_import_is_seen_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "trainer" / "inner" / "example.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    import wandb.sdk as w\nfrom nvidia import dali\nfrom .. import engine\nfrom . import a"
    )
    names = set(imported(path))
    assert {"wandb.sdk", "nvidia.dali", "trainer.engine", "trainer.inner.a"} <= names


def test_nothing_is_called_utils() -> None:
    assert [name_of(path) for path in MODULES if "util" in path.stem or "helper" in path.stem] == []


def test_text_files_are_opened_as_utf8() -> None:
    """The default of Windows is another encoding."""
    found = [
        f"{name_of(path)}: {ast.unparse(call)}"
        for path in MODULES
        for call in ast.walk(tree_of(path))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "open"
        if not (call.args[1:] and "b" in ast.unparse(call.args[1]))
        if "encoding" not in {keyword.arg for keyword in call.keywords}
    ]
    assert found == []


def test_every_module_says_what_it_is() -> None:
    assert [name_of(path) for path in MODULES if not ast.get_docstring(tree_of(path))] == []


def test_global_generators_are_seeded_in_one_place() -> None:
    found = {name_of(path) for path in MODULES if GLOBAL_SEEDS & set(calls(path))}
    assert found == {"trainer/runtime/seeding.py"}


def test_nothing_draws_from_numpys_or_pythons_global_generator() -> None:
    """A generator of one's own begins with a capital letter (Philox, Generator) or is default_rng."""
    found = set()
    for path in MODULES:
        assert "random" not in set(imported(path)), name_of(path)
        drawn = {re.match(r"(?:np|numpy)\.random\.(\w+)", call) for call in calls(path)} - {None}
        found |= {f"{name_of(path)}: {match[0]}" for match in drawn if not re.match("[A-Z]|default_rng", match[1])}
    assert found == set()
