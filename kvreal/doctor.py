"""What of kvmove works on this machine, by trying it; what is missing, and the one command that adds it.

    report = examine()

Nothing here raises: a transport that cannot be tried says why. Each one is tried with real processes that move a few
KiB from every kind of location to every other, and compare the bytes.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, Final, List, Tuple

import msgspec

from kvcore.protocol.links import best_direction
from kvcore.protocol.machine import CopyDone, Received, Send, StartCopy
from kvcore.protocol.messages import Fetch, Push, Rid
from kvcore.scenario.history import Line, read
from kvcore.scenario.topology import LOCATIONS
from kvreal.facts import PACKAGES, Machine, child_environment, line_of, machine

TRY_TIMEOUT_S: Final = 20.0
PROCESS_TIMEOUT_S: Final = 60.0
#: What real nodes cannot do without: module, distribution.
NEEDS: Final[Dict[str, str]] = {"zmq": "pyzmq", "numpy": "numpy"}
SERVICE: Final = ("fastapi", "uvicorn", "httpx")
MEASURED_BYTES: Final = 32 << 20
SMALL_SHM_BYTES: Final = 1 << 30
SMALL_MEMLOCK_BYTES: Final = 1 << 30

Said = Callable[[str], None]


class Tried(msgspec.Struct, frozen=True):
    """One transport. ``pairs``: ``cpu to disk`` -> what carried the bytes there; ``failed`` -> why they did not arrive.
    ``(inside)``: between two locations of one process. ``why``: what was wrong besides, or why it was not tried."""

    transport: str
    works: bool
    pairs: Dict[str, str] = {}
    failed: Dict[str, str] = {}
    why: str = ""


class Missing(msgspec.Struct, frozen=True):
    """``what`` is not here; ``so`` what that costs; ``command`` adds it, empty if only other hardware does."""

    what: str
    so: str
    command: str = ""


class Report(msgspec.Struct, frozen=True):
    """``kinds``: of locations -> works, or why not. ``auto``: what it takes, the first that both ends have.
    ``directions``: ``cpu to disk`` -> who moves the bytes of 32 MiB between two processes here, and why, as the profile
    says that ``measured`` names; of other pairs the destination does."""

    machine: Machine
    transports: Tuple[Tried, ...]
    kinds: Dict[str, str]
    missing: Tuple[Missing, ...]
    auto: Tuple[str, ...] = ()
    measured: str = ""
    directions: Dict[str, str] = {}

    @property
    def works(self) -> bool:
        """Does anything real work here?"""
        return any(one.works for one in self.transports)


def examine(saying: Said = lambda text: None) -> Report:
    """All of it, in some seconds. ``saying`` hears what is being tried."""
    saying("asking the machine")
    here = machine()
    tried = _try_all(saying)
    measured, directions = _directions()
    kinds = _kinds(here, tried)
    return Report(here, tried, kinds, tuple(missing(here, tried)), _auto(), measured, directions)


def _directions() -> Tuple[str, Dict[str, str]]:
    """(the profile's name, or why none is used; pair -> which way and why)."""
    try:
        from kvreal.transfer.choice import VARIABLE, profile_from

        profile = profile_from()
        if profile is None:
            return f"no profile of this machine: {VARIABLE} names what kvmove calibrate has written", {}
        known = profile.measured(_auto())
    except Exception as error:
        return line_of(error), {}
    found: Dict[str, str] = {}
    for source in LOCATIONS:
        for target in LOCATIONS:
            _, why = best_direction([(known, known)], source, target, MEASURED_BYTES, 1)
            if why:
                found[f"{source} to {target}"] = why
    return (profile.name if found else f"profile {profile.name}: no copy was measured both ways"), found


def _auto() -> Tuple[str, ...]:
    try:
        from kvreal.transfer import resolve

        return tuple(resolve("auto"))
    except Exception:  # then nothing could be tried either, and that is said
        return ()


# ---- trying ---------------------------------------------------------------------------------------------------------
def _try_all(saying: Said) -> Tuple[Tried, ...]:
    absent = [name for module, name in NEEDS.items() if importlib.util.find_spec(module) is None]
    if absent:
        return (Tried("all", False, why=f"{' and '.join(absent)} not installed"),)
    try:
        from kvreal import transfer

        here = transfer.here()
    except Exception as error:
        return (Tried("all", False, why=f"the transports cannot be loaded: {line_of(error)}"),)
    found: List[Tried] = []
    for name, lack in here.items():
        saying(f"trying {name}")
        found.append(Tried(name, False, why=lack) if lack else try_transport(name))
    return tuple(found)


def try_transport(name: str) -> Tried:
    """In a process of its own: whatever a transport's libraries do there, and print, ends with it. No profile has a say
    in it."""
    try:
        from kvreal.transfer.choice import VARIABLE

        done = subprocess.run(
            [sys.executable, "-m", "kvreal.doctor", name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=PROCESS_TIMEOUT_S, env={**child_environment(), VARIABLE: ""}, check=False,
        )  # fmt: skip
        return msgspec.json.decode(done.stdout, type=Tried)
    except subprocess.TimeoutExpired:
        return Tried(name, False, why=f"it did not end within {PROCESS_TIMEOUT_S:.0f} s")
    except msgspec.MsgspecError:
        return Tried(name, False, why=f"its process ended with status {done.returncode}")
    except OSError as error:
        return Tried(name, False, why=f"no process could be started for it: {error.strerror}")


def tried_here(name: str) -> Tried:
    """A few KiB between every two kinds of location that are here, from one process to another and within one."""
    try:
        from kvcore.scenario.build import build
        from kvcore.scenario.generate import expand
        from kvcore.scenario.loader import loads
        from kvreal.run import run
        from kvreal.slab import provides

        kinds = ["cpu", *provides()]
        built = build(expand(loads(scenario(kinds), "doctor")))
        with tempfile.TemporaryDirectory(prefix="kvmove-") as folder:
            log = Path(folder) / "log"
            result = run(built, history=log, transport=name, timeout_s=TRY_TIMEOUT_S)
            carried = carriers(list(read(log)[1]))
    except Exception as error:  # whatever a library says: it is the answer
        return Tried(name, False, why=line_of(error))
    pairs: Dict[str, str] = {}
    failed: Dict[str, str] = {}
    for operation in result.operations:
        if operation.what != "move":
            continue
        pair = operation.op.replace("-", " ").replace(" inside", " (inside)")
        if operation.state == "done":
            pairs[pair] = carried.get(operation.event, "")
        else:
            failed[pair] = operation.detail or operation.reason or operation.state
    wrong = [one.text for one in result.violations] + result.hung
    return Tried(name, bool(pairs) and not wrong, pairs, failed, wrong[0] if wrong else "")


def scenario(kinds: List[str]) -> str:
    """The scenario that tries them: each kind of location at ``a`` to each at ``b``, and to each other one at ``a``."""
    places = ", ".join(f"{LOCATIONS[kind]}: 4 MiB" for kind in kinds)
    lines = ["name: doctor", "kv: {bytes_per_token: 1 KiB, chunk: 16 tokens}", "instances:"]
    lines += [f"  {name}: {{locations: {{{places}}}}}" for name in "ab"]
    lines += ["steps:"]
    for source in kinds:
        lines.append(f"  - store: {{at: a/{LOCATIONS[source]}, prompt: p-{source}, tokens: 40}}")
    lines.append("  - settle")
    for source in kinds:
        for target in kinds:
            to = f"to: b/{LOCATIONS[target]}, prompt: p-{source}, copy: true"
            lines.append(f"  - move: {{from: a/{LOCATIONS[source]}, {to}, as: {source}-to-{target}}}")
            if target != source:
                to = f"to: a/{LOCATIONS[target]}, prompt: p-{source}, copy: true"
                lines.append(f"  - move: {{from: a/{LOCATIONS[source]}, {to}, as: {source}-to-{target}-inside}}")
    return "\n".join([*lines, "  - settle", ""])


def carriers(lines: List[Line]) -> Dict[int, str]:
    """Event -> what carried its bytes, as the transports say."""
    event_of: Dict[Rid, int] = {}
    found: Dict[int, str] = {}
    for line in lines:
        item = line.input
        if isinstance(item, Received) and isinstance(item.msg, Fetch):
            for effect in line.out:
                if isinstance(effect, StartCopy):
                    event_of[effect.rid] = item.msg.event
                elif isinstance(effect, Send) and isinstance(effect.msg, Push):
                    event_of[effect.msg.rid] = item.msg.event
        elif isinstance(item, CopyDone) and item.rid in event_of:
            found[event_of[item.rid]] = item.via
    return found


def _kinds(here: Machine, tried: Tuple[Tried, ...]) -> Dict[str, str]:
    found: Dict[str, str] = {}
    for kind in LOCATIONS:
        arrived = any(pair.startswith(f"{kind} to ") for one in tried for pair in one.pairs)
        why = next((why for one in tried for pair, why in one.failed.items() if pair.startswith(f"{kind} to ")), "")
        if kind == "gpu" and not arrived and not why:
            why = "kvmove does not see it" if here.gpus else "no GPU"
        found[kind] = "works" if arrived else why or "no transport works"
    return found


# ---- what is missing ------------------------------------------------------------------------------------------------
def missing(here: Machine, tried: Tuple[Tried, ...]) -> List[Missing]:
    """In the order in which to see to it."""
    found: List[Missing] = []
    real = [name for name, extra in PACKAGES.items() if extra == "real" and name not in here.versions]
    if real:
        cost = "nothing moves for real" if set(real) & set(NEEDS.values()) else "bytes go by sockets, not by NIXL"
        found.append(Missing(", ".join(real), cost, "pip install 'kvmove[real]'"))
    if any(name not in here.versions for name in SERVICE):
        lacking = ", ".join(name for name in SERVICE if name not in here.versions)
        found.append(Missing(lacking, "no controller over HTTP", "pip install 'kvmove[service]'"))
    for one in tried:
        if not one.works and one.transport not in ("all", "nixl"):
            found.append(Missing(f"transport {one.transport}", one.why, _command_in(one.why)))
    found += _kernel(here)
    if not here.gpus:
        found.append(Missing("a GPU", "no LocalGPUBackend; the hardware suite skips by name what concerns CUDA"))
    if not here.rdma:
        found.append(Missing("an RDMA device", "between hosts NIXL goes by tcp"))
    return found


def _kernel(here: Machine) -> List[Missing]:
    found: List[Missing] = []
    if not here.cma:
        fix = "sudo sysctl kernel.yama.ptrace_scope=0" if here.ptrace_scope > 0 else ""
        found.append(Missing("CMA (process_vm_readv)", "NIXL within this host goes by tcp, several times slower", fix))
    if here.shm_bytes < SMALL_SHM_BYTES:
        command = f"sudo mount -o remount,size={max(1, here.memory_bytes >> 31)}G /dev/shm"
        found.append(Missing("room in /dev/shm", "pools shared between processes stay small", command))
    if (here.rdma or here.gpus) and 0 <= here.memlock_bytes < SMALL_MEMLOCK_BYTES:
        found.append(Missing("a memlock limit above 1 GiB", "RDMA registers no large pool", "ulimit -l unlimited"))
    if here.transparent_huge_pages == "never" and not here.huge_pages:
        command = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        found.append(Missing("huge pages", "large copies are slower", command))
    return found


def _command_in(why: str) -> str:
    """``... not installed (pip install nixl)`` -> pip install nixl."""
    start = why.find("(pip install ")
    return why[start + 1 : why.index(")", start)] if start >= 0 and ")" in why[start:] else ""


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(tried_here(sys.argv[1])))
