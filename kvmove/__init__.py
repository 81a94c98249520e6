"""The face of the project: one command line that runs a scenario in either world or both, compares, and reports.

``kvmove.Client`` and ``kvmove.AsyncClient`` speak to a running controller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmove.client import AsyncClient as AsyncClient
    from kvmove.client import Client as Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """The client library is imported when it is asked for: it needs httpx, which simulating does not."""
    if name in __all__:
        from kvmove import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
