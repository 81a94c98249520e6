"""Between this machine and another: ``--peer tcp://HOST:PORT`` of a waiting ``kvmove peer``, or ``--peer ssh://HOST``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvreal.borrow import Away, Borrowed, PeerError, read_token
from kvreal.pool import Pool
from kvreal.run import run
from tests.hardware.found import KINDS, LAYOUTS, Asked, Case, need, way
from tests.hardware.plays import moved, of_case, row, scenario, sound, unreached
from tests.hardware.test_ends import CPU, STEPS, fault

pytestmark = [pytest.mark.real, pytest.mark.hardware, pytest.mark.timeout(300)]

NO_PEER = "another machine: --peer was not given (tcp://HOST:PORT of a waiting `kvmove peer`, or ssh://HOST)"


def wanted(name: str, params: dict[str, Any], want: Asked) -> bool:
    """Without a peer one test says so for all."""
    kinds = {params[name] for name in ("source", "target") if name in params}
    if want.peer:
        return kinds <= set(want.devices) and (not want.quick or kinds <= {"cpu"})
    first = ("from here", "read", want.transports[0])
    return kinds == {"cpu"} and tuple(params[name] for name in ("way_round", "direction", "transport")) == first


@pytest.fixture(scope="module")
def both_ends(want: Asked) -> Iterator[Callable[[str], tuple[Pool, Borrowed]]]:
    """Transport -> (processes here, processes there), which hear each other and nobody else."""
    with ExitStack() as all_of_it:
        secret = read_token(Path(want.token)) if want.token else b""
        found: dict[str, tuple[Pool, Borrowed]] = {}
        mine = all_of_it.enter_context(ExitStack())

        def get(transport: str) -> tuple[Pool, Borrowed]:
            if not want.peer:
                pytest.skip(NO_PEER)
            need(transport)
            if transport not in found:
                found.clear()
                mine.close()
                name, env = way(transport)
                try:
                    away = mine.enter_context(Away(want.peer, secret))
                    there = mine.enter_context(away.borrow(name, env))
                except PeerError as error:
                    if "it has only" in str(error):
                        pytest.skip(str(error))
                    raise
                found[transport] = (
                    mine.enter_context(Pool(there.transport, env, bind=there.mine, secret=there.secret)), there
                )  # fmt: skip
            return found[transport]

        yield get


@pytest.mark.parametrize("way_round", ["from here", "from there"])
@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("target", list(KINDS))
@pytest.mark.parametrize("source", list(KINDS))
def test_moves(
    source: str, target: str, direction: str, way_round: str, transport: str, want: Asked,
    both_ends: Callable[[str], tuple[Pool, Borrowed]], note: Callable[..., None], tmp_path: Path,
) -> None:  # fmt: skip
    here, there = both_ends(transport)
    kinds_here, kinds_there = (source, target) if way_round == "from here" else (target, source)
    need(kinds_here)
    if kinds_there == "gpu" and "gpu" not in there.loan.provides:
        pytest.skip("gpu: there is none at the peer")
    for layout in LAYOUTS[: 1 if want.quick else None]:
        for ranks in want.ranks:
            case = Case(transport, source, target, direction, layout, ranks, want.sizes[0])
            elsewhere = {"b" if way_round == "from here" else "a": there}
            result, phases = moved(case, of_case(case), here, tmp_path / "log", elsewhere)
            note(**row(case, result, phases), way=way_round)


@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("what", ["kill", "restart", "freeze"])
@pytest.mark.parametrize("end", ["source", "destination"])
def test_the_other_end_fails(
    end: str, what: str, direction: str, transport: str, both_ends: Callable[[str], tuple[Pool, Borrowed]],
    note: Callable[..., None], tmp_path: Path,
) -> None:  # fmt: skip
    here, there = both_ends(transport)
    layout = LAYOUTS[0]
    tokens = 64 * layout.chunk_tokens + 1
    node = "a/0" if end == "source" else "b/0"
    built = scenario(
        STEPS.format(cpu=CPU, tokens=tokens), {name: {CPU: 2 * tokens} for name in "ab"}, layout, direction=direction,
        constants="{scale: 0.2}", faults=fault(what, node), deadline_s=120,
    )  # fmt: skip
    log = tmp_path / "log"
    result = run(built, pool=here, history=log, elsewhere={node[0]: there})
    unreached(result)
    sound(result, log)
    assert result.fired, "the fault did not happen"
    if what != "kill":
        again = result.operation("again")
        assert again is not None and again.state == "done" and again.num_tokens == tokens, again
    move = result.operation("m")
    note(transport=transport, what=what, end=f"{end}, there", direction=direction, move=move.state if move else "")
