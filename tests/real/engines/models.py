"""Models made on the spot, and two instances that run one of them."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, Coroutine, Dict, List, Sequence, Tuple, TypeVar

import torch

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.config import MS, Config
from kvcore.protocol.worker import Worker
from kvreal.engines.transformers import Served, Server, TransformersEngine
from kvreal.instance_file import read
from kvreal.rank import Local
from tests.real.http.cluster import CPU, Controller, eventually

VOCABULARY = 258
CHUNK = 16
LATER = ("events_kept_ns", "hold_ns")
NAMES = [name for name in Config.__struct_fields__ if name.endswith("_ns") and name not in LATER]
T = TypeVar("T")


def llama(seed: int = 0) -> Any:
    """Grouped-query attention: 2 KV heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def deepseek(seed: int = 0) -> Any:
    """Multi-head latent attention: a latent of 24 and a rotated key of 8, one head each."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=16, first_k_dense_replace=3, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config).eval()


def uncut(engine: TransformersEngine, tokens: Sequence[int], count: int) -> Tuple[Tuple[int, ...], Any]:
    """What transformers' own code answers, with its own cache: all but the last token at once, then one by one."""
    from transformers.cache_utils import DynamicCache

    model = engine.model
    cache = DynamicCache(config=model.config)
    out: List[int] = []
    logits = []
    parts = [list(tokens[:-1]), list(tokens[-1:])]
    with torch.inference_mode():
        for part in [part for part in parts if part]:
            found = model(torch.tensor([part]), **{engine.cache_argument: cache}).logits[0, -1]
        for _ in range(count):
            logits.append(found)
            out.append(int(found.argmax()))
            found = model(torch.tensor([out[-1:]]), **{engine.cache_argument: cache}).logits[0, -1]
    return tuple(out), torch.stack(logits)


class Pair:
    """Instances of one controller in a loop of their own; each engine keeps its KV in its own way."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        # the usual constants, not the tests' quick ones: a model that computes may keep this loop waiting for a while
        usual = [f"--set={name[:-3]}={getattr(Config(), name) // MS} ms" for name in NAMES]
        self.controller: Controller = Controller(folder, *usual)
        self.controller.start()
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self.thread: threading.Thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.locals: Dict[str, Local] = {}
        self.servers: Dict[str, Server] = {}

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(60)

    def add(self, name: str, engine: TransformersEngine, size: str = "4 MiB") -> None:
        settings = {
            "chunk_size": CHUNK, "enable_controller": True, "lmcache_instance_id": name,
            "controller_pull_url": f"localhost:{self.controller.pull}",
            "kvmove": {"locations": {CPU: size}, "transport": "tcp"},
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(settings))
        file = read(path, space=engine.namespace())
        self.run(self._start(name, engine, file))
        eventually(lambda: name in self.controller.instances(), 20, f"{name} is registered")

    async def _start(self, name: str, engine: TransformersEngine, file: Any) -> None:
        local = Local(file, 0, -1, lambda registration: None, None, engine)
        await local.start()
        self.locals[name] = local
        self.servers[name] = Server(engine, local, file)

    def serve(self, name: str, tokens: Sequence[int], count: int, **more: Any) -> Served:
        return self.run(self.servers[name].serve(tokens, count, **more))

    def move(self, source: str, target: str, tokens: Sequence[int], copy: bool = False) -> Dict[str, Any]:
        """The event at its end."""
        eventually(lambda: self.controller.held(tokens).get(source) == len(tokens), 20, "the controller knows")
        answer = self.controller.move(source, target, tokens, copy=copy)
        assert answer.status_code == 200, answer.text
        assert answer.json()["num_tokens"] == len(tokens)
        return self.controller.ended(answer.json()["event_id"])

    def slots(self, name: str, tokens: Sequence[int]) -> Tuple[List[bytes], List[int], List[int]]:
        """(keys, slots, sizes in bytes) of a prompt that the instance holds."""
        local = self.locals[name]
        space = local.file.namespace
        keys, lens = chunk_keys(space, tokens)

        def look(machine: Worker) -> List[int]:
            return [machine.pools[CPU].index[key].slot for key in keys]

        return list(keys), self.run(local.service.peek(look)), [n * space.bytes_per_token for n in lens]

    def memory(self, name: str) -> Any:
        return self.locals[name].service.worker.memory

    def close(self) -> None:
        for local in self.locals.values():
            self.run(local.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()
        self.controller.close()
