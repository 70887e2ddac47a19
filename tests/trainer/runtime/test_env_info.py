"""The environment that is stored beside results."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch

from trainer.runtime import env_info


def test_the_revision_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    installed = checkout / ".venv" / "lib"
    installed.mkdir(parents=True)
    (checkout / "file").touch()
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "First"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(env_info, "_ROOT", checkout)
    assert env_info.collect_env_info(torch.device("cpu"))["revision"] == head[:12]
    (checkout / "file").write_text("changed")
    assert env_info.collect_env_info(torch.device("cpu"))["revision"] == f"{head[:12]}+"
    monkeypatch.setattr(env_info, "_ROOT", installed)
    assert env_info.collect_env_info(torch.device("cpu"))["revision"] is None


def test_versions_are_those_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_info, "_PACKAGES", ("numpy", "none-such", "pillow"))
    found = env_info.collect_env_info(torch.device("cpu"))["packages"]
    assert found == {"numpy": np.__version__, "pillow": PIL.__version__}
