"""One connection: writes a request, waits for its answer, and ends with its call when anything was odd.

One call is one coroutine of its caller: no task is made for it. A body is written in slices, each when the socket has
taken the one before, so that several large calls share the loop with everybody else.

A connection ends with its call when anything about the call was odd: an answer before the body was written, a broken
answer, a byte that nobody asked for, a timeout, a cancelled caller. Only a call that ended as HTTP/1.1 says leaves it
usable: an answer belongs to one request, or to none.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, cast

from fastkin.aws.http_answer import MAX_ANSWER, Answer, RefusedAnswerError, Reply
from fastkin.aws.http_progress import Progress, unread_by_us, unsent_by_kernel
from fastkin.errors import TransportError
from fastkin.net.dial import avoid

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

# One write is at most this much: 256 KiB of TLS is about 0.1 ms of the loop's time, and slices of this
# size also measured 10 to 19 % less CPU over TLS than whole bodies (they stay in the cache).
SLICE = 256 * 1024
# The transport asks us to wait once this much is queued behind the socket, and goes on below LOW_WATER.
HIGH_WATER = 256 * 1024
LOW_WATER = 64 * 1024
CLOSE_S = 5.0  # a transport that was aborted says so within this, or is forgotten


class StaleConnectionError(Exception):
    """A reused connection died before the first byte of an answer."""


class Connection(asyncio.Protocol):
    """One connection, one call at a time."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, where: str, *, tls: bool, gone: Callable[[Connection], None]
    ) -> None:
        """`where`: host and port, for messages. `gone` hears of the end, before the call does."""
        self.where = where
        self._tls = tls
        self._gone = gone
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = loop.create_future()
        self._waiter: asyncio.Future[Reply] | None = None
        self._error: BaseException | None = None
        self.answer: Answer = Answer()
        self._paused = False
        self._calls = 0
        self.idle_since: float = 0.0
        # what is being written, when it is more than one slice
        self._body: memoryview | None = None
        self._sent = 0

    # -- for the pool

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: Buffer, timeout_s: float, max_answer: int = MAX_ANSWER) -> Reply:
        """Write one request, read its answer. Raises StaleConnectionError if it may be tried again."""
        transport = self._transport
        self.answer.start(max_answer)
        if transport is None or transport.is_closing():
            raise self._broken("the connection closed before the call")
        if (self._calls or not self._tls) and unread_by_us(transport):
            # What is here before we have asked is no answer to us. (Behind a fresh handshake there may be tickets.)
            self.abort()
            raise self._broken("the server spoke before it was asked")
        loop = self._loop
        waiter: asyncio.Future[Reply] = loop.create_future()
        self._waiter = waiter
        self._error = None
        view = memoryview(body)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        progress = Progress(self, loop, len(view), timeout_s)
        try:
            if len(view) <= SLICE:
                transport.writelines((head, view) if len(view) else (head,))
            else:
                self._body = view
                self._sent = 0
                transport.write(head)
                self._pump()
            return await waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            progress.end()
            self._waiter = None
            self._body = None
            self._calls += 1
            # The transport may still hold the buffer: it is let go before the caller gets it back.
            if self._transport is not None and transport.get_write_buffer_size():
                self.abort()
            if transport.is_closing():
                try:
                    if not self.lost.done():
                        await asyncio.wait([self.lost], timeout=CLOSE_S)
                finally:
                    self._gone(self)
            with contextlib.suppress(BufferError):
                view.release()  # a traceback that keeps this frame must not keep the body

    def shut(self, code: str, message: str) -> None:
        """Close at once; a call that is on its way ends with this error."""
        self._error = self._error or TransportError(code, message)
        self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- writing

    def _pump(self) -> None:
        """Write the next slice. Called again by the loop, or when the transport has room."""
        view = self._body
        transport = self._transport
        if view is None or transport is None or self._paused or transport.is_closing():
            return
        at = self._sent
        self._sent = end = min(at + SLICE, len(view))
        if end == len(view):
            self._body = None
        transport.write(view[at:end])
        if self._body is not None and not self._paused:
            self._loop.call_soon(self._pump)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        # not at once: we may be inside the transport's own write
        if self._body is not None:
            self._loop.call_soon(self._pump)

    # -- what the loop tells us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio.Transport by class
        self._transport = transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(HIGH_WATER, LOW_WATER)
        self.answer.open()

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if self._waiter is None or answer.reply is not None:
            self.abort()  # bytes that nobody asked for
            return
        try:
            excess = answer.feed(data)
        except RefusedAnswerError as error:
            self._fail(error.code, str(error))
            return
        if answer.reply is not None:
            self._complete(answer.reply)
        if excess:
            self.abort()  # the answer stands, the connection does not

    def eof_received(self) -> bool | None:
        if self._waiter is not None and (reply := self.answer.end()) is not None:
            self._complete(reply)
        return None  # the transport closes itself

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        self.answer.close()
        self._body = None
        self._gone(self)
        if not self.lost.done():
            self.lost.set_result(None)
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self.answer.reply is not None:
            waiter.set_result(self.answer.reply)
        elif self._error is not None:
            waiter.set_exception(self._error)
        elif exc is None and (reply := self.answer.end()) is not None:
            waiter.set_result(reply)
        else:
            waiter.set_exception(self._broken(f"{type(exc).__name__}: {exc}" if exc else "closed by the other side"))

    def _broken(self, why: str) -> Exception:
        if self._calls and not self.answer.begun:
            return StaleConnectionError(why)
        when = "in the middle of the answer" if self.answer.begun else "before an answer"
        return TransportError("ConnectionLost", f"the connection broke {when}: {why}")

    def unsent(self) -> int:
        """Bytes that the peer's machine has not taken yet: ours, the transport's, the kernel's."""
        transport = self._transport
        if transport is None:
            return 0
        ours = len(self._body) - self._sent if self._body is not None else 0
        return ours + transport.get_write_buffer_size() + unsent_by_kernel(transport)

    def came(self) -> int:
        """Bytes of the answer so far, framing included."""
        return self.answer.wire_bytes

    def time_out(self, message: str, unsent: int) -> None:
        """End the call, for it does not move."""
        if not (self._calls or self.answer.begun) and self._transport is not None:
            avoid(self._transport.get_extra_info("peername"))  # another address of the host may answer
        self._fail("RequestTimeout", message)
        if isinstance(self._error, TransportError):
            self._error.unsent_bytes = unsent

    def _fail(self, code: str, message: str) -> None:
        """End the call with an error; the caller hears of it when the transport has let go."""
        if self._error is None:
            self._error = TransportError(code, message)
            self.answer.reply = None
        self.abort()

    def _complete(self, reply: Reply) -> None:
        transport = self._transport
        waiter = self._waiter
        if transport is None or waiter is None or waiter.done():
            return
        early = self._body is not None or transport.get_write_buffer_size() > 0
        if early and reply.status < 300:
            # it may refuse what it has seen, it cannot have taken what it has not
            self._fail("BadAnswer", f"the answer {reply.status} came before the request was written")
            return
        if early or self.answer.last:
            self.abort()  # connection_lost gives the answer out, when the buffer is free
            return
        waiter.set_result(reply)
