"""``KVMoveConnector``: what vLLM loads. It says nothing itself; it passes on to ``Scheduler`` or ``Worker``.

vLLM ends when a connector raises an exception. So nothing that goes wrong after the start leaves this file: it is
logged, and the answer is "nothing found", "nothing to do", or "these blocks were not loaded".
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple, TypeVar

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvcore.scenario.topology import kind_of
from kvreal.engines.vllm import api
from kvreal.engines.vllm.blocks import Paged
from kvreal.engines.vllm.plan import Plan
from kvreal.engines.vllm.scheduler import LEASE_S, Scheduler
from kvreal.engines.vllm.space import check, space_of
from kvreal.engines.vllm.stats import PromStats, Stats
from kvreal.engines.vllm.worker import Worker
from kvreal.instance_file import path_from, read

log = logging.getLogger("kvmove.engine")

api.check(KVConnectorBase_V1, vllm.__version__)

F = TypeVar("F", bound=Callable[..., Any])


def safe(default: Callable[[], Any]) -> Callable[[F], F]:
    """Whatever the method raises is logged; vLLM gets ``default()``."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception:
                log.exception("%s failed; vLLM goes on without it", method.__name__)
                return default()

        return guarded  # type: ignore[return-value]

    return wrap


@dataclass
class Metadata(KVConnectorMetadata):  # type: ignore[misc]
    """Of one step."""

    plan: Plan = field(default_factory=Plan)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A worker's: where its rank listens, and how large a block is."""

    address: str
    block_tokens: int
    block_bytes: int


class KVMoveConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """One instance in vLLM's scheduler process, one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check(vllm_config, kv_cache_config)
        extra = self._kv_transfer_config.get_from_extra_config
        self.config: str = path_from(extra("config", None), os.environ)
        self.scheduler: Optional[Scheduler] = None
        self.worker: Optional[Worker] = None
        if role == KVConnectorRole.SCHEDULER:
            block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            mode = str(extra("load", "auto"))
            if mode not in ("sync", "async", "auto"):
                raise ValueError(f"kv_connector_extra_config.load: found {mode!r}, expected sync, async or auto")
            overlapping = bool(getattr(vllm_config.scheduler_config, "async_scheduling", False))
            self.scheduler = Scheduler(block, mode, float(extra("lease_s", LEASE_S)), overlapping)
            _end_with_the_server()
        else:
            _prepare_amx()

    @property
    def requires_kv_delivery(self) -> bool:
        """What is not stored is a miss later, nothing worse."""
        return False

    # ---- scheduler side
    @safe(lambda: None)
    def set_xfer_handshake_metadata(self, metadata: Dict[int, Handshake]) -> None:
        if self.scheduler is not None and metadata:
            ranks = [metadata[rank] for rank in sorted(metadata)]
            server = multiprocessing.parent_process()
            parent = server.pid if server is not None and server.pid is not None else 0
            self.scheduler.connect([rank.address for rank in ranks], ranks[0].block_bytes, parent)

    @safe(lambda: None)
    def on_new_request(self, request: Any) -> None:
        if self.scheduler is not None:
            self.scheduler.new_request(request)

    @safe(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Tuple[Optional[int], bool]:
        return self.scheduler.matched(request, num_computed_tokens) if self.scheduler is not None else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self.scheduler is None:
            return
        block_ids = blocks.get_block_ids()[0]
        try:
            self.scheduler.admitted(request, block_ids, num_external_tokens)
        except Exception:
            log.exception("a load is not prepared")
            self.scheduler.abandon(request, block_ids, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> Dict[Any, int]:
        if not num_external_tokens or self.scheduler is None:
            return {}
        disk = kind_of(self.scheduler.source_of(request)) == "disk"
        return {CacheHitSource.DISK if disk else CacheHitSource.HOST: num_external_tokens}

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        if self.scheduler is None:
            return Metadata()
        try:
            return Metadata(self.scheduler.plan(scheduler_output))
        except Exception:
            log.exception("a step is not planned; what was to be loaded in it is computed")
            return Metadata(self.scheduler.no_plan())

    @safe(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        if self.scheduler is not None and connector_output.invalid_block_ids:
            self.scheduler.failed(sorted(connector_output.invalid_block_ids))

    def request_finished(self, request: Any, block_ids: List[int]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        if self.scheduler is None:
            return False, None
        try:
            return self.scheduler.finished(request), None
        except Exception:
            log.exception("the end of %s is not noted", request.request_id)
            return self.scheduler.forget(request), None

    # ---- worker side
    def register_kv_caches(self, kv_caches: Dict[str, Any]) -> None:
        """Starts the rank. What is wrong here keeps the engine from starting, in one line."""
        paged = Paged(kv_caches, self._kv_cache_config.num_blocks)
        space = space_of(self._vllm_config, self._kv_cache_config, paged)
        file = read(self.config, space=space)
        if file.ignored:
            log.warning("%s: ignored: %s", self.config, ", ".join(file.ignored))
        self.worker = self.make_worker(self.config, file.namespace, self._vllm_config.parallel_config.rank, paged)

    def make_worker(self, config: str, space: Any, rank: int, paged: Paged) -> Worker:
        return Worker(config, space, rank, paged)

    def get_handshake_metadata(self) -> Optional[Handshake]:
        if self.worker is None:
            return None
        return Handshake(self.worker.address, self.worker.block, self.worker.paged.block_bytes)

    @property
    def plan(self) -> Plan:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, Metadata) else Plan()

    @safe(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self.worker is not None and isinstance(kv_connector_metadata, Metadata):
            self.worker.preempted(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self.worker is None:
            return
        try:
            self.worker.start_loads(self.plan)
        except Exception:
            log.exception("loads failed")
            self.worker.fail(self.plan.loads)
        self.worker.fail(self.plan.abandoned)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        if self.worker is None:
            return
        try:
            self.worker.start_saves(self.plan)
        except Exception:
            log.exception("prompts are not stored")
            self.worker.skip_saves(self.plan)

    @safe(lambda: (None, None))
    def get_finished(self, finished_req_ids: Set[str]) -> Tuple[Optional[Set[str]], Optional[Set[str]]]:
        if self.worker is None:
            return None, None
        sent, received = self.worker.finished(finished_req_ids)
        return sent or None, received or None

    @safe(set)
    def get_block_ids_with_load_errors(self) -> Set[int]:
        return self.worker.take_errors() if self.worker is not None else set()

    # ---- both
    @safe(lambda: None)
    def get_kv_connector_stats(self) -> Optional[Stats]:
        if self.worker is not None:
            return Stats.of(self.worker.take_counts())
        return Stats.of(self.scheduler.tally.take()) if self.scheduler is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: Optional[Dict[str, Any]] = None) -> Optional[Stats]:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: List[str], per_engine_labelvalues: Dict[int, List[object]]
    ) -> PromStats:
        return PromStats(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.close()
        if self.scheduler is not None:
            self.scheduler.close()


def _prepare_amx() -> None:
    """A worker whose first step computes one token only dies of an illegal instruction on AMX, unless the tiles were
    asked for before: a prompt that is loaded whole makes such a step."""
    import torch

    init = getattr(torch.cpu, "_init_amx", None)
    if init is not None:
        init()


def _end_with_the_server() -> None:
    """vLLM's scheduler and workers outlive a server that is killed, reachable for nobody, and keep all their memory."""
    server = multiprocessing.parent_process()
    if server is None:
        return

    def wait(processes: Iterable[Any] = (server,)) -> None:
        for one in processes:
            one.join()
        log.error("vLLM's server has gone: this engine ends")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="kvmove server", daemon=True).start()
