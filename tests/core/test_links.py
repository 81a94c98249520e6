"""Who moves the bytes, by what both ends have measured."""

from __future__ import annotations

from typing import List, Optional, Tuple

import msgspec
import pytest

from kvcore.protocol.config import Config, ConfigError, NodeSpec, WorkerSpec
from kvcore.protocol.links import Cost, Measured, best_direction
from kvcore.protocol.messages import Fetch, Push, Register
from kvcore.scenario.world import World, specs
from tests.core.drive import CPU, Story

MIB = 1 << 20
DISK = "disk"


def cost(push: bool, rate: float, transport: str = "nixl", target: str = "cpu", fixed_ns: int = 0) -> Cost:
    return Cost(transport, "cpu", target, push, fixed_ns, 0, ((MIB, rate),))


def measured(*costs: Cost, profile: str = "here") -> Measured:
    return Measured(profile, costs)


def chosen(pusher: Optional[Measured], reader: Optional[Measured], nbytes: int = MIB) -> Tuple[bool, str]:
    return best_direction([(pusher, reader)], "cpu", "cpu", nbytes, 1)


def test_the_quicker_one_does_it_and_the_reason_says_so() -> None:
    both = measured(cost(False, 2.3e9), cost(True, 5.1e9))
    assert chosen(both, both) == (True, "push: 5.1 GB/s, read 2.3 by profile here")
    both = measured(cost(False, 5.1e9), cost(True, 2.3e9))
    assert chosen(both, both) == (False, "read: 5.1 GB/s, push 2.3 by profile here")


def test_ties_and_what_is_not_known_are_read() -> None:
    even = measured(cost(False, 1e9), cost(True, 1e9))
    assert chosen(even, even) == (False, "read: 1 GB/s, push 1 by profile here")
    pushes = measured(cost(False, 1e9), cost(True, 9e9))
    for pusher, reader in ((pushes, None), (None, pushes), (measured(cost(False, 1e9)), pushes)):
        assert chosen(pusher, reader) == (False, "")
    assert chosen(pushes, pushes, nbytes=0) == (False, "")
    assert best_direction([(pushes, pushes)], "cpu", "gpu", MIB, 1) == (False, "")


def test_each_is_believed_of_what_it_would_carry_out_itself() -> None:
    fast = measured(cost(False, 8e9), cost(True, 9e9), profile="fast")
    slow = measured(cost(False, 1e9), cost(True, 2e9), profile="slow")
    assert chosen(fast, slow) == (True, "push: 9 GB/s by profile fast, read 1 by profile slow")
    assert chosen(slow, fast) == (False, "read: 8 GB/s by profile fast, push 2 by profile slow")


def test_only_transports_that_both_have_count() -> None:
    one = measured(cost(False, 4e9, "socket"), cost(True, 1e9, "socket"), cost(False, 1e9), cost(True, 9e9))
    other = measured(cost(False, 4e9, "socket"), cost(True, 1e9, "socket"))
    assert chosen(one, one)[0] and not chosen(one, other)[0] and not chosen(other, one)[0]


def test_the_size_decides_where_pushing_costs_more_and_goes_faster() -> None:
    both = measured(cost(False, 1e9), cost(True, 4e9, fixed_ns=1_000_000))
    assert not chosen(both, both, MIB // 2)[0]
    assert chosen(both, both, 64 * MIB)[0]


def test_the_slowest_rank_decides_for_all() -> None:
    quick, slow = measured(cost(False, 1e9), cost(True, 9e9)), measured(cost(False, 1e9), cost(True, 0.5e9))
    assert best_direction([(quick, quick)], "cpu", "cpu", MIB, 1)[0]
    assert best_direction([(quick, quick), (slow, slow)], "cpu", "cpu", MIB, 1) == (
        False,
        "read: 1 GB/s, push 0.5 by profile here",
    )


# ---- in the machines -------------------------------------------------------------------------------------------------
BOTH = measured(cost(False, 1e9), cost(True, 2e9), cost(False, 2e9, target="disk"), cost(True, 1e9, target="disk"))


class Links(Story):
    """Instances of two ranks and two locations: what they have measured, and their own word on the direction."""

    def __init__(self, known: Optional[Measured], told: str = "auto", **words: str) -> None:
        super().__init__(Config().rules)
        nodes: List[NodeSpec] = []
        for spec in specs({"a": 8, "b": 8, "c": 8}, Config(direction=told), 2, (CPU, DISK)):
            if isinstance(spec, WorkerSpec):
                own = Config(direction=words.get(spec.instance, "auto"))
                spec = msgspec.structs.replace(spec, measured=known, config=own)
            nodes.append(spec)
        World.__init__(self, nodes)

    def moved(self, src: str, dst: str, location: str = CPU) -> Tuple[bool, str]:
        """(pushed?, why) of a move, told alike to both ranks."""
        for rank in (0, 1):
            self.store(f"{src}/{rank}", "x")
        self.settle()
        event = self.move(src, dst, "x", location=location)
        self.settle()
        assert self.status(event).state == "done" and self.leaks() == ""
        ways = [m.push for _, _, m in self.sent if isinstance(m, Fetch) and m.event == event]
        assert len(ways) == 2 and len(set(ways)) == 1
        copies = [m for _, _, m in self.sent if isinstance(m, Push)]
        assert bool(copies) == ways[0]
        why = [note.detail for _, note in self.notes if (note.kind, note.event) == ("direction", event)]
        return ways[0], why[0] if why else ""


def test_both_directions_in_one_run_by_what_is_known_of_each_pair() -> None:
    w = Links(BOTH)
    assert w.moved("a", "b") == (True, "push: 2 GB/s, read 1 by profile here")
    w.sent.clear()
    assert w.moved("c", "b", DISK) == (False, "read: 2 GB/s, push 1 by profile here")


def test_without_a_profile_it_is_read_and_nothing_is_said() -> None:
    assert Links(None).moved("a", "b") == (False, "")


def test_what_the_destination_says_goes_first_then_what_the_controller_was_told() -> None:
    assert Links(BOTH, told="read").moved("a", "b") == (False, "")
    assert Links(BOTH, told="read", b="push").moved("a", "b") == (True, "")
    assert Links(BOTH, told="push", b="read", a="push").moved("a", "b") == (False, "")
    assert Links(None, told="push").moved("a", "b") == (True, "")


def test_within_one_process_nobody_is_asked() -> None:
    w = Links(BOTH, told="push")
    assert w.moved("a", "a", DISK) == (False, "")


@pytest.mark.parametrize("told", ["auto", "read", "push"])
def test_config_knows_three_directions(told: str) -> None:
    Config(direction=told).check()


def test_another_direction_is_refused() -> None:
    with pytest.raises(ConfigError, match="direction is 'up', expected auto, read or push"):
        Config(direction="up").check()


def test_it_travels_with_the_registration() -> None:
    m = Register("a", 0, 1, specs({"a": 1}, Config())[1].namespace, (), measured=measured(cost(True, 1e9)))  # type: ignore[union-attr]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(m), type=Register) == m
