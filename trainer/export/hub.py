"""Push a run to the Hugging Face Hub, or pull one.

    python -m trainer.export.hub push RUN USER/NAME
    python -m trainer.export.hub pull USER/NAME DIR

A new repository is private. The files are those that commands read from a run, so a pulled directory is used like a
run; checkpoints to resume from, traces and batches stay where they are. If the run was exported (`python -m
trainer.export RUN --format safetensors`), the weights and the model card are pushed as well. The token is that of
`hf auth login` or HF_TOKEN; it is written nowhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from safetensors import SafetensorError, safe_open

from shards.atomic import replace_directory
from shards.cli import command_parser, run_command
from shards.errors import UserError, os_errors_as_user_errors, quote, refusal
from trainer.checkpoint.completed_run import CompletedRun

_FILES = (
    "checkpoints/best.pt",
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "predictions.npz",
    "report.html",
    "summary.json",
)
_EXPORT = Path("export/safetensors")
_WEIGHTS, _CARD = "model.safetensors", "README.md"


def push(run: Path, repository: str, api: HfApi) -> str:
    """Push a complete run in one commit.

    Args:
        run: Run directory.
        repository: USER/NAME, which is made if it does not exist.
        api: The Hub.

    Returns:
        Address of the repository.

    Raises:
        UserError: The run is not complete, its export is of another checkpoint, or the Hub refuses it.
    """
    completed = CompletedRun.open(run)
    files = {name: run / name for name in _FILES}
    if (run / _EXPORT / _WEIGHTS).is_file():
        _check_export(completed)
        files |= {name: run / _EXPORT / name for name in (_WEIGHTS, _CARD)}
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items() if path.is_file()
    ]
    with _errors_of_hub(repository):
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"Push {run.absolute().name}")
    return str(url)


def _check_export(run: CompletedRun) -> None:
    """Raise `UserError` if the exported weights are not those of the best checkpoint.

    They differ if training was resumed after the export.
    """
    exported = run.directory.path / _EXPORT / _WEIGHTS
    metadata: dict[str, str] = {}
    with contextlib.suppress(SafetensorError), safe_open(exported, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("checkpoint_sha256") != run.checkpoint_sha256():
        raise UserError(
            found=f"{exported}, which is not the export of {run.directory.best}",
            expected="the exported weights of the run, or none",
            hint=f"python -m trainer.export {quote(run.directory.path)} --format safetensors",
        )


def pull(repository: str, out: Path, api: HfApi) -> None:
    """Pull a run into a new directory, all or nothing.

    Raises:
        UserError: The Hub has no such run, or it is not intact.
    """
    with os_errors_as_user_errors(out), replace_directory(out) as replacement:
        with _errors_of_hub(repository):
            api.snapshot_download(repository, local_dir=replacement.path, allow_patterns=list(_FILES))
        CompletedRun.open(replacement.path)
        replacement.commit()


@contextlib.contextmanager
def _errors_of_hub(repository: str) -> Iterator[None]:
    """Raise every exception as a `UserError`; those of the network depend on the version of the library."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and refusal(error):  # of a file, not of the Hub
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise UserError(
            found=f"{repository}: {' '.join(str(error).split())[:300]}",
            expected="a repository USER/NAME on the Hugging Face Hub that this account may use",
            hint="hf auth login" if status in (401, 403, 404) else "check the name and the connection, and try again",
        ) from None


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.export.hub", __doc__, epilog="push RUN USER/NAME, or pull USER/NAME DIR")
    parser.add_argument("action", choices=("push", "pull"), help="direction")
    parser.add_argument("source", metavar="SOURCE", help="run directory to push, or USER/NAME to pull")
    parser.add_argument("target", metavar="TARGET", help="USER/NAME to push to, or new directory of the run to pull")
    arguments = parser.parse_args()
    if arguments.action == "push":
        print(push(Path(arguments.source), arguments.target, HfApi()))
        return 0
    out = Path(arguments.target)
    if out.exists():
        raise UserError(found=f"{out}, which exists", expected="a new directory", hint="choose another one")
    pull(arguments.source, out, HfApi())
    print(out)
    return 0


if __name__ == "__main__":
    run_command(main)
