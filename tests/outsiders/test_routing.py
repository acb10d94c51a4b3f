"""What a broker delivers on a pipeline's connection is stored, in the format of the filter it came by."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
from fastkin.config import Broker
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from fastkin.settings import load
from support.fake_broker import FakeBroker, until
from support.mqtt_wire import publish
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from support.fake_broker import Peer

PROTOCOLS = pytest.mark.parametrize("protocol", ["3.1.1", "5"])
LABEL = "/devices/+/bulkData/telemetry"
EVENT = b'{"event": 1}'
FRAME = fastkin.encode_frame([b"one", b"two"])


class Scripted:
    """A broker that keeps the session (or not), takes SUBSCRIBE and UNSUBSCRIBE, and delivers what it is told to."""

    def __init__(self, *, present: bool = False, properties: bytes = b"", refuse_identifiers: bool = False) -> None:
        self.present = present
        self.properties = properties
        self.refuse_identifiers = refuse_identifiers
        self.subscribed: list[tuple[int, list[str]]] = []  # identifier and filters of each SUBSCRIBE
        self.unsubscribed = 0
        self.acked: list[int] = []
        self.peer: Peer | None = None
        self._next = 0

    async def script(self, peer: Peer) -> None:
        first, body = await peer.packet()
        assert first == 0x10
        peer.version = body[6]
        answer = bytes((self.present, 0))
        if peer.version == 5:
            answer += bytes((len(self.properties),)) + self.properties
        peer.send(bytes((0x20, len(answer))), answer)
        self.peer = peer
        while True:
            first, body = await peer.packet()
            if first == 0x82:
                self.subscribe(peer, body)
            elif first == 0xA2:
                self.unsubscribed += 1
                count = 1
                peer.send(
                    b"\xb0\x04" + body[:2] + b"\0" + bytes(count) if peer.version == 5 else b"\xb0\x02" + body[:2]
                )
            elif first & 0xF0 == 0x40:
                self.acked.append(int.from_bytes(body[:2], "big"))
            elif first == 0xE0:
                return

    def subscribe(self, peer: Peer, body: bytes) -> None:
        at = 2
        number = 0
        if peer.version == 5:
            properties = body[3 : 3 + body[2]]
            if properties:
                assert properties[0] == 0x0B
                number = properties[1]
            at = 3 + body[2]
        filters = []
        while at < len(body):
            size = int.from_bytes(body[at : at + 2], "big")
            filters.append(body[at + 2 : at + 2 + size].decode())
            at += 3 + size
        self.subscribed.append((number, filters))
        code = 0xA1 if number and self.refuse_identifiers else 1
        answer = body[:2] + b"\0" * (peer.version == 5) + bytes([code] * len(filters))
        peer.send(bytes((0x90, len(answer))), answer)

    def number(self, topic_filter: str) -> int:
        return next(number for number, filters in reversed(self.subscribed) if topic_filter in filters)

    def deliver(self, topic: str, payload: bytes, *identifiers: int) -> None:
        assert self.peer is not None
        self._next += 1
        properties = b"".join(b"\x0b" + bytes((n,)) for n in identifiers if n)
        version = self.peer.version
        self.peer.send(
            publish(topic, payload, qos=1, packet_id=self._next, version=version, properties=properties)
        )  # fmt: skip

    async def acknowledged(self) -> None:
        await until(lambda: self.acked == list(range(1, self._next + 1)), 15)


class Plant:
    def __init__(self, emulator: Emulator, engine: fastkin.Engine, directory: Path, toml: Callable[..., Any]) -> None:
        self.emulator = emulator
        self.engine = engine
        self.directory = directory
        self.settings = toml

    def stored(self) -> list[bytes]:
        return [record.data for record in self.emulator.stored("welders")]

    def letters(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "dead.jsonl").read_text().splitlines()]

    @property
    def stats(self) -> dict[str, Any]:
        return self.engine.stats()["p"]


@contextlib.asynccontextmanager
async def plant(directory: Path, port: int, pipeline: str, protocol: str = "auto") -> AsyncIterator[Plant]:
    """An engine from a settings file, against a broker at the port and the emulator."""
    async with Emulator({"welders": 1}) as emulator:

        def settings(lines: str) -> Any:
            path = directory / "fastkin.toml"
            path.write_text(f"""
[broker]
host = "127.0.0.1"
port = {port}
client_id = "plant"
protocol = "{protocol}"

[[pipeline]]
id = "p"
stream = "welders"
region = "us-east-1"
endpoint_url = "{emulator.url}"
access_key = "{ACCESS_KEY}"
secret_key = "{SECRET_KEY}"
linger_ms = 5
dead_letter = "{directory / "dead.jsonl"}"
{lines}
""")
            return load(path, env={})

        async with fastkin.Engine(settings(pipeline)) as engine:
            async with asyncio.timeout(20):
                await engine.pipelines["p"].subscriber.connected.wait()
            yield Plant(emulator, engine, directory, settings)


@PROTOCOLS
async def test_one_format_takes_whatever_the_broker_delivers(tmp_path: Path, protocol: str) -> None:
    """Topics that a broker rewrote, that it took "#" for, whose filter it read in its own way."""
    topics = ["sensors/one", "$SYS/broker/uptime", "t", "rewritten/by/the/broker", "$events/x"]
    broker = Scripted()
    async with FakeBroker(broker.script) as server:
        lines = 'topics = ["sensors/+", "#", "$SYS/broker/uptime", "$queue/t", "a/b"]'
        async with plant(tmp_path, server.port, lines, protocol) as p:
            for topic in topics:
                broker.deliver(topic, topic.encode())
            await broker.acknowledged()
            assert p.stored() == [topic.encode() for topic in topics]
            assert p.stats["unrouted"] == 0
            assert {number for number, _ in broker.subscribed} == {0}


@PROTOCOLS
async def test_one_narrow_filter_takes_whatever_the_broker_delivers(tmp_path: Path, protocol: str) -> None:
    broker = Scripted()
    async with (
        FakeBroker(broker.script) as server,
        plant(tmp_path, server.port, 'topics = ["$queue/t"]', protocol) as p,
    ):
        broker.deliver("t", b"1")
        broker.deliver("other", b"2")
        await broker.acknowledged()
        assert p.stored() == [b"1", b"2"]


@pytest.mark.process
async def test_sys_topics_beside_everything(tmp_path: Path) -> None:
    """A real broker's."""
    with mosquitto("sys_interval 1\n") as server:
        async with plant(tmp_path, server.port, 'topics = ["#", "$SYS/broker/uptime"]') as p:
            await until(lambda: any(b"seconds" in data for data in p.stored()), 10)
            assert p.stats["unrouted"] == 0


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("3.1.1", {}),
        ("5", {}),
        ("5", {"properties": b"\x29\x00"}),
        ("5", {"properties": b"\x29\x01"}),
        ("5", {"refuse_identifiers": True}),
    ],
)
async def test_a_format_per_filter(tmp_path: Path, protocol: str, options: dict[str, Any]) -> None:
    """JSON that comes by `topics` is stored as it is, frames that come by the label are taken apart."""
    broker = Scripted(**options)
    async with FakeBroker(broker.script) as server:
        lines = 'topics = ["events/+", "$queue/jobs"]\nbulk_label = "telemetry"'
        async with plant(tmp_path, server.port, lines, protocol) as p:
            raw, bulk = broker.number("events/+"), broker.number(LABEL)
            if protocol == "5" and options.get("properties") != b"\x29\x00" and "refuse_identifiers" not in options:
                assert raw
                assert bulk
                assert raw != bulk
                broker.deliver("rewritten/by/the/broker", EVENT, raw)
                broker.deliver("rewritten/by/the/broker", FRAME, bulk)
            else:
                assert (raw, bulk) == (0, 0)
                broker.deliver("events/9", EVENT)
                broker.deliver("/devices/9/bulkData/telemetry", FRAME)
            broker.deliver("events/1", EVENT, raw)
            broker.deliver("/devices/7/bulkData/telemetry", FRAME, bulk)
            broker.deliver("events/1", EVENT)
            broker.deliver("/devices/7/bulkData/telemetry", FRAME)
            broker.deliver("jobs", EVENT)
            await broker.acknowledged()
            assert p.stored() == [EVENT, b"one", b"two"] * 3 + [EVENT]
            assert p.stats["format_errors"] == {}
            broker.deliver("/devices/7/bulkData/telemetry", EVENT)  # no frame
            await broker.acknowledged()
            assert [letter["topic"] for letter in p.letters()] == ["/devices/7/bulkData/telemetry"]


@PROTOCOLS
async def test_what_no_filter_tells_is_a_dead_letter(tmp_path: Path, protocol: str) -> None:
    broker = Scripted(properties=b"\x29\x00")
    async with FakeBroker(broker.script) as server:
        lines = 'topics = ["events/+"]\nbulk_label = "telemetry"'
        async with plant(tmp_path, server.port, lines, protocol) as p:
            broker.deliver("no/such\u202etopic", FRAME)
            broker.deliver("events/1", EVENT)
            await broker.acknowledged()
            assert p.stored() == [EVENT]
            (letter,) = p.letters()
            assert letter["topic"] == "no/such\u202etopic"
            for word in ("no/such\\u202etopic", "events/+", LABEL):
                assert word in letter["reason"]
            assert (p.stats["dead_lettered"], p.stats["unrouted"]) == (1, 0)


@PROTOCOLS
@pytest.mark.process
async def test_a_bulk_label_beside_everything(tmp_path: Path, protocol: str) -> None:
    """Both filters take the frames. Where the broker does not say which, the label's own is the closer one."""
    with mosquitto() as server:
        async with plant(tmp_path, server.port, 'topics = ["#"]\nbulk_label = "telemetry"', protocol) as p:
            publisher = Publisher(Broker(host=server.host, port=server.port))
            await publisher.connect()
            await publisher.publish("/devices/7/bulkData/telemetry", FRAME, 1)
            await publisher.publish("events/1", EVENT, 1)
            await publisher.close()
            await until(lambda: EVENT in p.stored() and b"two" in p.stored(), 10)
            # in 5.0 mosquitto sends a copy for each of the two subscriptions, and says for which
            copy = [FRAME] if protocol == "5" else []
            assert sorted(p.stored()) == sorted([b"one", b"two", EVENT, *copy])
            assert p.stats["dead_lettered"] == 0


@PROTOCOLS
@pytest.mark.parametrize("present", [False, True])
async def test_what_a_reload_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, protocol: str, present: bool
) -> None:
    """A session that the broker kept may still bring it: it is discarded, with its topic and filter told. In a new
    session nobody can have subscribed it."""
    caplog.set_level(logging.WARNING)
    broker = Scripted()
    async with (
        FakeBroker(broker.script) as server,
        plant(tmp_path, server.port, 'topics = ["a/+", "old/+"]', protocol) as p,
    ):
        broker.deliver("old/1", b"1")
        await broker.acknowledged()
        broker.present = present
        await p.engine.reload(p.settings('topics = ["a/+"]'))
        async with asyncio.timeout(10):
            await p.engine.pipelines["p"].subscriber.connected.wait()
        broker.deliver("old/2\u202e", b"2")
        broker.deliver("a/1", b"3")
        broker.deliver("rewritten/by/the/broker", b"4")
        await broker.acknowledged()
        assert p.stored() == ([b"1", b"3", b"4"] if present else [b"1", b"2", b"3", b"4"])
        assert p.stats["unrouted"] == present
    told = [r.getMessage() for r in caplog.records if "old/" in r.getMessage()]
    if present:
        (line,) = told
        for word in ("'old/2\\u202e'", "'old/+'", "discarded"):
            assert word in line
    else:
        assert told == []
    assert not any("former run" in r.getMessage() for r in caplog.records)
