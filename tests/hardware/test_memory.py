"""Memory of another life is never touched, and where there is no room nothing is lost."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kvreal.pool import Pool
from kvreal.run import RunError, run
from kvreal.transfer.conformance_peer import LOCATION, Peer
from tests.hardware.found import KINDS, LAYOUTS, Asked, need, way
from tests.hardware.plays import scenario, sound, unreached

pytestmark = [pytest.mark.real, pytest.mark.hardware, pytest.mark.timeout(300)]

TOKENS, BPT, SLOTS = 64, 1024, 8
FILE_BYTES = 8 << 20


def wanted(name: str, params: dict[str, Any], want: Asked) -> bool:
    return params.get("kind", "cpu") in want.devices


class Two:
    """a (epoch 1) holds chunk i in slot i; b (epoch 2) is empty. Nothing but their transports: no protocol."""

    def __init__(self, transport: str, stack: ExitStack) -> None:
        name, env = way(transport)
        if name == "arena":  # which both share
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmove-", dir="/dev/shm"))
            env = {**env, "KVMOVE_ARENA": folder}
        self.env = env
        self.stack = stack
        self.peers = {address: Peer(address, name, env) for address in ("a/0", "b/0")}
        stack.callback(lambda: [peer.kill() for peer in self.peers.values()])
        self.ends: dict[str, str] = {}
        self.count = 0
        for address, epoch in (("a/0", 1), ("b/0", 2)):
            self.begin(address, epoch)

    def begin(self, address: str, epoch: int) -> None:
        self.ends[address] = self.peers[address].begin(SLOTS, TOKENS * BPT, epoch)
        slots = list(range(SLOTS))  # of b: what must still be there afterwards
        keys = [slot + (0 if address == "a/0" else 100) for slot in slots]
        self.peers[address].ask("fill", location=LOCATION, slots=slots, keys=keys, tokens=TOKENS, bpt=BPT)

    def copy(self, read: bool, slot: int, epoch: int, end: str = "") -> str:
        """b reads from a, or a writes to b, who is believed to be in ``epoch``; "" if it worked, else why not."""
        self.count += 1
        me, peer = ("b/0", "a/0") if read else ("a/0", "b/0")
        self.peers[me].ask(
            "copy", rid=[2, self.count], read=read, peer=peer, peer_epoch=epoch, peer_slots=[slot], slots=[slot],
            peer_location=LOCATION, location=LOCATION, lens=[TOKENS], endpoint=end or self.ends[peer],
            epoch=2 if read else 1, bpt=BPT,
        )  # fmt: skip
        (ended,) = self.peers[me].ended()
        return "" if ended["state"] == "done" else str(ended["why"])

    def holds(self, slot: int, key: int) -> bool:
        """Does b's slot hold these bytes?"""
        asked = {"location": LOCATION, "slots": [slot], "keys": [key], "tokens": TOKENS, "bpt": BPT}
        return bool(self.peers["b/0"].ask("check", **asked) == [-1])


@pytest.fixture
def two(transport: str) -> Iterator[Two]:
    need(transport)
    with ExitStack() as stack:
        yield Two(transport, stack)


def test_another_epoch_is_never_written(two: Two) -> None:
    assert "epoch 9" in two.copy(False, 0, 9)
    assert two.holds(0, 100)
    two.peers["b/0"].ask("epoch", epoch=3)  # expelled, and registered anew: the same process, another life
    assert "epoch 2" in two.copy(False, 0, 2)
    assert two.holds(0, 100)
    assert two.copy(False, 0, 3) == "" and two.holds(0, 0)


def test_another_epoch_is_never_read(two: Two) -> None:
    assert "epoch 9" in two.copy(True, 1, 9)
    two.peers["a/0"].ask("epoch", epoch=4)
    assert "epoch 1" in two.copy(True, 1, 1)
    assert two.copy(True, 1, 4) == "" and two.holds(1, 1)


@pytest.mark.parametrize("read", [True, False], ids=["read", "push"])
def test_a_process_that_came_after_is_not_taken_for_the_one_before(two: Two, read: bool, transport: str) -> None:
    """Its endpoint is its own: whoever has the old one reaches nobody, and what was known of the old one is of no use
    with the new."""
    assert two.copy(read, 2, 1 if read else 2) == "" and two.holds(2, 2)
    victim = "a/0" if read else "b/0"
    old = two.ends[victim]
    two.peers[victim].kill()
    two.peers[victim] = Peer(victim, way(transport)[0], two.env)
    two.begin(victim, 5)
    assert two.copy(read, 3, 5, old) != ""
    assert not two.holds(3, 3) and (read or two.holds(3, 103))  # a reader's own slot is overwritten before
    assert two.copy(read, 4, 5) == "" and two.holds(4, 4)


# ---- no room ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_full_destination_loses_nothing(
    kind: str, transport: str, pool_of: Callable[[str], Pool], tmp_path: Path
) -> None:
    need(transport, kind)
    layout, cpu, there = LAYOUTS[0], KINDS["cpu"], KINDS[kind]
    tokens = 8 * layout.chunk_tokens + 5
    steps = f"""
  - store: {{at: a/{cpu}, prompt: p, tokens: {tokens}}}
  - move: {{from: a/{cpu}, to: b/{there}, prompt: p, as: m}}
  - settle
  - use: {{at: a/{cpu}, prompt: p, as: used}}
"""
    built = scenario(steps, {"a": {cpu: tokens}, "b": {there: 3 * layout.chunk_tokens}}, layout)
    log = tmp_path / "log"
    result = run(built, pool=pool_of(transport), history=log)
    sound(result, log)
    move, used = result.operation("m"), result.operation("used")
    assert move is not None and move.state == "done", move  # of the prefix that there was room for
    fits = 5 * layout.chunk_tokens
    assert move.num_tokens == fits, move
    assert used is not None and used.state == "ok" and used.num_tokens == tokens, used
    assert result.placement == {f"a/{cpu}": {"p": tokens}, f"b/{there}": {"p": fits}}
    assert result.metrics["bytes_checked"] == (tokens + fits) * layout.bytes_per_token


def test_a_disk_that_is_full_halfway(transport: str, tmp_path: Path) -> None:
    """A file may have 8 MiB, so the disk takes 7 chunks of 20: of a fill, of a copy within a process and of one
    from another nothing stays, and what fits is still taken."""
    need(transport, "disk")
    if transport == "arena":
        pytest.skip("arena: its memory is a file too, which may not be larger either")
    layout, cpu, disk = LAYOUTS[0], KINDS["cpu"], KINDS["disk"]
    tokens, few = 20 * layout.chunk_tokens, 3 * layout.chunk_tokens
    assert tokens * layout.bytes_per_token > FILE_BYTES > 2 * few * layout.bytes_per_token
    steps = f"""
  - store: {{at: a/{disk}, prompt: r, tokens: {tokens}, as: filled}}
  - settle
  - store: {{at: a/{cpu}, prompt: p, tokens: {tokens}}}
  - settle
  - move: {{from: a/{cpu}, to: a/{disk}, prompt: p, as: within}}
  - settle
  - move: {{from: a/{cpu}, to: b/{disk}, prompt: p, as: across}}
  - settle
  - use: {{at: a/{cpu}, prompt: p, as: used}}
"""
    after = f"""
  - store: {{at: a/{cpu}, prompt: q, tokens: {few}}}
  - settle
  - move: {{from: a/{cpu}, to: b/{disk}, prompt: q, as: small}}
  - settle
  - use: {{at: b/{disk}, prompt: q, as: used}}
"""
    places = {"a": {cpu: 2 * tokens, disk: 2 * tokens}, "b": {disk: 2 * tokens}}
    name, env = way(transport)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = tmp_path / "log"
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, hard))  # the nodes inherit it
    try:
        with closing(Pool(name, env=env)) as pool:
            result = run(scenario(steps, places, layout), pool=pool, history=log)
            second = run(scenario(after, places, layout), pool=pool)  # of the same processes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    unreached(result)
    sound(result, log)
    states = {one.op: one.state for one in result.operations}
    assert (states["within"], states["across"], states["used"]) == ("failed", "failed", "ok"), states
    assert states["filled"] != "ok", result.operation("filled")
    assert result.placement == {f"a/{cpu}": {"p": tokens}}
    refused = [copy.why for copy in result.copies if copy.state == "failed"]
    assert refused and all(why and len(why.splitlines()) == 1 for why in refused), refused
    assert any("cannot be written: File too large" in why for why in refused), refused
    assert second.clean and second.placement == {f"b/{disk}": {"q": few}}, second.placement


def test_more_memory_than_there_is(pool_of: Callable[[str], Pool], transport: str) -> None:
    """One line, and the processes serve the next run."""
    need(transport)
    layout, cpu = LAYOUTS[0], KINDS["cpu"]
    steps = f"\n  - store: {{at: a/{cpu}, prompt: p, tokens: 10}}\n"
    with pytest.raises(RunError, match="this machine has|memory|fit") as told:
        run(scenario(steps, {"a": {cpu: 1 << 36}}, layout), pool=pool_of(transport))
    assert len(str(told.value).splitlines()) == 1
    after = run(scenario(steps, {"a": {cpu: 10}}, layout), pool=pool_of(transport))
    unreached(after)
    assert after.clean
