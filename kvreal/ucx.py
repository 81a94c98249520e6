"""``UCX_TLS`` is respected. Where it names only hardware that is not here, it is set aside, with one warning: UCX would
otherwise refuse to start, and whoever copied a line from a tutorial would be left without a transfer.
"""

from __future__ import annotations

import glob
from typing import Dict, Final, FrozenSet, List, MutableMapping, Optional, Tuple

VARIABLE: Final = "UCX_TLS"

#: What may carry bytes between two processes, by where it comes from. ``self`` and copies within a process may not.
RDMA: Final = frozenset({"rc", "rc_x", "rc_v", "rc_mlx5", "rc_verbs", "ud", "ud_x", "ud_v", "ud_mlx5", "ud_verbs"}) | {
    "dc", "dc_x", "dc_mlx5", "ib", "srd", "gga_mlx5", "mlx5",
}  # fmt: skip
GPU: Final = frozenset({"cuda", "cuda_ipc", "cuda_copy", "gdr_copy", "gdrcopy", "rocm", "rocm_ipc", "rocm_copy", "ze"})
HOST: Final = frozenset({"tcp", "sm", "shm", "mm", "posix", "sysv", "cma", "knem", "xpmem", "all"})
LOCAL: Final = frozenset({"self", "cuda_copy", "rocm_copy", "gdr_copy", "gdrcopy"})
#: Kernel modules that few machines have.
MODULES: Final[Dict[str, str]] = {"knem": "/dev/knem", "xpmem": "/dev/xpmem"}


def hardware() -> FrozenSet[str]:
    """Which of RDMA, GPU there are: a device that this process may open."""
    found: List[str] = []
    if glob.glob("/dev/infiniband/uverbs*"):
        found.append("rdma")
    if glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/kfd"):
        found.append("gpu")
    return frozenset(found)


def judge(value: str, here: FrozenSet[str]) -> Tuple[List[str], List[str]]:
    """(names that can carry bytes to another process here, names that cannot) of a ``UCX_TLS`` list."""
    able: List[str] = []
    missing: List[str] = []
    for name in [part.strip().lower() for part in value.split(",") if part.strip()]:
        bare = name.partition(":")[0].lstrip("\\")
        if bare in LOCAL:
            continue
        if bare in RDMA:
            there = "rdma" in here
        elif bare in GPU:
            there = "gpu" in here
        elif bare in MODULES:
            there = bool(glob.glob(MODULES[bare]))
        else:
            there = bare in HOST
        (able if there else missing).append(name)
    return able, missing


def respect(environ: MutableMapping[str, str], here: Optional[FrozenSet[str]] = None) -> str:
    """The warning to give, or "". Before UCX is loaded; takes ``UCX_TLS`` out where nothing that it names is here."""
    value = environ.get(VARIABLE, "")
    if not value or value.startswith("^"):
        return ""
    able, missing = judge(value, hardware() if here is None else here)
    if not missing or able:
        return ""
    del environ[VARIABLE]
    return f"{VARIABLE}={value}: {', '.join(missing)} is not on this machine; the next transport that is here is used"
