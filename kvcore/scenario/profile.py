"""What things cost: a profile of measured latencies, service times and bandwidths, one number for each name.

Calibration writes such a file; ``profiles/default.yaml`` says the same as the defaults here, with a word on each.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvcore.scenario.loader import load_data


class ProfileError(ValueError):
    """One line: which file, which field, what was expected."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nanoseconds and bytes a second. A transfer of ``n`` slots and ``b`` bytes that is alone on its links takes
    ``transfer_ns + n * descriptor_ns + b / bandwidth``."""

    name: str = "default"
    about: str = ""

    message_latency_ns: int = 60_000
    service_ns: int = 30_000
    journal_ns: int = 50_000

    transfer_ns: int = 150_000
    descriptor_ns: int = 2_000
    copy_bytes_per_s: float = 5e9
    host_bytes_per_s: float = 9e9
    peer_death_ns: int = 1_000_000
    abort_ns: int = 100_000
    window_ns: int = 200_000

    memcpy_bytes_per_s: float = 9e9
    fill_ns: int = 50_000
    fill_bytes_per_s: float = 2e9
    read_ns: int = 50_000
    read_bytes_per_s: float = 2e9

    def check(self) -> None:
        """ProfileError for a time below 0 or a bandwidth of 0 or less."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name.endswith("_ns") and not 0 <= value < 1 << 62:
                raise ProfileError(f"{name} is {value}, expected nanoseconds, 0 or more")
            if name.endswith("_per_s") and not 0 < value < 1e18:
                raise ProfileError(f"{name} is {value}, expected bytes a second, above 0")

    def transfer_overhead_ns(self, descriptors: int) -> int:
        return self.transfer_ns + descriptors * self.descriptor_ns

    def fill_time_ns(self, nbytes: int) -> int:
        return self.fill_ns + round(nbytes * 1e9 / self.fill_bytes_per_s)

    def read_time_ns(self, nbytes: int) -> int:
        return self.read_ns + round(nbytes * 1e9 / self.read_bytes_per_s)


def load_profile(path: Path) -> Profile:
    """Read a profile from YAML. ProfileError says what is wrong with it; the loader's error that it is no YAML."""
    data = load_data(path)
    try:
        profile = msgspec.convert(data, type=Profile)
        profile.check()
    except (msgspec.ValidationError, ProfileError) as error:
        raise ProfileError(f"{path}: {error}") from error
    return profile
