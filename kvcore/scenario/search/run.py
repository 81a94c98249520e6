"""Search many worlds on all cores, and say what each came to."""

from __future__ import annotations

import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children
from typing import Iterator, Optional, Sequence

import msgspec

from kvcore.protocol.config import Rules
from kvcore.scenario.search.cases import CASES
from kvcore.scenario.search.explore import SEARCH_CONFIG, Case, Explorer, Found


def find_case(name: str) -> Case:
    """The case of that name; KeyError naming the known ones."""
    for case in CASES:
        if case.name == name:
            return case
    raise KeyError(f"no world {name!r}; known: {', '.join(case.name for case in CASES)}")


def search(name: str, max_states: int, without: Sequence[str] = (), quiet_every: int = 20) -> Found:
    """Search one world; ``without``: rules (h03 ...) that are switched off, to see what they guard against."""
    rules = msgspec.structs.replace(Rules(), **dict.fromkeys(without, False))
    config = msgspec.structs.replace(SEARCH_CONFIG, rules=rules)
    return Explorer(find_case(name), config, quiet_every).run(max_states)


def search_all(
    names: Sequence[str], max_states: int, without: Sequence[str] = (), processes: Optional[int] = None
) -> Iterator[Found]:
    """Search worlds side by side, yielding each as it ends."""
    others = active_children()
    with ProcessPoolExecutor(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            futures = [pool.submit(search, name, max_states, without) for name in names]
            for future in as_completed(futures):
                yield future.result()
        except BaseException:  # Ctrl-C, or nobody asks any more: a pool alone would wait until every world is searched
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                if child not in others:
                    child.kill()
            raise


def summary(found: Found) -> str:
    """One line: states, depth, whether all was seen, what was met."""
    seen = "complete" if found.complete else "cut off"
    met = ", ".join(
        f"{name} x{count}" for name, count in sorted(found.reached.items()) if ":" in name or "done" in name
    )
    text = f"{found.case:34} {found.states:>8,} states  depth {found.depth:>3}  {seen:9} {found.quiets:>5} quiet"
    if found.missing:
        text += f"  NOT MET: {', '.join(found.missing)}"
    if found.violations:
        text += f"  VIOLATED: {found.violations[0].property}: {found.violations[0].text}"
    return f"{text}  [{met}]"
