"""When to close the open batch: linger, an idle downstream, an exhausted in-flight window, drain.

Full batches close by themselves, in the codec. This is about the others: a batch that waits for 500
records never fills when the broker grants 20 unacknowledged messages, and one record alone should not wait
the whole linger when nothing else is on its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fastkin._codec import IDLE, LINGER

if TYPE_CHECKING:
    import asyncio

    from fastkin._codec import Lane

_QUIET_SHARE = 4  # the source is quiet when it gave nothing for this part of the linger
_QUIET_MIN_S = 0.002


class Downstream(Protocol):
    """What takes the closed batches: the sender, or what stands before it."""

    @property
    def idle(self) -> bool: ...

    def pump(self) -> None: ...


class Flusher:
    """One timer per lane, armed only while a batch is open."""

    __slots__ = ("_deadline", "_lane", "_linger_s", "_loop", "_quiet_s", "_seen", "_sender", "_timer")

    def __init__(self, lane: Lane, sender: Downstream, linger_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._lane = lane
        self._sender = sender
        self._linger_s = linger_s
        self._quiet_s = max(_QUIET_MIN_S, linger_s / _QUIET_SHARE)
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._seen = 0

    def attend(self) -> None:
        """The lane has news: send what is closed, see that what is open will be closed in time."""
        lane = self._lane
        lane.attention = False
        if lane.ready:
            # The batch that is open now was opened just now: its linger starts afresh.
            self._deadline = 0.0
        if lane.open_records:
            if self._linger_s <= 0.0:
                lane.seal(LINGER)
            elif self._timer is None:
                self._arm(self._loop.time())
        self._sender.pump()

    @property
    def armed(self) -> bool:
        """A timer will look at the open batch."""
        return self._timer is not None

    def close(self, reason: int) -> None:
        """Close the open batch now."""
        self._lane.seal(reason)
        # Not what seal() says: ending the open aggregate may have filled and closed the batch before it looked.
        if self._lane.ready:
            self._deadline = 0.0
            self._sender.pump()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, now: float) -> None:
        if self._deadline == 0.0:
            self._deadline = now + self._linger_s
        self._seen = self._lane.received
        self._timer = self._loop.call_at(min(self._deadline, now + self._quiet_s), self._check)

    def _check(self) -> None:
        self._timer = None
        lane = self._lane
        if not lane.open_records:
            self._deadline = 0.0
            return
        now = self._loop.time()
        if self._deadline == 0.0:
            self._deadline = now + self._linger_s - self._quiet_s
        if now >= self._deadline:
            self.close(LINGER)
        elif lane.received == self._seen and self._sender.idle:
            self.close(IDLE)
        if lane.open_records:
            self._arm(now)
