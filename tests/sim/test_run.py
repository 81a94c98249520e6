"""Whole scenarios in simulation: answers, bytes, time, and the same history every time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Tuple

import pytest

from kvcore.scenario.build import Built, build
from kvcore.scenario.history import check_replay, read
from kvcore.scenario.loader import ScenarioError, loads
from kvcore.scenario.result import Result
from kvsim.costs import Profile
from kvsim.loop import EventLimit
from kvsim.run import run

ROOT = Path(__file__).parents[2]

MOVE = """
name: a move
kv: {model: llama-3.1-8b, chunk: 256 tokens}
instances:
  a: {ranks: RANKS, locations: {cpu: 2 GiB, disk: {size: 4 GiB, bandwidth: 1 GB/s}}}
  b: {ranks: RANKS, locations: {cpu: 2 GiB}}
network: {nic: {bandwidth: 10 GB/s, latency: 5 us}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 4096}
  - move: {from: a/cpu, to: b/cpu, prompt: p, as: m}
  - settle: {}
  - lookup: {prompt: p, as: found}
  - use: {at: b/cpu, prompt: p, as: used}
"""


def built(text: str, *overrides: str) -> Built:
    return build(loads(text, "test", overrides))


def ran(text: str, path: Path, *overrides: str) -> Result:
    """Run it, and see that its history replays."""
    result = run(built(text, *overrides), history=path)
    assert not result.hung
    report = check_replay(*read(path))
    assert report.equal, report.first
    return result


def outcome(result: Result, name: str) -> Tuple[str, int]:
    operation = result.operation(name)
    assert operation is not None
    return operation.state, operation.num_tokens


@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_move(tmp_path: Path, ranks: int, direction: str) -> None:
    text = MOVE.replace("RANKS", str(ranks))
    result = ran(text, tmp_path / "h.jsonl", f"kv.direction={direction}")
    assert outcome(result, "m") == ("done", 4096)
    assert outcome(result, "used") == ("ok", 4096)
    assert result.placement == {"b/cpu": {"p": 4096}}
    assert result.metrics["bytes"] == 512 << 20
    (phases,) = result.phases
    assert phases.bytes == 512 << 20
    # All ranks share the NIC, so together they take what one would: 512 MiB at 10 GB/s.
    assert phases.copy_ns + phases.queue_ns == pytest.approx(53_687_091, rel=0.02)


def test_the_time_of_a_move_is_what_its_parts_cost(tmp_path: Path) -> None:
    profile = Profile(message_latency_ns=10_000, service_ns=1_000, journal_ns=0, transfer_ns=100_000, descriptor_ns=0)
    result = run(built(MOVE.replace("RANKS", "1")), profile=profile)
    (phases,) = result.phases
    bytes_ns = (512 << 20) // 10  # at 10 GB/s
    assert phases.copy_ns == 1_000 + 100_000 + 10_000 + bytes_ns + 1  # service, overhead, two NICs; rounded up
    hop = 1_000 + 10_000 + 5_000  # service, latency, one NIC on the way
    assert phases.control_ns == 3 * hop  # Pin, Pinned, Fetch
    # Fence, Fenced over two NICs; Committed, Release, Released; the controller is busy with a Delta each time
    assert phases.commit_ns == 2 * (hop + 5_000) + 3 * hop + 2_000


def test_a_scenario_names_its_profile(tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text("message_latency_ns: 1_000_000\n")
    text = MOVE.replace("RANKS", "1")
    slow = run(built(text, f"network.profile={path}"))
    assert slow.phases[0].control_ns > run(built(text)).phases[0].control_ns + 2_000_000
    path.write_text("message_latency_ns: soon\n")
    with pytest.raises(ScenarioError, match="message_latency_ns"):
        run(built(text, f"network.profile={path}"))


def test_between_the_tiers_of_one_instance(tmp_path: Path) -> None:
    text = MOVE.replace("RANKS", "1").replace("to: b/cpu", "to: a/disk").replace("at: b/cpu", "at: a/disk")
    result = ran(text, tmp_path / "h.jsonl")
    assert outcome(result, "m") == ("done", 4096)
    assert outcome(result, "used") == ("ok", 4096)
    assert result.placement == {"a/disk": {"p": 4096}}
    assert result.phases[0].copy_ns == pytest.approx(536_870_912, rel=0.02)


def test_moves_at_once_share_the_wire(tmp_path: Path) -> None:
    text = """
name: two at once
instances:
  a: {locations: {cpu: 2 GiB}}
  b: {locations: {cpu: 2 GiB}}
  c: {locations: {cpu: 2 GiB}}
network: {nic: {bandwidth: 1 GB/s}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 1024}
  - store: {at: b/cpu, prompt: q, tokens: 1024}
  - move: {from: a/cpu, to: c/cpu, prompt: p, as: m, background: true}
  - move: {from: b/cpu, to: c/cpu, prompt: q, as: n, background: true}
  - wait: {}
"""
    result = ran(text, tmp_path / "h.jsonl")
    assert result.placement == {"c/cpu": {"p": 1024, "q": 1024}}
    for phases in result.phases:
        assert phases.copy_ns == pytest.approx(134_217_728, rel=0.02)
        assert phases.queue_ns == pytest.approx(134_217_728, rel=0.02)


CRASH = (
    MOVE.replace("RANKS", "2")
    + """
faults:
  - when: {sent: Committed, by: b, nth: 1}
    drop: all
    crash: {node: b, restart_after: 2 leases}
"""
)


def test_the_destination_dies_with_its_commit_unheard(tmp_path: Path) -> None:
    result = ran(CRASH, tmp_path / "h.jsonl")
    assert outcome(result, "m")[0] == "failed"
    assert result.placement == {"a/cpu": {"p": 4096}}
    assert result.fired == {"crash at sent Committed": 1, "drop at sent Committed": 1}


FAULTS = {
    "partition": "- {when: {sent: Fetch, by: ctl}, partition: {between: ctl, and: b, for: 3 s}}",
    "pause": "- {when: {started: StartCopy}, pause: {node: b, for: 2 leases}}",
    "slow": "- {when: {sent: Pin, by: ctl}, slow: {node: b, factor: 10, for: 1 s}}",
    "full": "- {when: {sent: Pin, by: ctl}, full: {at: b/cpu, for: 5 s}}",
    "controller": "- {when: {started: Decide, by: ctl}, crash: {node: ctl, restart_after: 1 s}}",
    "source": "- {when: {started: StartCopy}, crash: {node: a, restart_after: 1 s}}",
    "cancel": "- {when: {started: StartCopy}, cancel: m}",
    "client": "- {when: {started: StartCopy}, crash: {node: client, restart_after: 1 s}}",
    "corrupt": "- {copy: {corrupt: true}, when: {started: StartCopy}}",
    "stuck": "- {copy: {stuck: true, fraction: 0.5}, when: {started: StartCopy}}",
    "at a time": "- {when: {at: 300 ms}, crash: {node: b, restart_after: 1 s}}",
    "pause for good": "- {when: {started: StartCopy}, pause: {node: b}}",
    "lost": "- {when: {sent: Released, by: a}, drop: 2}",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("direction", ["read", "push"])
def test_every_run_with_a_fault_ends_quiet_and_replays(tmp_path: Path, fault: str, direction: str) -> None:
    text = MOVE.replace("RANKS", "1") + f"\nfaults:\n  {FAULTS[fault]}\n"
    result = ran(text, tmp_path / "h.jsonl", f"kv.direction={direction}")
    assert result.fired
    if fault == "corrupt":
        assert outcome(result, "used")[0] != "ok"
    if fault in ("lost", "slow", "partition"):
        assert outcome(result, "m") == ("done", 4096)
    if fault in ("cancel", "source", "stuck"):
        assert outcome(result, "m")[0] == "failed"


def test_a_run_that_cannot_end_says_who_hangs() -> None:
    text = MOVE.replace("RANKS", "1") + "\ndeadline: 30 ms\n"
    result = run(built(text))
    assert any(line.startswith("client: ") for line in result.hung), result.hung


def test_too_many_events() -> None:
    with pytest.raises(EventLimit):
        run(built(MOVE.replace("RANKS", "1")), max_events=10)


PRINT = """
import sys
from pathlib import Path
from kvcore.scenario.build import build
from kvcore.scenario.loader import load
from kvsim.run import run
run(build(load(sys.argv[1])), history=Path(sys.argv[2]))
"""


def test_the_same_seed_gives_the_same_history_byte_for_byte(tmp_path: Path) -> None:
    """In two processes with different hash seeds, with faults and coupled flows."""
    scenario = tmp_path / "s.yaml"
    more = "".join(
        f"  - store: {{at: a/cpu, prompt: p{i}, tokens: {256 * (i + 1)}}}\n"
        f"  - move: {{from: a/cpu, to: b/cpu, prompt: p{i}, background: true}}\n"
        for i in range(6)
    )
    scenario.write_text(CRASH.replace("  - settle: {}\n", more + "  - wait: {}\n  - settle: {}\n"))
    histories = []
    for seed in ("1", "4242"):
        path = tmp_path / f"{seed}.jsonl"
        subprocess.run(
            [sys.executable, "-c", PRINT, str(scenario), str(path)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            timeout=60,
        )
        histories.append(path.read_bytes())
    assert len(histories[0]) > 10_000
    assert histories[0] == histories[1]
