"""``kvmove keys``: what makes a process a node of this cluster."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmove.errors import RealUnavailable, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(name="keys", help="Keys for the messages between nodes.", no_args_is_help=True)


def _name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).strip(".-_") or "node"


@app.command("new")
def new(
    directory: Annotated[str, typer.Argument(metavar="DIR")],
    name: Annotated[str, typer.Option("--name", help="Of the first node; else this machine's.")] = "",
) -> None:
    """Make a cluster's keys, and its first node's, in DIR.

    Give DIR to every process of this machine: `kvmove controller --keys DIR`, and `keys: DIR` under `kvmove:` in the
    instances' files. `kvmove keys add` makes keys for other machines.

    Examples:

    * `kvmove keys new /etc/kvmove/keys`
    """
    _said(lambda keys: keys.new(Path(directory), name or _name()))


@app.command("add")
def add(
    directory: Annotated[str, typer.Argument(metavar="DIR")],
    other: Annotated[str, typer.Argument(metavar="NEW_DIR")],
    name: Annotated[str, typer.Option("--name", help="What the new node is called among the peers.")],
) -> None:
    """Make keys for another machine in NEW_DIR, which is to be copied there; DIR then lists it among its peers.

    Every node hears those whose public keys are in its own `peers`: copy the new file there on the machines that are
    to hear it. Removing a file there ends that node's next handshake with this one.

    Examples:

    * `kvmove keys add /etc/kvmove/keys ./gpu7-keys --name gpu7`
    """
    _said(lambda keys: keys.add(Path(directory), Path(other), name))


def _said(make: Callable[[Any], list[Path]]) -> None:
    try:
        from kvreal import keys
    except ImportError as error:
        raise RealUnavailable(f"keys need more ({error}): pip install 'kvmove[real]'") from None
    try:
        for path in make(keys):
            print(path)
    except keys.KeysError as error:
        raise UserError(str(error)) from None
