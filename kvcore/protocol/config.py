"""The protocol's constants, units in their names, and its rules, each of which closes one hole."""

from __future__ import annotations

from typing import Final, Optional, Tuple, Union

import msgspec

from kvcore.protocol.links import Measured
from kvcore.protocol.messages import Location, Namespace

MS: Final = 1_000_000
S: Final = 1_000_000_000


class Rules(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Each rule is one condition in one place and closes the hole it is named after (docs/protocol.md). All are on;
    tests and the search switch one off to see the hole open."""

    h01: bool = True  #: Release waits until every destination rank has committed
    h02: bool = True  #: a chunk under a deleting pin does not count as present
    h03: bool = True  #: delete only if the index still names the pinned slot
    h04: bool = True  #: a worker remembers no finished event: without a live pin nothing is deleted
    h05: bool = True  #: Release names the pin, not the event
    h06: bool = True  #: a move to its own place deletes nothing
    h07: bool = True  #: present chunks are held until commit
    h08: bool = True  #: Decide is journaled before the first Release(delete)
    h09: bool = True  #: bytes count only if the pin was alive after them (fence)
    h10: bool = True  #: the fence comes after the last byte
    h11: bool = True  #: a pin id holds its process's epoch
    h12: bool = True  #: an aborted copy's slots stay in quarantine until its writer has stopped
    h13: bool = True  #: a pusher refuses reservation ids not higher than the highest it saw
    h13c: bool = True  #: Stop raises that mark, so a Push that it overtook is refused
    h14: bool = True  #: an answer of another reservation does not commit this one
    h15: bool = True  #: a pin that lapsed is never replaced within its event
    h16: bool = True  #: a chunk whose child is still here is not deleted
    h18: bool = True  #: answers under another incarnation than the believed one are ignored
    h19: bool = True  #: what is held is not evicted to fit the rest
    h20: bool = True  #: a clear raises the location's incarnation and ends its reservations
    h21: bool = True  #: only the reserved prefix is deleted, tail first
    h22: bool = True  #: a pin has a lease
    h23: bool = True  #: nobody waits for space
    h24: bool = True  #: event ids hold the journaled incarnation
    h25: bool = True  #: deleted is a count only if Released came from a live pin
    h26: bool = True  #: the controller fixes a drain's list
    h27: bool = True  #: local readers hold references
    h28: bool = True  #: a lower incarnation is refused
    h29: bool = True  #: Beat carries the inventory's sequence number
    h30: bool = True  #: a dead peer's quarantines end by PeerGone
    h31: bool = True  #: a failed fence is refused, not retried
    h32: bool = True  #: a new epoch is believed at its first Beat only
    h33: bool = True  #: a retention bars the key from eviction, whatever slot it has
    h34: bool = True  #: another event's Release keeps a retained key
    h35: bool = True  #: Decide needs a fresh Committed from every destination rank
    h36: bool = True  #: a restarted controller asks for the retentions before it deletes
    h37: bool = True  #: overdue timers run before the input
    h38: bool = True  #: a reservation that nobody answers ends by a timer
    h39: bool = True  #: an old Pin or Renew does not prolong a pin
    h40: bool = True  #: a retention outlives the epoch of its process


ALL_RULES: Final = Rules()


class ConfigError(ValueError):
    """Settings that contradict one another; the message names both."""


class Config(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """Durations in nanoseconds. ``check`` refuses settings that break an inequality the protocol stands on."""

    retry_ns: int = 200 * MS
    lease_ns: int = 10 * S
    renew_ns: int = 3 * S
    retain_ns: int = 30 * S
    stop_retry_ns: int = 1 * S
    beat_ns: int = 1 * S
    dead_ns: int = 5 * S
    release_give_up_ns: int = 11 * S
    copy_max_ns: int = 60 * S
    progress_ns: int = 200 * MS
    deadline_ns: int = 120 * S
    hold_ns: int = 600 * S
    events_kept_ns: int = 3600 * S
    events_kept: int = 100_000
    events_max: int = 100_000
    """Events in flight; beyond that a move is refused as busy."""
    drain_window: int = 4
    """Chains of a drain that move at once. Those that begin with the same chunk go one after another."""
    step_window: int = 3
    """Steps of a move that goes prefix by prefix that are under way at once: one is asked about at its source, one's
    bytes cross, and one is ready behind it. 1: each begins when the one before it is visible."""
    direction: str = "auto"
    """Who moves the bytes: the destination (read), the source (push), or who is quicker as both have measured; while
    that is not known, the destination (auto)."""
    checksums: str = "off"
    """off, sample or all: what of a copy's bytes is compared with its source's before it counts."""
    rules: Rules = ALL_RULES

    def check(self) -> None:
        """Raise ConfigError, naming both settings, if an inequality does not hold."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name.endswith("_ns") and value <= 0:
                raise ConfigError(f"{name} is {value}, expected a duration above 0")
        if self.direction not in ("auto", "read", "push"):
            raise ConfigError(f"direction is {self.direction!r}, expected auto, read or push")
        if self.checksums not in ("off", "sample", "all"):
            raise ConfigError(f"checksums is {self.checksums!r}, expected off, sample or all")
        if self.drain_window < 1:
            raise ConfigError(f"drain_window is {self.drain_window}, expected 1 or more")
        if self.step_window < 1:
            raise ConfigError(f"step_window is {self.step_window}, expected 1 or more")
        for small, factor, large, times in _INEQUALITIES:
            left = getattr(self, small) * factor
            right = getattr(self, large) * times
            if left > right:
                raise ConfigError(
                    f"{_times(factor, small)} = {left} ns must not be above {_times(times, large)} = {right} ns"
                )
        least = self.lease_ns + 2 * self.retry_ns
        if self.release_give_up_ns < least:
            raise ConfigError(
                f"release_give_up_ns = {self.release_give_up_ns} ns must not be below "
                f"lease_ns + 2 retry_ns = {least} ns"
            )


SHARED: Final = ("retry_ns", "lease_ns", "renew_ns", "retain_ns", "beat_ns", "dead_ns", "copy_max_ns")
"""What controller and workers should agree on: each side keeps time by its own."""


def unusual(config: Config) -> Tuple[Tuple[str, int], ...]:
    """Those of ``SHARED`` that are not the usual ones, as a worker says them when it registers."""
    usual = Config()
    return tuple([(name, getattr(config, name)) for name in SHARED if getattr(config, name) != getattr(usual, name)])


def differences(mine: Config, theirs: Tuple[Tuple[str, int], ...]) -> Tuple[Tuple[str, int, int], ...]:
    """(name, mine, theirs) of those of ``SHARED`` that differ; names that are not known here differ from nothing."""
    usual = Config()
    said = dict(theirs)
    found = [(name, getattr(mine, name), said.get(name, getattr(usual, name))) for name in SHARED]
    return tuple([one for one in found if one[1] != one[2]])


def _times(factor: int, name: str) -> str:
    return name if factor == 1 else f"{factor} {name}"


_INEQUALITIES: Final[Tuple[Tuple[str, int, str, int], ...]] = (
    ("renew_ns", 3, "lease_ns", 1),
    ("lease_ns", 3, "retain_ns", 1),
    ("retry_ns", 2, "lease_ns", 1),
    ("beat_ns", 2, "dead_ns", 1),
)


# ---- what a node is: enough to build its machine afresh, so that a log can be replayed ------------------------------
class ControllerSpec(msgspec.Struct, frozen=True, tag="controller", omit_defaults=True, forbid_unknown_fields=True):
    name: str
    config: Config = Config()


class WorkerSpec(msgspec.Struct, frozen=True, tag="worker", omit_defaults=True, forbid_unknown_fields=True):
    """One rank of one instance. ``name`` is its address; ``instance`` the id that it claims."""

    name: str
    instance: str
    rank: int
    controller: str
    namespace: Namespace
    locations: Tuple[Location, ...]
    config: Config = Config()
    measured: Optional[Measured] = None

    def space(self, location: str) -> Namespace:
        """What KV lies there."""
        return next((one.namespace for one in self.locations if one.name == location and one.namespace), self.namespace)


NodeSpec = Union[ControllerSpec, WorkerSpec]
