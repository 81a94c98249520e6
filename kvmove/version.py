"""Which kvmove this is, and which form of its core is loaded."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version


def version_text() -> str:
    """``kvmove 0.1.0 (pure Python)`` or ``... (compiled core)``; never imports the core."""
    try:
        number = version("kvmove")
    except PackageNotFoundError:
        number = "from a source tree"
    return f"kvmove {number} ({'compiled core' if compiled() else 'pure Python'})"


def compiled(module: str = "kvcore.protocol.worker") -> bool:
    """Whether ``module`` would be loaded from machine code."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None and not spec.origin.endswith((".py", ".pyc"))
