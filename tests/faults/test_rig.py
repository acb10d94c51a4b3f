"""The rig itself: its proxy does what it says, and a fastkin that loses, repeats or miscounts is found out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from harness import Rig, Scraper
from ledger import Ledger, MqttWatch, numbers, record
from proxy import FaultProxy
from support.mqtt_wire import publish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[FaultProxy]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
            writer.write(b"bye")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy = FaultProxy(server.sockets[0].getsockname()[1])
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
        server.close()


@contextlib.asynccontextmanager
async def connection(proxy: FaultProxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_without_a_fault_all_passes_and_ends_are_passed_on() -> None:
    async with echo() as proxy, connection(proxy) as (reader, writer):
        writer.write(b"x" * 200_000)
        assert await reader.readexactly(200_000) == b"x" * 200_000
        writer.write_eof()
        assert await reader.read() == b"bye"


async def test_a_flipped_byte_is_one() -> None:
    async with echo() as proxy, connection(proxy) as (reader, writer):
        damaged: list[int] = []
        proxy.on_damage = damaged.append
        proxy.down.corrupt_in = 3
        writer.write(b"abcdefgh")
        got = await reader.readexactly(8)
        assert got == b"abc" + bytes((ord("d") ^ 0xFF,)) + b"efgh"
        assert len(damaged) == 1
        writer.write(b"abcdefgh")
        assert await reader.readexactly(8) == b"abcdefgh"


async def test_a_cut_after_some_bytes() -> None:
    async with echo() as proxy, connection(proxy) as (reader, writer):
        proxy.down.cut_in = 5
        writer.write(b"abcdefgh")
        got = b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(100):
                got += data
        assert got == b"abcde"


async def test_a_trickle_is_slow_and_whole() -> None:
    async with echo() as proxy, connection(proxy) as (reader, writer):
        proxy.down.trickle = 3
        writer.write(b"abcdefgh")
        assert await reader.readexactly(8) == b"abcdefgh"


async def test_a_trickle_that_ends_in_the_middle_repeats_nothing() -> None:
    async with echo() as proxy, connection(proxy) as (reader, writer):
        proxy.down.trickle = 3
        sent = bytes(range(250)) * 4
        writer.write(sent)
        got = await reader.readexactly(30)
        proxy.heal()
        assert got + await reader.readexactly(970) == sent
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)


async def test_a_black_hole_holds_what_comes_and_gives_it_later() -> None:
    async with echo() as proxy, connection(proxy) as (reader, writer):
        proxy.hold()
        writer.write(b"abc")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        async with connection(proxy) as (second, third):  # taken, not answered
            third.write(b"x")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(second.read(1), 0.05)
            proxy.release()
            assert await reader.readexactly(3) == b"abc"
            assert await second.readexactly(1) == b"x"


async def test_what_comes_after_the_client_went_is_damage() -> None:
    async with echo() as proxy:
        damaged: list[int] = []
        proxy.on_damage = damaged.append
        async with connection(proxy) as (_, writer):
            proxy.down.passing.clear()
            writer.write(b"abc")
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        proxy.release()
        async with asyncio.timeout(5):
            while proxy.links:
                await asyncio.sleep(0.01)
        assert len(damaged) == 1


async def test_half_closed_and_refused() -> None:
    async with echo() as proxy, connection(proxy) as (reader, writer):
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        proxy.half_close()
        assert await reader.read() == b""
        writer.write(b"still")
        await writer.drain()
        port = proxy.port
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await proxy.start()
        assert proxy.port == port
        async with connection(proxy) as (second, third):
            third.write(b"b")
            assert await second.readexactly(1) == b"b"


def test_the_watch_counts_what_is_handed_out_and_what_is_open() -> None:
    safe = {1, 2}
    ledger = Ledger(unsafe=lambda which: [n for n in which if n not in safe])
    watch = MqttWatch(ledger)
    watch.up(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00")
    stream = b"".join(publish("plant/raw/1", record(n), qos=1, packet_id=n) for n in (1, 2, 3, 3))
    for at in range(0, len(stream), 7):  # in pieces, as they come
        watch.down(stream[at : at + 7])
    assert dict(ledger.handed) == {1: 1, 2: 1, 3: 2}
    assert (ledger.redelivered, watch.unacked) == (1, 3)
    watch.up(b"\x40\x02\x00\x01\x40\x02")
    watch.up(b"\x00\x03")
    assert ledger.acked == {1, 3}
    assert ledger.too_early == [3]
    watch.closed()
    assert (ledger.unacked_at_cut, ledger.late_acks) == (1, 2)


def test_records_tell_their_numbers() -> None:
    assert numbers(record(17) + record(4_000_000)) == [17, 4_000_000]
    assert len({len(record(n)) for n in range(300)}) > 100


TOLD = """# HELP fastkin_records_received_total x
fastkin_records_received_total{pipeline="raw"} 10.0
fastkin_records_stored_total{pipeline="raw"} 4.0
fastkin_records_dead_lettered_total{pipeline="raw",reason="a"} 1.0
fastkin_records_dead_lettered_total{pipeline="raw",reason="b"} 1.0
fastkin_records_filtered_total{pipeline="raw"} 0.0
fastkin_records_dropped_total{pipeline="raw",policy="x"} 1.0
fastkin_records_in_flight{pipeline="raw"} 2.0
fastkin_spool_records{pipeline="raw"} 1.0
"""


def test_a_broken_identity_is_seen() -> None:
    scraper = Scraper(1)
    scraper.judge(TOLD)
    assert (scraper.scrapes, scraper.broken) == (1, [])
    scraper.judge(TOLD.replace('spool_records{pipeline="raw"} 1.0', 'spool_records{pipeline="raw"} 0.0'))
    assert "received 10" in scraper.broken[0]
    scraper.judge("something else")
    assert len(scraper.broken) == 2


def test_a_fastkin_that_lies_is_found_out(tmp_path: Path) -> None:
    """One that ends the records of a failed call as if they were handled."""
    with Rig(tmp_path, patch={"lies": True}) as rig:
        rig.flow(100, wait=True)
        rig.stored(100)
        rig.call(lambda: rig.kinesis.faults.call("InternalFailure", times=1))
        rig.flow(100, wait=True)
        rig.until(lambda: rig.ledger.too_early, "the early acknowledgement is seen")
        with pytest.raises(AssertionError, match="before they were safe"):
            rig.finish()
        with pytest.raises(AssertionError, match="stored or set aside"):
            rig.settle(timeout=0.5)


def test_a_duplicate_without_a_reason_is_found_out(tmp_path: Path) -> None:
    with Rig(tmp_path, pipelines=("raw",)) as rig:
        rig.flow(100)
        rig.settle()
        shard = rig.emulator.service.streams["welders"].shards[0]
        rig.call(lambda: shard.log.append(shard.log[0]))
        with pytest.raises(AssertionError, match="more duplicates than can be explained"):
            rig.finish()
