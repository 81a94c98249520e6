"""Unpack the wheels beside this file, once. Needs no pip; numpy stays the machine's own where it has one."""

import importlib.util
import json
import os
import shutil
import sys
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
SITE = os.path.join(HERE, "site")


def main():
    with open(os.path.join(HERE, "about.json")) as file:
        about = json.load(file)
    version = ".".join(map(str, sys.version_info[:2]))
    if version != about["python"]:
        sys.exit(f"this is for Python {about['python']}, and {sys.executable} is {version}; PYTHON names another")
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed here: the suite skips what concerns a GPU's memory", file=sys.stderr)
    if os.path.isdir(SITE):
        return
    part = f"{SITE}.{os.getpid()}"
    for name in about["wheels"]:
        if name.startswith("numpy-") and importlib.util.find_spec("numpy") is not None:
            continue
        with zipfile.ZipFile(os.path.join(HERE, "wheels", name)) as wheel:
            wheel.extractall(part)
    for name in os.listdir(part):  # what a wheel wants in one of the interpreter's own folders
        for kind in ("purelib", "platlib"):
            inner = os.path.join(part, name, kind)
            if name.endswith(".data") and os.path.isdir(inner):
                shutil.copytree(inner, part, dirs_exist_ok=True)
    os.rename(part, SITE)


main()
