"""A process that has used NIXL ends with its own status, whatever destructors its libraries bring along."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, ctypes, sys
from kvreal.transfer.nixl import load_nixl
libc = ctypes.CDLL(None)
libc.on_exit(libc.abort, None)  # stands for a library's destructor that crashes
api = load_nixl()
agent = api.nixl_agent("ends", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
atexit.register(lambda: sys.stdout.write("python's own end"))
libc.printf(b"what C has buffered, ")
sys.exit(7)
"""


def test_a_process_that_used_nixl_ends_with_its_own_status() -> None:
    pytest.importorskip("nixl", reason="nixl is not installed")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    assert "what C has buffered, " in done.stdout and "python's own end" in done.stdout
