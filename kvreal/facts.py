"""What this machine is and has, read from the kernel and from the libraries themselves: nothing is guessed.

``machine()`` never raises: what cannot be found out is empty, 0, or says why in ``notes``. Libraries that may crash or
hang are asked in a process of their own (``python -m kvreal.facts``).
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, Final, List, Mapping, Optional, Tuple

import msgspec

PROBE_TIMEOUT_S: Final = 20.0
TICKS: Final = os.sysconf("SC_CLK_TCK")
#: Distributions whose versions matter to whoever reads a report, and the extra of ours that brings each.
PACKAGES: Final[Dict[str, str]] = {
    "numpy": "real",
    "pyzmq": "real",
    "nixl": "real",
    "torch": "real",
    "msgspec": "",
    "simpy": "",
    "fastapi": "service",
    "uvicorn": "service",
    "httpx": "service",
    "prometheus-client": "service",
    "tokenizers": "service",
}


class Gpu(msgspec.Struct, frozen=True):
    name: str
    memory_bytes: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """``cores``: those that this process may use. ``memlock_bytes`` -1: no limit. ``ptrace_scope`` -1: the kernel has
    no such restriction. ``cma``: one process may read a sibling's memory (process_vm_readv), as tried;
    ``user_namespaces``: one may be made, as tried. ``ucx_transports``: as UCX itself lists them."""

    host: str
    system: str
    cpu: str
    cores: int
    numa_nodes: int
    memory_bytes: int
    memory_free_bytes: int
    shm_bytes: int
    shm_free_bytes: int
    memlock_bytes: int
    huge_pages: int
    huge_pages_free: int
    transparent_huge_pages: str
    ptrace_scope: int
    cma: bool
    user_namespaces: bool
    gpus: Tuple[Gpu, ...] = ()
    rdma: Tuple[str, ...] = ()
    ucx_transports: Tuple[str, ...] = ()
    nixl_plugins: Tuple[str, ...] = ()
    versions: Dict[str, str] = {}
    notes: Tuple[str, ...] = ()


class Probed(msgspec.Struct, frozen=True):
    """What the child found out."""

    cma: bool = False
    user_namespaces: bool = False
    gpus: Tuple[Gpu, ...] = ()
    ucx_transports: Tuple[str, ...] = ()
    nixl_plugins: Tuple[str, ...] = ()
    notes: Tuple[str, ...] = ()


def machine() -> Machine:
    probed = _probed()
    memory = meminfo()
    shm = _statvfs("/dev/shm")
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Machine(
        host=host_id(),
        system=f"{platform.system()} {platform.release()}",
        cpu=cpu_model(),
        cores=cores(),
        numa_nodes=max(1, len(glob.glob("/sys/devices/system/node/node[0-9]*"))),
        memory_bytes=memory.get("MemTotal", 0) << 10,
        memory_free_bytes=memory.get("MemAvailable", 0) << 10,
        shm_bytes=shm[0],
        shm_free_bytes=shm[1],
        memlock_bytes=-1 if memlock == resource.RLIM_INFINITY else memlock,
        huge_pages=memory.get("HugePages_Total", 0),
        huge_pages_free=memory.get("HugePages_Free", 0),
        transparent_huge_pages=_chosen(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        ptrace_scope=_number(_text("/proc/sys/kernel/yama/ptrace_scope"), -1),
        cma=probed.cma,
        user_namespaces=probed.user_namespaces,
        gpus=probed.gpus,
        rdma=tuple(sorted(os.path.basename(path) for path in glob.glob("/sys/class/infiniband/*"))),
        ucx_transports=probed.ucx_transports,
        nixl_plugins=probed.nixl_plugins,
        versions=versions(),
        notes=probed.notes,
    )


# ---- who this is
def cpu_model() -> str:
    """As the kernel names it; the architecture where it has no name for it."""
    found = re.search(r"^(?:model name|Model|cpu)\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def host_id() -> str:
    """Twelve hexadecimal digits that tell this machine from another, and from which neither's name can be read."""
    name = _text("/etc/machine-id").strip() or socket.gethostname()
    return hashlib.blake2b(name.encode(), digest_size=6, person=b"kvmove").hexdigest()


def versions() -> Dict[str, str]:
    """Of Python and of what is installed of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ---- the kernel's files
def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.strip().isdigit() else otherwise


def _chosen(text: str) -> str:
    """``always [madvise] never`` -> madvise."""
    found = re.search(r"\[(\w+)\]", text)
    return found.group(1) if found else ""


def meminfo() -> Dict[str, int]:
    """The kernel's numbers: KiB, and pages for HugePages_*."""
    pairs = re.findall(r"^(\w+):\s+(\d+)", _text("/proc/meminfo"), re.MULTILINE)
    return {name: int(value) for name, value in pairs}


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used so far, in user and system mode. OSError if there is no such process."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def _statvfs(path: str) -> Tuple[int, int]:
    """(bytes, free bytes) of a file system; zeros where it is not there."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0, 0
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


# ---- asked in a child
def child_environment(env: Optional[Mapping[str, str]] = None) -> Dict[str, str]:
    """This process's, and ``env`` over it; a child finds this source tree in it, wherever it is."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return {**os.environ, **(env or {}), "PYTHONPATH": path}


def _probed() -> Probed:
    """The child reads this process's memory (as siblings read each other's), and loads what may take it down."""
    proof = ctypes.create_string_buffer(b"kvmove", 8)
    command = [sys.executable, "-m", "kvreal.facts", str(os.getpid()), str(ctypes.addressof(proof))]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PROBE_TIMEOUT_S,
            env=child_environment(), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Probed(notes=(f"the libraries did not answer within {PROBE_TIMEOUT_S:.0f} s",))
    except OSError as error:
        return Probed(notes=(f"no child process could be started: {error.strerror}",))
    last = Probed(notes=(f"the libraries were asked in a process that ended with status {done.returncode}",))
    for line in done.stdout.splitlines():
        with contextlib.suppress(msgspec.MsgspecError):
            last = msgspec.json.decode(line, type=Probed)
    return last


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def can_read(pid: int, address: int) -> bool:
    """Does process_vm_readv fetch ``kvmove`` from there? (CMA: what UCX moves bytes with on one host.)"""
    here = ctypes.create_string_buffer(6)
    mine = _Iovec(ctypes.addressof(here), 6)
    theirs = _Iovec(address, 6)
    try:
        read = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        return False
    return int(read(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)) == 6 and here.raw == b"kvmove"


def _user_namespaces() -> bool:
    CLONE_NEWUSER = 0x10000000
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _gpus(notes: List[str]) -> Tuple[Gpu, ...]:
    if not glob.glob("/dev/nvidia[0-9]*"):
        return ()
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        if not found:
            notes.append("there is an NVIDIA device, and torch sees none of it")
        return tuple(Gpu(one.name, one.total_memory) for one in found)
    except Exception as error:  # whatever a driver that does not match says
        notes.append(f"there is an NVIDIA device, and torch cannot use it: {line_of(error)}")
        return ()


def _nixl(notes: List[str]) -> Tuple[str, ...]:
    """The plugins that NIXL finds; UCX comes with it."""
    try:
        from kvreal.transfer.nixl import load_nixl

        api = load_nixl()
        agent = api.nixl_agent("doctor", api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        return tuple(sorted(agent.get_plugin_list()))
    except Exception as error:  # not there, or not for this machine
        notes.append(f"nixl cannot be asked: {line_of(error)}")
        return ()


def _ucx(notes: List[str]) -> Tuple[str, ...]:
    """Asked for a transport that nobody has, UCX warns and lists those that it has."""
    saved, sink = os.dup(1), os.memfd_create("ucx")
    os.dup2(sink, 1)
    try:
        from kvreal.transfer.nixl import load_nixl

        api = load_nixl()
        agent = api.nixl_agent("lists", api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        with contextlib.suppress(Exception):  # it may refuse to start like this: it has spoken by then
            agent.create_backend("UCX")
    except Exception:
        pass  # said by _nixl already
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
    said = os.pread(sink, 1 << 20, 0).decode(errors="replace")
    names = listed(said)
    if not names and not any("nixl" in note for note in notes):
        notes.append("UCX did not list its transports")
    return names


def listed(said: str) -> Tuple[str, ...]:
    """The names in UCX's ``please use one or more of: cma, mm, tcp``."""
    found = re.search(r"please use one or more of: ([\w, ]+)", said)
    return tuple(sorted(name.strip() for name in found.group(1).split(","))) if found else ()


def line_of(error: BaseException) -> str:
    """Its first line; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def main(argv: List[str]) -> None:
    """The child: cheap facts first, each answer printed anew, so that a crash later loses only what it was about."""
    out = os.fdopen(os.dup(1), "wb", 0)

    def say(probed: Optional[Probed] = None, **more: object) -> Probed:
        probed = msgspec.structs.replace(probed or Probed(), **more)
        out.write(msgspec.json.encode(probed) + b"\n")
        return probed

    os.environ["UCX_TLS"] = "self,tcp,kvmove_asks"
    os.environ["UCX_LOG_LEVEL"] = "warn"
    os.environ["NIXL_LOG_LEVEL"] = "FATAL"
    notes: List[str] = []
    probed = say(cma=can_read(int(argv[0]), int(argv[1])), user_namespaces=_user_namespaces())
    probed = say(probed, gpus=_gpus(notes), notes=tuple(notes))
    probed = say(probed, nixl_plugins=_nixl(notes), notes=tuple(notes))
    say(probed, ucx_transports=_ucx(notes), notes=tuple(notes))
    os._exit(0)  # UCX's threads and a GPU's driver need not be waited for


if __name__ == "__main__":
    main(sys.argv[1:])
