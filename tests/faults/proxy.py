"""A TCP proxy that does to bytes what networks do: late, little by little, flipped, half, or never.

It stands between any two parties. Everything is steered from the loop that runs it (see `harness.Rig`, which
calls over from the test's thread) and may be changed while connections are open. `up` is the way from the one
who connects, `down` the way back.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

HOST = "127.0.0.1"


class Watch(Protocol):
    """Sees what one connection carried, as it was passed on."""

    def up(self, data: bytes) -> None: ...
    def down(self, data: bytes) -> None: ...
    def closed(self) -> None: ...


@dataclass
class Way:
    """What happens to the bytes of one direction from now on."""

    delay_s: float = 0.0  # each read is passed on that much later, in order
    trickle: int = 0  # at most so many bytes a write
    trickle_s: float = 0.001  # between two of them
    corrupt_in: int | None = None  # this many bytes pass, the next one is flipped, once
    cut_in: int | None = None  # this many bytes pass, then the connection is cut, once
    passing: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: a black hole, bytes are held

    def __post_init__(self) -> None:
        self.passing.set()


class Link:
    """One connection through the proxy."""

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch
        self.client: asyncio.StreamWriter | None = None
        self.reader: asyncio.StreamReader | None = None  # the client's
        self.server: asyncio.StreamWriter | None = None
        self.server_side_port = 0  # how the server knows this connection
        self.damaged = False  # the one who connected may not have got all that the server sent
        self.pending_down = False
        self.passed_down = -math.inf  # when the last bytes went to the one who connected (loop time)
        self.deaf = False  # its way down was closed while the way up stayed open

    @property
    def gone(self) -> bool:
        """The one who connected has closed: what goes down from now on is not read."""
        reader = self.reader
        return reader is not None and (reader._eof or reader.exception() is not None)  # type: ignore[attr-defined]

    def cut(self) -> None:
        """Reset both ends: what was on its way is gone."""
        self.damaged = True
        for end in (self.client, self.server):
            if end is not None:
                _reset(end)


class FaultProxy:
    """Listens on a port of its own; `target` may be changed at any time."""

    def __init__(
        self,
        port: int,
        *,
        watch: Callable[[], Watch] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.target_port = port
        self.port = 0
        self.up = Way()
        self.down = Way()
        self.hasty_s = 0.0  # who leaves so soon after an answer may not have taken it
        self.links: set[Link] = set()
        self.accepted = 0
        self.flipped = 0  # bytes that were changed on their way
        # told the server's port of a link whose client may not have got what the server sent last
        self.on_damage: Callable[[int], None] = lambda _port: None
        self._watch = watch
        self._ssl = ssl_context
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Listen, on the former port if there was one."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, HOST, self.port, ssl=self._ssl)
            self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Nobody listens: connects are refused. Open connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        await self.refuse()
        self.cut()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> int:
        """Reset what is open; how many that were."""
        links = tuple(self.links)
        for link in links:
            link.cut()
        return len(links)

    def half_close(self) -> int:
        """The one who connected reads an end, and may go on writing."""
        links = tuple(self.links)
        for link in links:
            link.deaf = link.damaged = True
            if link.client is not None and link.client.can_write_eof():
                with contextlib.suppress(OSError):
                    link.client.write_eof()
        return len(links)

    def hold(self) -> None:
        """A black hole both ways: nothing passes, nothing is refused. New connections are taken and held."""
        self.up.passing.clear()
        self.down.passing.clear()

    def release(self) -> None:
        self.up.passing.set()
        self.down.passing.set()

    def heal(self) -> None:
        """No fault from now on; what was held is passed on."""
        for way in (self.up, self.down):
            way.delay_s, way.trickle, way.corrupt_in, way.cut_in = 0.0, 0, None, None
        self.release()

    # -- one connection --------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        link = Link(self._watch() if self._watch is not None else None)
        link.client, link.reader = writer, reader
        self.links.add(link)
        try:
            await self._serve(link, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self.links.discard(link)
            self._tasks.discard(task)
            if link.damaged or link.pending_down:
                self.on_damage(link.server_side_port)
            for end in (link.client, link.server):
                if end is not None:
                    end.close()
            if link.watch is not None:
                link.watch.closed()

    async def _serve(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.up.passing.wait()
        up_reader, up_writer = await asyncio.open_connection(HOST, self.target_port)
        link.server = up_writer
        link.server_side_port = up_writer.get_extra_info("sockname")[1]
        for end in (writer, up_writer):
            end.transport.set_write_buffer_limits(0)  # drain() is over when the kernel has it all
        pumps = [
            asyncio.create_task(self._pump(link, self.up, reader, up_writer, down=False)),
            asyncio.create_task(self._pump(link, self.down, up_reader, writer, down=True)),
        ]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, link: Link, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool
    ) -> None:
        try:
            while data := await reader.read(65_536):
                if down:
                    link.pending_down = True
                if way.delay_s:
                    await asyncio.sleep(way.delay_s)
                await way.passing.wait()
                if down and link.deaf:
                    continue
                await self._pass(link, way, data, writer, down=down)
                if down and link.gone:
                    link.damaged = True
                elif down:
                    link.pending_down = False
                    link.passed_down = asyncio.get_running_loop().time()
            if not down and asyncio.get_running_loop().time() - link.passed_down < self.hasty_s:
                link.damaged = True
            await way.passing.wait()
            if writer.can_write_eof():
                writer.write_eof()
            else:
                writer.close()
        except OSError:
            link.cut()
            raise

    async def _pass(self, link: Link, way: Way, data: bytes, writer: asyncio.StreamWriter, *, down: bool) -> None:
        cut = False
        if way.corrupt_in is not None:
            if way.corrupt_in < len(data):
                at, way.corrupt_in = way.corrupt_in, None
                data = data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]
                self.flipped += 1
                if down:
                    self.on_damage(link.server_side_port)
            else:
                way.corrupt_in -= len(data)
        if way.cut_in is not None:
            if way.cut_in < len(data):
                data, way.cut_in, cut = data[: way.cut_in], None, True
            else:
                way.cut_in -= len(data)
        while data:  # the step may change between two of them
            part, data = data[: way.trickle or None], data[way.trickle :] if way.trickle else b""
            writer.write(part)
            if link.watch is not None:
                (link.watch.down if down else link.watch.up)(part)
            await writer.drain()
            if way.trickle:
                await asyncio.sleep(way.trickle_s)
                await way.passing.wait()
        if cut:
            await asyncio.sleep(0.02)  # let the part arrive, or the reset overtakes it
            link.cut()
            raise ConnectionAbortedError


def _reset(end: asyncio.StreamWriter) -> None:
    sock = end.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()
