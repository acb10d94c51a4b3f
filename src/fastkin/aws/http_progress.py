"""Ends a call that does not move.

A fixed timeout for a whole call would end a large body on a slow line, and with a longer one a dead peer would hold
records for minutes. So a call may take as long as bytes of its body leave or bytes of its answer come. What has left
is told by the kernel's queue: a body that only lies in a buffer of this machine has not moved.
"""

from __future__ import annotations

import array
import fcntl
import sys
import termios
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

# A call is looked at so many times within its timeout: one without any progress ends at most an eighth late.
LOOKS = 8
# Progress must be worth waiting for: without this a peer that takes or sends a byte now and then would hold a call, and
# what is in it, for ever. A line slower than this could not carry what even a small plant sends.
LEAST_RATE = 1024.0  # bytes a second, over the whole call
PATIENCE = 4.0  # timeouts, before the rate counts; and the longest pause of a call that has moved


class Call(Protocol):
    """What is looked at: a connection with a call on its way."""

    where: str  # host and port, for messages

    def unsent(self) -> int:
        """Bytes of the request that the peer's machine has not taken yet."""
        ...

    def came(self) -> int:
        """Bytes of the answer so far, framing included."""
        ...

    def time_out(self, message: str, unsent: int) -> None:
        """End the call."""
        ...


class Progress:
    """One for each call. It holds its connection, so it must not outlive the call: `end` it."""

    def __init__(self, call: Call, loop: asyncio.AbstractEventLoop, length: int, timeout_s: float) -> None:
        """`length`: bytes of the request's body; `timeout_s`: how long nothing may move."""
        self._call = call
        self._loop = loop
        self._length = length
        self._timeout_s = timeout_s
        self._began_at = self._moved_at = loop.time()
        self._seen = (0, 0)
        self._timer = loop.call_later(timeout_s / LOOKS, self._look)

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        """Does the call move? Called every eighth of its timeout."""
        now = self._loop.time()
        unsent = self._call.unsent()
        came = self._call.came()
        seen = (unsent, came)
        if seen != self._seen:
            self._seen = seen
            self._moved_at = now
        where = self._call.where
        # What has moved for long may pause for longer. A slow peer says only now and then that it has read more, and
        # has what it took last in buffers that nobody here sees.
        allowed = min(self._timeout_s + self._moved_at - self._began_at, PATIENCE * self._timeout_s)
        moved = max(self._length - unsent, 0) + came
        took = now - self._began_at
        slack = self._timeout_s / LOOKS / 2  # timers may be early by a clock's tick
        if now - self._moved_at > allowed - slack:
            self._call.time_out(
                f"no whole answer from {where} within {took:.3g} s, nothing moved for {now - self._moved_at:.3g} s",
                min(unsent, self._length),
            )
        elif took > PATIENCE * self._timeout_s + moved / LEAST_RATE:
            self._call.time_out(f"{where} is too slow: {moved:,} bytes in {took:.3g} s", min(unsent, self._length))
        else:
            self._timer = self._loop.call_later(self._timeout_s / LOOKS, self._look)


def unsent_by_kernel(transport: asyncio.Transport) -> int:
    """Bytes that were not sent, or not acknowledged yet; 0 where that cannot be asked."""
    return _queued(transport, termios.TIOCOUTQ) if sys.platform == "linux" else 0


def unread_by_us(transport: asyncio.Transport) -> int:
    """Bytes that wait in the kernel to be read."""
    return _queued(transport, termios.FIONREAD)


def _queued(transport: asyncio.Transport, question: int) -> int:
    """Bytes in one of the kernel's queues: TIOCOUTQ or FIONREAD."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    answer = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), question, answer)
    except (OSError, ValueError):  # closed, or not a socket that knows
        return 0
    return max(answer[0], 0)
