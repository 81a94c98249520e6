"""What a move would do and cost, by what the registry sees now and by a profile of costs. Nothing is reserved."""

from __future__ import annotations

from typing import Dict, Final, List, Optional, Sequence, Tuple

from kvcore.protocol.chunks import namespace_mismatch
from kvcore.protocol.controller import Controller
from kvcore.protocol.messages import Key, Position
from kvcore.protocol.registry import Place, Registry
from kvcore.scenario.profile import AUTO, CopyCost, Profile
from kvcore.scenario.topology import kind_of
from kvreal.http.models import DryRunReply
from kvreal.http.status import Reply, refusal

MESSAGES: Final = 9
"""One after another: Pin, Pinned, Fetch, Reserved, Fence, Fenced, Committed, Release, Released."""
RECORDS: Final = 3
"""Begin, Decide, Outcome."""


def dry_run(
    machine: Controller,
    src: Position,
    dst: Position,
    keys: Sequence[Key],
    lens: Sequence[int],
    if_room: bool,
    profile: Profile,
    prefill_tokens_per_s: float,
) -> Reply:
    """Empty ``keys``: all that ``src`` holds."""
    registry = machine.registry
    sources, reason, detail = registry.place(src)
    destinations = None
    if sources is not None:
        destinations, reason, detail = registry.place(dst)
    if sources is None or destinations is None:
        return refusal(reason, detail)
    difference = namespace_mismatch(sources[0].space(src[1]), destinations[0].space(dst[1]))
    if difference is not None:
        return refusal("mismatch", f"source {difference[0]}; destination {difference[1]}")
    chunks = _held(registry, src, keys, lens)
    there = registry.places[dst]
    absent = [tokens for key, tokens in chunks if not _has(registry, there, key)]
    block = sources[0].space(src[1]).block_tokens
    crossing = sum(-(-tokens // block) * block for tokens in absent)
    views = [rank.views[dst[1]] for rank in destinations]
    slots = [loc.slots for rank in destinations for loc in rank.register.locations if loc.name == dst[1]]
    free = min(n - len(view.entries) for n, view in zip(slots, views))
    sizes = [rank.space(src[1]).bytes_per_token for rank in sources]
    held = sum(tokens for _, tokens in chunks)
    fits = len(absent) <= (free if if_room else min(slots))
    inside = src[0] == dst[0]
    tokens = sum(absent)
    push = not inside and machine.moves.direction(sources, destinations, src[1], dst[1], tokens, len(absent))[0]
    cost = profile.cost(AUTO, kind_of(src[1]), kind_of(dst[1]), inside, push)
    move_s = _seconds(profile, cost, len(absent), [crossing * size for size in sizes])
    recompute_s = held / prefill_tokens_per_s
    reply = DryRunReply(
        num_tokens=held if fits or not if_room else 0,
        held_tokens=held,
        present_tokens=held - tokens,
        bytes=crossing * sum(sizes),
        evicted_chunks=0 if if_room else max(0, min(len(absent), min(slots)) - max(0, free)),
        fits=fits,
        move_s=move_s,
        recompute_s=recompute_s,
        recompute_is_quicker=recompute_s < move_s,
        direction="push" if push else "read",
        profile=profile.name,
        prefill_tokens_per_s=prefill_tokens_per_s,
    )
    return Reply(200, reply)


def _held(
    registry: Registry, src: Position, keys: Sequence[Key], lens: Sequence[int]
) -> List[Tuple[Key, int]]:
    if not keys:
        every: Dict[Key, int] = {key: n for chain in registry.chains(src) for key, n in zip(*chain)}
        return list(every.items())
    place = registry.places[src]
    found: List[Tuple[Key, int]] = []
    for key, tokens in zip(keys, lens):
        if not _has(registry, place, key):
            break
        found.append((key, tokens))
    return found


def _has(registry: Registry, place: Place, key: Key) -> bool:
    return registry.holders.get(key, {}).get(place, 0) >= place.ranks


def _seconds(profile: Profile, cost: Optional[CopyCost], chunks: int, rank_bytes: Sequence[int]) -> float:
    """Ranks copy at the same time; the host's memory is shared. ``cost``: if the profile has measured such copies."""
    control = MESSAGES * (profile.message_latency_ns + profile.service_ns) + RECORDS * profile.journal_ns
    if not chunks:
        return control / 1e9
    if cost is not None:
        shared_ns = sum(rank_bytes) * 1e9 / cost.host_bytes_per_s if cost.host_bytes_per_s else 0.0
        return (control + cost.overhead_ns(chunks) + max(cost.bytes_ns(max(rank_bytes)), shared_ns)) / 1e9
    copy_s = max(max(rank_bytes) / profile.copy_bytes_per_s, sum(rank_bytes) / profile.host_bytes_per_s)
    return (control + profile.transfer_overhead_ns(chunks)) / 1e9 + copy_s
