"""What vLLM's scheduler side of the connector tells its workers to do in a step."""

from __future__ import annotations

from typing import Tuple

import msgspec

from kvreal.engines.vllm.link import Prompt

Found = Tuple[str, Tuple[int, ...]]
"""(location, slot of each chunk): where one rank holds a prompt."""


class Load(msgspec.Struct, frozen=True):
    """Copy into ``blocks`` (vLLM's ids), which are the prompt's from number ``first`` on. ``found``: one a rank."""

    request: str
    name: str
    sync: bool
    first: int
    blocks: Tuple[int, ...]
    found: Tuple[Found, ...]
    num_tokens: int
    moved: int
    """How many of ``num_tokens`` came by a move, the last of which was ``event``."""
    event: str


class Save(msgspec.Struct, frozen=True):
    """The whole prompt is computed with this step, and lies in ``blocks``."""

    request: str
    name: str
    prompt: Prompt
    blocks: Tuple[int, ...]


class Plan(msgspec.Struct, frozen=True):
    loads: Tuple[Load, ...] = ()
    saves: Tuple[Save, ...] = ()
    abandoned: Tuple[Load, ...] = ()
    """What vLLM was promised and will not come: its blocks are to be reported."""
    preempted: bool = False
    """Blocks are about to be taken from somebody: what is still read from them must be read first."""
