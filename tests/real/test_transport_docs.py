"""The transport that docs/transports.md shows is whole: it passes the suite that ours pass, and has its name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
FINDS = "from kvreal.transfer import here; print(here().get('pigeon'))"


@pytest.fixture
def package(tmp_path: Path) -> dict[str, str]:
    """An environment in which a package has it, with the entry point as the page shows it."""
    page = (ROOT / "docs" / "transports.md").read_text()
    code = re.search(r"```python\n(import socket.*?)```", page, re.DOTALL)
    entry = re.search(r"    \[project\.entry-points\.\"(?P<group>.*)\"\]\n    (?P<name>\w+) = \"(?P<what>.*)\"", page)
    assert code and entry
    (tmp_path / "pigeons.py").write_text(code[1])
    info = tmp_path / "pigeons-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeons\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{entry['group']}]\n{entry['name']} = {entry['what']}\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


@pytest.mark.timeout(180)
def test_it_passes_the_conformance_suite(package: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvreal.transfer.conformance", "pigeon", "-q"]
    done = subprocess.run(command, env=package, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "failed" not in done.stdout and "skipped" not in done.stdout and "passed" in done.stdout


def test_a_package_brings_it(package: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FINDS], env=package, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "\n", (done.stdout, done.stderr)  # it is there, and lacks nothing
