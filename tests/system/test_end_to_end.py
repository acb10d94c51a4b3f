"""The main job on real servers: mosquitto in, kinesalite or kinesis-mock out, every byte accounted for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

import fastkin
from fastkin.config import Broker
from fastkin.mqtt.publisher import Publisher
from support.readback import read_stream
from support.running import CountingProxy, service, wait_until
from support.servers import kinesalite, kinesis_mock, mosquitto

if TYPE_CHECKING:
    from pathlib import Path

    from support.servers import KinesisServer, Server

SETTINGS = """
[broker]
url = "mqtt://{host}:{port}"
client_id = "end-to-end"
clean_session = false
max_packet_bytes = 4194304

[kinesis]
stream = "welders"
endpoint_url = "{url}"
region = "us-east-1"
max_connections = 4

[[pipeline]]
id = "raw"
topics = ["plant/+/welder"]

[[pipeline]]
id = "bulk"
topics = ["/devices/+/bulkData/telemetry"]
format = "bulk"
"""


def payloads(count: int, seed: int, large: int) -> list[bytes]:
    """0 B, 1 B, mostly 152 B, some 2 KB, a few of 900 KB; the ones that have room are numbered."""
    rng = random.Random(seed)
    sizes = rng.choices([0, 1, 152, 2048], weights=[1, 1, 40, 4], k=count)
    for at in rng.sample(range(count), large):
        sizes[at] = 900_000
    made = []
    for at, size in enumerate(sizes):
        name = b"%d-%d-" % (seed, at)
        made.append((name + rng.randbytes(max(0, size - len(name)))) if size > 1 else b"x"[:size])
    return made


async def publish_all(broker: Server, raw: list[bytes], frames: list[bytes]) -> None:
    publisher = Publisher(Broker(host=broker.host, port=broker.port, clean_session=True), window=200)
    await publisher.connect()
    try:
        every = max(1, len(raw) // len(frames))
        for at, payload in enumerate(raw):
            await publisher.publish(f"plant/{at % 50}/welder", payload, 1)
            if at % every == 0 and at // every < len(frames):
                await publisher.publish(f"/devices/{at % 50}/bulkData/telemetry", frames[at // every], 1)
        for frame in frames[(len(raw) - 1) // every + 1 :]:
            await publisher.publish("/devices/0/bulkData/telemetry", frame, 1)
        await publisher.drain()
    finally:
        await publisher.close()


def run(
    directory: Path, broker: Server, kinesis: KinesisServer, raw: list[bytes], frames: list[list[bytes]]
) -> tuple[Counter[bytes], list[tuple[str | None, bytes, str]]]:
    with (
        CountingProxy(broker.port) as proxy,
        service(directory, SETTINGS.format(host="127.0.0.1", port=proxy.port, url=kinesis.url)) as fastkin_run,
    ):
        wait_until(lambda: fastkin_run.log().count("subscribed") >= 2, 20, "both pipelines are subscribed")
        asyncio.run(publish_all(broker, raw, [fastkin.encode_frame(frame) for frame in frames]))
        wait_until(lambda: proxy.acked == len(raw) + len(frames), 60, "every message is acknowledged")
        assert fastkin_run.terminate(90) == 0, fastkin_run.log()[-4000:]
        assert "unsettled=0" in fastkin_run.log()
        assert "ERROR" not in fastkin_run.log()
    published = Counter(raw)
    for frame in frames:
        published.update(frame)
    return published, asyncio.run(read_stream(kinesis.url, "welders"))


def check(published: Counter[bytes], stored: list[tuple[str | None, bytes, str]]) -> None:
    found = Counter(data for _, data, _ in stored)
    assert found.total() == published.total()
    assert not published - found, "records are missing"
    assert not found - published, "records are there twice, or changed"
    keys = [key for key, _, _ in stored]
    assert len(set(keys)) == len(keys), "a key is drawn for each record"


@pytest.mark.timeout(300)
def test_every_byte_reaches_kinesalite(tmp_path: Path) -> None:
    raw = payloads(20_000, 1, large=5)
    records = payloads(20_000, 2, large=3)
    frames = [records[at : at + 100] for at in range(0, 20_000, 100)]
    with (
        mosquitto("max_queued_messages 0\nmax_inflight_messages 200\n") as broker,
        kinesalite(shard_limit=100) as kinesis,
    ):
        kinesis.create_stream("welders", 4)
        published, stored = run(tmp_path, broker, kinesis, raw, frames)
    check(published, stored)
    assert len({shard for _, _, shard in stored}) == 4


@pytest.mark.timeout(180)
def test_every_byte_reaches_kinesis_mock(tmp_path: Path) -> None:
    raw = payloads(2_000, 3, large=2)
    records = payloads(1_000, 4, large=1)
    frames = [records[at : at + 100] for at in range(0, 1_000, 100)]
    with (
        mosquitto("max_queued_messages 0\nmax_inflight_messages 200\n") as broker,
        kinesis_mock(shard_limit=100) as kinesis,
    ):
        kinesis.create_stream("welders", 2)
        published, stored = run(tmp_path, broker, kinesis, raw, frames)
    check(published, stored)
