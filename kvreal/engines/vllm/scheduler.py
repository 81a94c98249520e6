"""The connector's side in vLLM's scheduler: asks the ranks what they hold of a prompt, says what to load and to save.

A prompt is looked up when it arrives, so that the answers are there when vLLM asks. vLLM is never kept waiting for
long: a rank that does not answer at once makes it ask again, and after ``PATIENCE_S`` the prompt is a miss.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import time
from typing import Any, Dict, Final, List, Optional, Sequence, Set, Tuple

from kvreal.engines.vllm.link import Drop, Link, LinkError, Look, Prompt, Renew, Seen, Watch
from kvreal.engines.vllm.plan import Found, Load, Plan, Save
from kvreal.engines.vllm.tally import Tally

log = logging.getLogger("kvmove.engine")

WAIT_S: Final = 0.005
"""How long one call may wait for a rank."""
PATIENCE_S: Final = 0.25
"""How long a request may wait for a rank before it is served without it."""
LEASE_S: Final = 30.0
SYNC_BYTES: Final = 64 << 20
"""What is copied within a step, in the time that another step would take; more is copied beside the steps."""


class Asked:
    """What is known of one request."""

    def __init__(self, request: Any, prompt: Prompt) -> None:
        self.request: Any = request
        self.prompt: Prompt = prompt
        self.num_tokens: int = len(prompt.tokens) // 4
        self.name: str = ""
        self.looks: int = 0
        self.at_s: float = 0.0
        """When it was last asked, or its leases renewed."""
        self.began_s: float = 0.0
        self.seen: Dict[int, Seen] = {}
        self.offered: int = -1
        """Local tokens that stood before what was offered; -1: nothing is."""
        self.tried: bool = False
        """A hit is offered once: one that failed would be offered for ever."""
        self.saved: int = 0
        """How often it was said to be saved."""
        self.blocks: Tuple[int, ...] = ()
        """From which it was saved last."""
        self.to_save: bool = True


class Scheduler:
    def __init__(self, block_tokens: int, mode: str, lease_s: float = LEASE_S, overlapping: bool = False) -> None:
        """``mode``: sync, async, or auto (by the size of a load). ``overlapping``: vLLM schedules asynchronously."""
        self.overlapping: bool = overlapping
        self.loaded_before: Set[int] = set()
        """Blocks that the step before loaded, where its end is not known yet."""
        self.block: int = block_tokens
        self.mode: str = mode
        self.lease_s: float = lease_s
        self.addresses: List[str] = []
        self.parent: int = 0
        self.links: Dict[int, Link] = {}
        """Of the ranks that are there; nothing is looked up unless all are."""
        self.again_s: float = 0.0
        """When one that is not there is tried again."""
        self.lost: Set[int] = set()
        self.late: Dict[int, float] = {}
        """Rank -> since when it owes an answer that nobody waits for any more."""
        self.block_bytes: int = 0
        self.requests: Dict[str, Asked] = {}
        self.names: Dict[str, Asked] = {}
        self.loads: List[Load] = []
        self.abandoned: List[Load] = []
        self.tally: Tally = Tally()

    def connect(self, addresses: Sequence[str], block_bytes: int, parent: int) -> None:
        """``addresses``: one a rank. ``parent``: vLLM's server process, 0 if that is this one."""
        self.block_bytes = block_bytes
        self.addresses = list(addresses)
        self.parent = parent
        self._reach()

    def _reach(self) -> bool:
        """Connect to ranks that are not connected, every half second at most. True: all are there."""
        now = time.monotonic()
        if len(self.links) < len(self.addresses) and now >= self.again_s:
            self.again_s = now + 0.5
            for rank, address in enumerate(self.addresses):
                if rank not in self.links:
                    try:
                        link = Link(address)
                        link.say(Watch(self.parent))
                    except LinkError:
                        continue
                    self.links[rank] = link
                    self.late.pop(rank, None)
                    if rank in self.lost:
                        log.warning("rank %d is there again", rank)
        return bool(self.addresses) and len(self.links) == len(self.addresses)

    def _lost(self, rank: int, error: LinkError) -> None:
        log.error("no KV is loaded until rank %d is there again: %s", rank, error)
        self.lost.add(rank)
        self.late.pop(rank, None)
        self.links.pop(rank).close()
        for asked in self.requests.values():
            asked.seen.pop(rank, None)

    # ---- a request's life
    def new_request(self, request: Any) -> None:
        prompt = prompt_of(request)
        if prompt is None or request.request_id in self.requests:
            return
        asked = self.requests[request.request_id] = Asked(request, prompt)
        if not request.skip_reading_prefix_cache:
            self._look(asked)

    def _look(self, asked: Asked) -> None:
        if self.names.pop(asked.name, None) is not None:
            self._say(Drop(asked.name))
        asked.looks += 1
        asked.name = f"{asked.request.request_id}#{asked.looks}"
        asked.at_s = asked.began_s = time.monotonic()
        asked.seen = {}
        if not self._reach() or self.late:
            return
        self.names[asked.name] = asked
        self._say(Look(asked.name, asked.prompt, self.lease_s))

    def _say(self, frame: Any) -> None:
        for rank, link in list(self.links.items()):
            try:
                link.say(frame)
            except LinkError as error:
                self._lost(rank, error)

    def _hear(self, wait_s: float, until: Optional[Asked]) -> None:
        """Take in answers; wait until those to ``until`` are complete, for ``wait_s`` at most."""
        end = time.monotonic() + wait_s
        for rank, link in list(self.links.items()):
            try:
                while True:
                    owed = until is not None and rank not in until.seen
                    answer = link.hear(max(0.0, end - time.monotonic()) if owed else 0.0)
                    if answer is None:
                        break
                    if self.late.pop(rank, None) is not None:
                        log.warning("rank %d answers again", rank)
                    asked = self.names.get(answer.name)
                    if isinstance(answer, Seen) and asked is not None:
                        asked.seen[rank] = answer
            except LinkError as error:
                self._lost(rank, error)

    def matched(self, request: Any, local: int) -> Tuple[Optional[int], bool]:
        """(tokens that can be loaded beyond the first ``local``, beside the steps?); (None, False): ask again."""
        asked = self.requests.get(request.request_id)
        if asked is None or asked.tried or request.skip_reading_prefix_cache:
            return 0, False
        if self.late:
            self._hear(0.0, None)
        if not self._reach() or (self.late and not self._complete(asked)):
            self._miss(asked, "rank_late" if self.late else "rank_gone")
            return 0, False
        now = time.monotonic()
        if asked.name not in self.names or (self._complete(asked) and now - asked.at_s > 0.8 * self.lease_s):
            self._look(asked)  # its leases may be over
        if not self._complete(asked):
            began = time.monotonic()
            self._hear(WAIT_S, asked)
            now = time.monotonic()
            self.tally.add("lookup_wait_seconds", now - began)
            if not self._complete(asked):
                if not self._reach():
                    self._miss(asked, "rank_gone")
                    return 0, False
                if now - asked.began_s <= PATIENCE_S:
                    return None, False
                for rank in self.links:
                    if rank not in asked.seen:
                        self.late[rank] = now
                        log.warning("rank %d has not answered for %.2f s: prompts are misses until it does", rank,
                                    now - asked.began_s)  # fmt: skip
                self._miss(asked, "rank_late")
                return 0, False
        elif now - asked.at_s > self.lease_s / 3:
            asked.at_s = now
            self._say(Renew(asked.name))
        return self._offer(asked, local)

    def _complete(self, asked: Asked) -> bool:
        return bool(self.addresses) and len(asked.seen) == len(self.addresses)

    def _offer(self, asked: Asked, local: int) -> Tuple[int, bool]:
        """All ranks or none: what the one that holds least of it holds; the last token is always computed."""
        count = min(self._held(asked), asked.num_tokens - 1) - local
        if count <= 0:
            return 0, False
        asked.offered = local
        return count, not self._within(-(-count // self.block))

    def _held(self, asked: Asked) -> int:
        """Tokens that every rank holds, once all have answered."""
        return min(seen.num_tokens for seen in asked.seen.values())

    def _within(self, blocks: int) -> bool:
        """Whether so many are loaded within a step."""
        return self.mode == "sync" or (self.mode == "auto" and blocks * self.block_bytes <= SYNC_BYTES)

    def _miss(self, asked: Asked, why: str) -> None:
        self.tally.add("lookups", 1, why)
        self._let_go(asked)

    def _let_go(self, asked: Asked) -> None:
        asked.tried = True
        if self.names.pop(asked.name, None) is not None:
            self._say(Drop(asked.name))

    def admitted(self, request: Any, block_ids: Sequence[int], count: int) -> None:
        """vLLM has made room: what is offered will be loaded if ``count`` is above 0, else it is not needed."""
        asked = self.requests.get(request.request_id)
        if asked is None or asked.tried:
            return
        if self._complete(asked):
            held = self._held(asked)
            asked.to_save = held < asked.num_tokens
            self.tally.add("lookups", 1, "loaded" if count > 0 else "local" if held > 0 else "nothing_held")
        if count <= 0 or asked.offered < 0:
            self._let_go(asked)
            return
        asked.tried = True
        del self.names[asked.name]  # the worker ends the hold
        first = asked.offered // self.block
        blocks = tuple(block_ids[first : -(-(asked.offered + count) // self.block)])
        found: Tuple[Found, ...] = tuple((seen.location, seen.slots) for _, seen in sorted(asked.seen.items()))
        one = asked.seen[0]
        moved = max(0, min(count, one.moved - max(0, one.num_tokens - asked.offered - count)))
        sync = self._within(len(blocks))
        self.loads.append(Load(request.request_id, asked.name, sync, first, blocks, found, count, moved, one.event))

    def abandon(self, request: Any, block_ids: Sequence[int], count: int) -> None:
        """What was offered to this request will not come."""
        asked = self.requests.get(request.request_id)
        if asked is None or count <= 0:
            return
        asked.tried = True
        local = max(0, asked.offered)
        blocks = tuple(block_ids[local // self.block : -(-(local + count) // self.block)])
        sync = self._within(len(blocks))
        load = Load(request.request_id, asked.name, sync, local // self.block, blocks, (), count, 0, "")
        self.loads = [one for one in self.loads if one.request != request.request_id]
        self.abandoned.append(load)
        self.tally.add("lookups", 1, "abandoned")

    def no_plan(self) -> Plan:
        """Nothing is done in this step, and what was promised for it is taken back."""
        loads, self.loads = [*self.loads, *self.abandoned], []
        self.abandoned = []
        return Plan(abandoned=tuple(loads), preempted=True)

    def source_of(self, request: Any) -> str:
        """The location that a load offered to this request comes from."""
        asked = self.requests.get(request.request_id)
        return asked.seen[0].location if asked is not None and 0 in asked.seen else ""

    def plan(self, output: Any) -> Plan:
        """What the workers do in this step."""
        saves: List[Save] = []
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens))
        # A load that fails at one rank spoils what all ranks compute in its step, and only that rank knows: with more
        # than one, what such a step computes is saved with the next, unless it is computed anew.
        # Where vLLM plans a step before it knows how the last one ended, that one's loads are in doubt as well.
        unsure = self.overlapping or len(self.addresses) > 1
        loading = {block for load in self.loads if load.sync and unsure for block in load.blocks}
        doubtful = loading | self.loaded_before
        self.loaded_before = loading if self.overlapping else set()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            asked = self.requests.get(request_id)
            if asked is None or not asked.to_save or request_id not in computed:
                continue
            if computed[request_id] + scheduled >= asked.num_tokens:
                groups = output.kv_connector_block_state.get_block_ids(request_id)
                if groups is not None:
                    blocks = tuple(groups[0][: -(-asked.num_tokens // self.block)])
                    if not doubtful.isdisjoint(blocks):
                        continue
                    saves.append(Save(request_id, f"{request_id}!{asked.saved + 1}", asked.prompt, blocks))
        for save in saves:  # from here on nothing fails: what is noted is what the workers are told
            asked = self.requests[save.request]
            asked.to_save = False
            asked.saved += 1
            asked.blocks = save.blocks
        loads, self.loads = tuple(self.loads), []
        abandoned, self.abandoned = tuple(self.abandoned), []
        return Plan(loads, tuple(saves), abandoned, bool(output.preempted_req_ids))

    def failed(self, blocks: Sequence[int]) -> None:
        """These blocks were not loaded: what was to be saved from them was not, and will be once it is computed."""
        bad = frozenset(blocks)
        for asked in self.requests.values():
            if asked.saved and not bad.isdisjoint(asked.blocks):
                asked.to_save = True

    def finished(self, request: Any) -> bool:
        """True: its blocks may still be read from, and the workers will say when not any more."""
        asked = self.requests.pop(request.request_id, None)
        if asked is None:
            return False
        if not asked.tried:
            self._let_go(asked)
        return asked.saved > 0

    def forget(self, request: Any) -> bool:
        """As ``finished``, and no more than what vLLM must be told."""
        asked = self.requests.pop(request.request_id, None)
        return asked is not None and asked.saved > 0

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        self.links = {}
        self.addresses = []


def prompt_of(request: Any) -> Optional[Prompt]:
    """What the KV of this request's prompt follows from; None if that is not only tokens."""
    tokens = request.prompt_token_ids
    if not tokens or request.prompt_embeds is not None or request.pooling_params is not None:
        return None
    if getattr(request, "resumable", False):
        return None  # a session, whose prompt grows
    more: Dict[str, Any] = {}
    if request.lora_request is not None:
        more["lora"] = lora_identity(request.lora_request)
    if request.mm_features:
        media = request.mm_features
        more["media"] = [[one.identifier, one.mm_position.offset, one.mm_position.length] for one in media]
    adapter = json.dumps(more, sort_keys=True) if more else ""
    return Prompt(struct.pack(f"<{len(tokens)}I", *tokens), adapter, request.cache_salt or "")


def lora_identity(lora: Any) -> str:
    """The same adapter has the same one in every engine, whatever number it has there."""
    from kvreal.engines.vllm.space import digest_of_folder

    path = getattr(lora, "lora_path", "") or getattr(lora, "path", "")
    digest = digest_of_folder(path) if path and os.path.isdir(path) else ""
    return f"{lora.lora_name}:{digest}"
