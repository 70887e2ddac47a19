"""Every hint of the product: the commands, options, settings, recipes and extras that it names exist and parse."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, run_module
from support.parsers import parser_of

from inkstream import COMMANDS
from shards import UserError, open_split
from shards.errors import quote
from trainer.config.load import RECIPES, SETTINGS, load
from trainer.config.schema import Config
from trainer.tune.search_space import describe

MODULES = [ROOT / "inkstream.py"]
MODULES += sorted(
    path for name in ("shards", "pipeline", "trainer", "benchmarks") for path in (ROOT / name).rglob("*.py")
)
ERRORS = {"UserError", "NotFoundError", "CorruptError", "MismatchError", "AccessDeniedError", "DiskFullError"}
SCRIPTS = tuple(f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
EXTRA_COMMANDS = ("trainer.predict.pseudo_label", "trainer.predict.preview", "trainer.loop.find_batch_size")
EXTRA_COMMANDS += ("trainer.loop.replay_step", "pipeline.dedup.overlap", *SCRIPTS)
VALUE = "{}"  # what an f-string inserts
PATH = "/data/it's mine $HOME/-x"  # what `quote` is given
PATH_NAME = re.compile(r"\b(path|dir|directory|dataset|target|run|run_dir|root|folder|file|out|archive)\b(?!\()")


def texts(node: ast.expr | None) -> Iterator[str]:
    """The texts that an expression may become; inserted values are `VALUE`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(map(inserted, node.values))
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from texts(part.value)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for each in node.values:
            yield from texts(each)
    elif isinstance(node, ast.BinOp):
        right = [*texts(node.right)] or [VALUE]
        for left in [*texts(node.left)] or [VALUE]:
            yield from (left + each for each in right)
    elif is_quoted(node):
        yield inserted(node)


def is_quoted(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "quote"


def inserted(node: ast.expr) -> str:
    """A part of an f-string, with `VALUE` for a value and `PATH`, as a shell reads it, for `quote(value)`."""
    if isinstance(node, ast.FormattedValue):
        return inserted(node.value)
    if isinstance(node, ast.Call) and is_quoted(node):
        parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else node.args
        return quote("".join(part.value if isinstance(part, ast.Constant) else PATH for part in parts))
    return node.value if isinstance(node, ast.Constant) else VALUE


def inserted_names(node: ast.AST | None) -> Iterator[str]:
    """The variables that the f-strings of an expression insert outside of calls."""
    if isinstance(node, ast.FormattedValue) and not isinstance(node.value, ast.Call | ast.JoinedStr):
        yield ast.unparse(node.value)
    for child in ast.iter_child_nodes(node) if node is not None and not isinstance(node, ast.Call) else ():
        yield from inserted_names(child)


def hint_nodes(tree: ast.Module) -> Iterator[ast.expr | None]:
    """The hints of a module: arguments `hint=`, third arguments of errors, values of names that hold hints."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            yield node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and len(node.args) == 3:
            yield node.args[2]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any("hint" in ast.unparse(target).lower() for target in targets):
                yield node.value
        elif isinstance(node, ast.FunctionDef) and "hint" in (ast.get_docstring(node) or "").lower():
            yield from (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return))


@cache
def hints_of(path: Path) -> frozenset[str]:
    """The hints of a module, and those that it prints as text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = {text for hint in hint_nodes(tree) for text in texts(hint)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            for text in texts(node):
                hints.update(re.findall(r"^hint: (.+)$", text, re.MULTILINE))
    return frozenset(hints)


@cache
def known_options() -> frozenset[str]:
    commands = {module for module, _ in COMMANDS.values()} | set(EXTRA_COMMANDS)
    return frozenset(option for module in commands for option in parser_of(module)._option_string_actions)


@cache
def extras() -> frozenset[str]:
    return frozenset(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def commands_in(hint: str) -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of each command that a hint names, up to the words that follow it."""
    for module, rest in re.findall(r"(?:python|torchrun[^;]*?) -m (?!venv)([a-z_.]+)([^;()]*)", hint):
        rest = re.split(r", (?:or|and) | names the | lists all | shows the |, ", rest)[0]
        yield module, shlex.split(re.sub(r"\[|\]", "", rest))
    for name in re.findall(r"\binkstream ([a-z]+)", hint):
        yield COMMANDS[name][0], []


def test_paths_in_hints_are_quoted() -> None:
    for module in MODULES:
        for hint in hint_nodes(ast.parse(module.read_text(encoding="utf-8"))):
            for name in inserted_names(hint):
                assert not PATH_NAME.search(name), f"{module}: {name} in a hint needs quote(...)"


@pytest.mark.parametrize("word", [PATH, "-x", "--out", "a b", "~/x", "*", "plain/path-1.png", "", "\\"])
def test_a_quoted_path_is_one_word(word: str) -> None:
    shell = subprocess.run(["sh", "-c", f"printf '%s|' {quote(word)}"], capture_output=True, text=True, timeout=60)
    assert shell.stdout == (f"./{word}|" if word.startswith("-") else f"{word}|")


def test_hints_are_found_everywhere() -> None:
    assert sum(len(hints_of(path)) for path in MODULES) > 200
    packages = {path.relative_to(ROOT).parts[0] for path in MODULES if hints_of(path)}
    assert packages == {"inkstream.py", "shards", "pipeline", "trainer", "benchmarks"}


@pytest.mark.parametrize("package", ["inkstream.py", "shards", "pipeline", "trainer", "benchmarks"])
def test_what_hints_name_exists(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in MODULES:
        name = path.relative_to(ROOT).as_posix()
        if name.partition("/")[0] == package:
            for hint in sorted(hints_of(path)):
                check_hint(name, hint, capsys)


def check_hint(module: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in commands_in(hint):
        parser = parser_of(command)
        if "..." in words or not words:
            words = [word for word in words if word != "..."]
            options = [word.partition("=")[0] for word in words if word.startswith("--")]
            assert set(options) <= set(parser._option_string_actions), words
            continue
        assert any(PATH in word for word in words) == (shlex.quote(PATH)[1:10] in hint), words
        words = [word.replace(VALUE, "1").replace("SOURCE", "digits") for word in words]
        words = [re.sub("^N$", "2", word) for word in words]
        try:
            parser.parse_intermixed_args(words)
        except SystemExit:
            pytest.fail(f"{command} {words}: {capsys.readouterr().err}")
        for setting in (word.partition("=")[0] for word in words if re.fullmatch(r"[a-z_.]+=.*", word)):
            assert setting in SETTINGS, setting
    if module != "shards/remote/fsspec_backend.py":
        for option in re.findall(
            r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"pip install.*|torchrun --\S+|.*docker.*", "", hint)
        ):
            assert option in known_options(), option
    sections = {name.partition(".")[0] for name in SETTINGS if "." in name}
    for name in re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)(?![\w.(/])", hint):
        place = ROOT / name.replace(".", "/")
        is_module = place.is_dir() or place.with_suffix(".py").is_file()
        assert is_module or name in SETTINGS or name in describe(), name
    for extra in re.findall(r"\.\[([a-z]+)\]", hint):
        assert extra in extras(), extra
    for name in re.findall(r"(?:configs|benchmarks|docs)/[\w/]+\.(?:yaml|md)", hint):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\bmake ([a-z-]+)\b(?!=)", hint):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def error_of(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "mistake", ["trainer.epoch=3", "optim.learning_rate=0.1", "batch_size=8", "loader.batchsize=8", "model.nme=x"]
)
def test_a_setting_that_a_hint_suggests_is_accepted(mistake: str) -> None:
    error = error_of(lambda: load(RECIPES / "quickstart.yaml", [mistake]))
    found = re.fullmatch(r"did you mean (.+)\?", error.hint)
    assert found is not None
    assert isinstance(load(RECIPES / "quickstart.yaml", [f"{found[1]}={mistake.partition('=')[2]}"]), Config)


def test_a_recipe_that_a_hint_suggests_loads() -> None:
    found = re.fullmatch(r"did you mean (\w+).*\?", error_of(lambda: load(Path("quickstrat"), [])).hint)
    assert found is not None
    assert load(Path(found[1]), []).run.name == found[1]
    for name in error_of(lambda: load(Path("zzzzzz"), [])).hint.removeprefix("one of ").split(", "):
        assert load(Path(name), []).run.name == name


def test_a_data_set_that_a_hint_names_opens(digits_set: Path) -> None:
    inside = error_of(lambda: open_split(digits_set.parent, "train")).hint
    assert open_split(Path(inside.rpartition(": ")[2]), "train").manifest.split == "train"
    split = error_of(lambda: open_split(digits_set / "train", "train")).hint
    assert open_split(Path(split.removeprefix("name ")), "train").manifest.split == "train"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["emnist", "--split", "nothing"], 0), (["cifar", "--split", "x"], 0), (["digits", "--size", "0"], 0)],
)
def test_a_packing_command_that_a_hint_names_runs(tmp_path: Path, arguments: list[str], status: int) -> None:
    process = run_module("pipeline.shard", *arguments, "--dry-run", cwd=tmp_path)
    assert process.returncode == 2
    hint = process.stderr.rpartition("hint: ")[2].strip()
    if hint.startswith("python -m"):
        _, _, module, *words = shlex.split(hint)
        assert run_module(module, *words, "--dry-run", cwd=tmp_path).returncode == status, hint
    else:
        assert re.fullmatch(r"(did you mean|--size \d+).*", hint)


def test_swapped_arguments_are_exchanged_by_their_hint(digits_run: Path, tmp_path: Path, digits_set: Path) -> None:
    run = tmp_path / "it's $HOME"
    run.symlink_to(digits_run)
    process = run_module("trainer.evaluate", digits_set, run, cwd=tmp_path)
    assert process.returncode == 2
    words = shlex.split(process.stderr.rpartition("hint: exchange them: ")[2])
    process = run_module("trainer.evaluate", *words, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "accuracy" in process.stdout


def test_make_names_a_missing_python() -> None:
    process = subprocess.run(
        ["make", "PYTHON=nonexistent", "-W", "pyproject.toml", "-n", ".venv/.installed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert 'echo "error: $(' in process.stdout
    line = next(line for line in process.stdout.splitlines() if "version_info" in line)
    recipe = process.stdout[process.stdout.index(line) :].partition("exit 2; }")[0] + "exit 2; }"
    shell = subprocess.run(["sh", "-c", recipe], capture_output=True, text=True, timeout=60)
    assert shell.returncode == 2
    assert shell.stderr.splitlines() == [
        "error: no program nonexistent",
        "expected: Python 3.11 or newer",
        "hint: name one: make PYTHON=python3.12 ...",
    ]
