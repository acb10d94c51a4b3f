"""One timer, set for the earliest time that anybody asked for.

The sender waits for several things at once: a gate that opens, a bucket that fills, a record whose time comes. A timer
for each would start as many calls at once after an outage. So all of them share one. It must never ring later than
somebody asked: what waits then would be looked at by nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# uvloop rounds timers down to a millisecond. A timer that rings too early finds nothing to do, and is set again: the
# loop would spin.
_ROUNDING_S = 0.001


class Alarm:
    """Calls `ring()` at the earliest time that was asked for. Times are the event loop's, in seconds."""

    __slots__ = ("_at", "_closed", "_loop", "_ring", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self._at = 0.0
        self._closed = False

    def set(self, when: float) -> None:
        """Ring at `when`, or sooner if somebody asked for that."""
        # At the end whatever still fails would set it, and ring into what is closed.
        if self._closed:
            return
        if self._timer is not None:
            # It will ring before that, and whoever looks then sets it anew for what is left.
            if self._at <= when:
                return
            self._timer.cancel()
        self._at = when
        self._timer = self._loop.call_at(when + _ROUNDING_S, self._rang)

    def rings_by(self, when: float) -> bool:
        """It is set, and for no later than `when`."""
        return self._timer is not None and self._at <= when

    def close(self) -> None:
        """Ring no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _rang(self) -> None:
        # First: whoever is called sets it again.
        self._timer = None
        self._ring()
