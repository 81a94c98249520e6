"""Where nodes are to one another: what a message takes from one to another, and the links that bytes cross.

An instance hangs by its NIC (both directions at once) from a switch; switches form a tree, and trees meet in a core
that costs nothing. ``links: {a-b: ...}`` is a wire of its own between two instances. A scenario that says nothing about
its network runs on one host: every copy runs at the profile's rate, and all share the host's memory. Ranks of one
instance share its NIC. A location with a bandwidth (a disk) is one more link for whatever reads or writes it.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Tuple, final

from kvcore.protocol.config import Config, WorkerSpec
from kvcore.scenario import schema
from kvcore.scenario.build import AnySpec, Built
from kvcore.scenario.units import Duration
from kvsim.costs import Profile
from kvsim.fabric import Fabric
from kvsim.maxmin import Link

Path = Tuple[Tuple[Link, ...], int, float]
"""(the links, latency in ns, a copy's own limit in bytes a second or 0.0 for none)."""


@final
class Site:
    """An instance's attachment: ``out`` and ``inward`` are its NIC's two sides, ``trunk`` the switches above it."""

    def __init__(self, name: str, somewhere: bool = True) -> None:
        self.name: str = name
        self.somewhere: bool = somewhere
        self.out: Tuple[Link, ...] = ()
        self.inward: Tuple[Link, ...] = ()
        self.inside: Optional[Link] = None
        self.latency_ns: int = 0
        self.trunk: Tuple[str, ...] = ()  # the nearest first
        self.places: Dict[str, Tuple[Optional[Link], int]] = {}  # location -> (its link, its latency)


@final
class Network:
    def __init__(self, built: Built, profile: Profile, fabric: Fabric) -> None:
        self.profile: Profile = profile
        self.fabric: Fabric = fabric
        self.config: schema.Network = built.network
        self.constants: Config = built.config
        self.sites: Dict[str, Site] = {}
        self.uplinks: Dict[str, Tuple[Optional[Link], Optional[Link], int]] = {}
        self.wires: Dict[Tuple[str, str], Tuple[Link, int]] = {}
        self.named: bool = names_a_network(built.network, built.instances)
        self.host: Optional[Link] = None if self.named else fabric.link("host", profile.host_bytes_per_s)
        self.nowhere: Site = Site("", False)
        self._switches()
        for name, instance in built.instances.items():
            self.sites[name] = self._site(name, instance)
        self._wires()
        #: what every message takes, or -1: it depends on who sends it to whom
        self.uniform_ns: int = profile.message_latency_ns
        if self.wires or any(site.latency_ns for site in self.sites.values()):
            self.uniform_ns = -1
        #: two NICs are all that there is between any two instances
        self.plain: bool = self.named and not self.wires and not self.uplinks
        if any(site.places for site in self.sites.values()):
            self.plain = False

    # ---- building ---------------------------------------------------------------------------------------------------
    def _switches(self) -> None:
        for name, switch in self.config.switches.items():
            latency_ns = _ns(switch.latency, self.constants)
            up: Optional[Link] = None
            down: Optional[Link] = None
            if switch.bandwidth is not None:
                up = self.fabric.link(f"{name}.up", switch.bandwidth.bytes_per_s)
                down = self.fabric.link(f"{name}.down", switch.bandwidth.bytes_per_s)
            self.uplinks[name] = (up, down, latency_ns)

    def site(self, spec: AnySpec) -> Site:
        """Where a node is. Controller and client are nowhere: they are reached by the message latency alone."""
        if not isinstance(spec, WorkerSpec):
            return self.nowhere
        name = spec.name.rpartition("/")[0]
        site = self.sites.get(name)
        if site is None:
            site = self.sites[name] = self._site(name, schema.Instance())
        return site

    def _site(self, name: str, instance: schema.Instance) -> Site:
        site = Site(name)
        nic = instance.nic if instance.nic is not None else self.config.nic
        if nic is not None:
            site.latency_ns = _ns(nic.latency, self.constants)
        if self.named:
            rate = self.profile.copy_bytes_per_s
            if nic is not None and nic.bandwidth is not None:
                rate = nic.bandwidth.bytes_per_s
            site.out = (self.fabric.link(f"{name}.out", rate),)
            site.inward = (self.fabric.link(f"{name}.in", rate),)
        trunk: List[str] = []
        switch = instance.switch
        while switch:
            if switch in trunk or switch not in self.config.switches:
                raise ValueError(f"switch {switch}: it is above itself or nowhere described, expected a tree")
            trunk.append(switch)
            switch = self.config.switches[switch].uplink
        site.trunk = tuple(trunk)
        for location, spec in instance.locations.items():
            link: Optional[Link] = None
            if spec.bandwidth is not None:
                link = self.fabric.link(f"{name}/{location}", spec.bandwidth.bytes_per_s)
            latency_ns = _ns(spec.latency, self.constants)
            if link is not None or latency_ns:
                site.places[location] = (link, latency_ns)
        return site

    def _wires(self) -> None:
        for name, wire in self.config.links.items():
            a, b = split_pair(name, self.sites)
            latency_ns = _ns(wire.latency, self.constants)
            rate = wire.bandwidth.bytes_per_s if wire.bandwidth is not None else self.profile.copy_bytes_per_s
            for one, other in ((a, b), (b, a)):
                self.wires[(one, other)] = (self.fabric.link(f"{one}-{other}", rate), latency_ns)

    # ---- asking -----------------------------------------------------------------------------------------------------
    def message_ns(self, one: Site, other: Site) -> int:
        """What a control message takes from one site to another, besides its receiver's service time."""
        if self.uniform_ns >= 0:
            return self.uniform_ns
        distance_ns = 0
        if one is not other:
            if one.somewhere and other.somewhere:
                distance_ns = self._between(one, other)[1]
            else:
                distance_ns = one.latency_ns + other.latency_ns
        return self.profile.message_latency_ns + distance_ns

    def path(self, one: Site, src_location: str, other: Site, dst_location: str) -> Path:
        """What bytes cross from a location at one site to one at another. Each link once."""
        if self.plain and one is not other:
            return one.out + other.inward, one.latency_ns + other.latency_ns, 0.0
        if one is other:
            links, latency_ns, cap = self._inside(one)
        else:
            links, latency_ns, cap = self._between(one, other)
        if one.places or other.places:
            for site, location in ((one, src_location), (other, dst_location)):
                link, more_ns = site.places.get(location, (None, 0))
                latency_ns += more_ns
                if link is not None and link not in links:
                    links = (*links, link)
        return links, latency_ns, cap

    def _inside(self, site: Site) -> Path:
        if self.host is not None:
            return (self.host,), 0, self.profile.memcpy_bytes_per_s
        if site.inside is None:
            site.inside = self.fabric.link(f"{site.name}.memcpy", self.profile.memcpy_bytes_per_s)
        return (site.inside,), 0, 0.0

    def _between(self, one: Site, other: Site) -> Path:
        wire = self.wires.get((one.name, other.name))
        if wire is not None:
            return (wire[0],), wire[1], 0.0
        if self.host is not None:
            return (self.host,), 0, self.profile.copy_bytes_per_s
        latency_ns = one.latency_ns + other.latency_ns
        if not one.trunk and not other.trunk:
            return one.out + other.inward, latency_ns, 0.0
        links: List[Link] = list(one.out)
        shared = set(one.trunk) & set(other.trunk)
        for switch in one.trunk:
            if switch in shared:
                break
            up, _, more_ns = self.uplinks[switch]
            latency_ns += more_ns
            if up is not None:
                links.append(up)
        downs: List[Link] = []
        for switch in other.trunk:
            if switch in shared:
                break
            _, down, more_ns = self.uplinks[switch]
            latency_ns += more_ns
            if down is not None:
                downs.append(down)
        return (*links, *reversed(downs), *other.inward), latency_ns, 0.0


def names_a_network(network: schema.Network, instances: Mapping[str, schema.Instance]) -> bool:
    """Does the scenario say how its instances are connected?"""
    if network.nic is not None or network.links or network.switches:
        return True
    return any(instance.nic is not None or instance.switch for instance in instances.values())


def split_pair(name: str, sites: Mapping[str, Site]) -> Tuple[str, str]:
    """``a-b`` -> (a, b); names may hold dashes themselves. ValueError if it names no two instances."""
    parts = name.split("-")
    for i in range(1, len(parts)):
        a, b = "-".join(parts[:i]), "-".join(parts[i:])
        if a in sites and b in sites:
            return a, b
    raise ValueError(f"network.links: {name} does not name two instances, expected two of {', '.join(sites)} as a-b")


def _ns(duration: Optional[Duration], config: Config) -> int:
    return 0 if duration is None else duration.ns(config)
