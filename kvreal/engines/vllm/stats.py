"""The connector's numbers in vLLM's own /metrics, as ``kvmove_engine_*``."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvreal.engines.vllm.tally import ABOUT, LABELS, Counts, parse


class Stats(KVConnectorStats):  # type: ignore[misc]
    """``data``: counts of ``tally``."""

    data: Counts

    @classmethod
    def of(cls, counts: Counts) -> Optional[Stats]:
        return cls(data=dict(counts)) if counts else None

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key, value in other.data.items():
            self.data[key] = self.data.get(key, 0) + value
        return self

    def reduce(self) -> Dict[str, Any]:
        return {key: round(value, 6) for key, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class PromStats(KVConnectorPromMetrics):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: List[str], per_engine: Dict[int, List[object]]):
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        self.counters: Dict[str, Any] = {}
        for name, labels in LABELS.items():
            self.counters[name] = self._counter_cls(
                name=f"kvmove_engine_{name}", documentation=ABOUT[name], labelnames=[*labelnames, *labels]
            )

    def observe(self, transfer_stats_data: Dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            name, labels = parse(key)
            if name in self.counters:
                self.counters[name].labels(*self.per_engine_labelvalues[engine_idx], *labels).inc(value)
