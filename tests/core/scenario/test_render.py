"""The sequence diagram: what was sent, by whom, what was lost, doubled, and what each node did."""

from __future__ import annotations

from typing import Any, List

import pytest

from kvcore.protocol.machine import (
    AbortCopy,
    Boot,
    CloseWindow,
    Command,
    CopyDone,
    CopyStopped,
    FillDone,
    Journal,
    Note,
    Outcome,
    ReadDone,
    Received,
    Send,
    StartCopy,
    StartRead,
    TimerFired,
    WindowClosed,
)
from kvcore.protocol.messages import Answer, Beat, End, Found, MoveRequest, Pin
from kvcore.scenario.history import VERSION, Header, Line, ListHistory
from kvcore.scenario.render import describe, describe_effect, describe_input, diagram, duration
from tests.core.scenario.tiny import header, play

STEPS = [
    {"store": {"at": "a/cpu", "prompt": "p", "tokens": "5", "as": "s"}},
    {"move": {"from": "a/cpu", "to": "b/cpu", "prompt": "p", "as": "m"}},
    {"store": {"at": "b/cpu", "prompt": "q", "tokens": "2", "as": "t"}},
    {"move": {"from": "b/cpu", "to": "a/cpu", "prompt": "q", "as": "n"}},
    {"settle": {}},
]
HEAD = Header(VERSION, "real", "s")
PIN = Pin(1, 1 << 32 | 1, "cpu", (b"k", b"l"), True, 1)


def drawn(**more: Any) -> List[str]:
    built, tiny, _ = play(steps=STEPS)
    assert isinstance(tiny.history, ListHistory)
    return list(diagram(header(built), tiny.history.lines, **more))


def rows(lines: List[Line], **more: Any) -> List[str]:
    return list(diagram(HEAD, lines, **more))[2:]


def test_the_whole_of_a_move() -> None:
    text = drawn()
    assert text[0] == "tiny, in simulation, seed 0"
    assert text[1].split() == ["client", "ctl", "a/0", "b/0"]
    for part in (
        "MoveRequest m",
        "Pin 1-1  cpu, 3 chunks, move",
        "Fetch 1-1  3 chunks of a/0",
        "a/0: filled",
    ):
        assert sum(part in line for line in text) == 1, part
    assert not any("LOST" in line or "Beat" in line for line in text)
    assert any("journal Outcome done" in line for line in text)


def test_arrows_go_from_sender_to_receiver() -> None:
    pin = next(line for line in drawn() if "Pin 1-1" in line)
    answer = next(line for line in drawn() if "Answer m 1-1  done" in line)
    assert pin.split("     Pin")[0].split()[-2:] == ["├─────────▶", "│"]
    assert "◀─────────┤" in answer
    assert pin.endswith("(+1 us)")


def test_of_one_event_or_step_or_node_only() -> None:
    by_event, by_step = drawn(events=["1-1"]), drawn(events=["m"])
    assert by_event[1:] == by_step[1:]
    assert any("MoveRequest m" in line for line in by_event)
    assert any("Fence" in line for line in by_event) and any("copy 1 is done" in line for line in by_event)
    assert not any("1-2" in line or "StoreRequest" in line for line in by_event)
    assert any("StoreRequest s" in line for line in drawn(events=["s"]))
    only_b = drawn(nodes=["b"], events=["m"])
    assert only_b[1].split() == ["ctl", "a/0", "b/0"]
    assert any("Fence" in line for line in only_b) and not any("Pin " in line for line in only_b)


def test_of_some_time_only() -> None:
    whole = drawn()
    middle = drawn(after=15_000, before=20_000)
    assert 5 < len(middle) < len(whole)
    assert all(15 <= round(float(line.split()[0]) * 1000) <= 20 for line in middle[2:])
    assert drawn(after=10**18) == ["tiny, in simulation, seed 0", "nothing matches"]
    assert drawn(events=["9-9"])[1] == "nothing matches"


def test_heartbeats_are_shown_only_if_asked_for() -> None:
    beat = Line(5, "a/0", TimerFired(("beat", 0, 0)), [Send("ctl", Beat(1, ()))])
    assert not any("Beat" in row or "timer" in row for row in rows([beat, Line(6, "a/0", Boot(), [])]))
    assert any("Beat" in row for row in rows([beat], everything=True))


def test_what_is_lost_doubled_and_late() -> None:
    sent = Line(0, "ctl", Boot(), [Send("a/0", PIN)])
    got = Line(2_500_000, "a/0", Received("ctl", PIN), [])
    later = Line(9_000_000, "a/0", Boot(), [])
    assert rows([sent])[-1].endswith("Pin 1-1  cpu, 2 chunks, move  not received by the end")
    assert "✕" in rows([sent, later])[-2] and rows([sent, later])[-2].endswith("move  LOST")
    assert rows([sent, got])[-1].endswith("move  (+2.5 ms)")
    assert rows([sent, got, got])[-1].endswith("move  AGAIN")
    assert rows([got])[-1].endswith("(+0 ns)"), "its sending is not in the history"


def test_a_second_life_is_named() -> None:
    boot = Line(0, "a/0", Boot(), [])
    assert [row.split(": ", 1)[1] for row in rows([boot, boot])] == ["boots", "boots again: life 2"]


def test_a_node_that_talks_to_itself_and_one_that_was_not_built() -> None:
    text = list(diagram(HEAD, [Line(0, "x", Boot(), [Send("x", PIN), Send("y", PIN)])]))
    assert text[1].split() == ["x", "y"] and "↻" in text[3]


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (Answer("m", "failed", 0, 1 << 32 | 2, "full", "b/0"), "Answer m 1-2  failed, full, b/0"),
        (Answer("l", "ok", 5, found=(Found("a", "cpu", 5),)), "Answer l  ok, num_tokens 5, 5 tokens at a/cpu"),
        (
            MoveRequest("m", ("a", "cpu"), ("b", "cpu"), evict=False),
            "MoveRequest m  a/cpu, -> b/cpu, not evict",
        ),
        (End(1, 1 << 32 | 3), "End 1-3"),
    ],
)
def test_messages_in_words(thing: Any, text: str) -> None:
    assert describe(thing) == text


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (StartCopy((1, 7), False, "b/0", 1, "cpu", (0,), "cpu", (0,), (1,)), "starts copy 7: 1 chunk to b/0/cpu"),
        (AbortCopy((1, 7)), "aborts copy 7"),
        (StartRead(1, "cpu", (0, 1), (b"", b""), (1, 1)), "starts to read 2 chunks of cpu"),
        (CloseWindow("b/0", 1), "closes the window of b/0"),
        (Journal(Outcome(1, "failed", "full")), "journal Outcome failed, full"),
        (Note("decided", 3), "decided"),
    ],
)
def test_effects_in_words(thing: Any, text: str) -> None:
    assert describe_effect(thing) == text


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (CopyDone((1, 7), False, "torn"), "copy 7 failed: torn"),
        (CopyStopped((1, 7)), "copy 7 has stopped"),
        (FillDone(1, False), "filling failed"),
        (ReadDone(1, False), "read WRONG BYTES"),
        (WindowClosed("b/0", 1), "the window of b/0 is closed"),
        (Command("full", ("cpu", "on")), "command full cpu on"),
        (TimerFired(("retry", 1, 0)), "timer retry"),
    ],
)
def test_inputs_in_words(thing: Any, text: str) -> None:
    assert describe_input(thing) == text


@pytest.mark.parametrize(
    ("ns", "text"), [(0, "0 ns"), (999, "999 ns"), (1500, "1.5 us"), (2 * 10**9, "2 s"), (12345 * 10**9, "12345 s")]
)
def test_durations(ns: int, text: str) -> None:
    assert duration(ns) == text
