"""Max-min fairness as the textbook has it: raise all rates together, stop those that meet a full link or their cap."""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple


def progressive_filling(
    capacities: Sequence[float], flows: Dict[int, Tuple[Tuple[int, ...], float]]
) -> Dict[int, float]:
    """``flows``: id -> (indices of its links, own cap or 0.0). Returns id -> rate, in the capacities' unit."""
    left: List[float] = list(capacities)
    rates: Dict[int, float] = dict.fromkeys(flows, 0.0)
    rising = set(flows)
    while rising:
        step = float("inf")
        for index, spare in enumerate(left):
            users = sum(1 for fid in sorted(rising) if index in flows[fid][0])
            if users:
                step = min(step, spare / users)
        for fid in sorted(rising):
            cap = flows[fid][1]
            if cap > 0.0:
                step = min(step, cap - rates[fid])
        for fid in sorted(rising):
            rates[fid] += step
            for index in flows[fid][0]:
                left[index] -= step
        full = {index for index, spare in enumerate(left) if spare <= capacities[index] * 1e-13}
        stopped = {
            fid
            for fid in sorted(rising)
            if full.intersection(flows[fid][0]) or (0.0 < flows[fid][1] <= rates[fid] * (1 + 1e-13))
        }
        assert stopped, "no progress"
        rising -= stopped
    return rates
