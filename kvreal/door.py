"""Who comes to a listening ZeroMQ socket: what becomes of each connection, counted; who is turned away, told.

ZeroMQ ends a handshake by itself, and nothing of it reaches whoever reads the socket. Its monitor tells of each
connection; a thread listens to that. It says nothing of why a connection ends later on: one that is ended because a
frame was too large looks like one whose peer has gone, and is counted as ended, like that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections import Counter
from typing import Any, Dict, Final, List, Tuple

import zmq
from zmq.utils.monitor import parse_monitor_message

log = logging.getLogger("kvmove.network")

MAX_TOLD: Final = 1_000
UNKNOWN: Final = "unknown"
BACKLOG: Final = 100_000
EVENTS: Final = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)  # fmt: skip
CRYPTOGRAPHIC: Final = 0x11000001
MECHANISM_MISMATCH: Final = 0x11000002
WORDS: Final[Dict[str, str]] = {
    "no_keys": "it calls without keys, and here there are keys",
    "keys": "it calls with keys, and here there are none",
    "other_keys": "its keys are of another cluster",
    "not_zeromq": "it does not speak ZeroMQ as it should",
    "unknown_key": "",  # told by whoever looked for its key
    # Both ends see that one has keys and the other none; a node ends the connection then, and does not come again.
    "broken_off": "it ended its handshake: it has no keys that fit here, or only looked",
}


class Door:
    """Of one context; each socket that is watched has a thread that ends with the context."""

    def __init__(self, context: Any) -> None:
        self.context: Any = context
        self.watches: List[Watch] = []

    def watch(self, sock: Any, keyed: bool) -> None:
        """Before ``sock`` binds."""
        self.watches.append(Watch(self.context, sock, len(self.watches), keyed))

    def counts(self) -> Tuple[Dict[str, int], Dict[str, int]]:
        """Connections by what became of them (accepted, established, ended), and refused handshakes by why."""
        whole: Counter[str] = Counter(accepted=0, established=0, ended=0)
        why: Counter[str] = Counter(dict.fromkeys(WORDS, 0))
        for one in self.watches:
            whole.update(one.connections)
            why.update(one.refused)
        return dict(whole), dict(why)


class Watch(threading.Thread):
    def __init__(self, context: Any, sock: Any, number: int, keyed: bool) -> None:
        super().__init__(name="door", daemon=True)
        self.keyed: bool = keyed
        self.connections: Dict[str, int] = {"accepted": 0, "established": 0, "ended": 0}
        self.refused: Dict[str, int] = dict.fromkeys(WORDS, 0)
        #: connection's descriptor -> address
        self.addresses: Dict[int, str] = {}
        self.failed: str = ""
        #: (address, why) -> how often
        self.told: Dict[Tuple[str, str], int] = {}
        at = f"inproc://door/{number}"
        # Of its own context object, so that destroying the other leaves this socket to this thread to close.
        self.sock: Any = zmq.Context.shadow(context.underlying).socket(zmq.PAIR)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.sock.setsockopt(zmq.RCVHWM, BACKLOG)  # ZeroMQ waits for whoever does not read its monitor
        sock.monitor(at, EVENTS)
        self.sock.connect(at)
        self.start()

    def run(self) -> None:
        while True:
            try:
                told = parse_monitor_message(self.sock.recv_multipart())
            except zmq.ContextTerminated:
                break
            except zmq.ZMQError as error:
                log.error("connections are not watched any more: %s", error)
                break
            self.step(int(told["event"]), int(told["value"]))
        self.sock.close(linger=0)

    def step(self, event: int, value: int) -> None:
        """One event. ZeroMQ says why a handshake failed just before it ends that connection, by its descriptor."""
        if event == zmq.EVENT_ACCEPTED:
            self.connections["accepted"] += 1
            self.addresses[value] = peer_of(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connections["established"] += 1
        elif event == zmq.EVENT_DISCONNECTED:
            address = self.addresses.pop(value, UNKNOWN)
            why, self.failed = self.failed, ""
            if not why:
                self.connections["ended"] += 1
                return
            self.refused[why] += 1
            self.tell(address, why)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.failed = "unknown_key"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            other = "no_keys" if self.keyed else "keys"
            self.failed = {CRYPTOGRAPHIC: "other_keys", MECHANISM_MISMATCH: other}.get(value, "not_zeromq")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self.failed = "broken_off"

    def tell(self, address: str, why: str) -> None:
        """Once an address and reason, and again at the tenth, the hundredth: others may be behind the same address."""
        words = WORDS[why]
        key = (address.rpartition(":")[0] or address, why)
        if not words or (key not in self.told and len(self.told) >= MAX_TOLD):
            return
        if address == UNKNOWN and any(reason == why for _, reason in self.told):
            return  # it may well be one that was told of
        count = self.told[key] = self.told.get(key, 0) + 1
        if count == 1:
            log.warning("refused %s: %s", address, words)
        elif str(count).strip("0") == "1":
            log.warning("refused %s %d times by now: %s", key[0], count, words)


def peer_of(descriptor: int) -> str:
    """Who is at the other end of a connection that ZeroMQ has accepted; ``unknown`` if it has ended already."""
    with contextlib.suppress(OSError):
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            host, port = sock.getpeername()[:2]
            return f"{host}:{port}"
    return UNKNOWN
