"""Memory is truth: what a broken protocol would do to bytes, the simulator does to them, and the checks see it."""

from __future__ import annotations

import pytest

from kvcore.scenario.build import build
from kvcore.scenario.loader import loads
from kvcore.scenario.result import Result
from kvsim.run import run

#: The pin lapses while the copy still runs, and its slot is used for something else.
LAPSED = """
name: a pin lapses under a slow copy
kv: {bytes_per_token: 1 KiB, chunk: 16 tokens, direction: DIRECTION}
constants: {scale: 0.05, dead: 1 s}
WITHOUT
instances:
  a: {locations: {cpu: 16 KiB}}
  b: {locations: {cpu: 64 KiB}}
network: {nic: {bandwidth: 64 kB/s}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 16}
  - move: {from: a/cpu, to: b/cpu, prompt: p, as: m, background: true}
  - store: {at: a/cpu, prompt: q, tokens: 16, after: 1.5 leases, as: q}
  - wait: {}
  - use: {at: b/cpu, prompt: p, as: used}
faults:
  - {copy: {slow: 4}, when: {started: StartCopy}}
  - {when: {sent: Renew}, drop: all}
  - {when: {sent: Pin, nth: 2}, drop: all}
"""


def lapsed(direction: str, without: str = "") -> Result:
    text = LAPSED.replace("DIRECTION", direction).replace("WITHOUT", f"without: [{without}]" if without else "")
    return run(build(loads(text, "test")))


@pytest.mark.parametrize("direction", ["read", "push"])
def test_a_lapsed_pin_is_noticed_after_the_last_byte(direction: str) -> None:
    result = lapsed(direction)
    move, stored = result.operation("m"), result.operation("q")
    assert move is not None and stored is not None
    assert stored.state == "ok"  # the slot really was given to somebody else
    assert (move.state, move.reason) == ("failed", "source_changed")
    assert not result.violations and not result.hung


@pytest.mark.parametrize("direction", ["read", "push"])
def test_without_the_fence_wrong_bytes_are_seen(direction: str) -> None:
    result = lapsed(direction, "h09")
    move = result.operation("m")
    assert move is not None and move.state == "done"
    assert "Byte" in {violation.property for violation in result.violations}
    used = result.operation("used")
    assert used is not None and used.reason == "wrong_bytes"
