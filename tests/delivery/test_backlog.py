"""What happens when memory is full: the spool in a pipeline, and the drop policies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

import fastkin.delivery.spool_disk
import fastkin.delivery.spool_file
from fastkin._codec import DRAIN
from fastkin.config import Broker, Kinesis, Pipeline
from fastkin.delivery.spool_errors import spool_error
from fastkin.delivery.spool_file import Put, Spool
from fastkin.emulator import Emulator
from fastkin.service.pipeline import PipelineRun
from support.servers import ACCESS_KEY, SECRET_KEY, free_port

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
    """One that is not there: messages are offered to the batcher by the tests."""
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
            if self.run.delivery.batcher.offer(b"plant/1", payload.ljust(self.size, b"."), 0) < 0:
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


def in_order(emulator: Emulator, count: int) -> None:
    """All are stored once, in each shard in the order they came."""
    assert sorted(numbers(emulator)) == list(range(count))
    shards: dict[str, list[tuple[int, int]]] = {}
    for record in emulator.stored("welders"):
        number = int(record.data.split(b"-", 1)[0])
        shards.setdefault(record.shard_id, []).append((int(record.sequence_number), number))
    assert len(shards) == 4
    for shard in shards.values():
        assert [number for _, number in sorted(shard)] == sorted(number for _, number in shard)


def one_call(settings: Pipeline) -> Pipeline:
    """Calls one after the other: else those that are open together are stored in any order."""
    return dataclasses.replace(settings, kinesis=dataclasses.replace(settings.kinesis, max_connections=1))


@contextlib.asynccontextmanager
async def running(settings: Pipeline) -> AsyncIterator[PipelineRun]:
    run = PipelineRun(settings, broker())
    run.start()
    await until(lambda: run.ready or run.subscriber.state != "new")
    try:
        yield run
    finally:
        await run.stop()


async def leave(emulator: Emulator, settings: Pipeline, count: int) -> None:
    """A run that ends in an outage: its records are in the spool, and Kinesis is back."""
    away = emulator.faults.cut("before", operation="PutRecords")
    run = PipelineRun(settings, broker())
    run.start()
    await until(lambda: run.ready)
    assert Feed(run).offer(count) == count
    assert await run.stop() == 0
    away.remove()


async def test_an_outage_goes_to_the_disk_and_comes_back(emulator: Emulator, tmp_path: Path) -> None:
    """Ten times what memory holds, all of it stored once, the file empty after."""
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        feed = Feed(run)
        await feed.all(500)
        await until(lambda: run.delivery.batcher.stored == 500)
        away = emulator.faults.cut("before", operation="PutRecords")
        await feed.all(15_000)
        await until(lambda: run.delivery.batcher.spooled > 10_000)
        feed.check()
        assert run.delivery.backlog is not None
        assert run.delivery.budget.bytes < run.delivery.budget.max_bytes
        assert run.stats()["spool_bytes"] > 8 * MIB
        away.remove()
        more = asyncio.create_task(feed.all(1000))
        await until(lambda: run.delivery.batcher.stored == 16_500)
        await more
        feed.check()
        assert sorted(numbers(emulator)) == list(range(16_500))
        await until(lambda: not run.delivery.backlog.spooling and run.delivery.backlog.window.held == 0)  # type: ignore[union-attr]
        assert run.stats()["spool_rows"] == 0
        await feed.all(100)
        await until(lambda: run.delivery.batcher.stored == 16_600)
        assert run.delivery.budget.bytes == 0
    assert (tmp_path / "spool.db").stat().st_size < MIB


async def test_what_is_held_at_the_end_goes_to_the_disk_and_is_sent_by_the_next_run(
    emulator: Emulator, tmp_path: Path
) -> None:
    """Stopped in an outage: nothing is unsettled; the next run counts what it finds once, and sends it first."""
    settings = one_call(pipeline(emulator.url, tmp_path / "spool.db", max_records=100, spool_after_s=60.0))
    away = emulator.faults.cut("before", operation="PutRecords")
    run = PipelineRun(settings, broker())
    run.start()
    await until(lambda: run.ready)
    feed = Feed(run)
    feed.offer(700)
    await until(lambda: run.delivery.sender.counters.calls_failed > 0)
    assert run.delivery.batcher.spooled == 0
    assert await run.stop() == 0
    feed.check()
    assert run.stats()["spooled"] == 700
    assert run.delivery.budget.bytes == 0
    away.remove()
    async with running(settings) as again:
        await until(lambda: again.delivery.batcher.stored == 700)
        assert again.delivery.batcher.received == 700
        assert again.stats()["duplicates_possible"] == 0
        Feed(again).check()
    in_order(emulator, 700)


async def test_partly_stored_rows_are_written_again_without_what_is_stored(emulator: Emulator, tmp_path: Path) -> None:
    settings = pipeline(emulator.url, tmp_path / "spool.db", max_records=100)
    away = emulator.faults.cut("before", operation="PutRecords")
    run = PipelineRun(settings, broker())
    run.start()
    await until(lambda: run.ready)
    feed = Feed(run)
    feed.offer(100)
    await until(lambda: run.delivery.batcher.spooled + run.delivery.backlog.safe == 100)  # type: ignore[union-attr]
    # half of the row is stored, the other half fails for ever
    bad = emulator.faults.record("InternalFailure", match=lambda _shard, _key, data: data[:2].strip(b"-")[-1] % 2 == 0)
    away.remove()
    await until(lambda: run.delivery.batcher.stored == 50)
    assert await run.stop() == 0
    assert run.delivery.batcher.spooled == 50
    feed.check()
    bad.remove()
    async with running(settings) as again:
        assert again.delivery.batcher.received == 50
        await until(lambda: again.delivery.batcher.stored == 50)
    assert sorted(numbers(emulator)) == list(range(100))


async def test_order_is_kept_through_the_spool(emulator: Emulator, tmp_path: Path) -> None:
    """What comes while older records are on the disk waits for them: first sendings are in order of arrival."""
    settings = one_call(pipeline(emulator.url, tmp_path / "spool.db", max_records=100))
    async with running(settings) as run:
        feed = Feed(run)
        away = emulator.faults.cut("before", operation="PutRecords")
        await feed.all(3000)
        await until(lambda: run.delivery.batcher.spooled > 1000)
        away.remove()
        for _ in range(20):
            await feed.all(100)
        await until(lambda: run.delivery.batcher.stored == 5000)
    in_order(emulator, 5000)


async def test_spooling_begins_below_the_budget_when_records_wait(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One message in an outage: acknowledged after spool_after_s, by the disk."""
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        away = emulator.faults.cut("before", operation="PutRecords")
        Feed(run).offer(1)
        await until(lambda: run.delivery.backlog.spooled_total == 1)  # type: ignore[union-attr]
        assert "records have waited" in caplog.text
        away.remove()
        await until(lambda: run.delivery.batcher.stored == 1)


async def test_calls_that_hang_are_cut_short(emulator: Emulator, tmp_path: Path) -> None:
    """Kinesis takes connections and says nothing: the records are on the disk long before the call times out."""
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        emulator.latency_s = 60.0
        feed = Feed(run)
        feed.offer(10)
        await until(lambda: run.delivery.backlog.spooled_total == 10)  # type: ignore[union-attr]
        feed.check()
        assert run.stats()["duplicates_possible"] == 10
        emulator.latency_s = 0.0
    assert run.delivery.batcher.spooled + run.delivery.batcher.stored == 10


async def test_while_kinesis_is_away_replay_does_not_spin(emulator: Emulator, tmp_path: Path) -> None:
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        emulator.faults.cut("before", operation="PutRecords")
        await Feed(run).all(5000)
        await until(lambda: run.delivery.batcher.spooled > 3000)
        calls = run.delivery.sender.counters.calls
        turns = 0
        turn = run.delivery.backlog._turn  # type: ignore[union-attr]

        async def counted() -> bool:
            nonlocal turns
            turns += 1
            return await turn()

        run.delivery.backlog._turn = counted  # type: ignore[union-attr, method-assign]
        await asyncio.sleep(1.5)
        assert run.delivery.sender.counters.calls - calls < 15
        assert turns < 30


class Disk:
    """A disk that takes nothing while `fails` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: sqlite3.Error | None = None
        put = Spool._put

        def refuse(spool: Spool, db: sqlite3.Connection, one: Put) -> int:
            if self.fails is not None:
                raise self.fails
            return put(spool, db, one)

        monkeypatch.setattr(Spool, "_put", refuse)


@pytest.mark.parametrize("code", ["SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY"])
async def test_a_disk_that_takes_nothing(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Subscriber pauses, one ERROR names path and cure, nothing is lost, it goes on when the disk is back."""
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    caplog.set_level(logging.INFO)
    disk = Disk(monkeypatch)
    path = tmp_path / "spool.db"
    async with running(pipeline(emulator.url, path)) as run:
        feed = Feed(run)
        away = emulator.faults.cut("before", operation="PutRecords")
        await feed.all(3000)
        await until(lambda: run.delivery.batcher.spooled > 1000)
        error = sqlite3.OperationalError("no")
        error.sqlite_errorcode = getattr(sqlite3, code)
        disk.fails = error
        more = asyncio.create_task(feed.all(5000))
        await until(lambda: run.delivery.backlog.broken is not None and run.delivery.budget.full)  # type: ignore[union-attr]
        await asyncio.sleep(1.0)
        feed.check()
        assert not more.done(), "memory had room for all of it"
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR and r.name == "fastkin.spool"]
        assert len(errors) == 1
        assert str(path) in errors[0]
        disk.fails = None
        await until(lambda: run.delivery.backlog.broken is None)  # type: ignore[union-attr]
        await more
        assert "takes batches again" in caplog.text
        away.remove()
        await until(lambda: run.delivery.batcher.stored == 8000)
        feed.check()
    assert sorted(numbers(emulator)) == list(range(8000))


async def test_with_a_broken_disk_kinesis_still_gets_what_comes(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    disk = Disk(monkeypatch)
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        feed = Feed(run)
        away = emulator.faults.cut("before", operation="PutRecords")
        await feed.all(1000)
        await until(lambda: run.delivery.batcher.spooled > 0)
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        disk.fails = error
        feed.offer(200)
        await until(lambda: run.delivery.backlog.broken is not None)  # type: ignore[union-attr]
        away.remove()
        await until(lambda: run.delivery.batcher.stored >= 1200)
        disk.fails = None
    assert sorted(set(numbers(emulator))) == list(range(1200))


async def test_a_full_spool_pauses(emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = pipeline(emulator.url, tmp_path / "spool.db", spool_max_bytes=2 * MIB)
    async with running(settings) as run:
        feed = Feed(run)
        away = emulator.faults.cut("before", operation="PutRecords")
        more = asyncio.create_task(feed.all(6000))
        await until(lambda: run.delivery.backlog.full and run.delivery.budget.full)  # type: ignore[union-attr]
        await asyncio.sleep(0.3)
        assert not more.done()
        assert run.stats()["spool_bytes"] <= 2 * MIB
        assert sum("is full" in r.getMessage() and "spool_max_bytes" in r.getMessage() for r in caplog.records) == 1
        away.remove()
        await more
        await until(lambda: run.delivery.batcher.stored == 6000)
        feed.check()
    assert sorted(numbers(emulator)) == list(range(6000))


async def test_a_spool_that_cannot_be_opened_is_opened_later(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    folder = tmp_path / "later"
    async with running(pipeline(emulator.url, folder / "spool.db")) as run:
        feed = Feed(run)
        feed.offer(10)
        await until(lambda: run.delivery.batcher.stored == 10)
        assert "mkdir -p), or set another `spool`" in caplog.text
        folder.mkdir()
        away = emulator.faults.cut("before", operation="PutRecords")
        feed.offer(10)
        await until(lambda: run.delivery.backlog.spooled_total == 10)  # type: ignore[union-attr]
        away.remove()
        await until(lambda: run.delivery.batcher.stored == 20)


async def test_a_damaged_row_is_set_aside_and_the_others_go_on(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool.db"
    settings = pipeline(emulator.url, path, max_records=100, spool_after_s=60.0)
    await leave(emulator, settings, 300)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        rows = [row for (row,) in db.execute("SELECT id FROM rows ORDER BY id")]
        assert len(rows) == 3
        body = bytearray(db.execute("SELECT body FROM bodies WHERE id = ?", rows[1:2]).fetchone()[0])
        body[40] ^= 1
        db.execute("UPDATE bodies SET body = ? WHERE id = ?", (body, rows[1]))
        # one that its checksum does not give away
        body = b'{"Records":[{"Data":"AAAA"}'
        crc = fastkin.delivery.spool_file._crc(body, b"", 100, 100)
        db.execute("UPDATE bodies SET body = ? WHERE id = ?", (body, rows[2]))
        db.execute("UPDATE rows SET crc = ? WHERE id = ?", (crc, rows[2]))
    async with running(settings) as again:
        await until(lambda: again.delivery.batcher.stored + again.delivery.batcher.dead_lettered == 300)
        Feed(again).check()
        assert again.delivery.batcher.stored == 100
        errors = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
        assert len(errors) == 2
    assert sorted(numbers(emulator)) == list(range(100))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM rows WHERE damaged").fetchone() == (2,)


async def test_calls_cut_short_go_again_when_the_disk_breaks(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the disk; when it breaks before it has them, Kinesis must get them."""
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    disk = Disk(monkeypatch)
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        overflow = run.delivery.backlog
        assert overflow is not None
        emulator.faults.latency(60_000, operation="PutRecords", times=1)
        error = disk.fails = sqlite3.OperationalError("no")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        feed = Feed(run)
        feed.offer(10)
        await until(lambda: run.delivery.sender.in_flight == 1)
        await until(lambda: overflow.broken is not None)
        opens = Spool.open

        def refuse(spool: Spool) -> object:
            if disk.fails is not None:
                raise spool_error(spool.path, "open it", disk.fails)
            return opens(spool)

        monkeypatch.setattr(Spool, "open", refuse)
        await until(lambda: run.delivery.batcher.stored == 10)
        feed.check()
        disk.fails = None


@pytest.mark.parametrize("how", ["hangs", "throttles"])
async def test_spooling_begins_once_in_an_outage(
    emulator: Emulator, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What was read back and is on its way is not yet taken: nothing new passes it, and the log stands still."""
    caplog.set_level(logging.INFO)
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        overflow = run.delivery.backlog
        assert overflow is not None
        if how == "hangs":
            fault = emulator.faults.latency(60_000, operation="PutRecords")
        else:
            fault = emulator.faults.record(
                "ProvisionedThroughputExceededException",
                "Rate exceeded for shard shardId-000000000000",
                contains=b"0-.",
            )
        feed = Feed(run)
        feed.offer(1)
        await until(lambda: overflow.stats()["spooled_ever"] == 1)
        await asyncio.sleep(0.7)  # read back since, and not taken within spool_after_s
        for _ in range(9):
            feed.offer(1)
            await asyncio.sleep(0.4)
        said = [record.getMessage() for record in caplog.records if record.name == "fastkin.spool"]
        assert [line.split("stage=spool ")[1].split(" ")[0] for line in said] == ["spooling"]
        feed.check()
        assert (run.delivery.batcher.stored > 0) == (how == "throttles")
        fault.remove()


async def test_a_full_disk_and_full_memory_do_not_fill_the_log(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kinesis is slower than the source, and the disk takes nothing: records go straight, as without a spool."""
    monkeypatch.setattr(Spool, "regain", lambda _: False)
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    caplog.set_level(logging.INFO)
    async with running(pipeline(emulator.url, tmp_path / "spool.db", spool_after_s=5.0)) as run:
        overflow = run.delivery.backlog
        assert overflow is not None
        assert overflow.spool is not None
        overflow.spool.disk_full = True
        emulator.latency_s = 0.05
        feed = Feed(run)
        full = 0
        for _ in range(300):
            feed.offer(2000)
            full += run.delivery.budget.full
            await asyncio.sleep(0.005)
        assert full > 10
        said = [record.getMessage() for record in caplog.records if record.name == "fastkin.spool"]
        assert len(said) == 1
        assert "the disk is full" in said[0]
        await until(lambda: run.delivery.batcher.stored == feed.sent)


@pytest.mark.parametrize(
    "wrong", ["records = -5", "records = 9223372036854775807", "entries = 0", "size = 1099511627776"]
)
async def test_a_rotten_header_holds_up_nobody(
    emulator: Emulator, tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers of a row are used before its checksum is looked at."""
    path = tmp_path / "spool.db"
    settings = pipeline(emulator.url, path, max_records=100, spool_after_s=60.0)
    await leave(emulator, settings, 300)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE rows SET {wrong} WHERE id = (SELECT min(id) FROM rows)")
    async with running(settings) as again:
        await until(lambda: again.delivery.batcher.stored == 200)
        assert "keeps 1 damaged batches" in caplog.text
        await until(lambda: not again.delivery.backlog.spooling)  # type: ignore[union-attr]
        Feed(again).offer(10)
        await until(lambda: again.delivery.batcher.stored == 210)
        assert (again.delivery.batcher.spooled, again.delivery.batcher.in_flight) == (0, 0)


async def test_a_disk_that_opens_and_takes_nothing_stops_no_call(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinesis is slow, and calls were cut short again and again for a disk that then did not take them."""
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    disk = Disk(monkeypatch)
    error = disk.fails = sqlite3.OperationalError("no")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        emulator.latency_s = 1.5
        feed = Feed(run)
        for _ in range(10):
            feed.offer(1)
            await asyncio.sleep(0.2)
        await until(lambda: run.delivery.batcher.stored == 10)
        feed.check()


async def test_a_stop_does_not_wait_for_records_that_are_safe(tmp_path: Path) -> None:
    """The stream is not reached; what was read back is on the disk all the same."""
    path = tmp_path / "spool.db"
    settings = pipeline(f"http://127.0.0.1:{free_port()}", path, aggregation="kpl", shutdown_timeout_s=15.0)
    run = PipelineRun(settings, broker())
    assert run.delivery.backlog is not None
    await run.delivery.backlog.start()
    assert run.delivery.batcher.offer(b"plant/1", b"0", 0) == 1
    await run.delivery.sender.close()
    await run.delivery.backlog.close()
    await run.client.close()
    assert run.delivery.batcher.spooled == 1
    async with running(settings) as again:
        await until(lambda: again.delivery.batcher.in_flight == 1)
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 10
    assert (again.delivery.batcher.spooled, again.delivery.batcher.in_flight) == (1, 0)


async def test_what_comes_back_is_bounded_in_records_too(emulator: Emulator, tmp_path: Path) -> None:
    settings = pipeline(emulator.url, tmp_path / "spool.db", budget_records=400, max_records=20)
    async with running(settings) as run:
        emulator.faults.cut("before", operation="PutRecords")
        feed = Feed(run, 10)
        most = 0
        for _ in range(200):
            feed.offer(100)
            await asyncio.sleep(0.005)
            most = max(most, run.delivery.backlog.window.budget.records)  # type: ignore[union-attr]
        assert run.delivery.batcher.spooled > 1000
        assert 0 < most <= 100


async def test_flush_does_not_pass_the_spool(emulator: Emulator, tmp_path: Path) -> None:
    """Who waits for a flush while older records are on the disk: what is new goes behind them."""
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        overflow = run.delivery.backlog
        assert overflow is not None
        away = emulator.faults.cut("before", operation="PutRecords")
        feed = Feed(run)
        await feed.all(8000)
        await until(lambda: run.delivery.batcher.spooled > 5000)
        away.remove()
        await until(lambda: run.delivery.sender.flowing and overflow.spooling)
        feed.offer(1)
        run.delivery.batcher.close_batch(DRAIN)
        fresh = run.delivery.sender.counters.batched
        async with asyncio.timeout(20):
            await run.delivery.sender.flush()
        assert run.delivery.sender.counters.batched > fresh
        assert run.delivery.batcher.spooled > 0, "the flush waited for the disk only"
        assert 8000 not in numbers(emulator)
        await until(lambda: run.delivery.batcher.stored == 8001)
        feed.check()
    assert sorted(numbers(emulator)) == list(range(8001))


async def test_a_bug_does_not_end_the_spool_quietly(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    fits = Spool.fits

    def broken(spool: Spool, puts: object) -> bool:
        if not told:
            raise ZeroDivisionError("oh")
        return fits(spool, puts)  # type: ignore[arg-type]

    monkeypatch.setattr(Spool, "fits", broken)
    async with running(pipeline(emulator.url, tmp_path / "spool.db")) as run:
        away = emulator.faults.cut("before", operation="PutRecords")
        feed = Feed(run)
        feed.offer(10)
        await until(lambda: run.delivery.backlog.spooled_total == 10)  # type: ignore[union-attr]
        assert [type(context["exception"]) for context in told] == [ZeroDivisionError]
        assert "unforeseen: ZeroDivisionError: oh" in caplog.text
        away.remove()
        await until(lambda: run.delivery.batcher.stored == 10)
        feed.check()


async def test_a_damaged_row_counts_once_it_is_marked(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes no mark: the row stays where it is until it does, and is dead-lettered once."""
    monkeypatch.setattr(fastkin.delivery.spool_disk, "_RETRY_S", 0.1)
    path = tmp_path / "spool.db"
    with Spool(path, max_bytes=MIB) as spool:
        spool.write([Put(b"nonsense", b"", 10, 10)])
    tries = 0
    mark = Spool.quarantine

    def refuse(spool: Spool, row: object) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            error = sqlite3.OperationalError("no")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise spool_error(spool.path, "write to it", error)
        mark(spool, row)  # type: ignore[arg-type]

    monkeypatch.setattr(Spool, "quarantine", refuse)
    async with running(pipeline(emulator.url, path)) as run:
        feed = Feed(run)
        await until(lambda: run.delivery.batcher.dead_lettered == 10)
        feed.check()
        assert tries == 4
        stats = run.stats()
        assert (stats["spool_rows"], stats["spool_bytes"], stats["spooled"]) == (0, 0, 0)
        feed.offer(5)
        await until(lambda: run.delivery.batcher.stored == 5)


async def test_closing_counts_what_nobody_took_from_the_batcher(emulator: Emulator, tmp_path: Path) -> None:
    run = PipelineRun(pipeline(emulator.url, tmp_path / "spool.db"), broker())
    assert run.delivery.backlog is not None
    await run.delivery.backlog.start()
    await run.delivery.sender.flush()
    await run.delivery.sender.flush()
    assert run.delivery.batcher.offer(b"plant/1", b"0", 0) == 1
    await run.delivery.sender.close()
    await run.delivery.backlog.close()
    assert (run.delivery.batcher.spooled, run.delivery.batcher.in_flight) == (1, 0)
    await run.client.close()


# -- dropping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
async def test_dropping_is_counted_and_acknowledged(
    emulator: Emulator, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    async with running(pipeline(emulator.url, None, on_full=policy)) as run:
        feed = Feed(run)
        away = emulator.faults.cut("before", operation="PutRecords")
        await feed.all(10_000)
        feed.check()
        dropped = run.delivery.batcher.dropped
        assert dropped > 5000
        assert run.stats()["dropped_by"] == {policy: dropped}
        assert sum("records dropped" in r.getMessage() for r in caplog.records) == 1
        away.remove()
        await until(lambda: run.delivery.batcher.in_flight == 0)
        feed.check()
        kept = sorted(numbers(emulator))
        assert len(kept) == 10_000 - run.delivery.batcher.dropped
        if policy == "drop_oldest":
            assert kept[-1] == 9999
            assert kept[0] > 1000
        else:
            assert kept[:500] == list(range(500))


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
async def test_a_payload_larger_than_what_is_free_at_the_low_mark(emulator: Emulator, policy: str) -> None:
    """Memory is not full, but what comes does not fit: something is dropped for it, too."""
    async with running(
        pipeline(emulator.url, None, on_full=policy, budget_bytes=MIB, max_record_bytes=MIB // 2)
    ) as run:
        emulator.faults.cut("before", operation="PutRecords")
        feed = Feed(run, 100_000)
        await feed.all(4)
        assert not run.delivery.budget.full
        feed.size = 400_000
        await feed.all(1, timeout=10.0)
        feed.check()
        assert 0 < run.delivery.batcher.dropped <= 4
