"""A controller and two instances as services, asked over HTTP as anybody would: what they cost when idle and when busy,
and the same moves by the reference in turns."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from kvmove.bench.matrix import Contention, Peer, Services
from kvmove.bench.result import MOVE, Cell, Figure, Phases, Series
from kvmove.errors import UserError
from kvreal.facts import child_environment, cpu_s
from kvreal.ports import free_port
from kvreal.reference.peer import CHUNK_TOKENS, CPU, VERSION, Http, PeerError, Reference, holds, move_body

START_S: Final = 60.0
LIFE_MOVES: Final = 3
"""Large moves that the reference's engines are asked for in one life: it keeps what it has moved away."""
TURNS: Final = 4
GIB: Final = float(1 << 30)


class Cluster:
    """The processes; ``with`` ends them. ``token_bytes`` of KV a token, ``pool_bytes`` at each of the two ends."""

    def __init__(self, folder: Path, transport: str, token_bytes: int, pool_bytes: int) -> None:
        self.folder: Path = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.https: dict[str, Http] = {}
        ports = {name: free_port() for name in ("controller", "a", "b")}
        pull, reply = free_port(), free_port()
        try:
            monitor = json.dumps({"pull": pull, "reply": reply})
            journal = str(folder / "journal.db")
            self._start(
                "controller", ["--port", str(ports["controller"]), "--monitor-ports", monitor, "--journal", journal]
            )
            for name in ("a", "b"):
                (folder / f"{name}.yaml").write_text(
                    f"enable_controller: true\nlmcache_instance_id: {name}\nchunk_size: {CHUNK_TOKENS}\n"
                    f"controller_pull_url: localhost:{pull}\n"
                    f"kvmove: {{transport: {transport}, bytes_per_token: {token_bytes} B,"
                    f" locations: {{{CPU}: {pool_bytes} B}}}}\n"
                )
                config = str(folder / f"{name}.yaml")
                self._start("instance", ["--config", config, "--port", str(ports[name])], name)
            self.https = {name: Http(port) for name, port in ports.items()}
            self.until(lambda: self._answers("controller", "/readyz"), "its controller is ready")
            for name in ("a", "b"):
                self.until(lambda n=name: self._answers(n, "/health"), f"its instance {name} is ready")  # type: ignore[misc]
            self.until(self._registered, "both instances are registered")
        except BaseException:
            self.close()
            raise

    def _start(self, command: str, args: list[str], name: str = "") -> None:
        name = name or command
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "kvmove", command, *args],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env=child_environment(),
            )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for one in self.https.values():
            one.close()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # ---- asking
    def until(self, check: Callable[[], bool], what: str) -> None:
        """UserError, with what a process said last, if that is not so in time."""
        deadline = time.monotonic() + START_S
        while not check():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    said = (self.folder / f"{name}.log").read_text().strip().splitlines()
                    raise UserError(f"bench: {name} has ended: {said[-1] if said else process.returncode}")
            if time.monotonic() > deadline:
                raise UserError(f"bench: not within {START_S:.0f} s: {what}")
            time.sleep(0.01)

    def _answers(self, name: str, path: str) -> bool:
        try:
            return self.https[name].ask("GET", path)[0] == 200
        except (OSError, http.client.HTTPException):
            self.https[name].close()
            return False

    def _registered(self) -> bool:
        status, answer = self.https["controller"].ask("GET", "/instances")
        whole = [one for one in answer.get("instances", []) if one.get("whole")]
        return status == 200 and len(whole) == 2

    def store(self, name: str, tokens: list[int]) -> None:
        body = json.dumps({"prompt": tokens, "max_tokens": 1}).encode()
        status, answer = self.https[name].ask("POST", "/v1/completions", body)
        if status != 200:
            raise UserError(f"bench: instance {name} answered {status} to a prompt: {json.dumps(answer)[:200]}")
        self.until(lambda: holds(self.https["controller"], name, tokens), f"{len(tokens):,} tokens are seen at {name}")

    def start_move(self, src: str, dst: str, tokens: list[int]) -> str:
        """The event's id; it goes on."""
        status, answer = self.https["controller"].ask("POST", "/move", move_body(src, dst, tokens))
        if status != 200 or answer.get("num_tokens") != len(tokens):
            raise UserError(f"bench: our controller answered {status} {json.dumps(answer)[:200]} to a move")
        return str(answer["event_id"])

    def state(self, event: str) -> str:
        return str(self.https["controller"].ask("GET", f"/events/{event}")[1].get("state", ""))

    def wait(self, event: str) -> dict[str, Any]:
        """The event, done: its source is released. UserError if it failed."""
        while True:
            status, view = self.https["controller"].ask("GET", f"/events/{event}/wait")
            if status != 200 or view.get("state") == "failed":
                raise UserError(f"bench: our move ended so: {json.dumps(view)[:300]}")
            if view.get("state") == "done":
                return view

    def move(self, src: str, dst: str, tokens: list[int]) -> tuple[float, dict[str, Any]]:
        """(seconds from the request until its event is done, the event)."""
        begun = time.perf_counter()
        view = self.wait(self.start_move(src, dst, tokens))
        return time.perf_counter() - begun, view

    # ---- looking at the processes
    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that each process has used so far."""
        return {name: cpu_s(process.pid) for name, process in self.processes.items()}

    def forget_peaks(self) -> None:
        for process in self.processes.values():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def memory(self, key: str) -> dict[str, int]:
        """Bytes of ``VmRSS`` or ``VmHWM`` (the peak since ``forget_peaks``) of each process."""
        found = {}
        for name, process in self.processes.items():
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith(f"{key}:"):
                    found[name] = int(line.split()[1]) << 10
        return found


def prompt(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


# ---- figures --------------------------------------------------------------------------------------------------------
def figures(services: Services, repeats: int) -> list[Figure]:
    """Idle CPU, growth of memory, small moves beside large ones, as asked for."""
    found: list[Figure] = []
    sizes = (services.memory, services.contention.large if services.contention else None)
    large = max(size.bytes if size is not None else 0 for size in sizes)
    token_bytes = 128 << 10 if large else 128
    room = large + (64 << 20) + 4 * token_bytes * CHUNK_TOKENS
    with tempfile.TemporaryDirectory(prefix="kvmove-bench-") as folder:
        with Cluster(Path(folder), services.transport, token_bytes, room) as cluster:
            long = prompt(1000, large // token_bytes)
            if long:
                cluster.store("a", long)
                for source, target in (("a", "b"), ("b", "a")):
                    cluster.move(source, target, long)
            if services.idle is not None:
                found += _idle(cluster, services, int(services.idle.amount) / 1e9)
            if services.memory is not None:
                found.append(_growth(cluster, services, long, min(repeats, 5)))
            if services.contention is not None:
                found += _contention(cluster, services, services.contention, long, repeats)
    return found


def _idle(cluster: Cluster, services: Services, seconds: float) -> list[Figure]:
    time.sleep(1.0)  # what the last move left to be done
    before, begun = cluster.cpu_s(), time.monotonic()
    time.sleep(seconds)
    after, took_s = cluster.cpu_s(), time.monotonic() - begun
    return [
        Figure(
            name=f"{services.name}: idle CPU of {name}",
            unit="% of a core",
            samples=((after[name] - before[name]) / took_s * 100,),
            about=f"over {took_s:.0f} s",
        )
        for name in before
    ]


def _growth(cluster: Cluster, services: Services, long: list[int], times: int) -> Figure:
    samples = []
    for turn in range(2 * times):
        source, target = ("a", "b") if turn % 2 == 0 else ("b", "a")
        before = cluster.memory("VmRSS")
        cluster.forget_peaks()
        cluster.move(source, target, long)
        peak = cluster.memory("VmHWM")
        samples.append(sum(max(0, peak[name] - before[name]) for name in before) / (1 << 20))
    return Figure(
        name=f"{services.name}: growth of memory during a move",
        unit="MiB",
        samples=tuple(samples),
        about="peak resident memory over what was resident before, controller and both instances together",
    )


def _contention(
    cluster: Cluster, services: Services, contention: Contention, long: list[int], repeats: int
) -> list[Figure]:
    small = prompt(90_000, contention.small.number)
    cluster.store("a", small)
    places = ["a", "b"]

    def once() -> float:
        taken, _ = cluster.move(places[0], places[1], small)
        places.reverse()
        return taken

    for _ in range(3):
        once()
    alone: list[float] = []
    beside: list[float] = []
    turn = 0
    while len(beside) < repeats:
        alone.extend(once() for _ in range(2))
        source, target = ("a", "b") if turn % 2 == 0 else ("b", "a")
        turn += 1
        event = cluster.start_move(source, target, long)
        while len(beside) < repeats:
            taken = once()
            if cluster.state(event) != "copying":  # it ended meanwhile, or the source is being released
                break
            beside.append(taken)
        cluster.wait(event)
        if turn > 4 * repeats:  # it is over before a small one can be: there is nothing to wait behind
            break
    alone.extend(once() for _ in range(max(0, repeats - len(alone))))
    found = [
        Figure(name=f"{services.name}: small move alone", unit="ms", samples=tuple(one * 1e3 for one in alone)),
        Figure(name=f"{services.name}: small move beside a large one", unit="ms",
               samples=tuple(one * 1e3 for one in beside)),
    ]  # fmt: skip
    if beside:
        ratio = statistics.median(beside) / statistics.median(alone)
        about = f"{contention.small} beside {contention.large}, over alone; medians"
        found.append(Figure(name=f"{services.name}: small beside large, over alone", unit="times", samples=(ratio,),
                            about=about))  # fmt: skip
    return found


# ---- beside the reference -------------------------------------------------------------------------------------------
def beside(services: Services, peer: Peer, repeats: int, warmup: int, python: Path | None) -> Cell:
    """The same move by us and by the reference, blocks in turns; without ``python`` ours alone. UserError if ours, or
    the reference, does not do it."""
    token_bytes = peer.token_bytes
    nbytes = peer.size.bytes if peer.size is not None else peer.tokens.number * token_bytes  # type: ignore[union-attr]
    count = nbytes // token_bytes
    tokens = prompt(1000, count)
    chunk_bytes = token_bytes * CHUNK_TOKENS
    room = -(-nbytes // chunk_bytes) * chunk_bytes + 2 * chunk_bytes
    ours: list[float] = []
    theirs: list[float] = []
    phases: list[Phases] = []
    carried = ""
    life = LIFE_MOVES if nbytes > 64 << 20 else TURNS + warmup
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmove-bench-")))
            cluster = stack.enter_context(Cluster(folder, services.transport, token_bytes, room))
            reference = stack.enter_context(Reference(python, folder)) if python is not None else None
            cluster.store("a", tokens)
            places = ["a", "b"]
            while len(ours) < repeats:
                for turn in range(warmup + TURNS):
                    taken, view = cluster.move(places[0], places[1], tokens)
                    places.reverse()
                    carried = str(view.get("transport", carried))
                    if turn >= warmup and len(ours) < repeats:
                        ours.append(taken)
                        phases.append(_phases(view, taken))
                if reference is not None:
                    want = min(repeats, len(ours))
                    while len(theirs) < want:
                        theirs += _life(reference, tokens, token_bytes, nbytes, life)[: want - len(theirs)]
    except (PeerError, OSError, http.client.HTTPException) as error:
        raise UserError(f"bench: {peer.name}: {error or type(error).__name__}") from None
    series = [Series(what=MOVE, seconds=tuple(ours), about=carried, warmup=warmup)]
    if theirs:
        series.append(
            Series(what="reference", seconds=tuple(theirs), about=f"LMCache {VERSION}, its nixl channel", warmup=1)
        )
    return Cell(
        name=f"{services.name}: {peer.name}",
        transport=services.transport,
        route=(f"a/{CPU}", f"b/{CPU}"),
        nbytes=nbytes,
        tokens=count,
        chunk_bytes=chunk_bytes,
        carried=carried,
        series=tuple(series),
        phases=tuple(phases),
    )


def _phases(view: dict[str, Any], total_s: float) -> Phases:
    """Of an event's states: pinning and reserving are control, releasing is commit."""
    spent = view.get("phases_s", {})
    return Phases(
        control_s=spent.get("pinning", 0.0) + spent.get("reserving", 0.0),
        queue_s=0.0,
        copy_s=spent.get("copying", 0.0),
        commit_s=spent.get("releasing", 0.0),
        total_s=total_s,
    )


def _life(reference: Reference, tokens: list[int], token_bytes: int, nbytes: int, moves: int) -> list[float]:
    """Seconds of each move of a new pair of its engines, there and back, less the first."""
    pool_gb = max(0.5, (nbytes + token_bytes * CHUNK_TOKENS * (moves + 3)) * 1.2 / GIB)
    # Names and a prompt of their own: its controller goes on believing in the engines of an earlier life.
    reference.lives += 1
    names = [f"{side}{reference.lives}" for side in "ab"]
    tokens = prompt(reference.lives * 1_000_000, len(tokens))
    engines = [reference.engine(name, token_bytes, pool_gb) for name in names]
    try:
        engines[0].ask(f"store {tokens[0]} {len(tokens)}", "stored")
        taken = []
        for _ in range(moves):
            taken.append(reference.move(names[0], names[1], tokens))
            names.reverse()
        return taken[1:]
    finally:
        reference.end_engines()
