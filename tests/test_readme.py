"""The README's code runs, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_code_runs_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 3
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert "torch.Size([50, 3, 112, 112])" in process.stdout
    assert "(400, 32, 32, 3)" in process.stdout


def test_the_files_and_targets_it_names_exist() -> None:
    for name in re.findall(r"(?:configs|pipeline|shards|trainer|benchmarks)/[\w/]+\.(?:py|yaml|md|png)", TEXT):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", TEXT, re.MULTILINE)):
        assert f"\n{target}:" in makefile, target
    for module in set(re.findall(r"python -m ([a-z]+\.[a-z_]+)", TEXT)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_every_placeholder_was_filled() -> None:
    assert "<!--" not in TEXT
