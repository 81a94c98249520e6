"""A Hugging Face model as an engine, in this process: its cache lies in blocks, and its KV moves as any engine's does.

    engine = TransformersEngine(model, chunk_tokens=16, block_tokens=8, blocks=256)
    local = Local(read(path, space=engine.namespace()), 0, sink, said, keys, engine)
    served = await Server(engine, local, local.file).serve(tokens, max_tokens=20)

A ``Prompt`` is tokens, and the blocks that hold their KV. What a rank holds of it is loaded into them, the rest is
computed, and what was computed is stored, in chunks. The last token of a prompt is always computed: its logits
are what generation begins with. The model attends over what the blocks hold, and over nothing else; so its output
shows whether KV that was moved is the KV that was stored.

Layouts come from the model itself: one token is run, and what its cache then holds of it are the parts. For MLA those
are the latent and the rotated key.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
import threading
from typing import Any, Dict, Final, Iterator, List, Optional, Protocol, Sequence, Tuple

import msgspec
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.machine import StartFill, StartRead
from kvcore.protocol.messages import Answer, Key, Namespace, StoreRequest, UseRequest
from kvreal.instance_file import InstanceFile
from kvreal.layout import slots
from kvreal.layout.bind import allocate
from kvreal.layout.paged import Paged
from kvreal.layout.shape import ITEM_BYTES, Layout, LayoutError, Part, like
from kvreal.layout.views import INTEGERS, View
from kvreal.memory import Memory

Tensor = Any
AXES: Final = "part block token head channel"


class EngineFull(Exception):
    """No free blocks for a prompt."""


class Prompt:
    """A prompt and what follows it; ``held`` of its tokens have their KV in ``table``'s blocks."""

    def __init__(self, tokens: Sequence[int], table: List[int]) -> None:
        self.tokens: List[int] = list(tokens)
        self.table: List[int] = table
        self.held: int = 0


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a prompt's cache, in the engine's blocks."""

    is_sliding = False
    is_croppable = False

    def __init__(self, paged: Paged, views: Tuple[View, View], prompt: Prompt) -> None:
        super().__init__()
        self.paged: Paged = paged
        self.views: Tuple[View, View] = views
        self.prompt: Prompt = prompt
        self.length: int = prompt.held
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Tuple[Tensor, Tensor]:
        """Write the new tokens' [1][head][token][channel] into blocks; all tokens' come back, read from blocks."""
        new = key_states.shape[-2]
        table = self.prompt.table
        cut = self.paged.cut(0, table, self.length, new)
        for view, states in zip(self.views, (key_states, value_states)):
            rows = states[0].transpose(0, 1).reshape(new, view.row).contiguous()
            view.give(cut, rows.view(INTEGERS[ITEM_BYTES[view.plane.part.dtype]]))
        self.length += new
        whole = self.paged.cut(0, table, 0, self.length)
        keys, values = [self._all(view, whole, states) for view, states in zip(self.views, (key_states, value_states))]
        return keys, values

    def _all(self, view: View, whole: Any, states: Tensor) -> Tensor:
        part = view.plane.part
        rows = torch.empty(self.length, view.row, dtype=states.dtype, device=states.device)
        view.take(whole, rows.view(INTEGERS[ITEM_BYTES[part.dtype]]))
        return rows.view(1, self.length, part.heads, part.channels).transpose(1, 2).contiguous()

    def get_mask_sizes(self, query_length: int) -> Tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class TransformersEngine:
    """``kvreal.engines.base.Engine``. Prompts are run one at a time; chunks go in and out between two runs."""

    def __init__(
        self, model: Any, chunk_tokens: int, block_tokens: int, blocks: int, axes: str = AXES, name: str = "tiny"
    ) -> None:
        """``axes``: how a layer's blocks lie (kvreal.layout.shape), K and V together or each in a tensor.
        LayoutError: they cannot lie so, or the model keeps more than the KV of full attention, all layers alike."""
        self.model: Any = model.eval()
        self.name: str = name
        self.chunk_tokens: int = chunk_tokens
        names = inspect.signature(model.forward).parameters
        self.cache_argument: str = "cache" if "cache" in names else "past_key_values"  # its older name
        parts, layers = self._parts()
        self.layout: Layout = like(parts, layers, block_tokens, axes)
        self.paged: Paged = Paged(self.layout, allocate(self.layout, [blocks], model.device))
        self.copies: slots.Copies = slots.Copies(self.paged)
        self.free: List[int] = list(range(blocks))
        self.lock: threading.Lock = threading.Lock()
        self.there: Dict[Key, Tuple[Prompt, int, int]] = {}
        """Where the KV of a chunk lies that may be stored, or where it is to be laid: prompt, first token, tokens."""

    def _parts(self) -> Tuple[Tuple[Part, Part], int]:
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model(torch.tensor([[0]], device=self.model.device), **{self.cache_argument: cache})
        kept = []
        for number, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                kind = type(layer).__name__
                raise LayoutError(f"layer {number} of {self.name} keeps its KV in a {kind}, expected full attention")
            parts = []
            for name, held in (("k", layer.keys), ("v", layer.values)):
                parts.append(Part(name, held.shape[1], held.shape[3], str(held.dtype).removeprefix("torch.")))
            kept.append((parts[0], parts[1]))
            if kept[-1] != kept[0]:
                first, other = [" and ".join([str(part) for part in kept[at]]) for at in (0, -1)]
                raise LayoutError(f"layer {number} of {self.name} keeps {other}, layer 0 {first}: expected one shape")
        return kept[0], len(kept)

    def namespace(self) -> Namespace:
        """What must be equal for its KV to be another's: the weights are named by a digest of them."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + bytes(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data))
        dtype = str(self.model.dtype).removeprefix("torch.")
        return Namespace(
            self.name, digest.hexdigest(), dtype, self.layout.form, self.chunk_tokens, 1, self.layout.bytes_per_token
        )

    # ---- prompts
    def begin(self, tokens: Sequence[int], max_tokens: int) -> Prompt:
        """Room for a prompt and ``max_tokens`` more. EngineFull."""
        size = self.layout.groups[0].block_tokens
        needed = -(-(len(tokens) + max_tokens) // size)
        with self.lock:
            if needed > len(self.free):
                raise EngineFull(f"{needed} blocks are needed, {len(self.free)} are free")
            table, self.free = self.free[:needed], self.free[needed:]
        return Prompt(tokens, table)

    def end(self, prompt: Prompt) -> None:
        """Its blocks are free again."""
        with self.lock:
            self.free += prompt.table
            prompt.table = []

    def run(self, prompt: Prompt, max_tokens: int) -> Tuple[List[int], Tensor]:
        """Compute the KV that is missing and, greedily, ``max_tokens`` tokens: their ids, and [token][vocabulary]
        logits that each was taken from."""
        layers = []
        for layer in range(self.layout.groups[0].layers):
            one, other = self.paged.views[2 * layer : 2 * layer + 2]
            layers.append(_Layer(self.paged, (one, other), prompt))
        cache = Cache(layers=layers)
        out: List[int] = []
        logits: List[Tensor] = []
        missing = prompt.tokens[prompt.held :]
        with torch.inference_mode():
            for part in (missing[:-1], missing[-1:]):
                found = self._forward(part, cache) if part else None
            for number in range(max_tokens):
                logits.append(found)
                out.append(int(logits[-1].argmax()))
                if number + 1 < max_tokens:
                    found = self._forward(out[-1:], cache)
        prompt.held = len(prompt.tokens)
        return out, torch.stack(logits)

    def _forward(self, ids: Sequence[int], cache: Any) -> Tensor:
        given = {self.cache_argument: cache, "use_cache": True}
        return self.model(torch.tensor([list(ids)], device=self.model.device), **given).logits[0, -1]

    # ---- chunks: where they lie is said before the rank is asked
    def place(self, prompt: Prompt, keys: Sequence[Key], lens: Sequence[int]) -> None:
        """The chunks of this prompt lie here, or are to be laid here."""
        starts = itertools.accumulate(lens, initial=0)
        with self.lock:
            self.there.update({key: (prompt, start, n) for key, start, n in zip(keys, starts, lens)})

    def forget(self, keys: Sequence[Key]) -> None:
        with self.lock:
            for key in keys:
                self.there.pop(key, None)

    def fill(self, memory: Memory, task: StartFill, bytes_per_token: int) -> bool:
        """``kvreal.engines.base``"""
        for chunk, table, start, tokens in self._chunks(memory, task, bytes_per_token):
            self.copies.store([table], start, tokens, chunk)
        return True

    def read(self, memory: Memory, task: StartRead, bytes_per_token: int) -> bool:
        """``kvreal.engines.base``"""
        for chunk, table, start, tokens in self._chunks(memory, task, bytes_per_token, loading=True):
            self.copies.load([table], start, tokens, chunk)
        return True

    def _chunks(
        self, memory: Memory, task: Any, bytes_per_token: int, loading: bool = False
    ) -> Iterator[Tuple[Tensor, List[int], int, int]]:
        """(bytes in the slot, block table, first token, tokens) of each chunk. KeyError: nobody said where it lies."""
        self.layout.fits(bytes_per_token)
        for number, key, n in zip(task.slots, task.keys, task.lens):
            with self.lock:
                prompt, start, tokens = self.there[key]
                if tokens != n:
                    raise KeyError(f"a chunk of {n} tokens, {tokens} expected")
                nbytes = n * bytes_per_token
                if not memory.on_disk(task.location):
                    yield slots.slot(memory, task.location, number, nbytes), prompt.table, start, n
                elif loading:
                    yield torch.from_numpy(memory.get(task.location, number, nbytes, key)), prompt.table, start, n
                else:
                    chunk = torch.empty(nbytes, dtype=torch.uint8)
                    yield chunk, prompt.table, start, n  # whoever takes the next has filled this one
                    memory.put(task.location, number, chunk.numpy(), key)


class Served(msgspec.Struct, frozen=True):
    """A prompt's answer. ``loaded``: tokens whose KV came from the rank; ``stored``: those it holds now."""

    tokens: Tuple[int, ...]
    logits: Any
    loaded: int
    stored: int
    why: str = ""
    """Why not all was loaded or stored: wrong_bytes, full, ..."""


class Rank(Protocol):
    async def ask(self, request: Any) -> Answer: ...


class Server:
    """Prompts, one after the other: load what the rank holds, compute the rest, store it."""

    def __init__(self, engine: TransformersEngine, rank: Rank, file: InstanceFile) -> None:
        """LayoutError: the file's namespace is not the engine's."""
        engine.layout.fits(file.namespace.bytes_per_token)
        self.engine: TransformersEngine = engine
        self.rank: Rank = rank
        self.namespace: Namespace = file.namespace
        self.location: str = file.store_at
        self.turn: asyncio.Lock = asyncio.Lock()
        self.numbers: Iterator[int] = itertools.count(1)

    async def serve(self, tokens: Sequence[int], max_tokens: int, store: bool = True, salt: str = "") -> Served:
        """EngineFull; whatever the rank refuses is told, and the answer is right all the same."""
        async with self.turn:
            prompt = self.engine.begin(tokens, max_tokens)
            keys, lens = chunk_keys(self.namespace, tokens, "", salt)
            self.engine.place(prompt, keys, lens)
            try:
                return await self._serve(prompt, keys, lens, max_tokens, store)
            finally:
                self.engine.forget(keys)
                self.engine.end(prompt)

    async def _serve(
        self, prompt: Prompt, keys: Tuple[Key, ...], lens: Tuple[int, ...], max_tokens: int, store: bool
    ) -> Served:
        answer = await self._ask(UseRequest("", self.location, keys, lens))
        loaded = answer.num_tokens if answer.state == "ok" else 0
        prompt.held = min(loaded, len(prompt.tokens) - 1)
        running = asyncio.ensure_future(asyncio.to_thread(self.engine.run, prompt, max_tokens))
        try:
            out, logits = await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])  # a thread cannot be stopped, and the prompt's blocks are its own till then
            raise
        why = answer.reason if answer.state != "ok" else ""
        stored: Optional[Answer] = None
        if store:
            stored = await self._ask(StoreRequest("", self.location, keys, lens))
            why = why or stored.reason
        count = stored.num_tokens if stored is not None and stored.state == "ok" else 0
        return Served(tuple(out), logits, loaded, count, why)

    async def _ask(self, request: Any) -> Answer:
        return await self.rank.ask(msgspec.structs.replace(request, op=f"{self.location}-{next(self.numbers)}"))
