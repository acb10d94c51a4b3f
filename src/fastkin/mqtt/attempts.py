"""How the next connection is tried: after which delay, in which version of MQTT, with which window.

What one connection taught is kept for the next one here. A broker that is away must not be asked at a steady pace by
all its clients at once, a broker that knows one version only must not be asked for the other each time, and a broker
that ended a connection because of what we asked for must not be asked for it again at once.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from fastkin.mqtt.dialect import Dialect
from fastkin.mqtt.reasons import UNAVAILABLE
from fastkin.mqtt.window import MAX_WINDOW, Window

if TYPE_CHECKING:
    from fastkin.config import Broker

_WORKED_S = 5.0  # a connection that lived so long was a good one
_UNAVAILABLE_S = 600.0  # how long we do not ask for what ended a connection


class Attempts:
    """Of one subscriber. Times are the loop's, and come from outside."""

    def __init__(self, broker: Broker, linger_s: float) -> None:
        """`linger_s`: how long what the subscriber hands on may be held, see Window."""
        self._broker = broker
        self._linger_s = linger_s
        self.dialect: Dialect = Dialect(broker.protocol)
        self.early: int = 0  # connections in a row that died right after SUBSCRIBE
        self._failed = 0  # since a connection worked
        self._windows: dict[int, Window] = {}  # by version
        self._unavailable: dict[int, float] = {}  # reason codes that ended a connection, and until when they count

    def first_window(self) -> Window:
        """What to assume before the first attempt."""
        most = self._broker.receive_maximum
        return Window(most, most, linger_s=self._linger_s, sure=True)

    def window(self, version: int) -> Window:
        """What the broker lets us hold when `version` is spoken, 4 or 5.

        A 5.0 broker keeps to our Receive Maximum. A 3.1.1 broker has a limit of its own that is learned, so it is kept
        over its connections.
        """
        most = self._broker.receive_maximum if version == 5 else MAX_WINDOW
        first = most if version == 5 else self._broker.inflight
        new = Window(first, most, linger_s=self._linger_s, sure=version == 5)
        return self._windows.setdefault(version, new)

    def backoff(self) -> float:
        """Seconds until the next attempt: exponential with full jitter, above half of the least."""
        least, most = self._broker.reconnect_min_s, self._broker.reconnect_max_s
        self._failed += 1
        ceiling = min(most, least * 2.0 ** min(self._failed - 1, 30))
        return random.uniform(least / 2, max(least, ceiling))  # noqa: S311

    def lost(self, lived_s: float, code: int, now: float, *, early: bool) -> None:
        """A connection ended, with the broker's reason `code`. `early`: it may have been for what was subscribed."""
        if lived_s >= _WORKED_S:
            self._failed = self.early = 0
        elif early:
            self.early += 1
        if code in UNAVAILABLE:
            self._unavailable[code] = now + _UNAVAILABLE_S
        else:
            self._unavailable.clear()  # the broker may be another one now

    def unavailable(self, now: float) -> list[int]:
        """Reason codes by which the broker ended a connection not long ago: it must not be asked for that again."""
        return [code for code, until in self._unavailable.items() if now < until]
