"""What a user is told when something cannot be done: one line, and an exit status.

0 all good; 1 a check or an expectation failed, or a run hung; 2 bad input, or a world that cannot run here; 130 Ctrl-C.
"""

from __future__ import annotations

from typing import Final

GOOD: Final = 0
FAILED: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130


class UserError(Exception):
    """Bad input, or something that cannot run here. The message is the whole line that the user sees."""


class RealUnavailable(UserError):
    """The real world was asked for, and this machine lacks what it takes."""


#: Errors that other packages raise at users, by class name: those packages are imported only where they are used.
KNOWN: Final = frozenset(
    {"ScenarioError", "BuildError", "ConfigError", "ProfileError", "HistoryError", "TransferError", "RunError"}
    | {"EndpointError", "SlabError", "TokenizerError", "TopologyError", "KeysError"}
    | {"PeerError", "LendError"}
)


def line_for(error: BaseException) -> str | None:
    """What to tell the user of ``error``; None if it is a bug of ours, which deserves its traceback."""
    if isinstance(error, UserError) or any(kind.__name__ in KNOWN for kind in type(error).__mro__):
        return str(error)
    if isinstance(error, OSError):
        where = error.filename if isinstance(error.filename, str) else ""
        return f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
    return None
