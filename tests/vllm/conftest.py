"""Real vLLM engines. `make test-vllm` runs these in a venv that has vLLM; nothing here is in `make test`."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.vllm.model import make
from examples.vllm.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm"))


def model(shape: str) -> Path:
    return make(shape, ROOT / "out" / "vllm" / shape)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Of this module's files and logs."""
    return ROOT / "out" / "vllm" / "tests" / request.module.__name__.rpartition(".")[2]


@pytest.fixture(scope="module")
def stage(folder: Path) -> Iterator[Stage]:
    """A controller and the smallest model; engines are the tests' to start."""
    (folder / "journal.db").unlink(missing_ok=True)
    with Stage(folder, model("pair")) as found:
        found.controller()
        yield found
