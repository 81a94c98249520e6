"""The hardware suite's archive: what is brought along, thinned wheels, and what is refused. No network is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.hardware.bundle import BundleError, check_tags, requirements, slim

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "tests" / "hardware" / "bundled"


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
        file.writestr("big-1.dist-info/RECORD", "nonsense\n")
    return path


def test_what_is_brought_along() -> None:
    """All that the simulator, the real world and the tests need, but for what the other machine has or is large."""
    names = {one.split(">")[0].split("=")[0] for one in requirements(ROOT / "pyproject.toml")}
    assert {"msgspec", "simpy", "pyzmq", "numpy", "pytest", "hypothesis", "pytest-timeout"} <= names
    assert not {"torch", "nixl", "fastapi", "ruff", "mypy"} & names


def test_a_thinned_wheel_is_still_one(tmp_path: Path) -> None:
    kept = {"big/__init__.py": "x = 1\n", "big.libs/libuct.so": "y" * 1000, "big-1.dist-info/METADATA": "Name: big\n"}
    dropped = {"nixl_ep_cu13/huge.so": "z", "big-1.data/headers/a.h": "h", "big.libs/ucx/libucx_perftest.so": "p"}
    path = wheel(tmp_path / "big-1-py3-none-any.whl", kept | dropped)
    slim(path)
    with zipfile.ZipFile(path) as file:
        assert set(file.namelist()) == {*kept, "big-1.dist-info/RECORD"}
        assert {name: file.read(name).decode() for name in kept} == kept
        rows = [row.split(",") for row in file.read("big-1.dist-info/RECORD").decode().splitlines()]
    for name, digest, size in rows[:-1]:
        expected = base64.urlsafe_b64encode(hashlib.sha256(kept[name].encode()).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(kept[name]))
    assert {row[0] for row in rows} == {*kept, "big-1.dist-info/RECORD"}
    assert not list(tmp_path.glob("*.thin"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a-1-cp311-cp311-manylinux2014_x86_64.whl"], "is not for Python 3.12"),
        (["a-1-cp312-cp312-macosx_11_0_arm64.whl"], "is not for Python 3.12"),
        (["a-1-cp312-cp312-manylinux_2_39_x86_64.whl"], "is not for Python 3.12"),
        (["a-1-py3-none-any.whl", "a-2-py3-none-any.whl"], "two of a"),
    ],
)
def test_wheels_that_would_not_do(names: list[str], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        check_tags([Path(name) for name in names], "3.12")


def test_wheels_that_do() -> None:
    names = [
        "a-1-cp312-cp312-manylinux_2_28_x86_64.whl",
        "b-1-py2.py3-none-any.whl",
        "c-1-cp312-abi3-manylinux1_x86_64.whl",
    ]
    check_tags([Path(name) for name in names], "3.12")


def unpack(folder: Path, about: dict[str, object]) -> subprocess.CompletedProcess[str]:
    (folder / "about.json").write_text(json.dumps(about))
    (folder / "unpack.py").write_bytes((BUNDLED / "unpack.py").read_bytes())
    return subprocess.run(
        [sys.executable, str(folder / "unpack.py")], capture_output=True, text=True, env={**os.environ}
    )


def test_unpacking_needs_the_right_python(tmp_path: Path) -> None:
    done = unpack(tmp_path, {"python": "3.2", "wheels": []})
    assert done.returncode != 0 and "this is for Python 3.2" in done.stderr
    assert not (tmp_path / "site").exists()


def test_unpacking_happens_once_and_whole(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(
        tmp_path / "wheels" / "big-1-py3-none-any.whl", {"big/__init__.py": "x = 1\n", "big-1.data/purelib/side.py": ""}
    )
    here = {"python": ".".join(map(str, sys.version_info[:2])), "wheels": ["big-1-py3-none-any.whl"]}
    assert unpack(tmp_path, here).returncode == 0
    assert (tmp_path / "site" / "big" / "__init__.py").exists() and (tmp_path / "site" / "side.py").exists()
    (tmp_path / "wheels" / "big-1-py3-none-any.whl").unlink()
    assert unpack(tmp_path, here).returncode == 0  # it is there
    assert [path.name for path in tmp_path.glob("site*")] == ["site"]
