"""What there is to test here, what was asked for, and the cases that follow: pure, but for looking at the machine."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import pytest

from kvcore.scenario.topology import LOCATIONS
from kvcore.scenario.units import Size, UnitError

KINDS: Final = LOCATIONS
#: name -> (transport, environment of its processes): the same transport, made to take another way.
WAYS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "nixl over tcp": ("nixl", {"UCX_TLS": "tcp"}),
    "nixl over rdma": ("nixl", {"UCX_TLS": "rc,cuda_copy"}),
}
SIZES: Final = (Size(64 << 20),)
QUICK_SIZES: Final = (Size(4 << 20),)
RANKS: Final = (1, 2, 4)
DIRECTIONS: Final = ("read", "push")


class Layout(msgspec.Struct, frozen=True):
    """Of what a token takes over all ranks, and of how many tokens a slot holds."""

    name: str
    chunk_tokens: int
    bytes_per_token: int


LAYOUTS: Final = (
    Layout("1 MiB chunks", 256, 4096),
    Layout("32 MiB chunks", 256, 131072),
    Layout("16 KiB chunks", 16, 1024),
)


class Case(msgspec.Struct, frozen=True):
    """One move. ``source`` and ``target``: kinds of location."""

    transport: str
    source: str
    target: str
    direction: str
    layout: Layout
    ranks: int
    size: Size

    @property
    def tokens(self) -> int:
        """As many whole chunks as the size holds, and a third of a chunk."""
        chunk = self.layout.chunk_tokens
        whole = self.size.bytes // (chunk * self.layout.bytes_per_token)
        return whole * chunk + max(1, chunk // 3)

    @property
    def name(self) -> str:
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        pair = f"{self.source} to {self.target}"
        return ", ".join((self.transport, pair, self.direction, self.layout.name, ranks, str(self.size)))


class Asked(msgspec.Struct, frozen=True):
    """The options. ``transports``: names of TRANSPORTS, in order; of all others nothing is tried."""

    transports: tuple[str, ...]
    devices: tuple[str, ...]
    sizes: tuple[Size, ...]
    ranks: tuple[int, ...]
    quick: bool
    load_s: float
    peer: str
    token: str

    def moves(self) -> Iterator[Case]:
        """Between instances. Quick: each transport one way and the other, and each of the rest over the first."""
        for transport in self.transports:
            first = transport == self.transports[0]
            for source in self.devices:
                for target in self.devices:
                    for direction in DIRECTIONS:
                        for layout in LAYOUTS:
                            for ranks in self.ranks:
                                usual = (
                                    source != target,
                                    direction != "read",
                                    layout is not LAYOUTS[0],
                                    ranks != self.ranks[0],
                                    source == target != "cpu",
                                )
                                if self.quick and sum(usual) > (1 if first or usual[1] else 0):
                                    continue
                                for size in self.sizes:
                                    yield Case(transport, source, target, direction, layout, ranks, size)

    def tiers(self) -> Iterator[Case]:
        """Within one instance, over whatever it takes for that."""
        for source in self.devices:
            for target in self.devices:
                if source != target:
                    for layout in LAYOUTS[: 1 if self.quick else None]:
                        for ranks in self.ranks[: 1 if self.quick else None]:
                            for size in self.sizes:
                                yield Case("auto", source, target, "read", layout, ranks, size)


def known_transports() -> list[str]:
    """All that a pool may be told, the ways besides; the preferred one first."""
    from kvreal.transfer import available, here

    return list(dict.fromkeys([*available(), *WAYS, *here()]))


def way(transport: str) -> tuple[str, dict[str, str]]:
    """(what the pool is told, its environment)."""
    return WAYS.get(transport, (transport, {}))


def lacking(what: str) -> str:
    """Why a transport or a kind of location cannot be had here; "" if it can."""
    if what in KINDS:
        from kvreal.slab import provides

        if what == "gpu" and "gpu" not in provides():
            return "there is no GPU that torch can use"
        return ""
    from kvreal import transfer

    if what == "nixl over rdma" and not glob.glob("/sys/class/infiniband/*"):
        return "there is no RDMA device under /sys/class/infiniband"
    return transfer.lacking(way(what)[0])


def need(*parts: str) -> None:
    """Skip, saying what is missing."""
    for part in parts:
        lack = lacking(part)
        if lack:
            pytest.skip(f"{part}: {lack}")


# ---- options ---------------------------------------------------------------------------------------------------------
def asked(config: pytest.Config, quick: bool) -> Asked:
    """UsageError for what is not known."""
    known = known_transports()
    transports = tuple(_words(config, "--transports")) or tuple(known)
    devices = tuple(_words(config, "--devices")) or tuple(KINDS)
    _among("--transports", transports, known)
    _among("--devices", devices, tuple(KINDS))
    ranks = tuple(_whole("--ranks", word) for word in _words(config, "--ranks")) or (RANKS if not quick else RANKS[:2])
    sizes = tuple(_size(word) for word in _words(config, "--sizes")) or (QUICK_SIZES if quick else SIZES)
    seconds = config.getoption("--load-seconds", None)
    load_s = _seconds(str(seconds)) if seconds is not None else 2.0 if quick else 30.0
    peer, token = (str(config.getoption(name, None) or "") for name in ("--peer", "--peer-token"))
    return Asked(transports, devices, sizes, ranks, quick, load_s, peer, token)


def _words(config: pytest.Config, option: str) -> list[str]:
    return [word.strip() for word in str(config.getoption(option, None) or "").split(",") if word.strip()]


def _among(option: str, words: Sequence[str], known: Sequence[str]) -> None:
    for word in words:
        if word not in known:
            raise pytest.UsageError(f"{option} {word}: expected some of {', '.join(known)}")


def _whole(option: str, word: str) -> int:
    if not word.isdigit() or not 1 <= int(word) <= 64:
        raise pytest.UsageError(f"{option} {word}: expected whole numbers from 1 to 64")
    return int(word)


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise pytest.UsageError(f"--load-seconds {word}: expected a number of seconds")
    return seconds


def _size(word: str) -> Size:
    try:
        size = Size.parse(word)
    except UnitError as error:
        raise pytest.UsageError(f"--sizes {word}: {error}") from None
    return size
