"""How the command line answers wrong usage and bad input: one line on stderr, the right status, no traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmove.cli import call

SCENARIO = """\
name: twelve tokens
instances:
  a: {locations: {LocalCPUBackend: 1 GiB}}
  b: {locations: {LocalCPUBackend: 1 GiB}}
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 12}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: m}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "twelve.yaml"
    path.write_text(SCENARIO)
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a wrong command gets."""
    assert call(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("runn",), "No such command 'runn'"),
        (("run",), "Missing argument 'FILE...'"),
        (("run", "x.yaml", "--onn", "sim"), "No such option: --onn"),
        (("run", "x.yaml", "--seed", "seven"), "Invalid value for '--seed'"),
        (("run", "x.yaml", "--on", "reel"), "--on reel: expected one of sim, real, both; did you mean real?"),
        (
            ("run", "x.yaml", "--transport", "nixxl"),
            "expected one of auto, arena, nixl, mooncake, socket, tcp; did you mean nixl?",
        ),
        (("run", "/no/such/file.yaml"), "/no/such/file.yaml"),
        (("scenario", "check", "/no/such/file.yaml"), "/no/such/file.yaml"),
        (("history", "/no/such/file.jsonl"), "/no/such/file.jsonl"),
        (("search", "one-mov"), "did you mean one-move?"),
        (("search", "--without", "h99"), "--without h99"),
        (("protocol", "--format", "dott"), "did you mean dot?"),
        (("protocol", "--machine", "sorce"), "did you mean source?"),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], part: str) -> None:
    assert part in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("tokens: 12", "tokns: 12", "twelve.yaml:6:47"),
        ("to: b/Local", "to: c/Local", "twelve.yaml:7:"),
        ("to: b/LocalCPU", "to: b/LocalGPU", "twelve.yaml:7:"),
        ("1 GiB", "-1 GiB", "twelve.yaml:3:"),
        ("1 GiB", "1 GiBs", "twelve.yaml:3:"),
        ("steps:", "steps: [", "twelve.yaml:"),
        ("instances:", "# instances:", "twelve.yaml"),
    ],
)
def test_a_mistake_in_a_scenario_has_its_place(
    capsys: pytest.CaptureFixture[str], scenario: Path, old: str, new: str, place: str
) -> None:
    scenario.write_text(SCENARIO.replace(old, new, 1))
    line = refused(capsys, "run", str(scenario))
    assert place in line
    assert line.removeprefix("kvmove: ") == refused(capsys, "scenario", "check", str(scenario))


def test_a_mistake_in_the_last_file_is_told_before_the_first_runs(
    capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("name: [")
    assert "bad.yaml" in refused(capsys, "run", str(scenario), str(tmp_path / "bad.yaml"))


def test_a_wrong_override_is_named(capsys: pytest.CaptureFixture[str], scenario: Path) -> None:
    assert "instances.c" in refused(capsys, "run", str(scenario), "--set", "instances.c.ranks=2")
    assert "lease" in refused(capsys, "run", str(scenario), "--set", "constants.lease=12 parsecs")


def test_an_unreadable_place_for_the_output_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str], scenario: Path
) -> None:
    assert "--json" in refused(capsys, "run", str(scenario), "--json", "/no/such/place/out.json")
    assert "--history" in refused(capsys, "run", str(scenario), "--history", str(scenario))


def test_check_goes_on_after_a_bad_file(capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(SCENARIO.replace("name:", "nmae:"))
    assert call(["scenario", "check", str(bad), str(scenario)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{scenario}: ok: twelve tokens\n"
    assert err.startswith(f"{bad}:1:1") and "did you mean 'name'?" in err


def test_help_of_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands: list[tuple[str, ...]] = [("run",), ("history",), ("protocol",), ("search",), ("demo",)]
    for command in [*commands, ("scenario", "check"), ("scenario", "schema")]:
        assert call([*command, "--help"]) == 0
        out, _ = capsys.readouterr()
        assert "Example" in out and f"kvmove {' '.join(command)}" in out


def test_help_imports_neither_world_nor_torch() -> None:
    """So that it is quick, and works where only a part is installed."""
    code = (
        "import sys; from kvmove.cli import call; call(['--help']); call(['--version']);"
        "heavy = ('simpy', 'zmq', 'torch', 'nixl', 'yaml', 'numpy', 'fastapi', 'httpx');"
        "print([name for name in heavy if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "kvmove" in done.stdout and "core" in done.stdout or "pure Python" in done.stdout


def test_a_closed_pipe_is_no_error() -> None:
    """Whether it is noticed while writing or at the end."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    for unbuffered in ("", "1"):
        command = f"set -o pipefail; {sys.executable} -m kvmove scenario schema | head -1"
        env["PYTHONUNBUFFERED"] = unbuffered
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, check=False)
        assert (done.stdout, done.stderr, done.returncode) == ("{\n", "", 0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_search_that_is_ended_takes_its_processes_along(number: signal.Signals, status: int) -> None:
    """The signal goes to the one process that was started, as from a service manager, not to its group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmove", "search", "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        deadline = time.monotonic() + 60
        while len(children.read_text().split()) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # Python loses what a signal raises while os.fork is still at its hooks
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == status and "Traceback" not in err
        with pytest.raises(ProcessLookupError):  # nobody of its group is left
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
