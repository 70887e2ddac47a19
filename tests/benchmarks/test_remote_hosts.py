"""Benchmark of several hosts: what the system or a host refuses is one message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import remote_hosts
from shards import UserError


def test_what_the_system_refuses_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ip", "tc"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Operation not permitted' >&2; exit 2\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match=r"ip link add .*: Operation not permitted"), remote_hosts.network(1, 1.0):
        pass
    with pytest.raises(UserError, match="tc qdisc: Operation not permitted"):
        remote_hosts.run("tc", "qdisc")


@pytest.mark.parametrize(("status", "kind"), [(2, UserError), (1, RuntimeError)])
def test_a_host_that_fails_ends_the_benchmark_with_its_message(status: int, kind: type[Exception]) -> None:
    code = f"import sys; sys.stderr.write('error: a small cache\\nhint: enlarge it'); sys.exit({status})"
    with remote_hosts._process([sys.executable, "-S", "-c", code]) as worker, pytest.raises(kind) as caught:
        remote_hosts._read_line(worker)
    assert "a small cache" in str(caught.value)
