"""Paths through what a scenario's network describes, and what a profile may say."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List

import pytest

from kvcore.scenario.loader import ScenarioError
from kvcore.scenario.schema import Instance, Link, LocationSpec, Network, Switch
from kvcore.scenario.units import Duration, Rate, Size
from kvsim.costs import Profile, ProfileError, load_profile
from tests.sim.stubs import CPU, Stage


def link(rate: str, latency: str = "0 s") -> Link:
    return Link(bandwidth=Rate.parse(rate), latency=Duration.parse(latency))


def stage(instances: Dict[str, Instance], network: Network) -> Stage:
    return Stage(instances=instances, network=network)


def names(stage: Stage, a: str, b: str, src: str = CPU, dst: str = CPU) -> List[str]:
    one, other = stage.node(a).site, stage.node(b).site
    return [link.name for link in stage.cluster.network.path(one, src, other, dst)[0]]


def latency_ns(stage: Stage, a: str, b: str) -> int:
    one, other = stage.node(a).site, stage.node(b).site
    return stage.cluster.network.path(one, CPU, other, CPU)[1]


def test_nics() -> None:
    world = stage({"a": Instance(nic=link("2 GB/s", "3 us")), "b": Instance()}, Network(nic=link("1 GB/s", "5 us")))
    assert names(world, "a/0", "b/0") == ["a.out", "b.in"]
    assert latency_ns(world, "a/0", "b/0") == 8000
    assert world.node("a/0").site.out[0].capacity == 2.0
    assert names(world, "a/0", "a/0") == ["a.memcpy"]
    network = world.cluster.network
    one, other, nowhere = world.node("a/0").site, world.node("b/0").site, world.node("ctl").site
    assert network.message_ns(one, other) == 1000 + 8000
    assert network.message_ns(nowhere, one) == 1000 + 3000
    assert network.message_ns(one, one) == 1000


def test_a_wire_between_two_instances_is_theirs_alone() -> None:
    world = stage(
        {"a-1": Instance(), "b": Instance(), "c": Instance()},
        Network(nic=link("1 GB/s"), links={"a-1-b": link("10 Gbit/s", "20 us")}),
    )
    assert names(world, "a-1/0", "b/0") == ["a-1-b"]
    assert names(world, "b/0", "a-1/0") == ["b-a-1"]
    assert latency_ns(world, "b/0", "a-1/0") == 20_000
    assert names(world, "b/0", "c/0") == ["b.out", "c.in"]


def test_switches_are_a_tree() -> None:
    switches = {
        "core": Switch(),
        "left": Switch(uplink="core", bandwidth=Rate.parse("10 GB/s"), latency=Duration.parse("1 us")),
        "right": Switch(uplink="core", bandwidth=Rate.parse("10 GB/s"), latency=Duration.parse("2 us")),
    }
    instances = {
        "a": Instance(switch="left"),
        "b": Instance(switch="left"),
        "c": Instance(switch="right"),
        "d": Instance(switch="core"),
        "e": Instance(),
    }
    world = stage(instances, Network(nic=link("1 GB/s"), switches=switches))
    assert names(world, "a/0", "b/0") == ["a.out", "b.in"]
    assert names(world, "a/0", "c/0") == ["a.out", "left.up", "right.down", "c.in"]
    assert latency_ns(world, "a/0", "c/0") == 3000
    assert names(world, "c/0", "d/0") == ["c.out", "right.up", "d.in"]
    assert names(world, "e/0", "a/0") == ["e.out", "left.down", "a.in"]


def test_an_uplink_is_shared_by_those_below_it() -> None:
    """Two racks of two, an uplink as fast as one NIC: two crossing copies get half each."""
    switches = {"r1": Switch(uplink="top", bandwidth=Rate.parse("1 GB/s")), "r2": Switch(uplink="top"), "top": Switch()}
    instances = {name: Instance(switch="r1" if name in "ab" else "r2") for name in "abcd"}
    world = stage(instances, Network(nic=link("1 GB/s"), switches=switches))
    fabric = world.cluster.fabric
    flows = []
    for one, other in (("a/0", "c/0"), ("b/0", "d/0")):
        path = world.cluster.network.path(world.node(one).site, CPU, world.node(other).site, CPU)
        flows.append(fabric.start(path[0], 10**9, lambda arg: None, None))
    world.loop.advance(world.loop.now_ns)
    assert [fabric.rate(flow) for flow in flows] == pytest.approx([5e8, 5e8])


def test_a_cycle_of_switches_is_refused() -> None:
    switches = {"x": Switch(uplink="y"), "y": Switch(uplink="x")}
    with pytest.raises(ValueError, match="switch x: .*expected a tree"):
        stage({"a": Instance(switch="x")}, Network(switches=switches))


def test_a_wire_to_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="a-z does not name two instances"):
        stage({"a": Instance(), "b": Instance()}, Network(links={"a-z": link("1 GB/s")}))


def test_a_disk_is_a_link_of_its_own() -> None:
    disk = LocationSpec(size=Size.parse("1 MiB"), bandwidth=Rate.parse("500 MB/s"), latency=Duration.parse("80 us"))
    world = stage(
        {"a": Instance(locations={"disk": disk, CPU: LocationSpec(size=Size.parse("1 MiB"))}), "b": Instance()},
        Network(nic=link("1 GB/s")),
    )
    assert names(world, "a/0", "b/0", "disk") == ["a.out", "b.in", "a/disk"]
    assert names(world, "a/0", "a/0", CPU, "disk") == ["a.memcpy", "a/disk"]
    assert names(world, "a/0", "a/0", "disk", "disk") == ["a.memcpy", "a/disk"]
    assert names(world, "a/0", "b/0") == ["a.out", "b.in"]


def test_without_a_network_all_share_one_host() -> None:
    world = stage({"a": Instance(), "b": Instance()}, Network())
    assert names(world, "a/0", "b/0") == ["host"]
    path = world.cluster.network.path(world.node("a/0").site, CPU, world.node("b/0").site, CPU)
    assert path[2] == Profile().copy_bytes_per_s


# ---- profiles
PROFILES = Path(__file__).parents[2] / "profiles"


def test_the_default_profile_says_what_the_code_says() -> None:
    profile = load_profile(PROFILES / "default.yaml")
    assert profile == Profile(about=profile.about)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("message_latency_ns: -1", "message_latency_ns is -1"),
        ("copy_bytes_per_s: 0", "copy_bytes_per_s is 0"),
        ("mesage_latency_ns: 1", "mesage_latency_ns"),
        ("service_ns: fast", "service_ns"),
        ("- 1", "found a list, expected a mapping"),
    ],
)
def test_a_wrong_profile_is_one_line(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises((ProfileError, ScenarioError)) as caught:
        load_profile(path)
    assert what in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_profile(tmp_path / "none.yaml")
