"""Keys: who is a node of this cluster, for messages (ZeroMQ CURVE) and for copies (the secret of the windows).

    DIR/cluster.public  cluster.secret     what every node listens with, and calls
    DIR/node.public     node.secret        what this node calls with
    DIR/peers/NAME.public                  whom this node hears; looked at anew when it changes

Whoever has ``cluster.secret`` can listen as a node and touch a node's memory; whose ``node.public`` is among the peers
can speak to it. Everything between nodes' sockets is encrypted; a copy's bytes are not, but who opens its window is
proved by the secret that is derived from ``cluster.secret``, in both directions, before anything of it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any, Dict, Final, List, Optional, Set, Tuple

import zmq
from zmq.utils import z85

log = logging.getLogger("kvmove.keys")

DOMAIN: Final = b"kvmove"
ZAP: Final = "inproc://zeromq.zap.01"
MAX_TOLD: Final = 1_000
_KEY: Final = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
"""Z85, 32 bytes."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class KeysError(Exception):
    """One line: which file is wrong, and what was expected."""


# ---- files
def new(folder: Path, name: str) -> List[Path]:
    """A new cluster's keys and its first node's. KeysError if there are keys already: they are never overwritten."""
    _check_name(name)
    for one in ("cluster.secret", "node.secret"):
        if (folder / one).exists():
            raise KeysError(f"{folder}: has keys already; choose another directory")
    with _writing(folder):
        _folders(folder)
        made = [*_pair(folder, "cluster"), *_pair(folder, "node")]
        peer = folder / "peers" / f"{name}.public"
        _write(peer, (folder / "node.public").read_bytes(), 0o644)
        return [*made, peer]


def add(folder: Path, other: Path, name: str) -> List[Path]:
    """Keys for another node in ``other``: the cluster's, its own, and the peers; ``folder`` then hears it."""
    _check_name(name)
    if (other / "node.secret").exists():
        raise KeysError(f"{other}: has keys already; choose another directory")
    peer = folder / "peers" / f"{name}.public"
    if peer.exists():
        raise KeysError(f"{peer}: is there already; choose another name, or remove it")
    load(folder)
    with _writing(other):
        _folders(other)
        made = _pair(other, "node")
        for end, mode in (("public", 0o644), ("secret", 0o600)):
            _write(other / f"cluster.{end}", (folder / f"cluster.{end}").read_bytes(), mode)
        _write(peer, (other / "node.public").read_bytes(), 0o644)
        for known in sorted((folder / "peers").glob("*.public")):
            _write(other / "peers" / known.name, known.read_bytes(), 0o644)
        return [*made, peer]


@contextlib.contextmanager
def _writing(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise KeysError(f"{error.filename or folder}: cannot write keys: {error.strerror}") from error


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r}: expected a node's name of letters, digits, '.', '_' and '-'")


def _folders(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "peers").mkdir(mode=0o755, exist_ok=True)


def _pair(folder: Path, name: str) -> List[Path]:
    public, secret = zmq.curve_keypair()
    files = [folder / f"{name}.public", folder / f"{name}.secret"]
    _write(files[0], public + b"\n", 0o644)
    _write(files[1], secret + b"\n", 0o600)
    return files


def _write(path: Path, data: bytes, mode: int) -> None:
    """Never over a file that is there, and never readable by others for a moment."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _key(path: Path) -> bytes:
    try:
        if path.suffix == ".secret" and path.stat().st_mode & 0o007:
            raise KeysError(f"{path}: everyone on this machine can use it: chmod 600 it")
        key = path.read_bytes().strip()
    except OSError as error:
        raise KeysError(f"{path}: cannot read the key: {error.strerror} (see `kvmove keys new`)") from error
    if not _KEY.fullmatch(key):
        raise KeysError(f"{path}: is no key, expected 40 characters as `kvmove keys` writes them")
    return key


def load(folder: Path | str) -> Keys:
    """KeysError if something is missing, is no key, or is anybody's to read."""
    folder = Path(folder)
    pairs = {name: (_key(folder / f"{name}.public"), _key(folder / f"{name}.secret")) for name in ("cluster", "node")}
    for name, (public, secret) in pairs.items():
        if zmq.curve_public(secret) != public:
            raise KeysError(f"{folder / name}.public: does not belong to {name}.secret")
    peers = Peers(folder / "peers")
    if not peers.names():
        raise KeysError(f"{folder / 'peers'}: no *.public in it, so nobody would be heard")
    return Keys(pairs["cluster"], pairs["node"], peers)


class Peers:
    """Public keys of those who are heard. The directory is read again when it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.seen: Tuple[Tuple[str, int, int], ...] = ()
        self.known: Dict[bytes, str] = {}

    def names(self) -> Dict[bytes, str]:
        """Public key (Z85) -> name."""
        seen = self._look()
        if seen != self.seen:
            self.seen = seen
            self.known = {}
            for name, _, _ in seen:
                try:
                    self.known[_key(self.folder / name)] = name.removesuffix(".public")
                except KeysError as error:
                    log.warning("%s; that peer is not heard", error)
        return self.known

    def _look(self) -> Tuple[Tuple[str, int, int], ...]:
        found: List[Tuple[str, int, int]] = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                if entry.name.endswith(".public"):
                    with contextlib.suppress(OSError):
                        about = entry.stat()
                        found.append((entry.name, about.st_mtime_ns, about.st_ino))
        return tuple(sorted(found))


class Keys:
    """What makes a node's sockets speak CURVE, and its windows ask for proof."""

    def __init__(self, cluster: Tuple[bytes, bytes], node: Tuple[bytes, bytes], peers: Peers) -> None:
        self.cluster: Tuple[bytes, bytes] = cluster
        self.node: Tuple[bytes, bytes] = node
        self.peers: Peers = peers

    def listening(self, sock: Any) -> None:
        """Before a socket binds: it hears peers only."""
        # Another listening socket of the same context has one already.
        try:
            Doorkeeper(sock.context, self.peers)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.cluster[1])
        sock.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        if hasattr(zmq, "ZAP_ENFORCE_DOMAIN"):
            sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a doorkeeper nobody comes in, rather than everybody

    def calling(self, sock: Any, address: str) -> None:
        """Before a socket connects: it speaks to who has the cluster's secret only."""
        sock.setsockopt(zmq.CURVE_SERVERKEY, self.cluster[0])
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.node[0])
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.node[1])

    def window_secret(self) -> bytes:
        """What the two sides of a copy prove to one another that they have."""
        return hashlib.blake2b(b"windows", key=self.cluster[1], digest_size=32, person=b"kvmove").digest()


class Shared(Peers):
    """The peers of those who all have one secret: each other."""

    def __init__(self, public: bytes) -> None:
        super().__init__(Path("the secret that was shared"))
        self.known = {public: "peer"}

    def names(self) -> Dict[bytes, str]:
        return self.known


def shared(secret: bytes) -> Keys:
    """Keys of processes that have been given the same 32 bytes or more: one pair, cluster's and node's alike."""
    private = z85.encode(hashlib.blake2b(b"curve", key=secret[:64], digest_size=32, person=b"kvmove").digest())
    pair = (zmq.curve_public(private), private)
    return Keys(pair, pair, Shared(pair[0]))


class Doorkeeper(threading.Thread):
    """Answers ZeroMQ's question about each handshake (ZAP, RFC 27) from the peers' directory. Ends with its context."""

    def __init__(self, context: Any, peers: Peers) -> None:
        super().__init__(name="doorkeeper", daemon=True)
        self.peers: Peers = peers
        #: (address, its key): who has been told to be none of the peers
        self.told: Set[Tuple[str, str]] = set()
        # Of its own context object, so that destroying the other leaves this socket to this thread to close.
        self.sock: Any = zmq.Context.shadow(context.underlying).socket(zmq.REP)
        self.sock.setsockopt(zmq.LINGER, 0)
        try:
            self.sock.bind(ZAP)
        except zmq.ZMQError:
            self.sock.close(linger=0)
            raise
        self.start()

    def run(self) -> None:
        while True:
            try:
                self._answer(self.sock.recv_multipart())
            except zmq.ContextTerminated:
                break
            except zmq.ZMQError as error:
                log.error("handshakes are not answered any more: %s", error)
                break
        self.sock.close(linger=0)

    def _answer(self, frames: List[bytes]) -> None:
        name: Optional[str] = None
        key = "none"
        if len(frames) == 7 and frames[0] == b"1.0" and frames[2] == DOMAIN and frames[5] == b"CURVE":
            key = z85.encode(frames[6]).decode()
            name = self.peers.names().get(key.encode())
        number = frames[1] if len(frames) > 1 else b""
        if name is None:
            where = frames[3].decode(errors="replace") if len(frames) > 3 else "unknown"
            # Several nodes may be behind an address: each has its key, which is no secret.
            if (where, key) not in self.told and len(self.told) < MAX_TOLD:
                self.told.add((where, key))
                log.warning("refused %s: its public key %s is none of the peers in %s", where, key, self.peers.folder)
            self.sock.send_multipart([b"1.0", number, b"400", b"not a peer", b"", b""])
        else:
            self.sock.send_multipart([b"1.0", number, b"200", b"OK", name.encode(), b""])
