"""After Decide: what the controller may tell destinations before every source has spoken."""

from __future__ import annotations

from kvcore.protocol.config import Rules, S
from kvcore.protocol.messages import Release
from tests.core.drive import Story


def test_a_source_declared_dead_may_be_paused() -> None:
    """a stands still for 7 s, is declared dead after 5, and then carries out a Release before its lease has ended.
    Until then b must retain x: silence does not end an event's retentions, as an answer or a restart does."""
    w = Story(Rules(), {"a": 2, "b": 1})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Release)
    release = w.hold(Release)
    w.elapse(7 * S, frozen=("a/0",))
    assert w.status(event).state == "done"
    assert w.status(event).source[0].why == "dead"
    assert w.store("b/0", "z") == "refused"
    w.deliver(release)
    assert w.whole_at("x") == "b"
    w.elapse(60 * S)
    assert w.leaks() == ""
