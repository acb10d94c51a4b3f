"""Memory stays within the budget plus 10 %, measured as the resident memory of a process, while Kinesis is away.

Each case is a process of its own: `fastkin run` behind a broker that floods it, or a producer that puts until it waits.
What the process takes when it is idle and connected is where counting starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import psutil
import pytest

from fastkin import encode_frame
from support.running import ROOT, service
from support.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.process

MIB = 1 << 20
MOST = 1.1


def length(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def publish(payload: bytes, *, topic: bytes = b"plant/1", packet_id: int = 0, properties: bytes | None = None) -> bytes:
    body = len(topic).to_bytes(2, "big") + topic
    if packet_id:
        body += packet_id.to_bytes(2, "big")
    if properties is not None:
        body += length(len(properties)) + properties
    body += payload
    return bytes([0x32 if packet_id else 0x30]) + length(len(body)) + body


class Flood:
    """A broker that sends as fast as it is read, in a thread. `packets(version)` makes a chunk at a time."""

    def __init__(self, chunks: Callable[[], Iterator[bytes]], *, websocket: bool = False) -> None:
        self.port = free_port()
        self.sent = 0
        self._chunks = chunks
        self._websocket = websocket
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        if self._websocket:
            await self._serve_websocket()
            return
        server = await asyncio.start_server(self._client, "127.0.0.1", self.port)
        self._started.set()
        await self._over.wait()
        server.close()

    async def _serve_websocket(self) -> None:
        from aiohttp import web

        async def upgrade(request: web.Request) -> web.WebSocketResponse:
            socket = web.WebSocketResponse(protocols=("mqtt",), max_msg_size=0)
            await socket.prepare(request)
            await self._talk(lambda: socket.receive_bytes(), socket.send_bytes)
            return socket

        app = web.Application()
        app.router.add_get("/mqtt", upgrade)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self._started.set()
        await self._over.wait()
        await runner.cleanup()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            await self._talk(lambda: reader.read(65_536), send)
        finally:
            writer.close()

    async def _talk(self, receive: Any, send: Any) -> None:
        async def drain() -> None:
            with contextlib.suppress(ConnectionError, TypeError):
                while await receive():
                    pass

        with contextlib.suppress(ConnectionError, TypeError):
            hello = await receive()
            five = hello[hello.index(b"MQTT") + 4] == 5
            await send(b"\x20\x03\x00\x00\x00" if five else b"\x20\x02\x00\x00")
            asked = await receive()
            await send(b"\x90\x04" + asked[2:4] + b"\x00\x01" if five else b"\x90\x03" + asked[2:4] + b"\x01")
            reading = asyncio.create_task(drain())
            await asyncio.sleep(1.5)  # idle: where counting starts
            for chunk in self._chunks():
                await send(chunk)
                self.sent += len(chunk)
                if self._over.is_set():
                    break
            await self._over.wait()
            reading.cancel()


SETTINGS = """
[broker]
url = "{scheme}://127.0.0.1:{port}{path}"
client_id = "memory"
clean_session = false
protocol = "{protocol}"

[kinesis]
stream = "welders"
endpoint_url = "http://127.0.0.1:{kinesis}"
region = "us-east-1"

[[pipeline]]
id = "welders"
topics = ["plant/#"]
budget_bytes = {budget}
"""


def packets(payload: bytes, *, qos: int) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        if not qos:
            chunk = publish(payload) * 200
            while True:
                yield chunk
        for first in range(1, 65_001, 200):
            yield b"".join(publish(payload, packet_id=n) for n in range(first, first + 200))

    return chunks


def aliases() -> Iterator[bytes]:
    for n in range(1, 65_536):
        topic = b"plant/" + (b"%d" % n).rjust(64_000, b"x")
        yield publish(b"x", topic=topic, properties=b"\x23" + n.to_bytes(2, "big"))


def growth(
    tmp_path: Path, flood: Flood, settings: str, *, budget: int, seconds: float = 20.0, then: Callable[[], object] = int
) -> tuple[int, int]:
    """How much the process grew at most, from connected and idle until it took no more; and what it was sent."""
    with flood, service(tmp_path, settings) as run:
        deadline = time.monotonic() + 20
        while "subscribed" not in run.log():
            assert time.monotonic() < deadline, run.log()
            time.sleep(0.02)
        then()
        time.sleep(0.5)
        process = psutil.Process(run.process.pid)  # type: ignore[union-attr]
        base = peak = process.memory_info().rss
        sent, since, deadline = -1, time.monotonic(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.02)
            peak = max(peak, process.memory_info().rss)
            if flood.sent != sent or flood.sent == 0:
                sent, since = flood.sent, time.monotonic()
            elif time.monotonic() - since > 2.0:
                break
        print(f"base {base / MIB:.1f} MiB, +{(peak - base) / MIB:.2f} MiB of {budget / MIB:g}, sent {sent:,} bytes")
        assert process.is_running()
        return peak - base, sent


@pytest.mark.parametrize(
    ("size", "qos", "linger_ms"), [(1, 0, 0), (1, 1, 50), (152, 0, 50), (152, 1, 0), (5000, 1, 0), (5000, 0, 50)]
)
def test_raw_messages(tmp_path: Path, size: int, qos: int, linger_ms: int) -> None:
    budget = 16 * MIB
    settings = SETTINGS.format(
        scheme="mqtt", path="", port="{port}", protocol="3.1.1", kinesis=free_port(), budget=budget
    )  # fmt: skip
    flood = Flood(packets(b"x" * size, qos=qos))
    grown, _ = growth(
        tmp_path, flood, settings.format(port=flood.port) + f"linger_ms = {linger_ms}\n", budget=budget
    )  # fmt: skip
    assert grown <= MOST * budget


@pytest.mark.parametrize("protocol", ["3.1.1"])
def test_frames(tmp_path: Path, protocol: str) -> None:
    budget = 16 * MIB
    flood = Flood(packets(encode_frame([b"x"] * 100), qos=1))
    settings = SETTINGS.format(
        scheme="mqtt", path="", port=flood.port, protocol=protocol, kinesis=free_port(), budget=budget
    )  # fmt: skip
    grown, _ = growth(tmp_path, flood, settings + 'format = "bulk"\nlinger_ms = 0\n', budget=budget)
    assert grown <= MOST * budget


def test_aggregates(tmp_path: Path) -> None:
    budget = 16 * MIB
    flood = Flood(packets(b"x" * 20, qos=0))
    settings = SETTINGS.format(
        scheme="mqtt", path="", port=flood.port, protocol="3.1.1", kinesis=free_port(), budget=budget
    )  # fmt: skip
    grown, _ = growth(tmp_path, flood, settings + 'aggregation = "kpl"\n', budget=budget)
    assert grown <= MOST * budget


@pytest.mark.parametrize("qos", [0, 1])
def test_bad_frames_that_cannot_be_set_aside(tmp_path: Path, qos: int) -> None:
    """The place of the dead letters is gone: they wait."""
    budget = 16 * MIB
    flood = Flood(packets(b"\xc1", qos=qos))
    settings = SETTINGS.format(
        scheme="mqtt", path="", port=flood.port, protocol="3.1.1", kinesis=free_port(), budget=budget
    )  # fmt: skip
    place = tmp_path / "gone" / "letters.jsonl"
    place.parent.mkdir()
    grown, _ = growth(
        tmp_path, flood, settings + f'format = "bulk"\ndead_letter = "{place}"\n', budget=budget,
        then=lambda: shutil.rmtree(place.parent),
    )  # fmt: skip
    assert grown <= MOST * budget


def test_topic_aliases(tmp_path: Path) -> None:
    budget = 16 * MIB
    flood = Flood(aliases)
    settings = SETTINGS.format(
        scheme="mqtt", path="", port=flood.port, protocol="5", kinesis=free_port(), budget=budget
    )  # fmt: skip
    grown, _ = growth(tmp_path, flood, settings, budget=budget)
    assert grown <= MOST * budget


def test_websocket_frames(tmp_path: Path) -> None:
    def one_by_one() -> Iterator[bytes]:
        packet = publish(b"x")
        while True:
            yield packet

    budget = 16 * MIB
    flood = Flood(one_by_one, websocket=True)
    settings = SETTINGS.format(
        scheme="ws", path="/mqtt", port=flood.port, protocol="3.1.1", kinesis=free_port(), budget=budget
    )  # fmt: skip
    grown, _ = growth(tmp_path, flood, settings, budget=budget, seconds=25.0)
    assert grown <= MOST * budget


PRODUCER = """
import asyncio, sys, time
import psutil
from fastkin import Producer

async def main():
    kept = []
    rss = psutil.Process().memory_info
    async with asyncio.timeout(60):
        one = Producer("welders", region="us-east-1", endpoint_url={url!r}, access_key="a", secret_key="b",
                       budget_bytes={budget}, **{options!r})
        await one.start()
        await asyncio.sleep(0.5)
        base = peak = rss().rss
        for n in range(100_000_000):
            try:
                put = one.put({payload!r})
                receipt = await (asyncio.wait_for(put, 1.5) if one._delivery.budget.full else put)
            except TimeoutError:
                break
            if {keep}:
                kept.append(receipt)
            if n % 100 == 0:
                peak = max(peak, rss().rss)
            if {pause} and n % {pause} == 0:
                await asyncio.sleep(0)
        peak = max(peak, rss().rss)
        print(base, peak, n, one.stats()["peak_bytes"], sys.getsizeof(kept))
        sys.stdout.flush()
        import os
        os._exit(0)

asyncio.run(main())
"""


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"linger_ms": 50}, {"linger_ms": 0}, {"linger_ms": 0, "max_records": 1}, {"aggregate_bytes": 20_000}],
    ids=["linger", "no linger", "records alone", "aggregates"],
)
@pytest.mark.parametrize("size", [1, 152])
def test_a_producer(size: int, options: dict[str, Any], keep: bool) -> None:
    budget = 8 * MIB
    script = PRODUCER.format(
        url=f"http://127.0.0.1:{free_port()}", budget=budget, options=options, payload=b"x" * size, keep=keep, pause=50
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=90,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert told.returncode == 0, told.stderr
    base, peak, count, charged, listed = map(int, told.stdout.split())
    grown = peak - base - listed  # the caller's own list
    print(f"base {base / MIB:.1f}, +{grown / MIB:.2f} MiB of {budget / MIB:g}, {count:,} records, charged {charged:,}")
    assert grown <= MOST * budget
