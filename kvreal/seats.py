"""Where nodes sit, and the two ways in which a run ends before its time."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

from kvcore.scenario.build import AnySpec
from kvcore.scenario.faults import Spent
from kvreal import control as c
from kvreal.pool import Host


class Hang(Exception):
    """The run was not quiet at its deadline."""


class Broken(Exception):
    """A node cannot go on: what kind of trouble, which node, what it said."""

    def __init__(self, kind: str, node: str, text: str) -> None:
        super().__init__(text)
        self.kind: str = kind
        self.node: str = node
        self.text: str = text


class Seat:
    """A node's place; its host changes with every life."""

    def __init__(self, spec: AnySpec) -> None:
        self.spec: AnySpec = spec
        self.name: str = spec.name
        self.life: int = 0
        self.host: Optional[Host] = None
        self.address: Optional[c.Address] = None
        self.paused: bool = False
        self.dying: bool = False
        self.failed: bool = False  # it has said so: its process lives on, and answers nothing more
        self.restarts: int = 0  # restarts that are still to come
        self.state: Optional[c.State] = None
        self.checked: List[c.Checked] = []
        self.idle: Optional[bool] = None
        self.spent: Tuple[Spent, ...] = ()
        self.fired: Dict[int, Dict[str, int]] = {}
        """Life -> what its fault plan has fired."""

    @property
    def up(self) -> bool:
        return self.host is not None and self.address is not None

    def say(self, message: c.Said) -> None:
        if self.host is not None:
            self.host.pipe.say(message)
