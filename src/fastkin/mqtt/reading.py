"""Whether a connection reads: the causes of a pause, and when a pause pays because it makes one large read of many.

When memory has no room, reading pauses and the connection stays. What comes waits in TCP's buffers and at the broker.
To disconnect instead would cost more than it saves. Acknowledgements that are on their way in Kinesis would be void on
the next connection. The broker would send all unacknowledged messages again, and memory would be as full as before.
With QoS 0 or a clean session it would also throw away what comes meanwhile. While reading is paused, acknowledgements
and pings leave as always.

A pause whose cause nobody ends would stop the pipeline for good. So each cause has one who ends it: see `Reading`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from fastkin.mqtt.transport import Wire

# Why reading is paused, see Reading.
STALL = 1
COALESCE = 2
STOPPED = 4
PIECE = 8  # a piece of a message that is set aside is not taken yet
# Reads are coalesced while messages come faster than this in reads smaller than that. Below 2,000/s a
# pause costs latency and gains nothing, from 5,000/s on it saves four to seven of the wake-ups.
_COALESCE_ON = 5_000.0
_COALESCE_OFF = 4_000.0  # per second
_COALESCE_READ = 32 * 1024
_COALESCE_LOOK_S = 0.02


class Reading:
    """Whether a link reads: it does unless a cause is set. Each cause has one who ends it, set up before the pause.

    ========== ================================= ==========================================================
    STALL      a sink has no room, or too many   Connection.resume(). The pipeline calls it whenever records are
               are unacknowledged                settled and the budget is low, flush() when acknowledgements
                                                 leave; a call that comes in the middle of a feed is made up
                                                 for after it (Connection._idle()).
    COALESCE   the next read would be small      the timer that pause_for() arms
    PIECE      a piece of a message that is set  SetApart._carry(), the task that takes it, when who sets it
               aside is not taken                aside has room for the next
    STOPPED    stop(): no more is wanted         leave()
    ========== ================================= ==========================================================

    The end of the connection ends all. A cause may be set before there is a wire: begin() minds it.
    """

    __slots__ = ("_loop", "_stalled_at", "_timer", "_wire", "deaf", "paused")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._wire: Wire | None = None
        self._stalled_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.paused: int = 0  # bits
        self.deaf: bool = False  # the connection is given up: what still comes is thrown away

    def begin(self, wire: Wire) -> None:
        self._wire = wire
        if self.paused:
            wire.pause_reading()

    @property
    def listening(self) -> bool:
        """What the broker says is heard, or will be within a moment."""
        return not self.paused & (STALL | STOPPED | PIECE)

    @property
    def stalled(self) -> bool:
        """Reading waits for room. A connection that is being given up reads no more, whatever room there is."""
        return bool(self.paused & STALL) and not self.deaf

    @property
    def stopped(self) -> bool:
        """No more is wanted."""
        return bool(self.paused & STOPPED)

    def pause(self, why: int) -> None:
        if self.paused & why:
            return
        if why == STALL:
            self._stalled_at = self._loop.time()
        # Only the first cause pauses the wire, and only the last one to end resumes it.
        if not self.paused and self._wire is not None and not self._wire.is_closing():
            self._wire.pause_reading()
        self.paused |= why

    def pause_for(self, seconds: float) -> None:
        self.pause(COALESCE)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self.go_on, COALESCE)

    def go_on(self, why: int) -> None:
        if not self.paused & why:
            return
        self.paused &= ~why
        if not self.paused and self._wire is not None and not self._wire.is_closing():
            self._wire.resume_reading()

    def stalled_for(self) -> float:
        return self._loop.time() - self._stalled_at if self.paused & STALL else 0.0

    def end(self) -> None:
        self.paused = 0
        self._wire = None
        if self._timer is not None:
            self._timer.cancel()


class Coalescing:
    """Whether a pause after a small read pays: it does while many messages come in small reads.

    Each wake-up costs 20-30 us whatever it brings; behind a broker that sends message by message a
    short pause makes one read of ten.
    """

    __slots__ = ("_bytes", "_looked_at", "_messages", "_reads", "on", "pause_s")

    def __init__(self, pause_s: float) -> None:
        """`pause_s` 0: never."""
        self.pause_s: float = pause_s
        self.on: bool = False
        self._looked_at = 0.0  # when the rate was last looked at; since then:
        self._messages = 0
        self._reads = 0
        self._bytes = 0

    def begin(self, now: float) -> None:
        self._looked_at = now

    def pays(self, messages: int, nbytes: int, now: float) -> bool:
        """After a read of so much."""
        self._messages += messages
        self._reads += 1
        self._bytes += nbytes
        elapsed = now - self._looked_at
        if elapsed >= _COALESCE_LOOK_S:
            rate = self._messages / elapsed
            # Two thresholds, so that a rate between them does not switch it on and off. Large reads gain nothing from
            # a pause.
            self.on = (
                rate >= (_COALESCE_OFF if self.on else _COALESCE_ON) and self._bytes < self._reads * _COALESCE_READ
            )
            self._looked_at = now
            self._messages = self._reads = self._bytes = 0
        return self.on and nbytes < _COALESCE_READ
