"""Quantities with their units written: ``250 us``, ``2 leases``, ``5 GiB``, ``10 Gbit/s``, ``256 tokens``.

Each is an own type, so that a bare number cannot pass for one, and each knows its shortest exact text: ``parse(str(x))
== x``. ``dec_hook`` and ``enc_hook`` let msgspec read and write them as strings.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Dict, Final, List, Optional, Tuple, Type

from kvcore.protocol.config import Config

_NUMBER: Final = re.compile(r"\s*([-+]?)([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([^\s0-9].*?)?\s*\Z", re.ASCII)
_DIGITS_MAX: Final = 24

_TIME_NS: Final[Dict[str, int]] = {
    "h": 3600 * 10**9,
    "min": 60 * 10**9,
    "s": 10**9,
    "ms": 10**6,
    "us": 10**3,
    "ns": 1,
}
_CONSTANT_NAMES: Final[Tuple[Tuple[str, str, str], ...]] = (
    ("retry", "retry", "retries"),
    ("lease", "lease", "leases"),
    ("renew", "renew", "renews"),
    ("retain", "retain", "retains"),
    ("stop_retry", "stop_retry", "stop_retries"),
    ("beat", "beat", "beats"),
    ("dead", "dead", "deads"),
    ("release_give_up", "give_up", "give_ups"),
    ("copy_max", "copy_max", "copy_maxes"),
    ("deadline", "deadline", "deadlines"),
    ("hold", "hold", "holds"),
)
_SINGULAR: Final = {constant: one for constant, one, _ in _CONSTANT_NAMES}
_PLURAL: Final = {constant: many for constant, _, many in _CONSTANT_NAMES}
_CONSTANTS: Final[Dict[str, str]] = {
    name: constant for constant, one, many in _CONSTANT_NAMES for name in (constant, one, many)
}
_SIZE_BYTES: Final[Dict[str, int]] = {
    "TiB": 2**40,
    "GiB": 2**30,
    "MiB": 2**20,
    "KiB": 2**10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "B": 1,
}
_RATE_BITS: Final[Dict[str, int]] = {
    "Tbit/s": 10**12,
    "Gbit/s": 10**9,
    "Mbit/s": 10**6,
    "kbit/s": 10**3,
    "bit/s": 1,
    "TB/s": 8 * 10**12,
    "GB/s": 8 * 10**9,
    "MB/s": 8 * 10**6,
    "kB/s": 8 * 10**3,
    "B/s": 8,
    "GiB/s": 8 * 2**30,
    "MiB/s": 8 * 2**20,
    "KiB/s": 8 * 2**10,
}
_ALIASES: Final[Dict[str, str]] = {
    "µs": "us",
    "μs": "us",
    "sec": "s",
    "second": "s",
    "seconds": "s",
    "minutes": "min",
    "KB": "kB",
    "bytes": "B",
    "byte": "B",
    "KB/s": "kB/s",
    "Kbit/s": "kbit/s",
}


class UnitError(ValueError):
    """What was found and what is expected, in one line. ``unit``: the one that is not among ``known``."""

    def __init__(self, text: str, unit: str = "", known: Tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.unit: str = unit
        self.known: Tuple[str, ...] = known


def _split(value: object, what: str, example: str) -> Tuple[Decimal, str]:
    """(number, unit); the unit may be missing. UnitError for anything else and for negative numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UnitError(f"found {_shown(value)}, expected {what} such as {example!r}")
    match = _NUMBER.match(str(value))
    if match is None:
        raise UnitError(f"found {_shown(value)}, expected {what} such as {example!r}")
    sign, digits, unit = match.groups()
    if len(digits) > _DIGITS_MAX:
        raise UnitError(f"found a number of {len(digits)} digits, expected {what} such as {example!r}")
    number = Decimal(digits.replace("_", ""))
    if sign == "-" and number:
        raise UnitError(f"{_shown(value)} is negative, expected {what} of 0 or more")
    unit = unit or ""
    return number, _ALIASES.get(unit, unit)


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _scaled(value: object, units: Dict[str, int], what: str, example: str, whole: str) -> int:
    number, unit = _split(value, what, example)
    if not unit:
        if not number:
            return 0  # nothing is nothing in every unit
        raise UnitError(f"found {_shown(value)} without a unit, expected {what} such as {example!r}")
    factor = units.get(unit)
    if factor is None:
        raise UnitError(f"unknown unit {unit!r}, expected {what} such as {example!r}", unit, tuple(units))
    scaled = number * factor
    if scaled != int(scaled):
        raise UnitError(f"{_shown(value)} is not a whole number of {whole}")
    if scaled >= 2**63:
        raise UnitError(f"{_shown(value)} is too large, expected {what} below 2**63 {whole}")
    return int(scaled)


def _shortest(count: int, units: Dict[str, int]) -> str:
    """The fewest digits that say ``count`` exactly; equal numbers of digits: the unit listed first."""
    best: Optional[str] = None
    for unit, factor in units.items():
        if count % factor == 0:
            text = f"{count // factor} {unit}"
            if best is None or len(text.split(" ")[0]) < len(best.split(" ")[0]):
                best = text
    return best or str(count)


class Quantity:
    """Base: compared and hashed by ``parts``, shown by its text."""

    def parts(self) -> Tuple[Any, ...]:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Quantity) and self.parts() == other.parts()

    def __hash__(self) -> int:
        return hash(self.parts())

    def __repr__(self) -> str:
        return f"{type(self).__name__}.parse({str(self)!r})"


class Duration(Quantity):
    """Nanoseconds (``constant`` ""), or ``amount`` times a protocol constant: that means the same in both worlds."""

    def __init__(self, amount: Decimal, constant: str = "") -> None:
        self.amount: Decimal = amount
        self.constant: str = constant

    @staticmethod
    def parse(value: object) -> Duration:
        number, unit = _split(value, "a duration", "250 us")
        constant = _CONSTANTS.get(unit)
        if constant is not None:
            return Duration(number.normalize(), constant)
        units = _TIME_NS
        if unit and unit not in units:
            known = (*units, *_PLURAL.values())
            raise UnitError(f"unknown unit {unit!r}, expected a duration such as '250 us' or '2 leases'", unit, known)
        return Duration(Decimal(_scaled(value, units, "a duration", "250 us", "nanoseconds")))

    @staticmethod
    def of_ns(ns: int) -> Duration:
        return Duration(Decimal(ns))

    def ns(self, config: Config) -> int:
        """Nanoseconds under the constants of ``config``."""
        if not self.constant:
            return int(self.amount)
        return int(self.amount * int(getattr(config, self.constant + "_ns")))

    def parts(self) -> Tuple[Any, ...]:
        return self.amount, self.constant

    def __str__(self) -> str:
        if not self.constant:
            return _shortest(int(self.amount), _TIME_NS) if self.amount else "0 s"
        names = _SINGULAR if self.amount == 1 else _PLURAL
        return f"{self.amount:f} {names[self.constant]}"


class Size(Quantity):
    """A number of bytes."""

    def __init__(self, count: int) -> None:
        self.bytes: int = count

    @staticmethod
    def parse(value: object) -> Size:
        return Size(_scaled(value, _SIZE_BYTES, "a size", "5 GiB", "bytes"))

    def parts(self) -> Tuple[Any, ...]:
        return (self.bytes,)

    def __str__(self) -> str:
        return _shortest(self.bytes, _SIZE_BYTES) if self.bytes else "0 B"


class Rate(Quantity):
    """Bits a second; never 0, as nothing would ever end."""

    def __init__(self, bits_per_s: int) -> None:
        self.bits_per_s: int = bits_per_s

    @staticmethod
    def parse(value: object) -> Rate:
        bits = _scaled(value, _RATE_BITS, "a rate", "10 Gbit/s", "bits a second")
        if bits == 0:
            raise UnitError(f"found {_shown(value)}, expected a rate above 0 such as '10 Gbit/s'")
        return Rate(bits)

    @property
    def bytes_per_s(self) -> float:
        return self.bits_per_s / 8

    def parts(self) -> Tuple[Any, ...]:
        return (self.bits_per_s,)

    def __str__(self) -> str:
        return _shortest(self.bits_per_s, _RATE_BITS)


class Tokens(Quantity):
    """A number of tokens, or of chunks. A bare number will do: fields of this kind are called tokens."""

    def __init__(self, number: int, chunks: bool = False) -> None:
        self.number: int = number
        self.chunks: bool = chunks

    @staticmethod
    def parse(value: object) -> Tokens:
        number, unit = _split(value, "a number of tokens", "4096 tokens")
        chunks = unit in ("chunk", "chunks")
        if not chunks and unit not in ("", "token", "tokens"):
            raise UnitError(f"unknown unit {unit!r}, expected tokens or chunks", unit, ("tokens", "chunks"))
        if number != int(number):
            raise UnitError(f"{_shown(value)} is not a whole number of {'chunks' if chunks else 'tokens'}")
        if number >= 2**40:
            raise UnitError(f"{_shown(value)} is too large, expected a number of tokens such as '4096 tokens'")
        return Tokens(int(number), chunks)

    def count(self, chunk_tokens: int) -> int:
        """Tokens, where a chunk has ``chunk_tokens``."""
        return self.number * chunk_tokens if self.chunks else self.number

    def parts(self) -> Tuple[Any, ...]:
        return self.number, self.chunks

    def __str__(self) -> str:
        unit = "chunk" if self.chunks else "token"
        return f"{self.number} {unit}" if self.number == 1 else f"{self.number} {unit}s"


class ChunkTokens(Quantity):
    """Tokens of one chunk. The unit is written: a bare ``chunk: 256`` could as well be slots or bytes."""

    def __init__(self, number: int) -> None:
        self.number: int = number

    @staticmethod
    def parse(value: object) -> ChunkTokens:
        units = {"tokens": 1, "token": 1}
        number = _scaled(value, units, "a number of tokens", "256 tokens", "tokens")
        if not 1 <= number <= 2**20:
            raise UnitError(f"found {_shown(value)}, expected a chunk of 1 to {2**20} tokens")
        return ChunkTokens(number)

    def parts(self) -> Tuple[Any, ...]:
        return (self.number,)

    def __str__(self) -> str:
        return f"{self.number} tokens" if self.number != 1 else "1 token"


QUANTITIES: Final[Tuple[Type[Quantity], ...]] = (Duration, Size, Rate, Tokens, ChunkTokens)


def dec_hook(kind: Type[Any], value: Any) -> Any:
    """For msgspec: the text of a quantity to the quantity. UnitError (a ValueError) names found and expected."""
    if kind is Duration:
        return Duration.parse(value)
    if kind is Size:
        return Size.parse(value)
    if kind is Rate:
        return Rate.parse(value)
    if kind is Tokens:
        return Tokens.parse(value)
    if kind is ChunkTokens:
        return ChunkTokens.parse(value)
    raise NotImplementedError(f"no text form for {kind.__name__}")


def enc_hook(value: Any) -> Any:
    """For msgspec: a quantity to its text."""
    if isinstance(value, Quantity):
        return str(value)
    raise NotImplementedError(f"no text form for {type(value).__name__}")


def known_units(kind: Type[Any]) -> List[str]:
    """The units a quantity may be written in, for help texts and the JSON Schema."""
    if kind is Duration:
        return [*_TIME_NS, *_PLURAL.values()]
    if kind is Size:
        return list(_SIZE_BYTES)
    if kind is Rate:
        return list(_RATE_BITS)
    return ["tokens"] if kind is ChunkTokens else ["tokens", "chunks"]
