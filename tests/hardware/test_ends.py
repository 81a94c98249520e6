"""Either end of a copy is killed, frozen or started again while its bytes are on their way.

``at its start``: the controller notices that the room is reserved, which is when the copy starts, and has the fault
happen before it goes on. ``halfway``: half of the bytes have landed and the copy is still under way. What must hold: no
wrong byte, nobody hangs, the log replays, the prompt is somewhere unless the process that held it died, and once all is
well again another move ends well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvreal.pool import Pool
from kvreal.run import run
from tests.hardware.found import KINDS, LAYOUTS, Asked, need
from tests.hardware.plays import scenario, sound, unreached

pytestmark = [pytest.mark.real, pytest.mark.hardware, pytest.mark.timeout(300)]

CPU = KINDS["cpu"]
CHUNKS = 256
STEPS = """
  - store: {{at: a/{cpu}, prompt: p, tokens: {tokens}}}
  - settle
  - move: {{from: a/{cpu}, to: b/{cpu}, prompt: p, as: m}}
  - settle
  - sleep: 2 deads
  - settle
  - store: {{at: a/{cpu}, prompt: q, tokens: {tokens}, as: stored}}
  - settle
  - move: {{from: a/{cpu}, to: b/{cpu}, prompt: q, as: again}}
  - settle
  - use: {{at: b/{cpu}, prompt: q, as: used}}
"""
WHAT = {
    "kill": "crash: {{node: {node}}}",
    "restart": "crash: {{node: {node}, restart_after: 1 beats}}",
    "freeze": "pause: {{node: {node}, for: 1 s}}",
}


def wanted(name: str, params: dict[str, Any], want: Asked) -> bool:
    """Quick: each end restarted and frozen, one by a read and the other by a push."""
    if not want.quick:
        return True
    if name != "test_in_the_middle_of_a_copy" or params["what"] == "kill":
        return False
    reads, source, halfway = params["direction"] == "read", params["end"] == "source", params["when"] == "halfway"
    return reads == source and halfway == (params["what"] == "restart")


def fault(what: str, node: str, when: str = "at its start") -> str:
    if when == "at its start":
        return f"\n  - when: {{received: Reserved, by: ctl, nth: 1}}\n    {WHAT[what].format(node=node)}\n"
    return (
        "\n  - copy: {stuck: true, fraction: 0.5}\n"
        f"  - when: {{sent: Renew, by: ctl, nth: 1}}\n    {WHAT[what].format(node=node)}\n"
    )


@pytest.mark.parametrize("when", ["at its start", "halfway"])
@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("end", ["source", "destination"])
@pytest.mark.parametrize("what", list(WHAT))
def test_in_the_middle_of_a_copy(
    what: str, end: str, direction: str, when: str, transport: str, want: Asked, pool_of: Callable[[str], Pool],
    note: Callable[..., None], tmp_path: Path,
) -> None:  # fmt: skip
    need(transport)
    layout = LAYOUTS[0]
    chunks = CHUNKS // 8 if want.quick else CHUNKS
    tokens = chunks * layout.chunk_tokens + 1
    steps = STEPS.format(cpu=CPU, tokens=tokens)
    node = "a/0" if end == "source" else "b/0"
    places = {name: {CPU: 2 * tokens} for name in ("a", "b")}
    built = scenario(
        steps, places, layout, direction=direction, constants="{scale: 0.2, copy_max: 4 s}",
        faults=fault(what, node, when), deadline_s=120,
    )  # fmt: skip
    log = tmp_path / "log"
    result = run(built, pool=pool_of(transport), history=log)
    unreached(result)
    sound(result, log)
    assert result.fired, "the fault did not happen"
    move = result.operation("m")
    assert move is not None and move.state in ("done", "failed"), move
    whole = [place for place, prompts in result.placement.items() if prompts.get("p") == tokens]
    dead = end if what in ("kill", "restart") else ""
    if move.state == "failed":
        assert dead == "source" or f"a/{CPU}" in whole, result.placement
    else:
        assert dead == "destination" or whole, result.placement
    if what != "kill":
        again, used = result.operation("again"), result.operation("used")
        assert again is not None and again.state == "done" and again.num_tokens == tokens, again
        assert used is not None and used.state == "ok" and used.num_tokens == tokens, used
    first = min((copy for copy in result.copies), key=lambda copy: copy.asked_ns, default=None)
    landed = f"{first.state} after {first.nbytes >> 20} MiB: {first.why}" if first is not None else "with its process"
    note(
        transport=transport, what=what, end=end, direction=direction, when=when, move=move.state, reason=move.reason,
        copy=landed,
    )  # fmt: skip


def test_one_rank_of_several_dies(transport: str, pool_of: Callable[[str], Pool], tmp_path: Path) -> None:
    """They move together or not at all."""
    need(transport)
    layout = LAYOUTS[0]
    tokens = CHUNKS // 4 * layout.chunk_tokens + 1
    built = scenario(
        STEPS.format(cpu=CPU, tokens=tokens), {name: {CPU: 2 * tokens} for name in ("a", "b")}, layout, ranks=4,
        constants="{scale: 0.2}", faults=fault("restart", "b/2"), deadline_s=120,
    )  # fmt: skip
    log = tmp_path / "log"
    result = run(built, pool=pool_of(transport), history=log)
    unreached(result)
    sound(result, log)
    move, again = result.operation("m"), result.operation("again")
    assert move is not None and (move.state == "failed") == (result.placement[f"a/{CPU}"].get("p", 0) == tokens), move
    assert again is not None and again.state == "done" and again.num_tokens == tokens, again
