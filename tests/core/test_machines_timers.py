"""The driver's alarm, and what is due by itself."""

from __future__ import annotations

from kvcore.protocol.config import MS, Rules, S
from kvcore.protocol.machine import TimerFired
from kvcore.protocol.messages import Beat, Register, Retain
from kvcore.protocol.tables import kinds
from tests.core.drive import Story


def test_an_alarm_runs_its_timer_once() -> None:
    """What is due runs before the input; the input is the alarm for it, and a periodic timer is armed again by then."""
    w = Story(Rules())
    w.now = S
    assert kinds(w.give("a/0", TimerFired(("beat", 0, 0)))) == ("Beat",)
    assert len([letter for letter in w.fresh if isinstance(letter[2], Beat)]) == 1


def test_a_retry_runs_once() -> None:
    w = Story(Rules())
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    w.finish_copy("b/0", w.copying("b/0"))
    w.mail(keep=(Retain,), deaf=("a/0",))
    w.now = 200 * MS
    effects = w.give("ctl", TimerFired(("retry", event, 0)))
    assert len(effects) == 1


def test_a_timer_that_was_cancelled_does_nothing() -> None:
    w = Story(Rules())
    assert w.give("a/0", TimerFired(("lease", 1, 0))) == []


def test_a_doubled_register_brings_no_second_epoch() -> None:
    """The successor is issued an epoch; a Register that it had sent before arrives and starts a probe; then it beats.
    Once it is believed, that probe must not end in another epoch: all its pins and reservations would end with it."""
    w = Story(Rules())
    w.boot("b/0")
    register = w.take(Register)
    w.until(Beat)
    beat = w.hold(Beat)
    epoch = w.worker("b/0").epoch
    w.deliver(register)
    w.fresh.clear()
    w.deliver(beat)
    assert w.leaks() == ""
    w.elapse(3 * S)
    assert w.worker("b/0").epoch == epoch
