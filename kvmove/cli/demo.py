"""``kvmove demo``: two scenarios in both worlds, told to somebody who sees them for the first time."""

from __future__ import annotations


def demo() -> None:
    """Replay two scenarios in simulation and on this machine, compare, and explain what happened.

    Example:

    * `kvmove demo`
    """
    raise NotImplementedError
