"""``kvmove calibrate``: a profile comes of what was measured; mistakes cost one line, and are said first."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from kvcore.scenario.profile import CopyCost, Made, Profile, load_profile
from kvcore.scenario.result import CopyRecord, EventPhases, Operation, Result
from kvmove.calibrate import accuracy, foreign, plan
from kvmove.calibrate.accuracy import Accuracy, Move
from kvmove.calibrate.fit import fit
from kvmove.calibrate.measure import Budget, Measuring, budget
from kvmove.calibrate.samples import Samples
from kvmove.calibrate.write import text
from kvmove.cli import call
from kvmove.demo import scenarios_directory
from kvmove.errors import RealUnavailable
from kvmove.play import prepare
from kvmove.spread import spread
from kvsim.run import run as simulate

#: What a made-up machine costs. Calibration is to find these numbers again, knowing only how long things took.
TRUTH = Profile(
    message_latency_ns=90_000,
    service_ns=10_000,
    journal_ns=2_000,
    key_ns=150,
    index_ns=900,
    wake_ns=60_000,
    copies=(
        CopyCost(
            transport="quick",
            queue_ns=300_000,
            first_ns=120_000,
            copy_ns=200_000,
            descriptor_ns=2_500,
            rates=((plan.MIB, 2e10), (32 * plan.MIB, 1.5e10), (512 * plan.MIB, 1e10)),
            process_bytes_per_s=1.6e10,
            host_bytes_per_s=2.4e10,
        ),
    ),
)

SCENARIOS = scenarios_directory()


def measured_of(truth: Profile) -> tuple[Samples, dict[str, plan.Part]]:
    """As if that machine had been measured: its moves' times are those of a simulation of it."""
    samples = Samples("quick")
    parts = {}
    played = [plan.seldom(), plan.sizes(512 * plan.MIB, False, 2), plan.chunks(2), plan.contended(2)]
    for part in [*played, plan.ranks(1, 2), plan.ranks(2, 2)]:
        parts[part.name] = part
        result = simulate(part.built, profile=truth, check=False)
        assert result.clean and all(op.state in ("done", "ok") for op in result.operations), part.name
        samples.add(part, result, [])
    samples.gaps = [float(truth.service_ns)] * 9
    samples.together = {"process": [1.6e10], "host": [2.4e10]}
    return samples, parts


# ---- the fit --------------------------------------------------------------------------------------------------------
def test_the_fit_finds_a_machine_s_numbers_again_from_times_alone() -> None:
    samples, parts = measured_of(TRUTH)
    found = fit([samples], parts, [2_000.0], Made(), "found").profile
    assert (found.service_ns, found.journal_ns) == (10_000, 2_000)
    for name in ("message_latency_ns", "key_ns", "index_ns", "wake_ns"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.05), name
    (cost,), (true,) = found.copies, TRUTH.copies
    assert cost.queue_ns == pytest.approx(true.queue_ns, rel=0.02)
    assert cost.first_ns == pytest.approx(true.first_ns, rel=0.02)
    assert cost.descriptor_ns == pytest.approx(true.descriptor_ns, rel=0.1)
    for size in (64 * plan.KIB, plan.MIB, 20 * plan.MIB, 300 * plan.MIB):
        ours, theirs = (one.overhead_ns(1) + one.bytes_ns(size) for one in (cost, true))
        assert ours == pytest.approx(theirs, rel=0.05), size
    assert (cost.process_bytes_per_s, cost.host_bytes_per_s) == (1.6e10, 2.4e10)


def test_the_fit_finds_what_pushing_costs_beside_what_reading_does() -> None:
    (read,) = TRUTH.copies
    push = msgspec.structs.replace(
        read, push=True, queue_ns=250_000, copy_ns=400_000, rates=((plan.MIB, 5e9), (512 * plan.MIB, 3e9)),
        process_bytes_per_s=0.0, host_bytes_per_s=0.0, first_ns=0,
    )  # fmt: skip
    truth = msgspec.structs.replace(TRUTH, copies=(read, push))
    samples, parts = measured_of(truth)
    part = parts["sizes-push"] = plan.sizes(512 * plan.MIB, False, 2, push=True)
    samples.add(part, simulate(part.built, profile=truth, check=False), [])
    found = fit([samples], parts, [2_000.0], Made(), "found").profile
    assert [cost.push for cost in found.copies] == [False, True]
    for cost, true in zip(found.copies, truth.copies, strict=True):
        for size in (plan.KIB, 64 * plan.KIB, plan.MIB, 20 * plan.MIB, 300 * plan.MIB):
            ours, theirs = (one.overhead_ns(1) + one.bytes_ns(size) for one in (cost, true))
            assert ours == pytest.approx(theirs, rel=0.05), (cost.push, size)
    calm = fit([samples], {**parts}, [2_000.0], Made(), "found").profile.measured()
    assert calm is not None and [cost.push for cost in calm.costs] == [False, True]


def test_with_what_it_found_the_smoke_scenarios_take_as_long() -> None:
    samples, parts = measured_of(TRUTH)
    found = fit([samples], parts, [2_000.0], Made(), "found").profile
    for name in ("move", "prompt-4k", "shared-prefix", "tensor-parallel"):
        built = prepare(str(SCENARIOS / f"smoke/{name}.yaml")).built
        ours, theirs = (simulate(built, profile=profile, check=False) for profile in (found, TRUTH))
        for one, other in zip(ours.operations, theirs.operations, strict=True):
            if one.what == "move":
                assert one.duration_ns == pytest.approx(other.duration_ns, rel=0.03), f"{name} {one.op}"


def test_one_disturbed_measurement_in_three_changes_little() -> None:
    samples, parts = measured_of(TRUTH)
    calm = fit([samples], parts, [2_000.0], Made(), "calm").profile
    moves = [one for one in samples.moves for _ in range(3)]
    for index in range(0, len(moves), 3):
        late = msgspec.structs.replace(moves[index], copy_ns=moves[index].copy_ns * 9, queue_ns=5_000_000)
        moves[index] = msgspec.structs.replace(late, control_ns=8_000_000)
    samples.moves = moves
    assert fit([samples], parts, [2_000.0], Made(), "calm").profile == calm


def test_what_two_copies_at_once_carry_is_what_their_copies_say() -> None:
    part = plan.contended(1)
    (one, other), pair = [[op for op, ask in part.asks.items() if ask.group == group] for group in (1, 2)]
    operations = [Operation(op, "move", "done", start_ns=0, end_ns=900) for op in (one, other)]
    operations += [Operation(op, "move", "done", start_ns=1_000, end_ns=1_900) for op in pair]
    operations[3] = msgspec.structs.replace(operations[3], state="failed")

    def copied(number: int, began_ns: int, ended_ns: int) -> CopyRecord:
        return CopyRecord("b/0", (1, number), "done", True, "a/0", "t", 6_000, began_ns, began_ns, ended_ns)

    copies = [copied(1, 100, 500), copied(2, 200, 700), copied(3, 1_100, 1_200)]
    samples = Samples("t")
    samples.add(part, Result("real", "s", 1, operations, copies=copies), [])
    assert samples.together == {"process": [pytest.approx(12_000 * 1e9 / 600)], "host": []}
    assert samples.carried == {"t": None}


def test_a_spread_is_the_middle_and_where_the_middle_half_lies() -> None:
    found = spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.median, found.low, found.high, found.count) == (3.0, 2.0, 4.0, 5)
    assert found.percent == pytest.approx(100 / 3)
    assert spread([7.0]).percent == 0.0


def test_little_memory_leaves_the_largest_sizes_out() -> None:
    sizes = {ask.nbytes for ask in plan.sizes(40 * plan.MIB, False, 1).asks.values()}
    assert max(sizes) == 32 * plan.MIB and min(sizes) == 32 * plan.KIB
    assert budget(1.0, False, 8 << 30, (), 2).largest == 512 * plan.MIB
    assert budget(1.0, False, 0, (), 2).largest == plan.SIZES[0], "something is always measured"
    assert ("cpu", "gpu", False) in budget(1.0, True, 0, ("disk", "gpu"), 1).kinds


# ---- the file -------------------------------------------------------------------------------------------------------
def test_the_file_says_what_was_measured_and_reads_back_the_same(tmp_path: Path) -> None:
    samples, parts = measured_of(TRUTH)
    samples.carried["by something"] = None
    made = Made(date="2026-01-02", cpu='"odd" \\ cpu', cores=2, host="ab12")
    fitted = fit([samples], parts, [2_000.0, 2_100.0], made, "p", [1.9e10, 2e10, 3e10])
    move = Move("move", "m", 2_000_000, spread([2e6, 3e6, 4e6]), -0.333, {})
    held = Accuracy("something", 3, (move,), 0.333, 0.333)
    path = tmp_path / "p.yaml"
    path.write_text(text(fitted, ["a fact"], held))
    read = load_profile(path)
    assert msgspec.structs.replace(read, made=None) == msgspec.structs.replace(fitted.profile, made=None)
    assert read.made is not None and (read.made.date, read.made.host) == ("2026-01-02", "ab12")
    said = path.read_text()
    assert "# a fact\n" in said and "median error of a move's duration 33%, worst 33%" in said
    assert "move m" in said and "2.00 ms / 3.00 ms" in said and "-33%" in said
    assert read.sum_bytes_per_s == 2e10 and "sum_bytes_per_s: 20_000_000_000" in said
    assert "cpu to cpu, between two processes" in said and "+-" in said
    assert max(map(len, said.splitlines())) <= 120


def test_a_profile_of_another_machine_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.yaml"
    path.write_text('made: {cpu: "Some CPU", cores: 96}\n')
    (line,) = foreign(["", str(path), str(path)])
    assert line.startswith(f"{path} was measured on Some CPU with 96 cores; this is ") and "\n" not in line
    scenario = str(SCENARIOS / "smoke/move.yaml")
    assert call(["run", scenario, "--set", f"network.profile={path}"]) == 0
    assert "was measured on" not in capsys.readouterr()[1], "a simulation of another machine is what was asked for"


# ---- for real -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.real
def test_it_measures_this_machine_and_writes_what_the_simulator_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (only,) = [one for name, one in accuracy.scenarios().items() if name == "move"]
    monkeypatch.setattr(accuracy, "scenarios", lambda: {"move": only})
    path, out = tmp_path / "this.yaml", tmp_path / "out.json"
    command = ["calibrate", "--quick", "--transport", "socket", "--out", str(path), "--json", str(out)]
    assert call(command) == 0
    said, _ = capsys.readouterr()
    assert f"wrote {path}" in said and "median error" in said and "\x1b" not in said
    profile = load_profile(path)
    assert profile.name == "this" and profile.copies[0].transport == "socket"
    assert profile.made is not None and not list(foreign([str(path)]))
    cost = profile.cost("socket", "cpu", "cpu")
    assert cost is not None and [size for size, _ in cost.rates][0] == 32 * plan.KIB
    assert 1e8 < profile.rate("socket", "cpu", "cpu", 32 * plan.MIB) < 1e12
    assert profile.cost("auto", "cpu", "disk", True) is not None
    data = json.loads(out.read_text())
    assert data["accuracy"]["moves"][0]["op"] == "m" and data["accuracy"]["moves"][0]["measured"]["count"] == 3
    assert set(data["accuracy"]["moves"][0]["phases"]) == {"control", "queue", "copy", "commit"}
    assert msgspec.convert(data["profile"], Profile) == profile
    scenario = str(SCENARIOS / "smoke/move.yaml")
    assert call(["run", scenario, "--on", "both", "--transport", "socket", "--set", f"network.profile={path}"]) == 0
    assert call(["calibrate", "--against", str(path), "--quick", "--transport", "socket", "--no-check"]) == 0
    assert "was measured on" not in capsys.readouterr()[1]
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(path.read_text().replace(f'host: "{profile.made.host}"', 'host: "000000000000"'))
    assert (
        call(["run", scenario, "--on", "both", "--transport", "socket", "--set", f"network.profile={elsewhere}"]) == 0
    )
    said, complained = capsys.readouterr()
    (line,) = [line for line in complained.splitlines() if "was measured on" in line]
    assert line == f"kvmove: {elsewhere} was measured on another {profile.made.cpu}: it predicts that machine"
    assert "Traceback" not in said + complained


def test_a_transport_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvreal.pool import HostError

    def fails(part: plan.Part, pool: object) -> None:
        raise HostError("its processes died\nand said more")

    monkeypatch.setattr("kvmove.calibrate.measure.play", fails)
    measuring = Measuring(["socket"], Budget(0.0, True, plan.MIB, ()), lambda said: None)
    with pytest.raises(RealUnavailable, match="socket: its processes died$"):
        measuring.run()


def test_a_move_that_failed_is_no_measurement() -> None:
    def result(world: str, state: str, took: int) -> Result:
        move = Operation("m", "move", state, start_ns=0, end_ns=took)
        return Result(world, "s", 1, [move], phases=[EventPhases(1, "m", 1, 1, 1, 1, 1)])

    sim, good = result("sim", "done", 100), result("real", "done", 200)
    (move,) = accuracy._moves("s", sim, [good, good])
    assert move.error == -0.5
    assert accuracy._moves("s", sim, [good, result("real", "failed", 5)]) == []


# ---- mistakes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--transport", "pigeon"], "--transport pigeon: expected one of"),
        (["--out", "nowhere/at/all.yaml"], "--out nowhere/at/all.yaml: there is no directory nowhere/at"),
        (["--out", "."], "--out .: expected a file, and that is a directory"),
        (["--json", "nowhere/at/all.json"], "--json nowhere/at/all.json: there is no directory nowhere/at"),
        (["--seconds", "0"], "seconds"),
        (["--against", "none.yaml"], "none.yaml"),
        (["--against", "bad.yaml"], "bad.yaml:1:1: speed: unknown field 'speed'"),
        (["--against", "below.yaml"], "below.yaml: service_ns is -1, expected nanoseconds, 0 or more"),
    ],
)
def test_a_mistake_costs_one_line_and_nothing_is_measured(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvmove.calibrate.measure.play", lambda *args: pytest.fail("something was measured"))
    (tmp_path / "bad.yaml").write_text("speed: 3\n")
    (tmp_path / "below.yaml").write_text("service_ns: -1\n")
    before = sorted(tmp_path.rglob("*"))
    assert call(["calibrate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out
    assert sorted(tmp_path.rglob("*")) == before


def test_where_it_may_not_write_it_says_so_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmove.cli.calibrate.os.access", lambda path, mode: False)  # whoever is root may do anything
    assert call(["calibrate", "--out", str(tmp_path / "p.yaml")]) == 2
    assert capsys.readouterr()[1] == f"kvmove: --out {tmp_path}/p.yaml: may not be written\n"
