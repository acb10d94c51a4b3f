"""Pipelines that are stopped at a bad moment: what did not end is counted, and not acknowledged."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest

import fastkin.deadletter.insist
import fastkin.service.pipeline
from fastkin._codec import ShardTable
from fastkin.aws.shards import HASH_SPACE, Shard, ShardMap
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.emulator import Emulator
from fastkin.service.engine import Engine
from fastkin.service.pipeline import PipelineRun
from support.servers import ACCESS_KEY, SECRET_KEY, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


def pipeline(url: str, **options: object) -> Pipeline:
    kinesis = Kinesis(
        stream="welders", region="us-east-1", endpoint_url=url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
    )
    return Pipeline(
        **({"id": "p", "topics": ("plant/#",), "kinesis": kinesis, "shutdown_timeout_s": 1.0} | options)  # type: ignore[arg-type]
    )


def broker() -> Broker:
    """One that is not there: messages are offered to the batcher by the tests."""
    return Broker(host="127.0.0.1", port=free_port(), client_id="faults", clean_session=False)


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator({"welders": 2}) as emulator:
        yield emulator


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


async def running(run: PipelineRun) -> PipelineRun:
    run.start()
    await until(lambda: run.ready)
    return run


def offer(run: PipelineRun, *payloads: bytes) -> None:
    for payload in payloads:
        assert run.delivery.batcher.offer(b"plant/1", payload, 0) >= 0
    run._read()


async def test_stopped_while_the_dead_letter_disk_is_full(emulator: Emulator, tmp_path: Path) -> None:
    """A malformed frame that could not be written is not acknowledged, and is counted as left over."""
    run = PipelineRun(
        pipeline(emulator.url, format="bulk", dead_letter=str(tmp_path / "no such directory" / "dead.jsonl")), broker()
    )
    await running(run)
    offer(run, b"\x00 not a frame")
    await until(lambda: run.dead_letters.writing)
    assert await run.stop() == 1
    gc.collect()
    assert run.stats()["in_flight"] == 1
    assert run.delivery.batcher.dead_lettered == run.delivery.batcher.dropped == 0


async def test_dead_letters_are_written_when_the_disk_is_back(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastkin.deadletter.insist, "_RETRY_S", 0.05)
    path = tmp_path / "later" / "dead.jsonl"
    emulator.faults.record("InvalidArgumentException", contains=b"bad")
    run = await running(PipelineRun(pipeline(emulator.url, dead_letter=str(path)), broker()))
    offer(run, b"good", b"bad")
    await until(lambda: run.delivery.batcher.stored == 1)
    await asyncio.sleep(0.1)
    assert run.delivery.batcher.in_flight == 1
    path.parent.mkdir()
    await until(lambda: run.delivery.batcher.dead_lettered == 1)
    assert path.read_bytes().count(b"\n") == 1
    assert run.delivery.budget.bytes == 0
    assert await run.stop() == 0


async def test_stopped_before_a_call_took_its_first_step(emulator: Emulator) -> None:
    run = await running(PipelineRun(pipeline(emulator.url, shutdown_timeout_s=0.0, dead_letter=None), broker()))
    offer(run, b"one", b"two")
    assert await run.stop() == 2
    assert run.delivery.batcher.dropped == 0


async def test_stopped_before_it_started_and_while_it_starts() -> None:
    run = PipelineRun(pipeline(f"http://127.0.0.1:{free_port()}"), broker())
    assert await run.stop() == 0
    run = PipelineRun(pipeline(f"http://127.0.0.1:{free_port()}"), broker())
    run.start()
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(run.stop(), 5) == 0


async def test_two_who_stop_the_engine_both_wait(emulator: Emulator) -> None:
    emulator.latency_s = 0.3
    engine = Engine(Settings(broker=broker(), pipelines=(pipeline(emulator.url),)))
    await engine.start()
    run = engine.pipelines["p"]
    await until(lambda: run.ready)
    offer(run, b"one")
    first = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    assert await engine.stop() == 0
    assert run.delivery.batcher.stored == 1, "the second came back before everything was stored"
    assert first.done()
    assert await first == 0


async def test_an_engine_that_is_stopped_before_it_started() -> None:
    assert await Engine(Settings(broker=broker(), pipelines=())).stop() == 0


async def test_a_shard_that_is_gone_is_asked_about_once(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.delivery.stream_watch._EVERY_S", 0.02)
    monkeypatch.setattr("fastkin.delivery.stream_watch._LOOKS", 10_000)
    run = PipelineRun(pipeline(emulator.url), broker())
    asked = 0
    list_shards = run.client.list_shards

    async def counted() -> list[Shard]:
        nonlocal asked
        asked += 1
        return await list_shards()

    monkeypatch.setattr(run.client, "list_shards", counted)
    await running(run)
    run.delivery.sender.counters.throttled["shardId-000000000077"] = 1
    await asyncio.sleep(0.4)
    assert asked == 2
    await run.stop()


async def test_a_new_shard_map_while_batches_of_the_old_one_wait(emulator: Emulator) -> None:
    """Ordinals of the former map name other shards, or none: every record is stored all the same."""
    run = PipelineRun(pipeline(emulator.url, partition_key="topic"), broker())
    await running(run)
    emulator.faults.record(for_s=0.5)
    for n in range(300):
        assert run.delivery.batcher.offer(b"plant/%d" % (n % 40), b"%d" % n, 0) == 1
    run._read()
    await until(lambda: bool(run.delivery.sender.counters.throttled))
    merged = ShardMap([Shard("shardId-000000000002", 0, HASH_SPACE - 1)])
    run.delivery.batcher.shards = ShardTable(merged.ends)
    run.delivery.sender.set_shards(merged)
    offer(run, b"after")
    await until(lambda: run.delivery.batcher.stored == 301, 10)
    assert await run.stop() == 0
