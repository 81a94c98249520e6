"""What the controller costs, beside the reference's in the same run where that is there (``make bench-controller``).

Ratios are printed, nothing passes or fails by them. Ours runs with its defaults, durability ``process``; the constants
say only that nobody here is to be found dead. Where a figure is ours alone, the reason is printed.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("zmq")

import httpx

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.messages import Entry
from kvreal.ports import free_port
from tests.bench.crowd import CPU, NAMESPACE, Crowd
from tests.bench.reference.peer import Reference, found
from tests.real.http.cluster import ROOT, eventually
from tests.real.http.processes import commands

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
TOKENS = 4096
PATIENT = ("beat=100 s", "dead=400 s")
INSTANCE = """\
enable_controller: true
lmcache_instance_id: {name}
controller_pull_url: localhost:{pull}
transfer_channel: nixl
kvmove: {{bytes_per_token: 128 B, locations: {{LocalCPUBackend: 256 MiB}}}}
"""


class Client:
    """A connection that stays, and hardly any work of a client's own, so that what is measured is the other side's:
    http.client takes 40 us a request, as long as a whole answer of ours."""

    def __init__(self, port: int) -> None:
        self.port: int = port
        self.sock: socket.socket = self._connected()

    def _connected(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def fresh(self) -> None:
        """A server closes what has been idle for some seconds, as while the other one was asked."""
        self.sock.close()
        self.sock = self._connected()

    def ask(self, method: str, path: str, body: Optional[bytes] = None) -> Dict[str, Any]:
        answer: Dict[str, Any] = json.loads(self.told(request(method, path, body)))
        return answer

    def told(self, whole: bytes) -> bytes:
        """The body of the answer to a request; AssertionError if it has no length or there is none."""
        self.sock.sendall(whole)
        data = self.sock.recv(1 << 16)
        while (end := data.find(b"\r\n\r\n")) < 0:
            more = self.sock.recv(1 << 16)
            assert more, data
            data += more
        head = data[:end].lower()
        at = head.index(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        while len(data) < end + 4 + length:
            more = self.sock.recv(1 << 16)
            assert more, data
            data += more
        return data[end + 4 :]


def request(method: str, path: str, body: Optional[bytes] = None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body or b'')}\r\n\r\n".encode() + (body or b"")


class Ours:
    """A controller as a process, with its defaults."""

    def __init__(self, folder: Path, *sets: str) -> None:
        self.port, self.pull, self.reply = free_port(), free_port(), free_port()
        argv = [sys.executable, "-m", "kvmove", "controller", "--port", str(self.port)]
        argv += ["--journal", str(folder / "j.db")]
        argv += ["--monitor-ports", json.dumps({"pull": self.pull, "reply": self.reply})]
        argv += [f"--set={one}" for one in sets]
        with (folder / "ours.log").open("w") as log:
            self.process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
        self.http: httpx.Client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        eventually(self._up, 60, "our controller is ready")

    def _up(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def python() -> Optional[Path]:
    """The reference's interpreter."""
    where, why = found()
    if where is None:
        print(f"\nours only: {why}")
    return where


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Ours]:
    one = Ours(tmp_path, *PATIENT)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def theirs(tmp_path: Path, python: Optional[Path]) -> Iterator[Optional[Reference]]:
    one = Reference(python, tmp_path) if python is not None else None
    try:
        yield one
    finally:
        if one is not None:
            one.close()


def say(what: str, unit: str, ours: float, theirs: Optional[float], more_is_better: bool = False) -> None:
    if theirs is None:
        print(f"  {what}: {ours:,.2f} {unit}")
        return
    ratio = ours / theirs if more_is_better else theirs / ours
    print(f"  {what}: {ours:,.2f} {unit}, the reference {theirs:,.2f}: {ratio:.1f} times as good")


def median_ms(once: Callable[[int], object], times: int) -> float:
    spans: List[float] = []
    for turn in range(times):
        begun = time.perf_counter()
        once(turn)
        spans.append(time.perf_counter() - begun)
    return statistics.median(spans) * 1e3


def prompt(first: int, count: int = TOKENS) -> List[int]:
    return list(range(first, first + count))


def test_control_cost_of_a_move(tmp_path: Path, python: Optional[Path]) -> None:
    """There and back between two engines, from the request until the source is released. 16 moves of ours, 16 of theirs
    and so on, without the first four of each block. All processes run all the time: stopping the reference's meanwhile
    makes its next moves several times as slow. Its engines use a tenth of a core each when idle; ours pays for it."""
    ours = Ours(tmp_path, *PATIENT)
    theirs = Reference(python, tmp_path) if python is not None else None
    try:
        with commands(tmp_path) as start:
            ports: Dict[str, int] = {}
            for name in ("a", "b"):
                ports[name] = free_port()
                (tmp_path / f"{name}.yaml").write_text(INSTANCE.format(name=name, pull=ours.pull))
                one = start(name, ["instance", "--config", f"{name}.yaml", "--port", str(ports[name])])
                one.until_says("registered at")
            mine_http = Client(ours.port)
            their_http = Client(theirs.port) if theirs is not None else None
            engines = [theirs.engine(name) for name in ("a", "b")] if theirs is not None else []
            print("\ncontrol cost of a move, 128 bytes a token, median of 60, request to released source")
            for count in (256, 1024, 4096, 16384):
                tokens = prompt(count, count)
                _store(ports["a"], tokens)
                eventually(lambda t=tokens: _has(ours, "a", t), 20, "ours has stored")  # type: ignore[misc]
                if theirs is not None:
                    engines[0].ask(f"store {tokens[0]} {count}", "stored")
                    eventually(lambda t=tokens: _has(theirs, "a", t), 20, "theirs has stored")  # type: ignore[misc]
                spans: Dict[str, List[float]] = {"ours": [], "theirs": []}
                inside: List[float] = []
                for block in range(5):
                    turns = range(block * 16, block * 16 + 16)
                    mine_http.fresh()
                    for turn in turns:
                        body = _move(*(("a", "b") if turn % 2 == 0 else ("b", "a")), tokens)
                        begun = time.perf_counter()
                        answer = mine_http.ask("POST", "/move", body)
                        event = mine_http.ask("GET", f"/events/{answer['event_id']}/wait")
                        spans["ours"].append(time.perf_counter() - begun)
                        assert (event["state"], event["num_tokens"]) == ("done", count), event
                        inside.append(event["duration_s"])
                    if theirs is None or their_http is None:
                        continue
                    their_http.fresh()
                    for turn in turns:
                        src, dst = ("a", "b") if turn % 2 == 0 else ("b", "a")
                        # It finds what it has moved a little later only; that is not counted.
                        eventually(lambda s=src, t=tokens: _has(theirs, s, t), 20, "theirs is seen")  # type: ignore[misc]
                        body = _move(src, dst, tokens)
                        begun = time.perf_counter()
                        answer = their_http.ask("POST", "/move", body)
                        spans["theirs"].append(time.perf_counter() - begun)
                        assert answer.get("num_tokens") == count, answer
                mine, other = [statistics.median(_warm(spans[who])) * 1e3 if spans[who] else None for who in spans]
                assert mine is not None
                say(f"{count} tokens", "ms", mine, other)
                print(f"    of which between its Begin and its Outcome: {statistics.median(inside) * 1e3:.2f} ms")
            print(f"  (ours over {event['transport']})")
            _absent(ours, theirs)
    finally:
        ours.close()
        if theirs is not None:
            theirs.close()


def _warm(spans: List[float]) -> List[float]:
    """Without those at the beginning of a block, when the other side's have just ended."""
    return [span for i, span in enumerate(spans) if i % 16 >= 4]


def _move(src: str, dst: str, tokens: List[int]) -> bytes:
    return json.dumps({"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": tokens}).encode()


def _absent(ours: Ours, theirs: Optional[Reference]) -> None:
    """Twelve tokens that nobody holds; our own time is what it takes more than /healthz over the same connection."""
    body = _move("a", "b", prompt(900, 12))
    mine_http = Client(ours.port)
    assert mine_http.ask("POST", "/move", body)["num_tokens"] == 0
    floor = median_ms(lambda _: mine_http.ask("GET", "/healthz"), 300)
    mine = median_ms(lambda _: mine_http.ask("POST", "/move", body), 300)
    other: Optional[float] = None
    if theirs is not None:
        their_http = Client(theirs.port)
        other = median_ms(lambda _: their_http.ask("POST", "/move", body), 200)
    print("\na move of absent keys, median")
    say("round trip", "ms", mine, other)
    print(f"  of which ours: {mine - floor:.2f} ms (/healthz takes {floor:.2f})")


def _has(who: Any, name: str, tokens: List[int]) -> bool:
    answer = who.post("/lookup", tokens=tokens)
    info = answer.json()["layout_info"] if answer.status_code == 200 else {}
    return bool(info.get(name, ["", 0])[1] == len(tokens))


def _store(port: int, tokens: List[int]) -> None:
    answer = httpx.post(f"http://localhost:{port}/v1/completions", json={"prompt": tokens, "max_tokens": 1}, timeout=60)
    assert answer.status_code == 200, answer.text


def test_lookups_as_the_cluster_grows(ours: Ours, theirs: Optional[Reference]) -> None:
    """4,096 tokens, held by the last of N instances, from one client."""
    crowd = Crowd(f"127.0.0.1:{ours.pull}")
    registry = theirs.registry() if theirs is not None else None
    print("\nlookups a second of 4,096 tokens, the hit in the last of N instances")
    rates: List[float] = []
    try:
        before = 0
        for count in (10, 100, 1000):
            first = 50_000_000 + count * 10_000
            for number in range(before, count):
                crowd.add(f"i{number}", prompt(first if number == count - 1 else 1_000_000 + number * 10_000))
            crowd.settle()
            wanted = prompt(first)
            eventually(lambda n=count, w=wanted: _has(ours, f"i{n - 1}", w), 60, "all are believed")  # type: ignore[misc]
            if registry is not None:
                registry.ask(f"add {count - before} {first} {TOKENS}", "added")
                eventually(lambda n=count, w=wanted: _has(theirs, f"i{n - 1}", w), 60)  # type: ignore[misc]
            before = count
            whole = request("POST", "/lookup", json.dumps({"tokens": wanted}).encode())
            one = Client(ours.port)
            two = Client(theirs.port) if theirs is not None else None
            mine: List[float] = []
            other: List[float] = []
            for _ in range(6):  # in turn, so that both see the same machine; the first of each are not counted
                one.fresh()
                mine.append(median_ms(lambda _, o=one, w=whole: o.told(w), 100))  # type: ignore[misc]
                if two is not None:
                    two.fresh()
                    times = 30 if count < 1000 else 5
                    other.append(median_ms(lambda _, o=two, w=whole: o.told(w), times))  # type: ignore[misc]
            rates.append(1e3 / statistics.median(mine[1:]))
            say(f"{count} instances", "/s", rates[-1], 1e3 / statistics.median(other[1:]) if other else None, True)
        print(f"  ours at 1,000 over ours at 10: {rates[-1] / rates[0]:.2f}")
    finally:
        crowd.close()


def test_admits(ours: Ours, theirs: Optional[Reference]) -> None:
    """Chunks that one worker says it has stored, from the first message until a lookup finds the last."""
    crowd = Crowd(f"127.0.0.1:{ours.pull}")
    registry = theirs.registry() if theirs is not None else None
    print("\nadmits a second, from the first message until the last is found")
    try:
        address = crowd.add("i0", prompt(0, 256))
        crowd.settle()
        eventually(lambda: _has(ours, "i0", prompt(0, 256)), 20)
        if registry is not None:
            registry.ask("add 1 0 256", "added")
        for chunks, batch in ((5_000, 1), (50_000, 50), (200_000, 1000)):
            # The last of them is looked for; the rest are keys of nothing that anybody asks for.
            last = prompt(10_000 + batch * 1000, 256)
            keys, _ = chunk_keys(NAMESPACE, last)
            made = [Entry(b"%032d" % (batch * 10**9 + i), b"", 256) for i in range(chunks - 1)]
            begun = time.perf_counter()
            crowd.admit(address, [*made, Entry(keys[0], b"", 256)], batch)
            eventually(lambda w=last: _has(ours, "i0", w), 60)  # type: ignore[misc]
            mine = chunks / (time.perf_counter() - begun)
            other: Optional[float] = None
            if registry is not None:
                theirs_last = prompt(10_000 + batch * 1000, 256)
                begun = time.perf_counter()
                registry.ask(f"admit {chunks} {batch} {theirs_last[0]}", "admitted")
                eventually(lambda w=theirs_last: _has(theirs, "i0", w), 60)  # type: ignore[misc]
                other = chunks / (time.perf_counter() - begun)
            say(f"{batch} a message", "/s", mine, other, True)
    finally:
        crowd.close()
