"""Who is there: instances, their ranks, what is in their locations. Questions of the reference among them."""

from __future__ import annotations

import uuid
from typing import Any, Callable, Dict, List, Optional

from kvcore.protocol.controller import Controller
from kvcore.protocol.messages import Namespace, Position, event_name
from kvcore.protocol.registry import Rank
from kvreal.http import models as b
from kvreal.http.status import Reply, refusal


def fresh(what: str) -> str:
    """An id for what leaves no event behind."""
    return f"{what}-{uuid.uuid4().hex[:16]}"


class Members:
    def __init__(
        self, machine: Controller, now: Callable[[], int], nowhere: Callable[[Position], Optional[Reply]]
    ) -> None:
        """``nowhere``: why there is no such place; None if there is."""
        self.machine: Controller = machine
        self.now: Callable[[], int] = now
        self.nowhere: Callable[[Position], Optional[Reply]] = nowhere

    def awaited(self) -> List[str]:
        """Instances that the journal knows and that may still come back by themselves."""
        registry = self.machine.registry
        restored = {rank.register.instance for rank in registry.issued.values() if rank.clears < 0}
        return sorted(name for name in restored if registry.instance(name) is None)

    def health(self, body: b.InstanceBody) -> Reply:
        registry = self.machine.registry
        some = [rank for (name, _), rank in registry.ranks.items() if name == body.instance_id]
        if not some:
            return self.nowhere((body.instance_id, "")) or refusal("unknown_instance", body.instance_id)
        late_ns = 2 * self.machine.spec.config.beat_ns
        codes: Dict[str, int] = {}
        for number in range(some[0].register.namespace.ranks):
            rank = registry.ranks.get((body.instance_id, number))
            late = rank is not None and self.now() - rank.heard_ns > late_ns
            codes[str(number)] = 1 if rank is None else 2 if late else 0
        return Reply(200, b.HealthReply(fresh("health"), codes))

    def query_instance(self, body: b.QueryInstanceBody) -> Reply:
        ip = "127.0.0.1" if body.ip == "localhost" else body.ip
        ranks = self.machine.registry.ranks
        names = sorted({name for (name, _), rank in ranks.items() if rank.address.rpartition(":")[0] == ip})
        if not names:
            hosts = sorted({rank.address.rpartition(":")[0] for rank in ranks.values()})
            return refusal("unknown_instance", f"no instance at {body.ip}", known=hosts)
        return Reply(200, b.QueryInstanceReply(body.event_id or fresh("query"), names[0], names))

    def query_worker_info(self, body: b.QueryWorkerInfoBody) -> Reply:
        registry = self.machine.registry
        if body.instance_id != "all" and not any(name == body.instance_id for name, _ in registry.ranks):
            return self.nowhere((body.instance_id, "")) or refusal("unknown_instance", body.instance_id)
        infos = []
        for (name, number), rank in sorted(registry.ranks.items()):
            wanted = body.worker_ids is None or number in body.worker_ids
            if body.instance_id in ("all", name) and wanted:
                host, _, port = rank.address.rpartition(":")
                infos.append(
                    b.WorkerInfo(
                        name, number, host, int(port or 0), rank.register.endpoint,
                        rank.register.since_ns / 1e9, rank.heard_ns / 1e9,
                    )
                )  # fmt: skip
        return Reply(200, b.QueryWorkerInfoReply(fresh("query"), infos))

    def instances(self) -> Reply:
        registry = self.machine.registry
        by_name: Dict[str, List[Rank]] = {}
        for (name, _), rank in sorted(registry.ranks.items()):
            by_name.setdefault(name, []).append(rank)
        now = self.now()
        views = [
            b.InstanceView(
                instance_id=name,
                whole=registry.instance(name) is not None,
                ranks=[_rank_view(rank, now) for rank in ranks],
                namespace=_fields(ranks[0].register.namespace),
            )
            for name, ranks in by_name.items()
        ]
        return Reply(200, b.InstancesReply(views, self.awaited()))


def _fields(namespace: Namespace) -> Dict[str, Any]:
    return {name: getattr(namespace, name) for name in namespace.__struct_fields__}


def _rank_view(rank: Rank, now: int) -> b.RankView:
    places = []
    for location in rank.register.locations:
        space = rank.space(location.name)
        size, block = space.bytes_per_token, space.block_tokens
        entries = rank.views[location.name].entries
        tokens = sum(entry.num_tokens for entry in entries.values())
        whole = sum(-(-entry.num_tokens // block) * block for entry in entries.values()) if block > 1 else tokens
        places.append(
            b.LocationView(
                name=location.name, slots=location.slots, chunks=len(entries), tokens=tokens, bytes=whole * size,
                capacity_bytes=location.slots * location.slot_size(rank.register.namespace),
                namespace=_fields(space) if location.namespace is not None else None,
            )
        )  # fmt: skip
    return b.RankView(
        rank=rank.register.rank, address=rank.address, epoch=event_name(rank.epoch), since=rank.register.since_ns / 1e9,
        heard_s_ago=max(0.0, (now - rank.heard_ns) / 1e9), locations=places,
    )  # fmt: skip
