"""The producer when memory is full: receipts that are spooled or dropped."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from fastkin import Producer, encode_frame
from fastkin.emulator import Emulator
from fastkin.errors import ClosedError, LibraryError, RecordDropped
from fastkin.results import FrameResult, PutResult
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from fastkin._codec import Receipt

SPOOLED = PutResult(None, None, None, spooled=True)


def producer(url: str, **options: Any) -> Producer:
    given = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "linger_ms": 5.0, "max_record_bytes": 65536}
    return Producer("welders", region="us-east-1", endpoint_url=url, **(given | options))


def spooling(url: str, path: Path, **options: Any) -> Producer:
    return producer(url, **({"on_full": "spool", "spool": path, "spool_after_s": 0.2} | options))


def identity(one: Producer) -> None:
    stats = one.stats()
    ended = stats["stored"] + stats["dropped"] + stats["dead_lettered"]
    assert stats["received"] == ended + stats["in_flight"] + stats["spooled"]


async def result(receipt: Receipt) -> Any:
    async with asyncio.timeout(20):
        return await receipt


async def test_receipts_of_spooled_records_and_flush(tmp_path: Path) -> None:
    """In an outage receipts and flush() end as soon as the disk has the records; Kinesis gets them later."""
    async with Emulator({"welders": 2}) as emulator:
        async with spooling(emulator.url, tmp_path / "spool.db") as one:
            first = await one.put(b"0")
            assert (await result(first)).shard_id.startswith("shardId-")
            away = emulator.faults.cut("before", operation="PutRecords")
            receipts = [await one.put(b"%d" % n) for n in range(1, 1000)]
            frame = await one.put_frame(encode_frame([b"1000", b"1001"]))
            async with asyncio.timeout(20):
                await one.flush()
            identity(one)
            assert {await result(receipt) for receipt in receipts} == {SPOOLED}
            assert await result(frame) == FrameResult(2, spooled=True)
            away.remove()
            async with asyncio.timeout(20):
                while one.stats()["stored"] < 1002:
                    await asyncio.sleep(0.01)
            identity(one)
            assert await one.put(b"1002") is not None
        assert sorted(int(record.data) for record in emulator.stored("welders")) == list(range(1003))


async def test_a_producer_with_little_memory_never_waits_long(tmp_path: Path) -> None:
    """Many times the budget is put while Kinesis is away."""
    async with Emulator({"welders": 2}) as emulator:
        away = emulator.faults.cut("before", operation="PutRecords")
        async with spooling(emulator.url, tmp_path / "spool.db", budget_bytes=300_000) as one:
            async with asyncio.timeout(30):
                for n in range(3000):
                    await one.put(b"%d-" % n + b"x" * 500)
            identity(one)
            assert one.stats()["peak_bytes"] <= 300_000
            away.remove()
            async with asyncio.timeout(30):
                while one.stats()["stored"] < 3000:
                    await asyncio.sleep(0.01)
        assert len(emulator.stored("welders")) == 3000


async def test_closing_leaves_what_is_unsettled_in_the_spool(tmp_path: Path) -> None:
    async with Emulator({"welders": 2}) as emulator:
        away = emulator.faults.cut("before", operation="PutRecords")
        one = spooling(emulator.url, tmp_path / "spool.db", spool_after_s=60.0)
        await one.start()
        receipts = [await one.put(b"%d" % n) for n in range(100)]
        assert await one.close(timeout_s=0.3) == 0
        assert [receipt.result() for receipt in receipts] == [SPOOLED] * 100
        identity(one)
        assert one.stats()["spooled"] == 100
        away.remove()
        async with spooling(emulator.url, tmp_path / "spool.db") as two:
            async with asyncio.timeout(20):
                while two.stats()["stored"] < 100:
                    await asyncio.sleep(0.01)
            identity(two)
            assert two.stats()["received"] == 100
        assert sorted(int(record.data) for record in emulator.stored("welders")) == list(range(100))


async def test_closing_with_a_broken_disk_ends_every_receipt(tmp_path: Path) -> None:
    """Neither Kinesis nor the disk takes them: who waits for a receipt is told."""
    async with Emulator({"welders": 2}) as emulator:
        emulator.faults.cut("before", operation="PutRecords")
        one = spooling(emulator.url, tmp_path / "missing" / "spool.db")
        await one.start()
        receipts = [await one.put(b"%d" % n) for n in range(100)]
        assert await one.close(timeout_s=0.3) == 100
        for receipt in receipts:
            with pytest.raises(ClosedError):
                await result(receipt)
        identity(one)
        assert one.stats()["in_flight"] == 0


async def test_closed_while_it_opens(tmp_path: Path) -> None:
    async with Emulator({"welders": 2}) as emulator:
        one = spooling(emulator.url, tmp_path / "spool.db")
        starting = asyncio.create_task(one.start())
        await asyncio.sleep(0)
        assert await one.close() == 0
        await asyncio.gather(starting, return_exceptions=True)
        async with spooling(emulator.url, tmp_path / "spool.db") as two:
            await result(await two.put(b"1"))


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
async def test_receipts_of_dropped_records_raise(policy: str) -> None:
    async with Emulator({"welders": 2}) as emulator:
        away = emulator.faults.cut("before", operation="PutRecords")
        async with producer(emulator.url, on_full=policy, budget_bytes=300_000, max_record_bytes=4096) as one:
            async with asyncio.timeout(20):
                receipts = [await one.put(b"%d-" % n + b"x" * 500) for n in range(2000)]
            identity(one)
            dropped = one.stats()["dropped"]
            assert dropped > 1000
            ended = [receipt for receipt in receipts if receipt.done()]
            assert len(ended) == dropped
            with pytest.raises(RecordDropped, match=policy):
                ended[0].result()
            early, late = (sum(one.done() for one in half) for half in (receipts[:1000], receipts[1000:]))
            assert early > late if policy == "drop_oldest" else early < late
            away.remove()
            async with asyncio.timeout(20):
                await one.flush()
            identity(one)
        assert len(emulator.stored("welders")) == 2000 - one.stats()["dropped"]


@pytest.mark.parametrize("options", [{"on_full": "spool"}, {"spool": "x"}, {"on_full": "drop"}])
def test_policies_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(LibraryError, match="on_full"):
        producer("http://localhost:1", **options)
