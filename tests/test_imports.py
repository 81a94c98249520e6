"""Imports run one way, and each outside library has one home. Read from the source: nothing need be installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: package -> the packages of this project that it may import. The longest matching package decides.
MAY_IMPORT = {
    "kvcore.protocol": {"kvcore.protocol"},
    "kvcore": {"kvcore"},
    "kvsim": {"kvcore", "kvsim"},
    "kvreal": {"kvcore", "kvreal"},
    "kvmove": {"kvcore", "kvsim", "kvreal", "kvmove"},
}
OURS = {"kvcore", "kvsim", "kvreal", "kvmove"}

#: All that kvcore.protocol may import besides itself: nothing here does I/O, tells the time or draws a number.
PROTOCOL_MAY_IMPORT = {
    "__future__",
    "collections",
    "collections.abc",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "msgspec",
    "struct",
    "typing",
}

#: module -> where it may be imported: packages, or one file.
HOMES = {
    "simpy": ("kvsim",),
    "zmq": ("kvreal",),
    "nixl": ("kvreal",),
    "nixl_cu12": ("kvreal",),
    "nixl_cu13": ("kvreal",),
    "torch": ("kvreal",),
    "transformers": ("kvreal",),
    "triton": ("kvreal",),
    "threading": ("kvreal",),
    "socket": ("kvreal",),
    "time": ("kvreal", "kvmove"),  # kvmove shows how long a run took; no machine or simulation may know
    "yaml": ("kvcore.scenario.loader",),
}


def imports(module: str, text: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module's text imports, at any depth, also by import_module("...")."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            if origin in OURS:  # `from kvcore import scenario` imports kvcore.scenario
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, origin
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "run_module") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def refusal(module: str, imported: str) -> str | None:
    """Why ``module`` must not import ``imported``; None if it may."""
    if imported.split(".")[0] in OURS:
        for package, allowed in MAY_IMPORT.items():
            if within(module, package):
                if any(within(imported, one) for one in allowed):
                    return None
                return f"{package} may import only {', '.join(sorted(allowed))} of this project"
        return "it belongs to no package that is listed here"
    if within(module, "kvcore.protocol") and imported not in PROTOCOL_MAY_IMPORT:
        return f"kvcore.protocol may import only {', '.join(sorted(PROTOCOL_MAY_IMPORT))}"
    for name, homes in HOMES.items():
        if within(imported, name) and not any(within(module, home) for home in homes):
            return f"{name} may be imported only in {', '.join(homes)}"
    return None


def violations(root: Path) -> list[str]:
    """One line a forbidden import under ``root``: file, line, what, why."""
    found = []
    for path in sorted(path for package in sorted(OURS) for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        for line, imported in imports(module, path.read_text(encoding="utf-8"), is_package):
            why = refusal(module, imported)
            if why is not None:
                found.append(f"{path.relative_to(root)}:{line}: imports {imported}: {why}")
    return found


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_there_is_something_to_check() -> None:
    assert all(list((ROOT / package).rglob("*.py")) for package in ("kvcore", "kvmove"))


PLANTED = [
    ("kvcore/protocol/a.py", "import time", "kvcore.protocol may import only"),
    ("kvcore/protocol/a.py", "from random import random", "kvcore.protocol may import only"),
    ("kvcore/protocol/a.py", "from kvcore.scenario import schema", "may import only kvcore.protocol"),
    ("kvcore/protocol/a.py", "from ..scenario import schema", "may import only kvcore.protocol"),
    ("kvcore/protocol/a.py", "import importlib", "kvcore.protocol may import only"),
    ("kvcore/scenario/a.py", "from kvsim import run", "may import only kvcore of"),
    ("kvcore/scenario/a.py", "import yaml", "only in kvcore.scenario.loader"),
    ("kvcore/scenario/a.py", "def f():\n    import time", "only in kvreal, kvmove"),
    ("kvsim/a.py", "from kvreal.run import run", "may import only kvcore, kvsim"),
    ("kvsim/a.py", "import zmq.utils", "only in kvreal"),
    ("kvsim/a.py", "import importlib\nimportlib.import_module('torch')", "only in kvreal"),
    ("kvreal/a.py", "import simpy", "only in kvsim"),
    ("kvreal/a.py", "import kvsim.run", "may import only kvcore, kvreal"),
    ("kvmove/a.py", "import threading", "only in kvreal"),
]


@pytest.mark.parametrize(("path", "text", "why"), PLANTED)
def test_a_planted_import_is_found(tmp_path: Path, path: str, text: str, why: str) -> None:
    target = tmp_path / path
    target.parent.mkdir(parents=True)
    target.write_text(text + "\n", encoding="utf-8")
    (line,) = violations(tmp_path)
    assert line.startswith(f"{path}:{len(text.splitlines())}: ")
    assert why in line


def test_what_is_allowed_is_not_refused(tmp_path: Path) -> None:
    allowed = {
        "kvcore/protocol/a.py": "from collections.abc import Sequence\nfrom . import messages\nimport msgspec",
        "kvcore/scenario/loader.py": "import yaml\nfrom kvcore.protocol import messages",
        "kvsim/a.py": "import simpy\nfrom kvcore.scenario.build import build",
        "kvreal/a.py": "import zmq, time, threading, socket, torch\nfrom nixl._api import nixl_agent",
        "kvmove/a.py": "import time\nfrom kvreal.run import run\nfrom kvsim import run as sim",
    }
    for path, text in allowed.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n", encoding="utf-8")
    assert violations(tmp_path) == []
