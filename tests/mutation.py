"""Mutation testing: changes core modules one small step at a time and reports the changes that no test notices.

    make mutation                                            # 20 mutants of every module below, in hours
    make mutation MODULES=trainer/optim/losses.py SAMPLE=0   # all mutants of one module
    make mutation MODULES=trainer/optim/losses.py:43         # those of one line, after a test was added

The mutants are those of Cosmic Ray. It has no sampling and starts an interpreter for each mutant; this script draws a
sample by a seed and forks from a process that has imported the libraries. It works in a copy of the checkout.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import fnmatch
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "hypothesis",
    "numpy",
    "pydantic",
    "pytest",
    "scipy.optimize",
    "sklearn.metrics",
    "timm",
    "torch",
    "torchvision",
    "zarr",
)
STORE_CONTRACT = "tests/shards/stores/test_store_contract.py"
SLOW_CONTRACT = f"--deselect={STORE_CONTRACT}::test_what_is_packed_is_read"
TRANSFORMS = "tests/pipeline/transforms"
FUSED_UPDATES = "tests/trainer/optim/test_fused_updates.py"
SLOW_UPDATES = f"--deselect={FUSED_UPDATES}::test_two_ranks_learn_what_one_does"
# The tests of each module, fast ones first.
TESTS = {
    "pipeline/common/rng.py": ["tests/pipeline/test_sampler.py", "tests/pipeline/common/test_stratified.py"],
    "pipeline/sampler.py": ["tests/pipeline/test_sampler.py"],
    "pipeline/transforms/augmentation.py": [f"{TRANSFORMS}/test_augmentation.py"],
    "pipeline/transforms/warp.py": [f"{TRANSFORMS}/test_augmentation.py"],
    "pipeline/transforms/ops/matmul.py": [f"{TRANSFORMS}/test_matmul.py"],
    "pipeline/transforms/ops/philox.py": [
        f"{TRANSFORMS}/test_augmentation.py::test_words_of_a_gpu_are_those_of_numpy",
        f"{TRANSFORMS}/test_augmentation.py::test_noise_of_a_gpu_is_that_of_a_cpu",
    ],
    "pipeline/transforms/ops/resize.py": [f"{TRANSFORMS}/test_transforms.py"],
    "pipeline/transforms/ops/*.py": [f"{TRANSFORMS}/test_preprocess.py", f"{TRANSFORMS}/test_augmentation.py"],
    "pipeline/transforms/preprocess.py": [f"{TRANSFORMS}/test_preprocess.py"],
    "pipeline/transforms/shared_ops.py": [
        f"{TRANSFORMS}/test_auto_augment.py",
        f"{TRANSFORMS}/test_augmentation.py",
        f"{TRANSFORMS}/test_preprocess.py",
    ],
    "pipeline/transforms/*.py": [TRANSFORMS],
    "shards/stores/block_cache.py": ["tests/shards/stores/test_block_cache.py"],
    "shards/stores/image_header.py": ["tests/shards/stores/test_image_header.py"],
    "shards/stores/record_index.py": ["tests/shards/stores/test_records.py", "tests/shards/test_index.py"],
    "shards/stores/records.py": ["tests/shards/stores/test_records.py"],
    "shards/stores/zarr*.py": ["tests/shards/stores/test_zarr_store.py", STORE_CONTRACT, SLOW_CONTRACT],
    "shards/stores/split_files.py": ["tests/shards/stores/test_split_files.py"],
    "shards/stores/tar_members.py": ["tests/shards/test_index.py"],
    "shards/stores/*.py": ["tests/shards/stores/test_tar_format.py", STORE_CONTRACT, SLOW_CONTRACT],
    "trainer/checkpoint/checkpointer.py": [
        "tests/trainer/checkpoint/test_checkpointer.py",
        "tests/trainer/loop/test_resume.py::test_a_checkpoint_is_due_by_steps_or_minutes",
        "tests/trainer/loop/test_resume.py::test_what_is_written_is_the_state_when_it_was_given",
    ],
    "trainer/checkpoint/*.py": ["tests/trainer/checkpoint"],
    "trainer/evaluate/calibration.py": ["tests/trainer/evaluate/test_calibration.py"],
    "trainer/evaluate/logit_adjustment.py": ["tests/trainer/evaluate/test_logit_adjustment.py"],
    "trainer/evaluate/metrics.py": ["tests/trainer/evaluate/test_metrics.py"],
    "trainer/evaluate/tta.py": ["tests/trainer/evaluate/test_calibration.py"],
    "trainer/optim/distillation.py": ["tests/trainer/optim/test_distillation.py"],
    "trainer/optim/ema.py": [FUSED_UPDATES, SLOW_UPDATES],
    "trainer/optim/losses.py": ["tests/trainer/optim/test_loss.py"],
    "trainer/optim/mixup.py": ["tests/trainer/optim/test_mixup.py"],
    "trainer/optim/optimizers.py": ["tests/trainer/optim/test_optimizer.py"],
    "trainer/optim/schedules.py": ["tests/trainer/optim/test_optimizer.py"],
    "trainer/optim/skippable.py": [
        "tests/trainer/optim/test_optimizer.py::test_a_step_with_an_overflow_changes_nothing",
        FUSED_UPDATES,
        SLOW_UPDATES,
    ],
}

Place = tuple[tuple[int, int], tuple[int, int]]


def tests_of(module: str) -> list[str]:
    return next(tests for pattern, tests in TESTS.items() if fnmatch.fnmatch(module, pattern))


def annotations(source: str) -> list[Place]:
    """Places of the type annotations, which nothing evaluates."""
    tree = ast.parse(source)
    found = [node.annotation for node in ast.walk(tree) if isinstance(node, (ast.AnnAssign, ast.arg))]
    found += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in found if n]


def mutants_of(source: str, sample: int, seed: str, line: int = 0) -> Iterator[tuple[int, str]]:
    """The line and the source of `sample` mutants (0: all) in as many places as possible; of `line` alone if given."""
    ignored = annotations(source)
    nodes = list(ast_nodes(get_ast(source)))
    mutants = []
    for name in sorted(operator_names()):
        if get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start and end <= last for first, last in ignored):
                mutants.append((start, operator, occurrence))
    random.Random(seed).shuffle(mutants)
    earlier: dict[tuple[int, int], int] = {}
    rounds = []
    for mutant in mutants:
        rounds.append(earlier.setdefault(mutant[0], 0))
        earlier[mutant[0]] += 1
    for number in sorted(range(len(mutants)), key=rounds.__getitem__)[: sample or None]:
        start, operator, occurrence = mutants[number]
        if line in (0, start[0]):
            try:
                mutated = mutate_code(source, operator, occurrence)
            except AttributeError:
                continue  # Cosmic Ray cannot replace an exception with a dotted name
            yield start[0], mutated


def copy_checkout(to: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    if (ROOT.parent / "shared").is_dir():
        (to.parent / "shared").symlink_to(ROOT.parent / "shared")


def pass_tests(checkout: Path, tests: list[str], timeout: float) -> bool:
    """Whether all tests pass, within `timeout` seconds."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(checkout.parent / "output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(checkout)
        sys.path[0] = str(checkout)
        temporary = checkout.parent / "temporary"
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={temporary}"]
        options += ["--hypothesis-profile=ci"]  # the same examples each time, and no deadlines
        status = 1
        with contextlib.suppress(BaseException):
            status = importlib.import_module("pytest").main([*options, *tests])
        os._exit(status)
    deadline = time.monotonic() + timeout
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests have left running
    return ended[1] == 0


def test_module(checkout: Path, argument: str, sample: int, seed: int) -> tuple[int, int]:
    """Report the mutants of a module that survive; returns the number of mutants and of survivors."""
    module, _, chosen = argument.partition(":")
    path, tests = checkout / module, tests_of(module)
    source = path.read_text(encoding="utf-8")
    started = time.monotonic()
    if not pass_tests(checkout, tests, 600):
        print((checkout.parent / "output").read_text()[-2000:], file=sys.stderr)
        raise SystemExit(f"error: {' '.join(tests)} fail without a mutation")
    timeout = 10 + 3 * (time.monotonic() - started)
    mutants = survivors = 0
    for line, mutated in mutants_of(source, sample, f"{seed} {module}", int(chosen or 0)):
        mutants += 1
        path.write_text(mutated, encoding="utf-8")
        if pass_tests(checkout, tests, timeout):
            survivors += 1
            changed = list(difflib.ndiff(source.splitlines(), mutated.splitlines()))
            print(f"{module}:{line} survived", *(text for text in changed if text[0] in "-+"), sep="\n    ", flush=True)
    path.write_text(source, encoding="utf-8")
    print(f"{module}: {mutants} mutants, {survivors} survived, {time.monotonic() - started:.0f} s", flush=True)
    return mutants, survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE[:LINE]", help="default: all of TESTS")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each module; 0: all (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    options = parser.parse_args()
    found = {p.relative_to(ROOT).as_posix(): None for pattern in TESTS for p in sorted(ROOT.glob(pattern))}
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as directory:
        checkout = Path(directory, "checkout")
        copy_checkout(checkout)
        counts = [test_module(checkout, module, options.sample, options.seed) for module in options.modules or found]
    mutants, survivors = (sum(column) for column in zip(*counts, strict=True))
    print(f"all: {mutants} mutants, {mutants - survivors} caught, {survivors} survived")


if __name__ == "__main__":
    main()
