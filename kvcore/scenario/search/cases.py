"""The worlds that are searched: each small enough to be seen whole, or as far as its limit goes, within seconds.

Together they are the worlds of the protocol's own proof search, at a size that continuous integration can afford; with
``kvmove search --states N`` each goes as deep as there is time for.
"""

from __future__ import annotations

from typing import Dict, Final, Tuple

from kvcore.protocol.messages import Key, MoveRequest
from kvcore.scenario.search.explore import Budget, Case

X: Final[Key] = b"x"
Y: Final[Key] = b"y"
Z: Final[Key] = b"z"


def move(
    op: str, src: str, dst: str, keys: Tuple[Key, ...] = (X,), copy: bool = False, step: int = 0
) -> MoveRequest:
    return MoveRequest(op, (src, "cpu"), (dst, "cpu"), keys, (1,) * len(keys), copy, step=step)


AT_A: Final = (("a/0", (X,)),)
AT_BOTH: Final = (("a/0", (X,)), ("b/0", (X,)))
AB: Final[Dict[str, int]] = {"a": 2, "b": 2}
ABC: Final[Dict[str, int]] = {"a": 2, "b": 2, "c": 2}
DONE: Final = "done deleted"

CASES: Final[Tuple[Case, ...]] = (
    Case(
        "one-move",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(timeout=1, lapse=1, cancel=1, fail=1, late=1),
        reach=(DONE, "failed:cancelled", "released:pin_gone", "refused:source_changed", "refused:copy_failed"),
    ),
    Case(
        "one-move-crash-source",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(crash=("a/0",)),
        reach=(DONE, "failed:source_restarted"),
    ),
    Case(
        "one-move-crash-destination",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(crash=("b/0",)),
        reach=(DONE, "failed:destination_restarted", "refused:stale_inc"),
    ),
    Case(
        "one-move-crash-controller",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(timeout=1, crash=("ctl",), lapse=1),
        reach=(DONE, "decided"),
    ),
    Case(
        "one-move-evict-store",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(lapse=1, evict=1, store=1),
        foreign=(("a/0", X), ("a/0", Z), ("b/0", Z)),
        reach=(DONE, "refused:source_changed"),
    ),
    Case(
        "one-move-clear",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(clear=1, cancel=1),
        reach=(DONE, "refused:stale_inc", "cleared"),
    ),
    Case(
        "one-move-full",
        {"a": 2, "b": 1},
        (("a/0", (X,)), ("b/0", (Z,))),
        (move("m", "a", "b"), move("n", "b", "a", (Z,))),
        budget=Budget(),
        reach=(DONE, "refused:full"),
    ),
    Case(
        "one-move-pause",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(pause=1, evict=1),
        reach=(DONE, "retention_lapsed", "pin_lapsed", "done:source_unreachable kept"),
    ),
    Case(
        "one-move-pause-crash-controller",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        budget=Budget(pause=1, evict=1, crash=("ctl",)),
        reach=(DONE, "retention_lapsed"),
    ),
    Case(
        "push",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        push=True,
        budget=Budget(timeout=1, lapse=1, cancel=1, fail=1, late=1),
        reach=(DONE, "Stopped", "refused:source_changed"),
    ),
    Case(
        "push-reuse",
        AB,
        AT_A,
        (move("m", "a", "b"),),
        push=True,
        budget=Budget(cancel=1, store=1, evict=1, late=1),
        foreign=(("b/0", Z),),
        reach=(DONE, "Stopped"),
    ),
    Case("push-crash", AB, AT_A, (move("m", "a", "b"),), push=True, budget=Budget(crash=("a/0", "b/0")), reach=(DONE,)),
    Case("crossing", AB, AT_A, (move("m", "a", "b"), move("n", "b", "a")), reach=(DONE,)),
    Case("crossing-both", AB, AT_BOTH, (move("m", "a", "b"), move("n", "b", "a")), reach=(DONE,)),
    Case(
        "crossing-lapse",
        AB,
        AT_BOTH,
        (move("m", "a", "b"), move("n", "b", "a")),
        budget=Budget(lapse=1),
        reach=(DONE, "released:pin_gone"),
    ),
    Case("twice", AB, AT_A, (move("m", "a", "b"), move("n", "a", "b")), reach=(DONE,)),
    Case("two-ways", ABC, AT_A, (move("m", "a", "b"), move("n", "a", "c")), reach=(DONE,)),
    Case("copy-and-move", AB, AT_A, (move("m", "a", "b", copy=True), move("n", "a", "b")), reach=(DONE, "done kept")),
    Case("chain", ABC, AT_A, (move("m", "a", "b"), move("n", "b", "c")), reach=(DONE,)),
    Case(
        "ring",
        ABC,
        (("a/0", (X,)), ("b/0", (X,)), ("c/0", (X,))),
        (move("m", "a", "b"), move("n", "b", "c"), move("o", "c", "a")),
        reach=(DONE,),
    ),
    Case(
        "swap-full",
        {"a": 1, "b": 1},
        (("a/0", (X,)), ("b/0", (Y,))),
        (move("m", "a", "b"), move("n", "b", "a", (Y,))),
        reach=("refused:full",),
    ),
    Case(
        "shared-prefix",
        {"a": 3, "b": 3},
        (("a/0", (X, Y)), ("a/0", (X, Z))),
        (move("m", "a", "b", (X, Y)), move("n", "a", "b", (X, Z))),
        reach=(DONE, "released:child_here"),
    ),
    Case(
        "partial",
        {"a": 2, "b": 1},
        (("a/0", (X, Y)),),
        (move("m", "a", "b", (X, Y)),),
        budget=Budget(cancel=1),
        reach=("done kept", "released:child_here"),
    ),
    Case(
        "two-keys",
        {"a": 2, "b": 3},
        (("a/0", (X, Y)), ("b/0", (X,))),
        (move("m", "a", "b", (X, Y)),),
        budget=Budget(evict=1, lapse=1, cancel=1),
        reach=(DONE,),
    ),
    Case(
        "steps",
        AB,
        (("a/0", (X, Y)),),
        (move("m", "a", "b", (X, Y), step=1),),
        budget=Budget(lapse=1, cancel=1, fail=1, late=1),
        reach=(DONE, "failed:cancelled", "refused:source_changed", "refused:copy_failed", "shown:1"),
    ),
    Case(
        "steps-push",
        AB,
        (("a/0", (X, Y)),),
        (move("m", "a", "b", (X, Y), step=1),),
        push=True,
        budget=Budget(lapse=1, cancel=1),
        reach=(DONE, "Stopped", "shown:1"),
    ),
    Case(
        "steps-push-reuse",
        AB,
        (("a/0", (X, Y)),),
        (move("m", "a", "b", (X, Y), step=1),),
        push=True,
        budget=Budget(cancel=1, store=1, late=1),
        foreign=(("b/0", Z),),
        reach=("Stopped", "failed:cancelled"),
    ),
    Case(
        "steps-evict",
        AB,
        (("a/0", (X, Y)),),
        (move("m", "a", "b", (X, Y), step=1),),
        budget=Budget(evict=1, store=1, clear=1),
        foreign=(("b/0", Z),),
        reach=(DONE, "shown:1"),
    ),
    Case(
        "steps-moved-on",
        {"a": 2, "b": 2, "c": 1},
        (("a/0", (X, Y)),),
        (move("m", "a", "b", (X, Y), step=1), move("n", "b", "c")),
        reach=(DONE, "shown:1"),
    ),
    Case("two-ranks", AB, (("a/0", (X,)), ("a/1", (X,))), (move("m", "a", "b"),), ranks=2, reach=(DONE,)),
    Case(
        "two-ranks-cancel",
        AB,
        (("a/0", (X,)), ("a/1", (X,))),
        (move("m", "a", "b"),),
        ranks=2,
        budget=Budget(cancel=1, lapse=1),
        reach=(DONE, "failed:cancelled"),
    ),
    Case(
        "retained-replaced",
        {"a": 2, "b": 1, "c": 2},
        (("a/0", (X,)),),
        (move("m", "a", "b"), move("n", "b", "c")),
        budget=Budget(evict=1),
        reach=(DONE,),
    ),
    Case(
        "view",
        {"a": 2},
        (("a/0", (X,)),),
        (),
        view=True,
        budget=Budget(store=1, evict=2, clear=1),
        foreign=(("a/0", Y),),
        reach=("Resync",),
    ),
)
