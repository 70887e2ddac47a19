"""Commands print names in any encoding, and end by signals and broken pipes with the status of a shell."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from shards.cli import command_parser


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"from shards.cli import run_command\n{code}"
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(os.name == "nt", reason="redirections of a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_without_standard_streams_works(tmp_path: Path, closed: str) -> None:
    """What is written to them does not end up in a file that was opened later."""
    program = (
        "import os, sys\n"
        "from shards.cli import run_command\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "        print('text')\n"
        "        print('text', file=sys.stderr, flush=True)\n"
        "        os.write(1, b'text')\n"
        "        os.write(2, b'text')\n"
        "        file.write('content')\n"
        "    return 3\n"
        "run_command(main)\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'program.py'))} {closed}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["sh", "-c", command], env=env, timeout=60).returncode == 3
    assert (tmp_path / "file").read_text() == "content"


def test_a_parser_describes_a_command_by_the_first_line_of_its_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-m"])
    parser = command_parser("shards.verify", "Check shards.\n\nMore.", epilog="The end.")
    assert (parser.prog, parser.description, parser.epilog) == ("python -m shards.verify", "Check shards.", "The end.")
    monkeypatch.setattr(sys, "argv", ["inkstream verify"])
    assert command_parser("shards.verify", "Check shards.").prog == "inkstream verify"


def test_a_command_without_docstrings_has_a_help() -> None:
    process = subprocess.run(
        [sys.executable, "-OO", "-m", "shards.verify", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("usage: python -m shards.verify")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_name_that_the_encoding_lacks_is_escaped(encoding: str) -> None:
    process = run("run_command(lambda: print('class \\u4e00'))", PYTHONIOENCODING=encoding)
    assert (process.returncode, process.stdout, process.stderr) == (0, "class \\u4e00\n", "")


def test_an_error_message_too() -> None:
    code = (
        "from shards import UserError\ndef fail(): raise UserError('class \\u4e00', 'one', 'none')\nrun_command(fail)"
    )
    process = run(code, PYTHONIOENCODING="ascii")
    assert process.returncode == 2 and "error: class \\u4e00\n" in process.stderr


def test_a_working_directory_that_was_removed_is_one_message() -> None:
    code = "import os, tempfile\nwith tempfile.TemporaryDirectory() as path: os.chdir(path)\nrun_command(os.getcwd)"
    process = run(code)
    assert process.returncode == 2 and process.stderr.startswith("error: the working directory: No such file")


def test_a_removed_working_directory_of_the_installed_command(tmp_path: Path) -> None:
    lines = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} {ROOT}/inkstream.py verify set"
    process = subprocess.run(["sh", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and "error: the working directory: No such file" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_runs_the_clean_up(number: signal.Signals) -> None:
    code = (
        "import signal\ndef main():\n    try:\n"
        f"        signal.raise_signal({int(number)})\n    finally:\n        print('removed')\nrun_command(main)"
    )
    process = run(code)
    assert (process.returncode, process.stdout, process.stderr) == (128 + number, "removed\n", "stopped\n")


CLOSED_ON_WINDOWS = """
import io, os, signal, sys
class ClosedPipe(io.RawIOBase):
    def fileno(self): return 1
    def writable(self): return True
    def write(self, content):
        if not os.path.samestat(os.fstat(1), os.stat(os.devnull)):
            raise OSError({number}, "no reader")
        return len(content)
sys.stdout = io.TextIOWrapper(io.BufferedWriter(ClosedPipe()))
os.name = "nt"
del signal.SIGPIPE
run_command(lambda: print("a word", flush=True))
"""


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EINVAL])
def test_a_closed_pipe_of_windows_is_no_error(number: int) -> None:
    process = run(CLOSED_ON_WINDOWS.replace("{number}", str(number)))
    assert (process.returncode, process.stderr) == (141, "")


def test_another_invalid_argument_of_windows_is_an_error() -> None:
    process = run("import os\nos.name = 'nt'\ndef main(): raise OSError(22, 'a wrong offset')\nrun_command(main)")
    assert process.returncode == 1 and "a wrong offset" in process.stderr


@pytest.mark.parametrize("error", ['RuntimeError("can\'t start new thread")', "BlockingIOError(11, os.strerror(11))"])
def test_a_thread_that_the_system_refuses_is_one_message(error: str) -> None:
    process = run(f"import os\ndef main(): raise {error}\nrun_command(main)")
    assert process.returncode == 2
    assert process.stderr.startswith("error: no more threads or processes: ") and "ulimit -u" in process.stderr
    assert process.stderr.count("\n") == 3


class TestCtrlC:
    """Python imports the package of `python -m package.module` while the first argument is -m."""

    start = "import signal, sys\nsys.argv[0] = '-m'\nimport trainer\n"

    def test_while_a_command_imports(self) -> None:
        process = subprocess.run(
            [sys.executable, "-c", f"{self.start}signal.raise_signal(signal.SIGINT)"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (process.returncode, process.stdout, process.stderr) == (130, "", "stopped\n")

    def test_later_the_command_cleans_up(self) -> None:
        main = (
            "def main():\n    try: signal.raise_signal(signal.SIGINT)\n    finally: print('removed')\nrun_command(main)"
        )
        code = f"{self.start}from shards.cli import run_command\n{main}"
        process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (process.returncode, process.stdout, process.stderr) == (130, "removed\n", "stopped\n")

    def test_programs_of_others_keep_their_own_handling(self) -> None:
        handler = run("import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
        assert handler.stdout == "True\n"
