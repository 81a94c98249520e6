"""Histories: written, read, merged, replayed; what is no history is refused, naming file and line."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, List

import msgspec
import pytest

from kvcore.protocol.machine import Boot, Note, Received, Send, TimerFired
from kvcore.protocol.messages import Answer
from kvcore.scenario.history import (
    VERSION,
    FileHistory,
    Header,
    HistoryError,
    Line,
    ListHistory,
    check_replay,
    merge,
    read,
    replay,
)
from kvcore.scenario.result import Operation, Result, Violation, phases
from tests.core.scenario.tiny import COPY_NS, MESSAGE_NS, header, play

STEPS = [
    {"store": {"at": "a/cpu", "prompt": "p", "tokens": "5", "as": "s"}},
    {"move": {"from": "a/cpu", "to": "b/cpu", "prompt": "p", "as": "m"}},
    {"settle": {}},
    {"use": {"at": "b/cpu", "prompt": "p", "as": "u"}},
]
WORLDS: List[Any] = [{}, {"kv": {"chunk": "2 tokens", "bytes_per_token": "1 B", "direction": "push"}}]


def lines(count: int, node: str = "a/0", start: int = 0, step: int = 10) -> List[Line]:
    return [Line(start + step * i, node, Boot(nonce=i), [Note("n", i)]) for i in range(count)]


def write(path: Path, items: List[Line], node: str = "", packed: bool = False) -> Header:
    head = Header(VERSION, "real", "s", node=node, packed=packed)
    sink = FileHistory(path, head)
    for line in items:
        sink.add(line.t, line.node, line.input, line.out)
    sink.close()
    sink.close()
    return head


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_streamed_is_what_is_listed(tmp_path: Path, world: Any) -> None:
    built, tiny, _ = play(steps=STEPS, faults=[{"when": {"at": "2 leases"}, "crash": {"node": "b"}}], **world)
    path = tmp_path / "deep" / "h.jsonl"
    play(FileHistory(path, header(built)), steps=STEPS, **world)[1].history.close()
    head, items = read(path)
    assert head == header(built)
    assert isinstance(tiny.history, ListHistory)
    assert list(items) == tiny.history.lines


@pytest.mark.parametrize("world", WORLDS)
def test_replay_gives_equal_effects_and_finds_one_that_is_not(world: Any) -> None:
    built, tiny, _ = play(steps=STEPS, **world)
    assert isinstance(tiny.history, ListHistory)
    report = check_replay(header(built), tiny.history.lines)
    assert report.equal and report.nodes == 4 and report.lines == len(tiny.history.lines) and not report.first
    at = next(i for i, line in enumerate(tiny.history.lines) if line.node == "b/0" and isinstance(line.input, Received))
    bad = msgspec.structs.replace(tiny.history.lines[at], out=[Note("planted")])
    report = check_replay(header(built), [*tiny.history.lines[:at], bad, *tiny.history.lines[at + 1 :]])
    assert not report.equal and report.unequal == 1 and report.first.startswith("b/0 at ")


def test_a_replay_needs_what_was_built_and_a_boot() -> None:
    built, _, _ = play(steps=STEPS)
    with pytest.raises(HistoryError, match="cannot be replayed"):
        list(replay(Header(VERSION, "sim", "x"), []))
    with pytest.raises(HistoryError, match="its first input is not Boot"):
        list(replay(header(built), [Line(0, "a/0", TimerFired(("beat", 0, 0)), [])]))
    with pytest.raises(HistoryError, match="node z/9 is in the history"):
        list(replay(header(built), lines(1, "z/9")))


def test_each_boot_is_a_fresh_machine() -> None:
    built, _, _ = play(steps=STEPS)
    steps = list(replay(header(built), lines(2, "a/0")))
    assert steps[0].machine is not steps[1].machine


def test_phases_add_up_to_the_whole_move() -> None:
    built, tiny, result = play(steps=STEPS)
    assert isinstance(tiny.history, ListHistory)
    assert result.phases == phases(tiny.history.lines, built.bytes_per_token)
    (one,) = result.phases
    operation = result.operation("m")
    assert operation is not None and one.event == operation.event and one.op == "m"
    # Pin, Pinned, Fetch; the copy; Fence, Fenced, Committed, Release, Released. The client adds its two messages.
    assert (one.control_ns, one.queue_ns, one.copy_ns, one.commit_ns, one.bytes) == (
        3 * MESSAGE_NS,
        0,
        COPY_NS,
        5000,
        5,
    )
    assert operation.duration_ns == one.total_ns + 2 * MESSAGE_NS


def test_a_move_prefix_by_prefix_is_one_move_with_several_copies() -> None:
    by_prefix = {"move": {"from": "a/cpu", "to": "b/cpu", "prompt": "p", "granularity": "prefix", "as": "m"}}
    _, _, result = play(
        steps=[{"store": {"at": "a/cpu", "prompt": "p", "tokens": "3"}}, {"settle": {}}, by_prefix, {"settle": {}}],
        kv={"chunk": "1 tokens", "bytes_per_token": "64 MiB"},
        instances={name: {"locations": {"cpu": {"size": "1 GiB"}}} for name in "ab"},
    )
    (whole,) = result.phases
    assert (whole.op, whole.bytes, whole.queue_ns) == ("m", 3 << 26, 0)
    assert (whole.control_ns, whole.copy_ns) == (3 * MESSAGE_NS, COPY_NS)  # begun at once, in a world without links
    operation = result.operation("m")
    assert operation is not None and operation.duration_ns == whole.total_ns + 2 * MESSAGE_NS


def test_a_move_that_copies_nothing_is_all_control() -> None:
    again = {"move": {"from": "a/cpu", "to": "b/cpu", "prompt": "p", "copy": True}}
    _, _, result = play(steps=[STEPS[0], again, again])
    assert [one.copy_ns > 0 for one in result.phases] == [True, False]
    assert result.phases[1].commit_ns == 0 and result.phases[1].control_ns > 0 and result.phases[1].bytes == 0


def test_a_last_line_that_was_cut_off_is_dropped_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    write(path, lines(3))
    whole = path.read_bytes()
    said: List[str] = []
    for cut in (1, 5, 40):
        path.write_bytes(whole[:-cut])
        expected = 3 if cut == 1 else 2
        assert list(read(path, said.append)[1]) == lines(3)[:expected]
    assert said == [f"{path}:4: the last line was cut off and is dropped"] * 2
    with pytest.warns(UserWarning, match="cut off"):
        list(read(path)[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: b"", ":1: not a kvmove history: it is empty"),
        (lambda data: b"name: a scenario\n", ":1: not a kvmove history"),
        (lambda data: b"\xff\xfe\x00\n" + data, ":1: not a kvmove history"),
        (lambda data: data.replace(b'"version":2', b'"version":1'), ":1: history of version 1, expected 2"),
        (lambda data: data.replace(b'"nonce":1', b'"nonce":"x"'), ":3: not a line of a history"),
        (lambda data: data + b"{}\n", ":5: not a line of a history"),
    ],
)
def test_what_is_no_history_is_refused_by_line(tmp_path: Path, change: Any, text: str) -> None:
    path = tmp_path / "h.jsonl"
    write(path, lines(3))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(HistoryError) as caught:
        list(read(path)[1])
    assert str(path) + text in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="cannot read the history: No such file"):
        read(tmp_path / "none")
    with pytest.raises(HistoryError, match="cannot read the history: Is a directory"):
        read(tmp_path)


class FullDisk:
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        pass


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    sink = FileHistory(tmp_path / "h", Header(VERSION, "sim", "s"))
    assert sink._file is not None
    sink._file.close()
    sink._file = FullDisk()  # type: ignore[assignment]
    sink.add(0, "a/0", Boot(), [])
    with pytest.raises(HistoryError, match="h: cannot write the history: No space left on device"):
        sink.flush()
    sink.add(0, "a/0", Boot(), [])
    sink.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_really_full_disk() -> None:
    with pytest.raises(HistoryError, match="No space left on device"):
        FileHistory(Path("/dev/full"), Header(VERSION, "sim", "s"))


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match="cannot write the history"):
        FileHistory(tmp_path / "file" / "h", Header(VERSION, "sim", "s"))


def test_flushed_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "h"
    sink = FileHistory(path, Header(VERSION, "sim", "s"))
    sink.add(0, "a/0", Boot(), [])
    assert list(read(path)[1]) == []
    sink.flush()
    assert len(list(read(path)[1])) == 1
    sink.close()


def test_merging_keeps_time_then_node_then_each_files_order(tmp_path: Path) -> None:
    b, a, again = lines(3, "b/0", 0), lines(3, "a/0", 0), lines(2, "a/0", 20, 0)
    paths = [tmp_path / name for name in ("b", "a", "again")]
    for path, items in zip(paths, (b, a, again)):
        write(path, items, items[0].node)
    head = Header(VERSION, "real", "s")
    merge(paths, tmp_path / "out", head)
    found, items_read = read(tmp_path / "out")
    assert found == head
    assert list(items_read) == [a[0], b[0], a[1], b[1], a[2], *again, b[2]]


def test_merging_a_killed_process_drops_its_last_line(tmp_path: Path) -> None:
    write(tmp_path / "a", lines(2))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-9])
    said: List[str] = []
    merge([tmp_path / "a"], tmp_path / "out", Header(VERSION, "real", "s"), said.append)
    assert list(read(tmp_path / "out")[1]) == lines(1) and len(said) == 1


def test_merging_names_a_damaged_line(tmp_path: Path) -> None:
    write(tmp_path / "a", lines(2))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(b'"t":10', b'"t":oh'))
    with pytest.raises(HistoryError, match="a:3: not a line"):
        merge([tmp_path / "a"], tmp_path / "out", Header(VERSION, "real", "s"))


def test_packed_lines_are_the_same_lines(tmp_path: Path) -> None:
    _, tiny, _ = play(steps=STEPS)
    assert isinstance(tiny.history, ListHistory)
    items = tiny.history.lines
    for name, packed in (("plain", False), ("packed", True)):
        write(tmp_path / name, items, packed=packed)
    assert list(read(tmp_path / "packed")[1]) == items
    head = Header(VERSION, "real", "s")
    for name in ("plain", "packed"):
        merge([tmp_path / name], tmp_path / f"of {name}", head)
    assert (tmp_path / "of packed").read_bytes() == (tmp_path / "of plain").read_bytes()


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_packed_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a"
    write(path, lines(1), packed=True)
    whole = path.stat().st_size
    write(path, lines(2), packed=True)
    path.write_bytes(path.read_bytes()[: min(whole + cut, path.stat().st_size - 1)])
    said: List[str] = []
    merge([path], tmp_path / "out", Header(VERSION, "real", "s"), said.append)
    assert list(read(tmp_path / "out")[1]) == lines(1) and len(said) == 1 and "a:3" in said[0]


def test_a_damaged_packed_line_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", lines(2), packed=True)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(b"Boot", b"Boat", 1))
    with pytest.raises(HistoryError, match="a:2: not a line"):
        merge([tmp_path / "a"], tmp_path / "out", Header(VERSION, "real", "s"))


def test_a_result_as_json() -> None:
    _, _, result = play(steps=STEPS)
    result.violations.append(Violation("Byte", "a/0", 5, "wrong"))
    body = msgspec.json.decode(msgspec.json.encode(result.to_json()))
    move = body["operations"][1]
    assert {key: move[key] for key in ("op", "what", "state", "num_tokens")} == {
        "op": "m",
        "what": "move",
        "state": "done",
        "num_tokens": 5,
    }
    assert move["event_id"] == "1-1" and 0 < move["start_ns"] < move["end_ns"]
    assert body["placement"] == {"b/cpu": {"p": 5}} and body["violations"][0]["property"] == "Byte"
    assert set(body) >= {"operations", "violations", "placement", "metrics", "phases", "hung", "transport"}
    assert result.operation("none") is None and not result.clean
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
    assert Operation("o", "move").duration_ns == -1


def test_sends_survive(tmp_path: Path) -> None:
    effects: List[Any] = [Send("client", Answer("m", "done", 3))]
    write(tmp_path / "h", [Line(1, "ctl", Received("client", Answer("m", "ok")), effects)])
    assert next(read(tmp_path / "h")[1]).out == effects
