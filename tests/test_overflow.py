"""What happens when memory is full: the spool in a pipeline, and the drop policies."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.config import Broker, Kinesis, Pipeline
from fastkin.emulator import Emulator
from fastkin.pipeline import PipelineRun
from servers import ACCESS_KEY, SECRET_KEY, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

MIB = 2**20


def pipeline(url: str, path: Path | None, **options: object) -> Pipeline:
    kinesis = Kinesis(
        stream="welders", region="us-east-1", endpoint_url=url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
    )
    given: dict[str, Any] = {
        "id": "p", "topics": ("plant/#",), "kinesis": kinesis, "shutdown_timeout_s": 0.5, "budget_bytes": 2 * MIB,
        "max_record_bytes": 65536, "linger_ms": 5.0, "on_full": "spool", "spool_after_s": 0.3,
        "spool": None if path is None else str(path),
    }  # fmt: skip
    return Pipeline(**(given | options))


def broker() -> Broker:
    """One that is not there: messages are offered to the lane by the tests."""
    return Broker(host="127.0.0.1", port=free_port(), client_id="overflow", clean_session=False)


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator({"welders": 4}) as emulator:
        yield emulator


async def until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


class Feed:
    """Offers numbered payloads, waits for room as the intake does, and looks at the books all the time."""

    def __init__(self, run: PipelineRun, size: int = 600) -> None:
        self.run = run
        self.sent = 0
        self.size = size

    def check(self) -> None:
        stats = self.run.stats()
        ended = sum(stats[k] for k in ("stored", "dead_lettered", "filtered", "dropped", "in_flight", "spooled"))
        assert stats["received"] == ended, stats

    def offer(self, count: int) -> int:
        """As many of `count` as there is room for."""
        taken = 0
        for _ in range(count):
            payload = b"%d-" % self.sent
            if self.run.lane.offer(b"plant/1", payload.ljust(self.size, b"."), 0) < 0:
                break
            self.sent += 1
            taken += 1
        self.run._read()
        self.check()
        return taken

    async def all(self, count: int, timeout: float = 30.0) -> None:
        async with asyncio.timeout(timeout):
            while count > 0:
                count -= self.offer(min(count, 100))
                await asyncio.sleep(0.002)


def numbers(emulator: Emulator) -> list[int]:
    return [int(record.data.split(b"-", 1)[0]) for record in emulator.stored("welders")]


@contextlib.asynccontextmanager
async def running(settings: Pipeline) -> AsyncIterator[PipelineRun]:
    run = PipelineRun(settings, broker())
    run.start()
    await until(lambda: run.ready or run.intake.state != "new")
    try:
        yield run
    finally:
        await run.stop()


async def test_an_outage_goes_to_the_disk_and_comes_back(emulator: Emulator, tmp_path: Path) -> None:
    """Ten times what memory holds, all of it stored once, the file empty after."""
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        feed = Feed(run)
        await feed.all(500)
        await until(lambda: run.lane.stored == 500)
        away = emulator.faults.cut("before", operation="PutRecords")
        await feed.all(15_000)
        await until(lambda: run.lane.spooled > 10_000)
        feed.check()
        assert run.overflow is not None
        assert run.budget.bytes < run.budget.max_bytes
        assert run.stats()["spool_bytes"] > 8 * MIB
        away.remove()
        more = asyncio.create_task(feed.all(1000))
        await until(lambda: run.lane.stored == 16_500)
        await more
        feed.check()
        assert sorted(numbers(emulator)) == list(range(16_500))
        await until(lambda: not run.overflow.spooling and run.overflow._rows.held == 0)  # type: ignore[union-attr]
        assert run.stats()["spool_rows"] == 0
        await feed.all(100)
        await until(lambda: run.lane.stored == 16_600)
        assert run.budget.bytes == 0
    assert (tmp_path / "spool.db").stat().st_size < MIB
