"""Make one archive that runs the hardware suite on a machine with no network: ``make hardware-bundle``.

What it brings along: this source tree's packages, its scenarios and this suite; wheels, for the Python that is asked
for, of what they need; NIXL's for the CUDA that is asked for, without the parts that no transport here uses. What the
other machine must have: that Python, and for its GPU's memory torch with CUDA. Nothing is installed there: ``run.sh``
unpacks the wheels beside itself.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 62 << 20
PLATFORMS = [
    "manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
]  # fmt: skip
SOURCES = ("kvcore", "kvsim", "kvreal", "kvmove", "scenarios", "profiles", "tests/hardware")
FILES = ("pyproject.toml", "README.md", "tests/conftest.py", "tests/scenario_files.py", "docs/hardware-suite.md")
#: What the other machine has, or does not need for this.
NOT_BROUGHT = ("torch", "nixl")
TESTING = ("pytest", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "hypothesis")
#: Of NIXL's wheel: expert-parallel kernels for each torch, headers, examples, and UCX's own benchmark.
DROPPED = re.compile(r"(nixl_ep_|[^/]*\.data/|[^/]*\.scripts/|.*/libucx_perftest)")


class BundleError(Exception):
    """One line: why there is no bundle."""


def requirements(pyproject: Path) -> list[str]:
    """What is brought along, as pyproject.toml has it: the simulator's, the real world's and the tests'."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["real"]]
    wanted += [one for one in extras["dev"] if _name(one) in TESTING]
    return [one for one in wanted if _name(one) not in NOT_BROUGHT]


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]


def download(wanted: Sequence[str], python: str, folder: Path, *, needs: bool = True) -> None:
    """Wheels for ``python`` (3.12) on Linux, x86-64, with what they need themselves."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "-c", str(_pins())]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += [] if needs else ["--no-deps"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"pip could not download what is needed: {done.stderr.strip().splitlines()[-1]}")


def _pins() -> Path:
    return ROOT / "constraints-cpu.txt"


def slim(wheel: Path) -> None:
    """Rewrite a wheel without what DROPPED matches, its RECORD true."""
    thin = wheel.with_suffix(".thin")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(thin, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        rows = []
        record = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        for info in old.infolist():
            if info.is_dir() or info.filename == record or DROPPED.match(info.filename):
                continue
            data = old.read(info)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{info.filename},sha256={digest},{len(data)}")
            new.writestr(info, data, zipfile.ZIP_DEFLATED, 9)
        new.writestr(record, "\n".join([*rows, f"{record},,", ""]))
    thin.replace(wheel)


def check_tags(wheels: Iterable[Path], python: str) -> None:
    """BundleError for a wheel that pip would not install there, or two of one package."""
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import parse_wheel_filename

    version = tuple(int(part) for part in python.split("."))
    own = f"cp{version[0]}{version[1]}"
    fits = {*cpython_tags(version, platforms=PLATFORMS), *compatible_tags(version, own, PLATFORMS)}
    seen: dict[str, str] = {}
    for wheel in wheels:
        name, _, _, tags = parse_wheel_filename(wheel.name)
        if not tags & fits:
            raise BundleError(f"{wheel.name} is not for Python {python} on Linux, x86-64")
        if name in seen:
            raise BundleError(f"two of {name}: {seen[name]} and {wheel.name}")
        seen[name] = wheel.name


def lay_out(folder: Path, python: str, cuda: str) -> None:
    """The bundle's contents, in ``folder``."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    download(requirements(ROOT / "pyproject.toml"), python, wheels)
    download(["nixl", f"nixl-cu{cuda}"], python, wheels, needs=False)
    for wheel in wheels.glob("nixl_cu*.whl"):
        slim(wheel)
    check_tags(wheels.glob("*.whl"), python)
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in FILES:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    for name, mode in (("run.sh", 0o755), ("kvmove", 0o755), ("unpack.py", 0o644)):
        shutil.copy2(ROOT / "tests/hardware/bundled" / name, folder / name)
        (folder / name).chmod(mode)
    about = {"python": python, "cuda": cuda, "made_from": _commit(), "wheels": sorted(w.name for w in wheels.iterdir())}
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def make(out: Path, python: str, cuda: str) -> None:
    """Write the archive. BundleError: there is none, or it is too large."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kvmove-bundle-") as scratch:
        folder = Path(scratch) / "kvmove-hardware"
        lay_out(folder, python, cuda)
        part = out.with_name(out.name + ".part")
        with tarfile.open(part, "w:gz", compresslevel=6) as archive:
            archive.add(folder, folder.name)
    size = part.stat().st_size
    if size > LIMIT_BYTES:
        part.unlink()
        raise BundleError(f"the bundle has {size / 2**20:.1f} MiB, expected at most {LIMIT_BYTES >> 20}")
    part.replace(out)
    print(f"{out}: {size / 2**20:.1f} MiB, for Python {python} and CUDA {cuda}")


def find_python(python: str) -> str:
    """The command of an interpreter of this version; "" if there is none that runs."""
    for command in (os.environ.get("BUNDLE_PYTHON", ""), f"python{python}", "python3", sys.executable):
        where = shutil.which(command) if command else None
        if where is None:
            continue
        say = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([where, "-c", say], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == python:
            return where
    return ""


def check(out: Path, python: str, options: Sequence[str]) -> bool:
    """Unpack the archive elsewhere and run it, if there is such a Python here. False if the run failed."""
    command = find_python(python)
    if not command:
        print(f"not run: there is no Python {python} here (BUNDLE_PYTHON names one); the wheels' tags are right")
        return True
    with tempfile.TemporaryDirectory(prefix="kvmove-bundle-") as scratch:
        with tarfile.open(out) as archive:
            archive.extractall(scratch, filter="data")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        run = Path(scratch) / "kvmove-hardware" / "run.sh"
        print(f"running it with {command}", flush=True)
        return subprocess.run([str(run), *options], env={**clean, "PYTHON": command}, cwd=scratch).returncode == 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bundle", description="make the hardware suite's archive")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "kvmove-hardware.tar.gz")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", default="13", choices=["12", "13"])
    parser.add_argument("--check", nargs=argparse.REMAINDER, help="run it too, with these options of the suite")
    args = parser.parse_args(argv)
    try:
        make(args.out, args.python, args.cuda)
    except BundleError as error:
        print(f"hardware-bundle: {error}", file=sys.stderr)
        return 2
    return 0 if args.check is None or check(args.out, args.python, args.check) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
