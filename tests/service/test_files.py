"""A pipeline into files and S3, from a real broker on: nothing is lost by a SIGKILL, raw messages and dead letters."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.mqtt.publisher import Publisher
from support.buckets import create, objects
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from support.servers import Server

_RIGS = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


def finished(folder: Path, prefix: str = "") -> bytes:
    """What all finished files with that prefix hold."""
    found = b""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.startswith(prefix) and not name.startswith("."):
            data = path.read_bytes()
            found += gzip.decompress(data) if name.endswith(".gz") else data
    return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(110):
        while not condition():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def publishing(server: Server) -> AsyncIterator[Publisher]:
    publisher = Publisher(Broker(host=server.host, port=server.port))
    await publisher.connect()
    try:
        yield publisher
    finally:
        await publisher.close()


@contextlib.asynccontextmanager
async def rig(server: Server, folder: Path, **more: Any) -> AsyncIterator[tuple[fastkin.Engine, Publisher]]:
    broker = Broker(host=server.host, port=server.port, client_id=f"files-{next(_RIGS)}")
    given = {"separator": "\n", "file_compression": "none", "file_interval_s": 3600.0, "dead_letter": "none"} | more
    pipeline = Pipeline(id="p", topics=("plant/#",), kinesis=Kinesis(), file=str(folder), **given)
    async with fastkin.Engine(Settings(broker=broker, pipelines=(pipeline,))) as engine:
        await until(engine.pipelines["p"].subscriber.connected.is_set)
        async with publishing(server) as publisher:
            yield engine, publisher


async def settled(engine: fastkin.Engine, count: int) -> dict[str, Any]:
    def done() -> bool:
        told = engine.stats()["p"]
        return told["received"] >= count and not told["in_flight"] and not told["unacked"]

    await until(done)
    return engine.stats()["p"]


async def test_messages_are_acknowledged_when_synced_and_whole_after_a_stop(server: Server, tmp_path: Path) -> None:
    async with rig(server, tmp_path, file_prefix="data/") as (engine, publisher):
        for n in range(20):
            await publisher.publish("plant/a", b"%02d" % n, 1)
        await publisher.drain()
        told = await settled(engine, 20)
        assert told["stored"] == 20
        assert finished(tmp_path) == b""
        assert engine.pipelines["p"].unready() is None
    assert finished(tmp_path, "data/") == b"".join(b"%02d\n" % n for n in range(20))


async def test_raw_messages_are_kept_whatever_becomes_of_their_records(server: Server, tmp_path: Path) -> None:
    """IC-10, IC-12: error prefix and raw backup. One frame is bad, and one message is filtered."""
    good, bad = fastkin.encode_frame([b"a", b"b"]), b"no frame"
    async with rig(
        server, tmp_path, format="bulk", dead_letter=None, file_prefix="data/", file_error_prefix="error/",
        file_raw_prefix="raw/",
    ) as (engine, publisher):  # fmt: skip
        for payload in (good, bad, good):
            await publisher.publish("plant/a", payload, 1)
        await publisher.drain()
        told = await settled(engine, 5)
        assert (told["stored"], told["dead_lettered"]) == (4, 1)
        assert told["received"] == 5  # a raw message is no record of its own
    assert finished(tmp_path, "data/") == b"a\nb\na\nb\n"
    assert finished(tmp_path, "raw/") == good + b"\n" + bad + b"\n" + good + b"\n"
    (letter,) = [json.loads(line) for line in finished(tmp_path, "error/").splitlines()]
    assert (letter["topic"], letter["payload"]) == ("plant/a", "bm8gZnJhbWU=")


async def test_filtered_messages_are_in_the_raw_files_too(server: Server, tmp_path: Path) -> None:
    async with rig(server, tmp_path, events=("start",), file_raw_prefix="raw/") as (engine, publisher):
        for kind in ("start", "stop"):
            await publisher.publish("plant/a", json.dumps({"eventType": kind}).encode(), 1)
        await publisher.drain()
        assert (await settled(engine, 2))["filtered"] == 1
    assert [json.loads(line)["eventType"] for line in finished(tmp_path, "raw/").splitlines()] == ["start", "stop"]


async def test_a_bucket_that_is_not_there_makes_it_not_ready(
    server: Server, moto_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.files.upload._AGAIN_S", (0.05, 0.1))
    bucket = f"plant-{uuid.uuid4().hex[:12]}"
    broker = Broker(host=server.host, port=server.port, client_id=f"files-{next(_RIGS)}")
    kinesis = Kinesis(region="us-east-1", endpoint_url=moto_server.url, access_key="AKID", secret_key="secret")
    pipeline = Pipeline(
        id="p", topics=("plant/#",), kinesis=kinesis, file=str(tmp_path), s3=bucket, file_interval_s=0.2,
        separator="\n", dead_letter="none", shutdown_timeout_s=30.0,
    )  # fmt: skip
    async with fastkin.Engine(Settings(broker=broker, pipelines=(pipeline,))) as engine:
        run = engine.pipelines["p"]
        await until(run.subscriber.connected.is_set)
        async with publishing(server) as publisher:
            await publisher.publish("plant/a", b"kept", 1)
            await publisher.drain()
        await settled(engine, 1)
        await until(lambda: f"there is no bucket {bucket}" in str(run.unready()))
        await create(moto_server.url, bucket)
        await until(lambda: run.unready() is None)
        assert engine.stats()["p"]["files_uploaded"] == 1
    assert list((await objects(moto_server.url, bucket)).values()) == [b"kept\n"]


async def test_nothing_that_was_acknowledged_is_lost_by_a_sigkill(
    server: Server, moto_server: Server, tmp_path: Path
) -> None:
    """Killed with a file that is not finished; the next process finishes and uploads it."""
    bucket = f"plant-{uuid.uuid4().hex[:12]}"
    await create(moto_server.url, bucket)
    folder = tmp_path / "out"

    def start(interval_s: float) -> subprocess.Popen[bytes]:
        config = tmp_path / "fastkin.toml"
        config.write_text(
            f"""
            [broker]
            url = "mqtt://{server.host}:{server.port}"
            client_id = "killed"
            [kinesis]
            region = "us-east-1"
            endpoint_url = "{moto_server.url}"
            access_key = "AKID"
            secret_key = "secret"
            [[pipeline]]
            id = "p"
            topics = ["killed/#"]
            file = "{folder}"
            s3 = "{bucket}"
            file_interval_s = {interval_s}
            dead_letter = "none"
            """
        )
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fastkin", "run", str(config)],
                stderr=log, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip

    def written() -> bytes:
        return b"".join(path.read_bytes() for path in folder.glob(".open/*.part"))

    log = tmp_path / "log"
    first = start(3600)
    try:
        await until(lambda: b"subscribed" in log.read_bytes() or first.poll() is not None)
        async with publishing(server) as publisher:
            for n in range(50):
                await publisher.publish("killed/a", b"%02d" % n, 1)
            await publisher.drain()
        await until(lambda: all(b"%02d\n" % n in written() for n in range(50)) or first.poll() is not None)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = start(0.5)
    try:
        found: list[bytes] = []
        async with asyncio.timeout(110):
            while len(set(found)) < 50:
                found = b"".join((await objects(moto_server.url, bucket)).values()).splitlines()
                await asyncio.sleep(0.2)
    finally:
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=40) == 0
    assert set(found) == {b"%02d" % n for n in range(50)}
    assert "a former run left 1 unfinished files" in log.read_text()
