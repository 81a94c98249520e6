"""For all tests: nothing is left running, CI generates the same examples each time, `real` needs its libraries."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from kvmove.version import compiled

hypothesis.settings.register_profile("here", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


#: Tests that fork machines by pickling them, which native classes do not allow. The search is always pure.
FORKS = ("test_search.py::", "test_a_fork_goes_its_own_way")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compiled():
        for item in items:
            if any(name in item.nodeid for name in FORKS):
                item.add_marker(pytest.mark.skip(reason="compiled machines cannot be forked"))
    if importlib.util.find_spec("zmq") is None:
        skip = pytest.mark.skip(reason="pyzmq is not installed: pip install 'kvmove[real]'")
        for item in items:
            if item.get_closest_marker("real") is not None:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what tests that generate scenarios say of them: the tables of what was covered, good or bad."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if "tests/compare/" in report.nodeid and report.when == "call" and report.capstdout.strip():
                terminalreporter.section(f"{report.nodeid.partition('::')[2]}: {outcome}")
                terminalreporter.write_line(report.capstdout.strip("\n"))


def children() -> dict[int, str]:
    """Live child processes of this one, by pid, with their command lines. Helpers of Python's own are left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended meanwhile
            continue
        state, parent = fields[0], int(fields[1])
        if parent == os.getpid() and state != "Z" and "multiprocessing" not in command:
            found[int(stat.parent.name)] = command
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """The first fixture to start is the last to end: every process that a test started must be gone by then."""
    before = children()
    yield
    deadline = time.monotonic() + 5
    while (
        left := {pid: what for pid, what in children().items() if pid not in before}
    ) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"processes were left running: {left}"
