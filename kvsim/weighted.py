"""Rates where flows are not alike: by priority and by weight, as a real process sees to it for its own copies.

Only what one process carries out is told apart (kvreal/transfer/flow.py): whose turn it is there is decided by its
own copies' terms, and nobody asks another process. So against others a process has as many shares of a link as copies
on it, whatever their weights; among its own copies these shares are divided by weight; and a copy of a lower priority
gets what those above it in its process leave.

``solve`` does a whole connected component anew, by progressive filling, the highest first. It is for the seldom case;
where all flows are alike kvsim/maxmin.py solves only what changes. Its rates are max-min fair there too, with the
bottlenecks that maxmin.py goes on from, so that either may follow the other.
"""

from __future__ import annotations

from typing import Dict, List

from kvsim.maxmin import Flow, Link

_FULL = 1.0 + 1e-12


def solve(dirty: List[Link]) -> List[Flow]:
    """The flows whose ``next_rate`` (bytes a nanosecond) is their rate from now on: all that dirty links reach."""
    flows = _component(dirty)
    by_rank: Dict[int, List[Flow]] = {}
    for flow, rank in _ranks(flows).items():
        by_rank.setdefault(rank, []).append(flow)
    left: Dict[Link, float] = {}
    for flow in flows:
        for link in flow.path:
            left[link] = link.capacity
            link.resized = False
    for rank in sorted(by_rank):
        _fill(by_rank[rank], left)
    return flows


def _component(dirty: List[Link]) -> List[Flow]:
    links = dict.fromkeys(dirty)
    flows: Dict[int, Flow] = {}
    waiting = list(links)
    while waiting:
        for flow in waiting.pop().flows.values():
            if flow.fid not in flows:
                flows[flow.fid] = flow
                new = [link for link in flow.path if link not in links]
                links.update(dict.fromkeys(new))
                waiting += new
    return [flows[fid] for fid in sorted(flows)]


def _ranks(flows: List[Flow]) -> Dict[Flow, int]:
    """0 for what has the highest priority of its process's flows here, 1 for the next, and so on."""
    known: Dict[object, Dict[int, None]] = {}
    for flow in flows:
        known.setdefault(flow.owner, {})[_priority(flow)] = None
    order = {owner: sorted(found, reverse=True) for owner, found in known.items()}
    return {flow: order[flow.owner].index(_priority(flow)) for flow in flows}


def _priority(flow: Flow) -> int:
    return flow.terms.priority if flow.terms is not None else 0


def _weights(flows: List[Flow]) -> Dict[Flow, float]:
    """Each process's come to as many as it has flows here."""
    sums: Dict[object, int] = {}
    counts: Dict[object, int] = {}
    for flow in flows:
        sums[flow.owner] = sums.get(flow.owner, 0) + (flow.terms.weight if flow.terms is not None else 1)
        counts[flow.owner] = counts.get(flow.owner, 0) + 1
    return {
        flow: (flow.terms.weight if flow.terms is not None else 1) * counts[flow.owner] / sums[flow.owner]
        for flow in flows
    }


def _fill(flows: List[Flow], left: Dict[Link, float]) -> None:
    """Raise them together, each by its weight, out of what those before them have left."""
    weights = _weights(flows)
    rising = dict.fromkeys(flows)
    load: Dict[Link, float] = {}
    for flow in flows:
        for link in flow.path:
            load[link] = load.get(link, 0.0) + weights[flow]
    while rising:
        level, full = min(((left[link] / load[link], link) for link in load), key=lambda one: (one[0], one[1].index))
        capped = [flow for flow in rising if 0.0 < flow.cap <= level * weights[flow] * _FULL]
        if capped:
            stopped = [min(capped, key=lambda flow: (flow.cap / weights[flow], flow.fid))]
        else:
            stopped = [flow for flow in rising if full in flow.path]
        for flow in stopped:
            rate = flow.next_rate = flow.cap if capped else level * weights[flow]
            flow.bottleneck = None if capped else full
            del rising[flow]
            for link in flow.path:
                left[link] = max(0.0, left[link] - rate)
                load[link] -= weights[flow]
        for link in [link for link in load if not any(flow in rising for flow in link.flows.values())]:
            del load[link]
