"""One engine of the reference, unmodified, on a CPU: run by the interpreter that has ``lmcache``, never by ours.

    PYTHON engine.py INSTANCE PULL REPLY WORKER_PORT INIT_PORT LOOKUP_PORT TOKEN_BYTES CHUNK_TOKENS POOL_GB

Then lines on stdin: ``store FIRST COUNT`` stores the prompt FIRST, FIRST + 1, ... and answers ``stored COUNT``;
``held FIRST COUNT`` answers how many of its tokens are held; ``clear`` drops all.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata

LAYERS, HEADS = 2, 1


class Stand(GPUConnectorInterface):  # type: ignore[misc]
    """Instead of a GPU: what is stored is a pattern of the tokens' positions. ``width``: values a token and layer."""

    def __init__(self, width: int) -> None:
        self.width = width

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        memory_obj.tensor.fill_(float(start % 251))

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        pass

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends):
            self.from_gpu(memory_obj, start, end)

    def batched_to_gpu(self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any) -> None:
        pass

    def get_shape(self, num_tokens: int) -> Any:
        return torch.Size([2, LAYERS, num_tokens, self.width])


def main() -> None:
    name = sys.argv[1]
    pull, reply, worker, init, lookup, token_bytes, chunk = [int(text) for text in sys.argv[2:9]]
    width = token_bytes // (2 * LAYERS * 2)  # K and V, two bytes a value
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=chunk, local_cpu=True, max_local_cpu_size=float(sys.argv[9]), enable_controller=True,
        lmcache_instance_id=name,
        controller_pull_url=f"localhost:{pull}", controller_reply_url=f"localhost:{reply}",
        lmcache_worker_ports=[worker], enable_p2p=True, p2p_host="localhost", p2p_init_ports=[init],
        p2p_lookup_ports=[lookup], transfer_channel="nixl", save_unfull_chunk=True,
    )  # fmt: skip
    config.validate()
    metadata = LMCacheMetadata(
        model_name="bench", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
        kv_dtype=torch.bfloat16, kv_shape=(LAYERS, 2, chunk, HEADS, width // HEADS),
    )  # fmt: skip
    engine = LMCacheEngineBuilder.get_or_create(
        name, config, metadata, Stand(width), lambda tensor, rank: None, lambda item, rank: item
    )
    engine.post_init(async_lookup_server=None)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        if what == "clear":
            print(f"cleared {engine.clear()}", flush=True)
            continue
        first, count = [int(text) for text in rest]
        tokens = list(range(first, first + count))
        if what == "store":
            engine.store(tokens, kvcaches=None, slot_mapping=None)
            print(f"stored {count}", flush=True)
        else:
            print(f"held {engine.lookup(tokens)}", flush=True)


if __name__ == "__main__":
    asyncio.set_event_loop(asyncio.new_event_loop())
    main()
