"""Prior art 18: anybody may move, register, admit and read memory, and metadata is unpickled."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path
from typing import Iterator

import httpx
import msgspec
import pytest
import zmq

from kvcore.protocol.messages import Location, Namespace, Register
from kvreal.ports import free_ports
from tests.real.http.processes import ROOT, Command, commands, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]
READ, MOVE = "r" * 32, "m" * 32


class Guarded:
    """A controller with tokens and keys."""

    def __init__(self, folder: Path, port: int, pull: int, command: Command) -> None:
        self.folder = folder
        self.url = f"http://localhost:{port}"
        self.pull = pull
        self.command = command

    def post(self, path: str, body: object, token: str = "") -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=20).status_code


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("safety")
    tokens = folder / "tokens"
    tokens.write_text(f"read {READ}\nmove {MOVE}\n")
    tokens.chmod(0o600)
    port, pull, reply = free_ports(3)
    with commands(folder) as start:
        assert start("keys", ["keys", "new", "keys"]).until_ends() == 0
        argv = ["controller", "--port", str(port), "--monitor-ports", f'{{"pull": {pull}, "reply": {reply}}}']
        command = start("controller", [*argv, "--keys", "keys", "--tokens", "tokens"])
        command.until_says("controller: http://")
        yield Guarded(folder, port, pull, command)
        assert command.stop(signal.SIGTERM) == 0


def test_prior_art_18_a_move_needs_a_token_with_that_role(guarded: Guarded) -> None:
    body = {"old_position": ["a", "L"], "new_position": ["b", "L"], "tokens": [1]}
    assert guarded.post("/move", body) == 401
    assert guarded.post("/move", body, "x" * 32) == 401
    assert guarded.post("/move", body, READ) == 403
    assert guarded.post("/move", body, MOVE) == 404  # it may, and there is no such instance
    assert guarded.post("/lookup", {"tokens": [1]}, READ) == 200


@pytest.mark.parametrize("curve", ["plain", "foreign keys"])
def test_prior_art_18_a_forged_registration_changes_nothing(guarded: Guarded, curve: str) -> None:
    """A frame that any node of the cluster would be believed for, from one that has no keys, or keys of its own."""
    register = Register("forged", 0, 1, Namespace(), (Location("LocalCPUBackend", 1),), "127.0.0.1:1")
    header = msgspec.msgpack.encode(["kvmove", "127.0.0.1:1", f"127.0.0.1:{guarded.pull}"])
    with zmq.Context() as context, context.socket(zmq.PUSH) as sock:
        sock.setsockopt(zmq.LINGER, 300)
        if curve != "plain":
            public, secret = zmq.curve_keypair()
            sock.setsockopt(zmq.CURVE_SERVERKEY, (guarded.folder / "keys/cluster.public").read_bytes().strip())
            sock.setsockopt(zmq.CURVE_PUBLICKEY, public)
            sock.setsockopt(zmq.CURVE_SECRETKEY, secret)
        sock.connect(f"tcp://127.0.0.1:{guarded.pull}")
        sock.setsockopt(zmq.SNDTIMEO, 1000)
        with contextlib.suppress(zmq.Again):  # nobody took it
            sock.send_multipart([header, msgspec.msgpack.encode(register)])
        if curve != "plain":
            until(lambda: "refused" in guarded.command.text(), guarded.command.text, 10)
    headers = {"Authorization": f"Bearer {READ}"}
    assert httpx.get(f"{guarded.url}/instances", headers=headers).json()["instances"] == []


def test_prior_art_18_nothing_is_unpickled() -> None:
    wrong = []
    for package in ("kvcore/protocol", "kvreal"):  # what messages, journals and metadata pass through
        for path in sorted((ROOT / package).rglob("*.py")):
            if re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill|cloudpickle)\b", path.read_text(), re.M):
                wrong.append(str(path))
    assert wrong == []
