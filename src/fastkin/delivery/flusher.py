"""Says when the open batch may go, before it is full.

A full batch closes by itself, in the codec. The others need a time. A batch that waits for 500 records never fills when
the broker grants 20 unacknowledged messages. And one record alone should not wait the whole linger when nothing else is
on its way. So a batch may go after the linger, when sender and source are quiet, when the broker's window is exhausted,
or at a drain.

A batch whose time has come is offered, not closed. The sender takes it when it can make a call; until then it grows.
If it were closed by its time alone, an outage would leave one small batch for each linger, and each of them would be a
call of its own afterwards. An open batch also costs less memory than many small ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fastkin._codec import IDLE, LINGER

if TYPE_CHECKING:
    import asyncio

    from fastkin._codec import Batcher

_QUIET_SHARE = 4  # the source is quiet when it gave nothing for this part of the linger
_QUIET_MIN_S = 0.002
_ROUNDING_S = 0.001  # uvloop rounds timers down to that: waking early would spin


class Downstream(Protocol):
    """What takes the closed batches: the sender, or what stands before it."""

    @property
    def idle(self) -> bool: ...

    def pump(self) -> None: ...


class Flusher:
    """One timer per batcher, armed only while a batch is open and not offered."""

    __slots__ = (
        "_batcher",
        "_deadline",
        "_last",
        "_linger_s",
        "_loop",
        "_opened",
        "_quiet_s",
        "_seen",
        "_sender",
        "_timer",
    )

    def __init__(self, batcher: Batcher, sender: Downstream, linger_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._batcher = batcher
        self._sender = sender
        self._linger_s = linger_s
        self._quiet_s = max(_QUIET_MIN_S, linger_s / _QUIET_SHARE)
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._opened = 0  # which open batch the deadline is for
        self._deadline = 0.0
        self._last = -linger_s  # when the last one went before it was full
        self._seen = 0

    def attend(self) -> None:
        """The batcher has news: send what is closed, see that what is open will go in time."""
        batcher = self._batcher
        # First of all: what comes while this runs sets it again.
        batcher.dirty = False
        if batcher.open_records and not batcher.offered:
            # Nothing to wait for. A timer of zero would cost a turn of the loop per message.
            if self._linger_s <= 0.0:
                batcher.offer_open(LINGER)
            elif self._timer is None:
                self._arm(self._loop.time())
        self._sender.pump()

    @property
    def armed(self) -> bool:
        """A timer will look at the open batch."""
        return self._timer is not None

    def close(self, reason: int) -> None:
        """The open batch may go now."""
        # Only what really went starts a new linger.
        if self._batcher.offer_open(reason) or self._batcher.ready:
            self._last = self._loop.time()
            self._sender.pump()

    def stop(self) -> None:
        # What is open stays open: the owner decides about it.
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, now: float) -> None:
        batcher = self._batcher
        if batcher.opened != self._opened:
            self._opened = batcher.opened
            self._deadline = now + self._linger_s
        # To be compared when the timer rings: more since means that the source is not quiet.
        self._seen = batcher.received
        # Early ones keep the linger between them, else each message of a slow source would be a call of its own.
        early = max(now + self._quiet_s, self._last + self._linger_s)
        self._timer = self._loop.call_at(min(self._deadline, early), self._check)

    def _check(self) -> None:
        self._timer = None
        batcher = self._batcher
        if batcher.open_records and not batcher.offered:
            now = self._loop.time()
            # It was opened since, and nobody told how long ago. So it counts as quiet for a while already.
            if batcher.opened != self._opened:
                self._opened = batcher.opened
                self._deadline = now + self._linger_s - self._quiet_s
            if now >= self._deadline - _ROUNDING_S:
                self.close(LINGER)
            # The source is quiet and nobody is busy. The rest of the linger would only make it late.
            elif batcher.received == self._seen and now >= self._last + self._linger_s and self._sender.idle:
                self.close(IDLE)
            # It may still be open, or the next one may be: without a timer nobody would look at it.
            if batcher.open_records and not batcher.offered:
                self._arm(now)
