"""A scripted broker, and a rig around a Subscriber: what the tests of the MQTT side share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Self

from fastkin.config import Broker
from fastkin.mqtt._core import AckTracker, CallbackSink, Router
from fastkin.mqtt.subscriber import Subscriber

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from support.servers import Server

CONNACK = {4: b"\x20\x02\x00\x00", 5: b"\x20\x03\x00\x00\x00"}


async def until(condition: Callable[[], Any], timeout: float = 5.0) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


class Peer:
    """One connection, seen from the broker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number  # of the connection, from 1
        self.version = 0
        self.identifiers: list[int] = []  # of each SUBSCRIBE, 0 for none

    def send(self, *packets: bytes) -> None:
        self.writer.write(b"".join(packets))

    async def packet(self) -> tuple[int, bytes]:
        """First byte and body of the next packet."""
        first = (await self.reader.readexactly(1))[0]
        size = shift = 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return first, await self.reader.readexactly(size)

    async def connect(self, answer: bytes | None = None) -> bytes:
        """Take CONNECT and accept it."""
        first, body = await self.packet()
        assert first == 0x10
        self.version = body[6]
        self.send(CONNACK[self.version] if answer is None else answer)
        return body

    async def subscribe(self, *codes: int) -> list[str]:
        """Take one SUBSCRIBE and grant it, or answer with `codes`."""
        first, body = await self.packet()
        assert first == 0x82
        at = 2
        if self.version == 5:
            assert body[2] < 128
            at += 1 + body[2]
            properties = body[3:at]
            assert properties[:1] in {b"", b"\x0b"}
            self.identifiers.append(int(properties[1]) if properties else 0)
        filters = []
        granted = bytearray()
        while at < len(body):
            size = int.from_bytes(body[at : at + 2], "big")
            filters.append(body[at + 2 : at + 2 + size].decode())
            granted.append(body[at + 2 + size] & 3)  # the other bits are options of the subscription
            at += 3 + size
        head = body[:2] + (b"\0" if self.version == 5 else b"")
        answer = bytes(codes) or bytes(granted)
        self.send(bytes((0x90, len(head) + len(answer))), head, answer)
        return filters

    async def until_closed(self) -> bytes:
        """Everything that still comes, to the end or to a DISCONNECT without a reason."""
        rest = b""
        with contextlib.suppress(ConnectionError):
            while not rest.endswith(b"\xe0\x00") and (data := await self.reader.read(65536)):
                rest += data
        return rest


class FakeBroker:
    """Runs `script(peer)` for every connection; an error in it fails the test at the end."""

    def __init__(self, script: Callable[[Peer], Awaitable[None]]) -> None:
        self._script = script
        self._errors: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.host = "127.0.0.1"
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._client, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._errors:  # before what the test itself fell over: this is why
            raise self._errors[0]

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._script(Peer(reader, writer, self.connections))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except BaseException as error:  # noqa: BLE001 - raised by __aexit__
            self._errors.append(error)
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()


class Rig:
    """A Subscriber whose messages land in a list; `room` False makes the sink refuse them."""

    def __init__(
        self,
        server: Server | FakeBroker | Any,
        filters: Sequence[tuple[str, int]] = (("plant/#", 1),),
        **broker: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "host": server.host,
            "port": server.port,
            "client_id": "rig",
            "reconnect_min_s": 0.05,
            "reconnect_max_s": 0.2,
        }
        self.acks = AckTracker()
        self.router = Router()
        self.got: list[tuple[bytes, bytes, int]] = []
        self.room = True
        self.reads = 0
        self.states: list[str] = []
        for topic_filter, _ in filters:
            self.router.add(topic_filter, CallbackSink(self._take))
        self.subscriber = Subscriber(
            Broker(**(settings | broker)),
            filters,
            router=self.router,
            acks=self.acks,
            on_read=self._on_read,
            on_state=self.states.append,
        )
        self.task: asyncio.Task[None] | None = None

    def _take(self, topic: bytes, payload: bytes, token: int) -> int:
        if not self.room:
            return -1
        self.got.append((topic, payload, token))
        return 1 if token else 0

    def _on_read(self) -> None:
        self.reads += 1

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload, _ in self.got]

    def settle(self, *messages: tuple[bytes, bytes, int]) -> None:
        """These are stored."""
        for _, _, token in messages:
            self.acks.settled(token)

    def settle_all(self) -> None:
        """Everything that came since the last time is stored, and forgotten here."""
        self.settle(*self.got)
        self.got.clear()

    def start(self) -> None:
        self.task = asyncio.create_task(self.subscriber.run())

    async def connected(self, timeout: float = 5.0) -> None:
        async with asyncio.timeout(timeout):
            await self.subscriber.connected.wait()

    async def __aenter__(self) -> Self:
        self.start()
        await self.connected()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.subscriber.close()
        assert self.task is not None
        if not self.task.done():
            await self.task

    async def crash(self) -> None:
        """Gone without a goodbye."""
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await asyncio.sleep(0.02)


def lines(caplog: Any, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]
