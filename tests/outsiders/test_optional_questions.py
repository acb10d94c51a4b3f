"""What we would like to know of a stream keeps nothing from flowing, and nobody from being ready.

Aggregates must not go to a stream that chooses shards itself, for its consumers drop them. So records go out one by one
until the stream has said that it does not; denied, unreachable and not answered yet are the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest

from fastkin import Producer
from fastkin.emulator import Emulator, StreamSpec
from fastkin.errors import LibraryError
from service.test_pipeline import rig
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.servers import Server

PAYLOADS = [b"%d" % n for n in range(100)]
QUESTIONS = ("DescribeStreamSummary", "DescribeStream", "ListShards")
MAGIC = b"\xf3\x89\x9a\xc2"


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 100\n") as running:
        yield running


def deny(emulator: Emulator, *operations: str) -> None:
    for operation in operations:
        emulator.faults.call("AccessDeniedException", operation=operation)


def fail(emulator: Emulator, *operations: str) -> None:
    for operation in operations:
        emulator.faults.call("ServiceUnavailable", status=503, operation=operation)


def hang(emulator: Emulator, *operations: str) -> None:
    for operation in operations:
        emulator.faults.latency(60_000, operation=operation)


def producer(url: str, **options: Any) -> Producer:
    return Producer(
        "welders", region="us-east-1", endpoint_url=url, access_key=ACCESS_KEY, secret_key=SECRET_KEY, **options
    )


@pytest.mark.parametrize("check", ["none", "describe"])
@pytest.mark.parametrize("how", [deny, fail, hang])
async def test_records_go_one_by_one_until_the_mode_is_known(
    server: Server, how: Any, check: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.service.pipeline._FIRST_LOOK_S", 0.3)
    async with rig(
        server, prepare=lambda emulator: how(emulator, *QUESTIONS), aggregation="kpl", startup_check=check,
        shutdown_timeout_s=2.0,
    ) as r:  # fmt: skip
        await r.publish(*PAYLOADS)
        await r.settled(100)
        assert sorted(record.data for record in r.stored()) == sorted(PAYLOADS)
        assert r.run.unready() is None
    said = [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()]
    assert len(said) == 1
    assert "DescribeStreamSummary" in said[0]


async def test_aggregation_begins_when_the_mode_is_known(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.service.preflight._RETRY_S", 0.05)
    monkeypatch.setattr("fastkin.delivery.stream_watch._EVERY_S", 0.05)
    async with rig(server, prepare=lambda emulator: deny(emulator, *QUESTIONS), aggregation="kpl") as r:
        await r.publish(*PAYLOADS)
        await r.settled(100)
        assert sorted(record.data for record in r.stored()) == sorted(PAYLOADS)
        asked = r.emulator.counters.operations.get("DescribeStreamSummary", 0)
        r.emulator.faults.clear()
        await r.until(
            lambda: r.emulator.counters.operations["DescribeStreamSummary"] > asked, "asked again, and answered"
        )
        for count in range(200, 1000, 100):
            await r.publish(*PAYLOADS)
            await r.settled(count)
            if any(record.data.startswith(MAGIC) for record in r.stored()):
                break
        else:
            pytest.fail("nothing was aggregated")
        assert r.stats["stored"] == count


async def test_a_stream_that_comes_to_choose_shards_gets_no_aggregates_any_more(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.delivery.stream_watch._EVERY_S", 0.02)
    monkeypatch.setattr("fastkin.delivery.stream_watch._LOOKS", 1)
    spec = StreamSpec(shards=2, mode="ON_DEMAND")
    async with rig(server, shards=spec, aggregation="kpl") as r:
        await r.publish(*PAYLOADS)
        await r.settled(100)
        assert any(record.data.startswith(MAGIC) for record in r.stored())
        stream = r.emulator.service.streams["welders"]
        stream.auto_keys = True
        await r.until(lambda: any("chooses shards itself" in x.getMessage() for x in caplog.records), "an ERROR")
        before = len(r.stored())
        await r.publish(*PAYLOADS)
        await r.settled(200)
        assert sorted(record.data for record in r.stored()[before:]) == sorted(PAYLOADS)
        await asyncio.sleep(0.1)
    said = [x for x in caplog.records if "chooses shards itself" in x.getMessage()]
    assert [x.levelno for x in said] == [logging.ERROR]


@pytest.mark.parametrize("how", [fail, hang])
async def test_what_is_stored_makes_ready_though_the_control_plane_is_away(
    server: Server, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.service.pipeline._FIRST_LOOK_S", 0.2)
    async with rig(server, prepare=lambda emulator: how(emulator, *QUESTIONS), shutdown_timeout_s=2.0) as r:
        assert "not reached" in r.run.unready()
        await r.publish(*PAYLOADS)
        await r.settled(100)
        assert r.run.unready() is None
        assert r.run.last_error is None


@pytest.mark.parametrize("check", ["describe", "dry_run", "put"])
async def test_a_list_of_shards_that_never_comes_keeps_nobody_from_being_ready(
    server: Server, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.service.pipeline._FIRST_LOOK_S", 0.5)
    async with rig(
        server, prepare=lambda emulator: hang(emulator, "ListShards"), startup_check=check, shutdown_timeout_s=2.0
    ) as r:
        await r.until(lambda: r.run.unready() is None, "ready", timeout=5.0)


async def test_a_passed_dry_run_makes_ready_whatever_else_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.service.pipeline._FIRST_LOOK_S", 0.5)
    async with rig(
        server, prepare=lambda emulator: hang(emulator, *QUESTIONS), startup_check="dry_run", shutdown_timeout_s=2.0
    ) as r:
        await r.until(lambda: r.run.unready() is None, "ready", timeout=5.0)


# -- the producer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"aggregate_bytes": 20_000}])
async def test_a_producer_starts_though_nobody_answers_its_questions(options: dict[str, Any]) -> None:
    async with Emulator({"welders": 2}) as emulator:
        hang(emulator, *QUESTIONS)
        one = producer(emulator.url, **options)
        began = time.monotonic()
        async with asyncio.timeout(15):
            await one.start()
            for payload in PAYLOADS:
                await one.put(payload)
            await one.flush()
        assert time.monotonic() - began < 15
        assert sorted(record.data for record in emulator.stored("welders")) == sorted(PAYLOADS)
        await one.close()


async def test_a_producer_does_not_aggregate_while_the_mode_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    async with Emulator({"welders": StreamSpec(shards=2, mode="ON_DEMAND", auto_keys=True)}) as emulator:
        deny(emulator, *QUESTIONS)
        async with producer(emulator.url, aggregate_bytes=20_000) as one:
            for payload in PAYLOADS:
                await one.put(payload)
        assert sorted(record.data for record in emulator.stored("welders")) == sorted(PAYLOADS)
    assert len([x for x in caplog.records if "one by one" in x.getMessage()]) == 1


async def test_a_producer_refuses_to_aggregate_for_a_stream_that_chooses_shards() -> None:
    async with Emulator({"welders": StreamSpec(shards=2, mode="ON_DEMAND", auto_keys=True)}) as emulator:
        with pytest.raises(LibraryError, match="chooses shards itself"):
            async with producer(emulator.url, aggregate_bytes=20_000):
                pass
