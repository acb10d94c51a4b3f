"""What is seen of a subscriber from outside: how it stands with its broker, and what it has counted.

Both outlive connections. A connection has no state of its own that anybody outside could read half-way.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger("fastkin.subscriber")


@dataclass(slots=True)
class Traffic:
    """Counters over all connections of a subscriber."""

    connects: int = 0
    disconnects: int = 0
    resumed: bool = False  # the broker had a session for the latest connection
    messages: int = 0
    reads: int = 0
    paused_s: float = 0.0  # for want of room, without the pause that is on


class Standing:
    """new, connecting, connected, refused (a filter), waiting, draining, closed."""

    def __init__(self, on_change: Callable[[str], None] | None, who: str) -> None:
        """`who`: how log lines begin."""
        self.state: str = "new"
        self.connected: asyncio.Event = asyncio.Event()  # and every filter is subscribed
        self.last_error: str | None = None
        self._on_change = on_change
        self._who = who

    def become(self, state: str, client_id: str) -> None:
        if state == self.state:
            return
        _LOG.debug("%s client=%s is %s now", self._who, ascii(client_id), state)
        self.state = state
        if self._on_change is not None:
            self._on_change(state)
