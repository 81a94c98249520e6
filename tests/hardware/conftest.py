"""What this machine has, and a table at the end of what was measured on it."""

from __future__ import annotations

import glob
import os
from typing import Dict, Iterator, List, Tuple

import pytest

ROWS: List[Tuple[str, ...]] = []


def missing(what: str) -> str:
    """Which part of the machine a transport or a location lacks here; "" if it has it."""
    from kvreal.memory import provides
    from kvreal.transfer import available

    if what.startswith("nixl") and "nixl" not in available():
        return "the package nixl is not installed (pip install nixl)"
    if what == "nixl rdma" and not glob.glob("/sys/class/infiniband/*"):
        return "there is no RDMA device under /sys/class/infiniband"
    if what == "LocalGPUBackend" and "gpu" not in provides():
        return "there is no GPU that torch can use"
    return ""


@pytest.fixture(scope="session")
def pools() -> Iterator[Dict[str, object]]:
    """Transport -> pool of processes, started when first asked for."""
    found: Dict[str, object] = {}
    yield found
    for pool in found.values():
        pool.close()  # type: ignore[attr-defined]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    head = ("transport", "from", "to", "direction", "carried by", "MiB", "GB/s", "bytes checked")
    widths = [max(len(row[i]) for row in [head, *ROWS]) for i in range(len(head))]
    terminalreporter.section(f"moves on this machine, {os.cpu_count()} CPUs")
    for row in [head, *ROWS]:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
