"""No content of one message can block a session: not its size, not its topic, not its properties.

A broker sends what it has no acknowledgement for again on the next connection, before anything else. So each hostile
message is the first of a session, with a thousand good ones behind it, and all of those must arrive.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.emulator import Emulator
from fastkin.errors import ProtocolError
from fastkin.mqtt._core import APART, AckTracker, CallbackSink, Router, Session, Unfit
from support.fake_broker import FakeBroker, Peer, until
from support.mqtt_wire import packet, text, varint
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

GOOD = 1000
LIMIT = 65_536  # max_packet_bytes
BAD_ID = 0xABCD  # no identifier that can be acknowledged

# what follows the fixed header, from the bytes of the packet identifier and the version
Body = "Callable[[bytes, int], bytes]"


def body(topic: str | bytes, payload: bytes = b"payload", properties: bytes = b"") -> Body:
    def made(packet_id: bytes, version: int) -> bytes:
        block = varint(len(properties)) + properties if version == 5 else b""
        return text(topic) + packet_id + block + payload

    return made


def raw(*parts: bytes) -> Body:
    """`b"ID"` stands for the packet identifier."""
    return lambda packet_id, version: b"".join(packet_id if part == b"ID" else part for part in parts)


def properties(*parts: bytes) -> Body:
    return body("plant/1", properties=b"".join(parts))


# name: what follows the fixed header, and whether there is an identifier to acknowledge
BOTH: dict[str, tuple[Body, bool]] = {
    "topic is not UTF-8": (body(b"plant/\xff"), True),
    "topic has an overlong form": (body(b"plant/\xc0\xaf"), True),
    "topic has a surrogate": (body(b"plant/\xed\xa0\x80"), True),
    "topic ends within a character": (body(b"plant/\xe2\x82"), True),
    "topic above U+10FFFF": (body(b"plant/\xf4\x90\x80\x80"), True),
    "topic has a NUL": (body("plant/\0"), True),
    "topic is a NUL": (body("\0"), True),
    "topic is #": (body("#"), True),
    "topic ends in #": (body("plant/#"), True),
    "topic has a +": (body("plant/+/1"), True),
    "topic has a + within a level": (body("plant/a+b"), True),
    "topic is 65,535 bytes and ends in #": (body("x" * 65_534 + "#", b""), True),
    "topic is empty": (body(""), True),
    "topic runs over the packet": (raw(b"\xff\xff", b"plant/1", b"ID", b"payload"), False),
    "no topic at all": (raw(), False),
    "half a length of the topic": (raw(b"\0"), False),
    "no packet identifier": (raw(text("plant/1")), False),
    "half a packet identifier": (raw(text("plant/1"), b"\x01"), False),
    "packet identifier 0": (raw(text("plant/1"), b"\0\0", b"\0payload"), False),
    "one byte too large": (raw(text("plant/1"), b"ID", b"\0" * (LIMIT - 4 - 11 + 1)), True),
    "1 MiB": (body("plant/1", bytes(1 << 20)), True),
    "9 MiB": (body("plant/1", bytes(9 << 20)), True),
    "too large and a topic of 65,535 bytes": (body("p/" + "x" * 65_533, bytes(1 << 17)), True),
    "too large and not UTF-8": (body(b"plant/\xff", bytes(1 << 20)), True),
    "too large with a wildcard": (body("plant/+", bytes(2 << 20)), True),
    "too large with a NUL": (body("plant/\0", bytes(100_000)), True),
    "too large with packet identifier 0": (raw(text("plant/1"), b"\0\0", bytes(200_000)), False),
    "too large and without a topic": (raw(text(""), b"ID", bytes(200_000)), True),
}
ONLY_5: dict[str, tuple[Body, bool]] = {
    "unknown property 0x00": (properties(b"\x00\x01"), True),
    "unknown property 0x04": (properties(b"\x04\x01"), True),
    "unknown property 0x2b": (properties(b"\x2b\x01"), True),
    "unknown property 0xff": (properties(b"\xff\x01"), True),
    "a CONNACK's property": (properties(b"\x21\x00\x01"), True),
    "a reason string": (properties(b"\x1f", text("because")), True),
    "payload format 2": (properties(b"\x01\x02"), True),
    "payload format twice": (properties(b"\x01\x01\x01\x01"), True),
    "expiry twice": (properties(b"\x02\0\0\0\1", b"\x02\0\0\0\1"), True),
    "content type twice": (properties(b"\x03", text("a"), b"\x03", text("a")), True),
    "expiry is cut": (properties(b"\x02\0\0"), True),
    "topic alias 0": (properties(b"\x23\0\0"), True),
    "topic alias twice": (properties(b"\x23\0\1\x23\0\1"), True),
    "topic alias above the maximum": (properties(b"\x23\xff\xff"), True),
    "topic alias that was never set": (body("", properties=b"\x23\0\1"), True),
    "topic alias is cut": (properties(b"\x23\0"), True),
    "subscription identifier 0": (properties(b"\x0b\0"), True),
    "subscription identifier of five bytes": (properties(b"\x0b\xff\xff\xff\xff\x01"), True),
    "subscription identifier too long for what it is": (properties(b"\x0b\x80\x00"), True),
    "properties run over the packet": (raw(text("plant/1"), b"ID", b"\xff\x7f", b"\x01\x01"), True),
    "length of the properties not the shortest": (raw(text("plant/1"), b"ID", b"\x80\x00", b"payload"), True),
    "length of the properties has five bytes": (raw(text("plant/1"), b"ID", b"\xff\xff\xff\xff\x01"), True),
    "no length of the properties": (raw(text("plant/1"), b"ID"), True),
    "response topic with a wildcard": (properties(b"\x08", text("a/+")), True),
    "response topic is not UTF-8": (properties(b"\x08", text(b"\xff")), True),
    "content type is not UTF-8": (properties(b"\x03", text(b"\xfe")), True),
    "content type has a NUL": (properties(b"\x03", text("\0")), True),
    "user property is cut": (properties(b"\x26", text("a"), b"\x00"), True),
    "user property without a value": (properties(b"\x26", text("a")), True),
    "user property is not UTF-8": (properties(b"\x26", text("a"), text(b"\xc3")), True),
    "correlation data run over": (properties(b"\x09\xff\xffabc"), True),
    "too large with an unknown property": (body("plant/1", bytes(1 << 20), b"\x04\x01"), True),
    "too large with an alias never set": (body("", bytes(1 << 18), b"\x23\0\2"), True),
    "properties of 200,000 bytes": (body("plant/1", b"", (b"\x26" + text("k") + text("v" * 60_000)) * 4), True),
}  # fmt: skip
CASES = [(4, name) for name in BOTH] + [(5, name) for name in BOTH | ONLY_5]


def good(n: int, version: int) -> bytes:
    return body("plant/good", b"good %d" % n)(n.to_bytes(2, "big"), version)


class Redelivering:
    """A broker with one session: what is not acknowledged comes again, first things first and with DUP."""

    def __init__(self, *hostile: tuple[int, Callable[[bytes, int], bytes]], count: int = GOOD) -> None:
        """`hostile`: first byte and body, each sent before the good ones; their identifiers are BAD_ID and above."""
        self.hostile = hostile
        self.count = count
        self.waiting: dict[int, tuple[int, bytes]] | None = None
        self.acknowledged: list[int] = []
        self.connections = 0
        self.connects: list[bytes] = []
        self.closed_by_us = False

    async def script(self, peer: Peer) -> None:
        self.connections += 1
        first, connect = await peer.packet()
        assert first == 0x10
        peer.version = connect[6]
        self.connects.append(connect)
        present = self.waiting is not None
        peer.send(packet(0x20, bytes((present, 0)) + (b"\0" if peer.version == 5 else b"")))
        await peer.subscribe()
        again = 8 if present else 0
        if self.waiting is None:
            self.waiting = {}
            for at, (head, make) in enumerate(self.hostile):
                packet_id = BAD_ID + at
                self.waiting[packet_id] = (head, make(packet_id.to_bytes(2, "big"), peer.version))
            for n in range(1, self.count + 1):
                self.waiting[n] = (0x32, good(n, peer.version))
        reader = asyncio.create_task(self._answers(peer))
        try:
            for head, rest in list(self.waiting.values()):
                peer.send(packet(head | (again if head & 6 else 0), rest))
                await peer.writer.drain()
            await reader
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
                await reader

    async def _answers(self, peer: Peer) -> None:
        assert self.waiting is not None
        while True:
            first, rest = await peer.packet()
            packet_id = int.from_bytes(rest[:2], "big")
            if first == 0x40:
                self.acknowledged.append(packet_id)
                self.waiting.pop(packet_id, None)
            elif first == 0x50:
                peer.send(packet(0x62, rest[:2]))
            elif first == 0x70:
                self.acknowledged.append(packet_id)
                self.waiting.pop(packet_id, None)
            elif first == 0xC0:
                peer.send(b"\xd0\x00")
            elif first == 0xE0 and rest in (b"", b"\0"):
                return


@contextlib.asynccontextmanager
async def plant(
    peer: Redelivering, version: int, dead: str, *, broker: dict[str, Any] | None = None, **pipeline: Any
) -> AsyncIterator[tuple[fastkin.Engine, Emulator]]:
    async with FakeBroker(peer.script) as server, Emulator({"s": 1, "letters": 1}) as emulator:
        emulator.set_limits(False)
        settings = Settings(
            broker=Broker(
                **{
                    "host": server.host, "port": server.port, "client_id": "c", "reconnect_min_s": 0.02,
                    "reconnect_max_s": 0.05, "protocol": "5" if version == 5 else "3.1.1",
                    "max_packet_bytes": LIMIT, "topic_alias_maximum": 10,
                } | (broker or {})
            ),
            pipelines=(
                Pipeline(
                    **{"id": "p", "topics": ("#",), "dead_letter": dead, "linger_ms": 5} | pipeline,
                    kinesis=Kinesis(
                        endpoint_url=emulator.url, region="us-east-1", stream="s", access_key=ACCESS_KEY,
                        secret_key=SECRET_KEY,
                    ),
                ),
            ),
        )  # fmt: skip
        async with fastkin.Engine(settings) as engine:
            yield engine, emulator


def arrived(emulator: Emulator) -> set[bytes]:
    return {record.data for record in emulator.stored("s")}


def letters(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def books(engine: fastkin.Engine) -> dict[str, Any]:
    stats: dict[str, Any] = engine.stats()["p"]
    ended = stats["stored"] + stats["dead_lettered"] + stats["filtered"] + stats["dropped"]
    assert stats["received"] == ended + stats["in_flight"]
    return stats


EVERYTHING = {b"good %d" % n for n in range(1, GOOD + 1)}


async def passes(peer: Redelivering, version: int, path: Path, answered: bool, **options: Any) -> dict[str, Any]:
    """All good messages arrive, what is hostile is set aside and acknowledged; the letter."""
    async with plant(peer, version, str(path), **options) as (engine, emulator):
        with contextlib.suppress(TimeoutError):
            await until(lambda: arrived(emulator) >= EVERYTHING, 12)
        missing = len(EVERYTHING - arrived(emulator))
        assert not missing, f"{missing} of {GOOD} good messages did not arrive in {peer.connections} connections"
        await until(lambda: letters(path), 5)
        if answered:
            await until(lambda: not peer.waiting, 5)
            assert BAD_ID in peer.acknowledged
        else:
            await until(lambda: list(peer.waiting or ()) == [BAD_ID], 5)
        assert peer.connections <= 2
        stats = books(engine)
        assert stats["dead_lettered"] == 1
        assert stats["received"] >= GOOD + 1
    (letter,) = letters(path)
    assert letter["pipeline"] == "p"
    return letter


@pytest.mark.parametrize(("version", "name"), CASES, ids=[f"v{version}-{name}" for version, name in CASES])
async def test_what_stands_behind_a_hostile_message_arrives(version: int, name: str, tmp_path: Path) -> None:
    make, answered = (BOTH | ONLY_5)[name]
    peer = Redelivering((0x32, make))
    letter = await passes(peer, version, tmp_path / "dead", answered)
    whole = make(BAD_ID.to_bytes(2, "big"), version)
    payload = base64.b64decode(letter["payload"])
    assert "truncated" not in letter
    if letter.get("packet"):
        assert payload == whole
        assert letter["reason"].startswith("ill-formed PUBLISH: ")
        assert 0 <= letter["offset"] <= len(whole)
    else:
        assert len(payload) > 1000
        assert whole.endswith(payload)
        assert "max_packet_bytes" in letter["reason"]
        assert peer.connections == 1  # size alone ends no connection


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("head", [0x36, 0x3E, 0x37])
async def test_quality_of_service_3_does_not_block(version: int, head: int, tmp_path: Path) -> None:
    letter = await passes(Redelivering((head, body("plant/1"))), version, tmp_path / "dead", answered=False)
    assert "QoS 3" in letter["reason"]


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", ["topic is not UTF-8", "9 MiB", "topic has a +"])
async def test_quality_of_service_2_is_set_aside_and_answered(version: int, name: str, tmp_path: Path) -> None:
    await passes(Redelivering((0x34, BOTH[name][0])), version, tmp_path / "dead", answered=True)


async def test_many_hostile_messages_that_are_all_different(tmp_path: Path) -> None:
    """Each closes the connection once at most, and all of them together a few times."""
    hostile = [(0x32, body(b"plant/\xff", b"%03d" % n)) for n in range(200)]
    peer = Redelivering(*hostile)
    path = tmp_path / "dead"
    async with plant(peer, 5, str(path)) as (engine, emulator):
        with contextlib.suppress(TimeoutError):
            await until(lambda: arrived(emulator) >= EVERYTHING and not peer.waiting, 15)
        assert arrived(emulator) >= EVERYTHING
        assert not peer.waiting
        assert peer.connections <= 4
        # what was set aside when the connection ended, and not acknowledged, came again
        assert 200 <= books(engine)["dead_lettered"] <= 210
    assert len({base64.b64decode(letter["payload"])[-3:] for letter in letters(path)}) == 200


async def test_the_same_message_comes_with_each_subscribe(tmp_path: Path) -> None:
    """Retained, with QoS 0: nobody acknowledges it, and it comes again for ever."""

    class Retaining(Redelivering):
        async def script(self, peer: Peer) -> None:
            self.waiting = self.waiting or {}
            self.waiting[0] = (0x31, text(b"plant/\xff") + (b"\0" if peer.version == 5 else b"") + b"kept")
            if not self.acknowledged:
                self.waiting |= {n: (0x32, good(n, 4)) for n in range(1, GOOD + 1)}
            await super().script(peer)

    peer = Retaining()
    path = tmp_path / "dead"
    async with plant(peer, 4, str(path)) as (engine, emulator):
        with contextlib.suppress(TimeoutError):
            await until(lambda: arrived(emulator) >= EVERYTHING, 12)
        assert arrived(emulator) >= EVERYTHING
        assert peer.connections <= 2
        await until(lambda: letters(path), 5)
        books(engine)
    # the connection ended for the first one, and nobody would have sent it again
    assert {base64.b64decode(letter["payload"])[-4:] for letter in letters(path)} == {b"kept"}


def test_connect_announces_no_maximum_packet_size() -> None:
    """A broker would discard what is larger, and say nothing."""
    from fastkin.mqtt import _core as _mqtt

    session = _mqtt.Session(version=5, acks=_mqtt.AckTracker(), router=_mqtt.Router(), max_packet_bytes=65536)
    assert b"\x27" not in session.connect(client_id="c", clean_start=False, session_expiry=60)


@pytest.mark.parametrize("dead", ["none", "stream:letters"])
async def test_without_a_file_the_beginning_is_kept_and_marked(
    dead: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    peer = Redelivering((0x32, body("plant/big", b"begin" + bytes(3 << 20))))
    async with plant(peer, 5, dead) as (engine, emulator):
        with contextlib.suppress(TimeoutError):
            await until(lambda: arrived(emulator) >= EVERYTHING and not peer.waiting, 12)
        assert arrived(emulator) >= EVERYTHING
        await until(lambda: not books(engine)["in_flight"], 5)
        stats = books(engine)
        assert (stats["dead_lettered"], stats["dropped"]) == ((0, 1) if dead == "none" else (1, 0))
        if dead != "none":
            (record,) = emulator.stored("letters")
            letter = json.loads(record.data)
            assert letter["truncated"] is True
            assert letter["payload_bytes"] == (3 << 20) + 5
            assert base64.b64decode(letter["payload"]) == b"begin" + bytes(65_531)
    (line,) = [each for each in caplog.messages if "max_packet_bytes" in each]
    for part in ("pipeline=p", "plant/big", str((3 << 20) + 5), str(LIMIT)):
        assert part in line


async def test_a_letter_of_the_file_says_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    peer = Redelivering((0x32, body("plant/big", b"begin" + bytes(3 << 20))))
    letter = await passes(peer, 5, tmp_path / "dead", answered=True)
    assert letter["topic"] == "plant/big"
    assert base64.b64decode(letter["payload"]) == b"begin" + bytes(3 << 20)
    (line,) = [each for each in caplog.messages if "max_packet_bytes" in each]
    assert str(tmp_path / "dead") in line
    assert [path.name for path in tmp_path.iterdir()] == ["dead"]  # nothing is left beside it


async def test_memory_stays_flat_while_64_mib_pass(tmp_path: Path) -> None:
    peer = Redelivering((0x32, body("plant/big", bytes(64 << 20))), count=10)
    path = tmp_path / "dead"
    async with plant(peer, 5, str(path)) as (engine, emulator):
        run = engine.pipelines["p"]
        most = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                while len(arrived(emulator)) < 10 or peer.waiting:
                    link = run.subscriber._link
                    most = max(most, link.session.buffer_bytes if link is not None else 0)
                    await asyncio.sleep(0)
        assert len(arrived(emulator)) == 10
        assert not peer.waiting
        assert most < 1 << 20
    assert path.stat().st_size > 64 << 20


async def test_a_full_disk_holds_the_message_back_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading waits, and goes on when there is room."""
    import errno
    import os

    from fastkin.deadletter import insist

    monkeypatch.setattr(insist, "_RETRY_S", 0.05)
    peer = Redelivering((0x32, body("plant/big", bytes(3 << 20))))
    path = tmp_path / "dead"
    full = True
    refused = 0
    write, pwrite = os.write, os.pwrite

    def no_space(call: Any) -> Any:
        def wrapped(fd: int, data: Any, *rest: int) -> int:
            nonlocal refused
            if full and len(data) > 60_000:
                refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(call(fd, data, *rest))

        return wrapped

    monkeypatch.setattr(os, "write", no_space(write))
    monkeypatch.setattr(os, "pwrite", no_space(pwrite))
    async with plant(peer, 5, str(path)) as (engine, emulator):
        await until(lambda: refused >= 3, 10)
        assert BAD_ID not in peer.acknowledged
        assert engine.stats()["p"]["dead_lettered"] == 0
        full = False
        await until(lambda: arrived(emulator) >= EVERYTHING and not peer.waiting, 12)
        assert peer.connections == 1
        assert books(engine)["dead_lettered"] == 1
    (letter,) = letters(path)
    assert len(base64.b64decode(letter["payload"])) == 3 << 20


async def test_a_connection_that_is_cut_within_leaves_nothing(tmp_path: Path) -> None:
    class Cutting(Redelivering):
        async def script(self, peer: Peer) -> None:
            if self.connections == 0:
                self.connections += 1
                await peer.connect()
                await peer.subscribe()
                wire = packet(0x32, body("plant/big", bytes(3 << 20))(b"\xab\xcd", 5))
                peer.send(wire[: 2 << 20])
                await peer.writer.drain()
                return
            await super().script(peer)

    peer = Cutting((0x32, body("plant/big", bytes(3 << 20))))
    await passes(peer, 5, tmp_path / "dead", answered=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dead"]


# -- a packet around the limit, of which the beginning has come -------------------------------------


def dripped(session: Session, sent: bytes) -> bytes:
    """What is set aside of `sent`, which comes bit by bit."""
    pieces = []
    for at in range(0, len(sent), 8000):
        flags = session.feed_data(sent[at : at + 8000])
        while flags & APART:
            pieces.append(session.take_piece())
            if not session.apart_left:
                session.finish_apart()
            flags = session.resume()
    return b"".join(pieces)


@pytest.mark.parametrize("topic", [b"plant/big", b"plant/\xff"])
@pytest.mark.parametrize("limit", [131_072, 1 << 21, 8 << 20])
def test_no_size_around_the_limit_is_special(limit: int, topic: bytes) -> None:
    """The beginning tells which message it is, and not a byte that has not come."""
    for size in range(limit - 6, limit + 2):
        behind = text(topic) + b"\0\7" + bytes(size - len(topic) - 4)
        sent = packet(0x32, behind)
        unfit = Unfit()
        acks, router = AckTracker(), Router()
        got: list[bytes] = []
        router.add("#", CallbackSink(lambda topic, payload, token, got=got: got.append(payload) or 1))
        for connection in range(2):
            session = Session(version=4, acks=acks, router=router, max_packet_bytes=limit, unfit=unfit)
            session.feed_data(b"\x20\x02\x01\x00")
            try:
                aside = dripped(session, sent)
            except ProtocolError:
                assert connection == 0
                assert topic == b"plant/\xff"
                acks.reset(True)
                sent = b"\x3a" + sent[1:]
                continue
            break
        if got:
            assert len(sent) <= limit
            assert topic == b"plant/big"
        else:
            assert aside == (behind if topic == b"plant/\xff" else behind[len(topic) + 4 :])
            # with DUP it is the same one, and nothing is set aside twice
            assert dripped(session, b"\x3a" + sent[1:]) == b""


# -- the same over a WebSocket ---------------------------------------------------------------------


class _Frames:
    """A StreamWriter whose writes are WebSocket messages."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()

    def write(self, data: bytes) -> None:
        self._queue.put_nowait(data)

    async def drain(self) -> None:
        await asyncio.sleep(0)

    async def pump(self) -> None:
        while True:
            await self._socket.send_bytes(await self._queue.get())


@pytest.mark.parametrize("name", ["30 MiB", "topic is not UTF-8"])
async def test_a_packet_in_one_websocket_frame_does_not_block(name: str, tmp_path: Path) -> None:
    """Brokers send each packet as one message; a library that must have it whole would refuse it for ever."""
    make = BOTH[name][0] if name in BOTH else body("plant/big", bytes(30 << 20))
    peer = Redelivering((0x32, make))

    async def handler(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("mqtt",))
        await socket.prepare(request)
        writer = _Frames(socket)
        reader = asyncio.StreamReader()
        work = asyncio.gather(
            writer.pump(),
            peer.script(Peer(reader, writer, 0)),  # type: ignore[arg-type]
            return_exceptions=True,
        )
        async for message in socket:
            reader.feed_data(message.data)
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        return socket

    app = web.Application()
    app.router.add_get("/mqtt", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    path = tmp_path / "dead"
    try:
        async with plant(peer, 5, str(path), broker={"port": runner.addresses[0][1], "scheme": "ws"}) as (
            engine,
            there,
        ):
            with contextlib.suppress(TimeoutError):
                await until(lambda: arrived(there) >= EVERYTHING and not peer.waiting, 20)
            missing = len(EVERYTHING - arrived(there))
            assert not missing, f"{missing} of {GOOD} good messages did not arrive in {peer.connections} connections"
            assert books(engine)["dead_lettered"] == 1
            assert peer.connections <= 2
    finally:
        await runner.cleanup()
    (letter,) = letters(path)
    assert make(BAD_ID.to_bytes(2, "big"), 5).endswith(base64.b64decode(letter["payload"]))
