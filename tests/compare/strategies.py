"""Whole scenarios for hypothesis: the same generator that a swarm feeds from seeds, fed from hypothesis's choices."""

from __future__ import annotations

import functools
import os
from typing import Any

import hypothesis
from hypothesis import strategies as st

from kvcore.scenario.arbitrary import WHOLE, Draw, Space, scenario_from
from kvcore.scenario.loader import dump
from kvcore.scenario.schema import Scenario

_integers = functools.lru_cache(maxsize=None)(st.integers)


@st.composite
def scenarios(draw: Any, space: Space = WHOLE) -> Scenario:
    """Shrinks to fewer and plainer instances, steps and faults."""
    return scenario_from(Draw(lambda least, most: draw(_integers(least, most))), space)


def note(scenario: Scenario) -> None:
    """Shown for the plainest failing example only."""
    hypothesis.note(f"--- save as a .yaml, then: kvmove run FILE --on both\n{dump(scenario)}---")


def examples(name: str, usual: int) -> int:
    """How many: ``make compare-long`` asks for more."""
    return int(os.environ.get(name, "") or usual)
