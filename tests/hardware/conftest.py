"""The hardware suite's options, its header, its table and its report.

    pytest tests/hardware                                   all of it, some minutes
    pytest tests/hardware --quick                           what `make test` runs of it
    pytest tests/hardware --transports nixl --devices cpu,gpu --sizes '64 MiB,2 GiB' --ranks 1,4
    pytest tests/hardware --peer ssh://other-host           between two machines, too
    pytest tests/hardware --junitxml suite.xml --hardware-json suite.json
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zmq", reason="the real world is not installed: pip install 'kvmove[real]'")
pytest.importorskip("numpy", reason="the real world is not installed: pip install 'kvmove[real]'")

from kvreal.pool import Pool
from tests.hardware.found import Asked, asked, way

pytest.register_assert_rewrite("kvreal.transfer.conformance", "tests.hardware.plays")

ROW = "hardware"
HERE = Path(__file__).parent
COLUMNS = ("transport", "from", "to", "direction", "layout", "ranks", "carried by", "MiB", "GB/s", "bytes checked")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hardware", "the hardware suite (docs/hardware-suite.md)")
    group.addoption("--transports", metavar="NAMES", help="comma-separated; default: all that are known")
    group.addoption("--devices", metavar="KINDS", help="of locations: cpu, disk, gpu; default: all")
    group.addoption("--sizes", metavar="SIZES", help="of moves: '64 MiB,2 GiB'; default: 64 MiB")
    group.addoption("--ranks", metavar="COUNTS", help="of each instance: default 1,2,4")
    group.addoption("--quick", action="store_true", help="one of each instead of each with each; under a minute")
    group.addoption("--load-seconds", metavar="S", help="of sustained load, a transport; default 30")
    group.addoption("--peer", metavar="URL", help="another machine: tcp://HOST:PORT of a `kvmove peer`, or ssh://HOST")
    group.addoption("--peer-token", metavar="FILE", help="the secret of that `kvmove peer`")
    group.addoption("--hardware-json", metavar="OUT", help="write what was found, done and measured there")


# ---- what was asked --------------------------------------------------------------------------------------------------
def _named(config: pytest.Config) -> bool:
    """Was this suite asked for, rather than all tests?"""
    return config.args_source == pytest.Config.ArgsSource.ARGS and any("hardware" in arg for arg in config.args)


def _quick(config: pytest.Config) -> bool:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        return bool(worker["kvmove_quick"])
    return bool(config.getoption("--quick", False)) or not _named(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Test processes cannot tell by themselves what was asked of the one that started them."""
    node.workerinput["kvmove_quick"] = _quick(node.config)


def _asked(config: pytest.Config) -> Asked:
    found = config.stash.get(ASKED, None)
    if found is None:
        found = config.stash[ASKED] = asked(config, _quick(config))
    return found


ASKED: pytest.StashKey[Asked] = pytest.StashKey()
MACHINE: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
REPORTS: pytest.StashKey[list[pytest.TestReport]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORTS] = []
    _asked(config)  # what makes no sense is told before anything is tried
    out = config.getoption("--hardware-json", None)
    if out and not Path(out).absolute().parent.is_dir():
        raise pytest.UsageError(f"--hardware-json {out}: there is no directory {Path(out).parent}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case``, ``tier``, ``transport``: as many as were asked for."""
    want = _asked(metafunc.config)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in want.moves()])
    if "tier" in metafunc.fixturenames:
        one_kind = pytest.mark.skip(reason="tiers: only one kind of memory was asked for")
        tiers = [pytest.param(case, id=case.name) for case in want.tiers()]
        metafunc.parametrize("tier", tiers or [pytest.param(None, id="none", marks=one_kind)])
    if "transport" in metafunc.fixturenames:
        metafunc.parametrize("transport", want.transports[: 1 if want.quick else None])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Conformance is some hundred tests, and tests/real has the better part of them."""
    return True if collection_path.name == "test_conformance.py" and _quick(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A module's ``wanted(name, params, want)`` says which of its tests are not what was asked for."""
    want = _asked(config)
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        wanted = getattr(getattr(item, "module", None), "wanted", None) if HERE in item.path.parents else None
        callspec = getattr(item, "callspec", None)
        of_class = getattr(getattr(item, "cls", None), "what", None)
        name = getattr(item, "originalname", item.name)
        good = wanted is None or wanted(name, callspec.params if callspec is not None else {}, want)
        good = good and (of_class is None or (of_class[0] in want.transports and {*of_class[1:]} <= {*want.devices}))
        (kept if good else left).append(item)
    if left:
        items[:] = kept
        config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="session")
def want(pytestconfig: pytest.Config) -> Asked:
    return _asked(pytestconfig)


@pytest.fixture(scope="session")
def pool_of() -> Iterator[Callable[[str], Pool]]:
    """Transport -> pool of processes, started when first asked for; of transports that are not in use the processes
    are ended, so that their memory is free for others."""
    found: dict[str, Pool] = {}

    def get(transport: str) -> Pool:
        if transport not in found:
            while found:
                found.popitem()[1].close()
            name, env = way(transport)
            found[transport] = Pool(name, env=env)
        return found[transport]

    yield get
    for pool in found.values():
        pool.close()


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Put what was measured into the table and the report."""
    return lambda **row: request.node.user_properties.append((ROW, row))


# ---- what is said ----------------------------------------------------------------------------------------------------
def _machine(config: pytest.Config) -> dict[str, Any]:
    found = config.stash.get(MACHINE, None)
    if found is None:
        import msgspec

        from kvreal.facts import machine

        found = config.stash[MACHINE] = msgspec.to_builtins(machine())
    return found


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not _named(config) or hasattr(config, "workerinput"):
        return []
    from kvreal import transfer

    want = _asked(config)
    here = _machine(config)
    can = [name for name, lack in transfer.here().items() if not lack]
    gib = 1 << 30
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / gib:.0f} GiB)" for gpu in here["gpus"]) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return [
        f"machine: {here['cpu']}, {here['cores']} cores, {here['numa_nodes']} NUMA node(s), "
        f"{here['memory_bytes'] / gib:.1f} GiB of memory ({here['memory_free_bytes'] / gib:.1f} free), "
        f"/dev/shm {here['shm_bytes'] / gib:.1f} GiB, CMA {'works' if here['cma'] else 'does not work'}",
        f"GPUs: {gpus}; RDMA: {', '.join(here['rdma']) or 'none'}; UCX: {', '.join(here['ucx_transports']) or 'none'}",
        f"transports here: {', '.join(can)}; versions: {versions}",
        f"asked for: {', '.join(want.transports)}; {', '.join(want.devices)}; "
        f"sizes {', '.join(map(str, want.sizes))}; ranks {', '.join(map(str, want.ranks))}; "
        f"{'quick' if want.quick else 'all'}; peer {want.peer or 'none'}",
    ]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/hardware/" in report.nodeid or report.nodeid.startswith("hardware/"):
        _LOGGED.append(report)


_LOGGED: list[pytest.TestReport] = []
"""Reports come without the configuration; there is one session a process."""


def _rows() -> list[dict[str, Any]]:
    """One a test: what came of it, and what it noted."""
    found: dict[str, dict[str, Any]] = {}
    for report in _LOGGED:
        row = found.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "why": ""})
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        if report.failed or (report.skipped and row["outcome"] != "failed"):
            row["outcome"] = report.outcome
            row["why"] = _why(report)
        if report.when == "call":
            row["measured"] = [value for name, value in report.user_properties if name == ROW]
    return list(found.values())


def _why(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message).splitlines()[0] if crash is not None else str(report.longrepr).splitlines()[-1]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    moves = [one for row in _rows() for one in row.get("measured", ()) if "carried by" in one]
    if moves:
        table = [COLUMNS, *[tuple(str(one.get(name, "")) for name in COLUMNS) for one in moves]]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        terminalreporter.section(f"moves on this machine, {os.cpu_count()} CPUs")
        for line in table:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    out = config.getoption("--hardware-json", None)
    if not out or hasattr(config, "workerinput"):
        return
    want = _asked(config)
    rows = _rows()
    outcomes = [row["outcome"] for row in rows]
    body = {
        "what": "kvmove hardware suite",
        "version": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["pytest", *sys.argv[1:]],
        "exit_status": int(exitstatus),
        "machine": _machine(config),
        "asked": {
            "transports": want.transports, "devices": want.devices, "sizes": [size.bytes for size in want.sizes],
            "ranks": want.ranks, "quick": want.quick, "load_seconds": want.load_s, "peer": want.peer,
        },
        "counts": {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
        "tests": rows,
    }  # fmt: skip
    Path(out).write_text(json.dumps(body, indent=1) + "\n")
