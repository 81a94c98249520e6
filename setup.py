"""Packages, and the compiled form of the core; everything else is in pyproject.toml.

``KVMOVE_COMPILE=1`` compiles kvcore.protocol and kvsim with mypyc, unchanged. Pure Python is the product: ``make fast``
compiles a copy in build/fast, so that no stale .so ever shadows an edited .py.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup

#: msgspec builds these classes at import and they are the wire form: mypyc has nothing to add to them.
INTERPRETED = {"__init__.py", "messages.py", "machine.py", "config.py", "tables.py"}
INTERPRETED |= {"rows.py", "rows_controller.py", "rows_worker.py"}  # data, built once


def extensions() -> list[Extension]:
    if os.environ.get("KVMOVE_COMPILE") != "1":
        return []
    from mypyc.build import mypycify

    modules = [*Path("kvcore/protocol").glob("*.py"), *Path("kvsim").glob("*.py")]
    return list(mypycify(sorted(str(path) for path in modules if path.name not in INTERPRETED), opt_level="3"))


#: An installed `kvmove demo` finds them beside itself.
DATA = {f"kvmove.{name}": name for name in ("scenarios", "profiles") if Path(name).is_dir()}

setup(
    packages=[*find_packages(include=["kvcore*", "kvsim*", "kvreal*", "kvmove*"]), *DATA],
    package_dir=DATA,
    package_data={
        **dict.fromkeys(DATA, ["**/*.yaml"]),
        "kvreal.http.page": ["*.html", "*.css", "*.js"],
        "kvmove.bench": ["*.yaml"],
        "kvmove.reports": ["*.jinja", "*.css"],
    },
    ext_modules=extensions(),
)
