"""The face of the project: one command line that runs a scenario in either world or both, compares, and reports.

``kvmove.Client`` and ``kvmove.AsyncClient`` speak to a running controller; what they raise is
``kvmove.Refused`` or ``kvmove.Unreachable``, both ``kvmove.ClientError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmove.client import AsyncClient as AsyncClient
    from kvmove.client import Client as Client
    from kvmove.client import ClientError as ClientError
    from kvmove.client import Refused as Refused
    from kvmove.client import Unreachable as Unreachable

__all__ = ["AsyncClient", "Client", "ClientError", "Refused", "Unreachable"]


def __getattr__(name: str) -> Any:
    """The client library is imported when it is asked for: it needs httpx, which simulating does not."""
    if name in __all__:
        from kvmove import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
