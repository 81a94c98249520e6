"""``kvmove peer``: lend this machine's processes to runs elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmove.errors import RealUnavailable, UserError

if TYPE_CHECKING:
    from kvreal.lend import Peer


def peer(
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            help="Where to wait; port 0 is any. ssh: the address by which ssh came in.",
            metavar="HOST:PORT",
            show_default=False,
        ),
    ],
    token: Annotated[
        str | None,
        typer.Option("--token", help="The secret that both sides share; made if missing. -: stdin's.", metavar="FILE"),
    ] = None,
    keys: Annotated[
        str | None, typer.Option("--keys", help="The cluster's keys, instead of a token.", metavar="DIR")
    ] = None,
) -> None:
    """Wait, and lend processes to a run elsewhere, so that some of its instances run on this machine.

    The other side proves that it has the secret, and so does this one; without a secret nothing listens. Control
    messages between nodes are encrypted, the bytes of copies are not. Everything that was lent is killed and removed
    when the borrower goes, however it goes. With `--token -` it ends when its standard input does: so ssh starts it.

    Examples:

    * `kvmove peer --listen 10.0.0.2:7000 --token peer.token`
    * elsewhere: `kvmove run FILE --on real --peer tcp://10.0.0.2:7000 --peer-token peer.token`
    * elsewhere, with nothing waiting: `kvmove run FILE --on real --peer ssh://10.0.0.2`
    """
    try:
        from kvreal import lend
    except ImportError as error:
        raise RealUnavailable(f"a peer needs more ({error}): pip install 'kvmove[real]'") from None
    by_stdin = token == "-"
    host, port = _address(listen)  # first: a wrong one makes no token
    secret = _secret(_told() if by_stdin else b"", token, keys)
    waiting = lend.Peer(host, port, secret, lambda text: print(f"kvmove: {text}", file=sys.stderr, flush=True))
    print(f"{waiting.address[0]}:{waiting.address[1]}", flush=True)
    _lend(waiting, by_stdin)


def _lend(waiting: Peer, by_stdin: bool) -> None:
    from kvreal.lend import serve

    serve(waiting, 0 if by_stdin else -1)


def _secret(told: bytes, token: str | None, keys: str | None) -> bytes:
    if (token is None) == (keys is None):
        raise UserError("peer: expected --token FILE or --keys DIR, so that not everybody can come in")
    return told or shared_secret(token, keys, make=True)


def _told() -> bytes:
    """The secret itself, as a borrower that starts this by ssh gives it."""
    try:
        secret = bytes.fromhex(sys.stdin.readline().strip())
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise UserError("--token -: expected a line of 64 hex digits on standard input")
    return secret


def shared_secret(token: str | None, keys: str | None, *, make: bool = False) -> bytes:
    """What a peer and its borrower both have: of a token's file, or of a directory of keys."""
    from kvreal import borrow
    from kvreal.keys import load

    if keys is not None:
        return borrow.secret_of(load(keys).window_secret(), keys)
    return borrow.read_token(Path(token), make) if token is not None else b""


def _address(listen: str) -> tuple[str, int]:
    if listen == "ssh":
        parts = os.environ.get("SSH_CONNECTION", "").split()
        if len(parts) != 4:
            raise UserError(
                "--listen ssh: this was not started by ssh (there is no SSH_CONNECTION), expected HOST:PORT"
            )
        if ":" in parts[2]:
            raise UserError(f"--listen ssh: ssh came in by IPv6 ({parts[2]}), and nodes speak IPv4: expected `ssh -4`")
        return parts[2], 0
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--listen {listen}: expected HOST:PORT, like 10.0.0.2:7000")
    return host, int(port)
