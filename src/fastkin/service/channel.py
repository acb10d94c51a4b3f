"""Questions from the process that has the workers to one of them, and its answers: JSON lines over a socket pair.

A pair and no port: strangers cannot reach it, nothing can be taken already, and each end sees at once that the other
has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

from fastkin.errors import FastkinError
from fastkin.runtime.waiters import fail_all

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping

_LOG = logging.getLogger("fastkin.workers")
_LINE_BYTES = 64 << 20  # the figures of a hundred pipelines are a megabyte


class GoneError(FastkinError):
    """The other end has gone, or does not answer."""


class Asker:
    """The end that asks."""

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._reading: asyncio.Task[None] | None = None

    async def open(self, end: socket.socket) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=end, limit=_LINE_BYTES)
        self._reading = asyncio.create_task(self._read(reader), name="fastkin channel")

    async def ask(self, what: str, timeout_s: float | None) -> Any:
        """GoneError: there is nobody, or no answer within `timeout_s`."""
        if self._writer is None or self._reading is None or self._reading.done():
            raise GoneError("it has ended")
        self._number += 1
        answer = asyncio.get_running_loop().create_future()
        self._waiting[self._number] = answer
        self._writer.write(json.dumps([self._number, what]).encode() + b"\n")
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise GoneError(f"it has not answered for {timeout_s:g} s") from None
        finally:
            self._waiting.pop(self._number, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                number, answer = json.loads(line)
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (OSError, ValueError):
            pass  # cut within a line: it was killed
        finally:
            fail_all(self._waiting.values(), GoneError("it has ended"))

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()


class Answerer:
    """The end that answers. Questions are answered side by side."""

    def __init__(self, end: socket.socket, answers: Mapping[str, Callable[[], Awaitable[Any]]]) -> None:
        self._end = end
        self._answers = answers
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until the other end has gone."""
        reader, writer = await asyncio.open_unix_connection(sock=self._end, limit=_LINE_BYTES)
        try:
            while line := await reader.readline():
                number, what = json.loads(line)
                task = asyncio.create_task(self._one(writer, number, what), name=f"fastkin channel {what}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except OSError:
            pass
        finally:
            writer.close()

    async def finish(self) -> None:
        """Wait until what was asked is answered."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _one(self, writer: asyncio.StreamWriter, number: int, what: str) -> None:
        try:
            said = await self._answers[what]()
        except Exception:  # noqa: BLE001 - whatever it is, the next question may be answered
            _LOG.exception("stage=workers cannot answer %s", what)
            said = None
        writer.write(json.dumps([number, said]).encode() + b"\n")
        with contextlib.suppress(OSError):
            await writer.drain()
