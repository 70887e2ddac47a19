"""The `inkstream` command: one entry point for the commands of all packages.

Each sub-command runs the `main` of a module that `python -m` also runs, so both forms take the same options. A
module is imported only when its command runs, which keeps `inkstream --help` fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMMANDS = {
    "pack": ("pipeline.shard", "pack raw files into shards"),
    "preview": ("pipeline.preview", "write a contact sheet of a packed data set"),
    "train": ("trainer.run", "train a recipe"),
    "evaluate": ("trainer.evaluate", "evaluate a run on a packed data set"),
    "predict": ("trainer.predict", "predict image files"),
    "label-errors": ("trainer.predict.label_errors", "find training images whose label is probably wrong"),
    "demo": ("trainer.predict.demo", "open a drawing page in the browser"),
    "ensemble": ("trainer.export.ensemble", "combine runs into an ensemble or a soup"),
    "export": ("trainer.export", "export a run to ONNX, torch.export or safetensors"),
    "hub": ("trainer.export.hub", "push a run to the Hugging Face Hub, or pull one"),
    "report": ("trainer.report", "write the report of a run, or compare runs"),
    "find-lr": ("trainer.loop.find_lr", "find a learning rate by a range test"),
    "tune": ("trainer.tune", "search hyperparameters with Optuna"),
    "verify": ("shards.verify", "check a packed data set for damage"),
    "convert": ("shards.convert", "convert a packed data set between tar and zarr"),
    "index": ("shards.index", "adopt WebDataset shards written by other tools"),
    "doctor": ("trainer.runtime.doctor", "report what this machine lacks, and the command that fixes it"),
    "sweep": ("benchmarks.resolution_sweep", "measure what each resolution costs and buys"),
}
_PACKAGES = ("shards", "pipeline", "trainer", "benchmarks")


def main() -> int:
    """Run a sub-command. Returns the exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"inkstream {_version()}")
        return 0
    if arguments[0] not in COMMANDS:
        return _unknown(arguments[0])
    shadowing = _shadowing_package()
    if shadowing is not None:
        name, place = shadowing
        print(
            f"error: the package {name} is imported from {place}\n"
            f"expected: the one of this installation, {ROOT / name}\n"
            f"hint: uninstall or rename the other package, or run in an environment of its own (python -m venv .venv)",
            file=sys.stderr,
        )
        return 2
    sys.argv = [f"inkstream {arguments[0]}", *arguments[1:]]
    from shards.cli import run_command

    def command() -> int:
        module = importlib.import_module(COMMANDS[arguments[0]][0])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{module.__name__}.__main__")
        return module.main()

    run_command(command)
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items())
    return (
        "usage: inkstream COMMAND [options]\n\n"
        "Train image classifiers on large sets of small images.\n\n"
        f"commands:\n{lines}\n\n"
        "options:\n  -h, --help  show this help\n  --version   show the version\n\n"
        "`inkstream COMMAND --help` lists the options of a command."
    )


def _version() -> str:
    try:
        return version("inkstream")
    except PackageNotFoundError:
        return "unknown (not installed: run `pip install -e .` in the checkout)"


def _unknown(name: str) -> int:
    import difflib

    from shards.credentials import hide

    name = hide(name)
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"inkstream {near[0]} --help" if near else "inkstream --help"
    print(
        f"error: unknown command {name!r}\nexpected: one of {', '.join(COMMANDS)}\nhint: {hint}",
        file=sys.stderr,
    )
    return 2


def _shadowing_package() -> tuple[str, str] | None:
    """Find a package of ours that would be imported from elsewhere.

    Returns:
        Its name and the directory it would be imported from, or None.
    """
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        place = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if place != ROOT / name:
            return name, str(place) if place is not None else "nowhere (it is not installed)"
    return None


if __name__ == "__main__":
    sys.exit(main())
