"""What processes say to one another before bytes flow: framed msgpack, and proof of the cluster's secret around it.

The target sends a nonce first. Hello and Grant then travel sealed: a keyed digest over both sides' nonces, checked
before what is inside is decoded. Nothing that was recorded earlier opens a window, and no stranger's word is read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
from typing import Final

import msgspec

MAX_MESSAGE: Final = 16 << 20
NONCE_BYTES: Final = 32


class TransferError(Exception):
    """A copy, or a transport, that failed; the message says why."""


class Stranger(ConnectionError):
    """Who dials has not the cluster's secret."""


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The target's first word where there is a secret."""

    nonce: bytes


class Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An encoded message, and the proof that who sent it has the secret."""

    nonce: bytes
    body: bytes
    proof: bytes


_encode: Final = msgspec.msgpack.Encoder().encode
_challenge: Final = msgspec.msgpack.Decoder(Challenge).decode
_sealed: Final = msgspec.msgpack.Decoder(Sealed).decode


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """ConnectionError if the peer hangs up first."""
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            raise ConnectionError("connection closed")
        parts += part
    return bytes(parts)


def send_message(sock: socket.socket, body: bytes) -> None:
    sock.sendall(struct.pack("<I", len(body)) + body)


def read_message(sock: socket.socket, limit: int = MAX_MESSAGE) -> bytes:
    (size,) = struct.unpack("<I", read_exactly(sock, 4))
    if size > limit:
        raise ConnectionError(f"a message of {size} bytes, expected at most {limit}")
    return read_exactly(sock, size)


def _proof(secret: bytes, what: bytes, theirs: bytes, ours: bytes, body: bytes) -> bytes:
    """``theirs`` and ``ours``: the nonces of the target and of who dials, both of one length."""
    return hashlib.blake2b(theirs + ours + body, key=secret, digest_size=32, person=what).digest()


class Answering:
    """The target's side of one connection: a question and its answer, again and again. Without a secret nothing is
    sealed; with one each question is asked for anew, so that none can be repeated."""

    def __init__(self, secret: bytes, sock: socket.socket, limit: int = MAX_MESSAGE) -> None:
        self.secret: bytes = secret
        self.sock: socket.socket = sock
        self.limit: int = limit
        self.mine: bytes = b""
        self.theirs: bytes = b""

    def read(self) -> bytes:
        """What who dials asks for. Stranger: it has not the secret."""
        if not self.secret:
            return read_message(self.sock, self.limit)
        self.mine = os.urandom(NONCE_BYTES)
        send_message(self.sock, _encode(Challenge(self.mine)))
        sealed = _sealed(read_message(self.sock, self.limit))
        proof = _proof(self.secret, b"hello", self.mine, sealed.nonce, sealed.body)
        if len(sealed.nonce) != NONCE_BYTES or not hmac.compare_digest(proof, sealed.proof):
            raise Stranger("a stranger")
        self.theirs = sealed.nonce
        return sealed.body

    def send(self, body: bytes) -> None:
        if self.secret:
            body = _encode(Sealed(self.mine, body, _proof(self.secret, b"grant", self.mine, self.theirs, body)))
        send_message(self.sock, body)


def read_challenge(sock: socket.socket, who: str) -> bytes:
    """The nonce of a target that has a secret. TransferError: it has none."""
    theirs = _challenge(read_message(sock)).nonce
    if len(theirs) != NONCE_BYTES:
        raise TransferError(f"{who} does not ask for a proof as this cluster's nodes do")
    return theirs


def ask(sock: socket.socket, body: bytes, secret: bytes, theirs: bytes) -> bytes:
    """Send ``body``, sealed for the nonce ``theirs`` where there is a secret; returns our own nonce."""
    if not secret:
        send_message(sock, body)
        return b""
    ours = os.urandom(NONCE_BYTES)
    send_message(sock, _encode(Sealed(ours, body, _proof(secret, b"hello", theirs, ours, body))))
    return ours


def told(sock: socket.socket, secret: bytes, theirs: bytes, ours: bytes, who: str) -> bytes:
    """The answer. TransferError: ``who`` has not the secret; OSError: it hung up."""
    if not secret:
        return read_message(sock)
    sealed = _sealed(read_message(sock))
    if not hmac.compare_digest(_proof(secret, b"grant", theirs, ours, sealed.body), sealed.proof):
        raise TransferError(f"{who} has not this cluster's secret")
    return sealed.body
