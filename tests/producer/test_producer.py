"""The producer's public face, against the emulator: every receipt ends, every record is in one counter."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from typing import Any

import pytest

import fastkin
from fastkin import ClosedError, Producer, encode_frame
from fastkin.aws.shards import HASH_SPACE
from fastkin.emulator import Emulator
from fastkin.errors import DataFormatError, KinesisError, LibraryError, RecordError, RecordFailed
from fastkin.results import FrameResult, PutResult
from support.servers import ACCESS_KEY, SECRET_KEY, free_port

THROTTLED = "ProvisionedThroughputExceededException"


def producer(url: str, **options: Any) -> Producer:
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    return Producer("welders", region="us-east-1", endpoint_url=url, **(keys | options))


def identity(stats: dict[str, Any]) -> bool:
    return bool(stats["received"] == stats["stored"] + stats["dropped"] + stats["in_flight"])


def ended(one: Producer) -> None:
    stats = one.stats()
    assert identity(stats)
    assert stats["in_flight"] == 0
    assert stats["buffered_bytes"] == 0


# -- put, put_frame, receipts ------------------------------------------------------------------------


async def test_receipts_tell_where_each_record_is() -> None:
    async with Emulator({"welders": 4}) as emulator:
        async with producer(emulator.url) as one:
            receipts = [await one.put(b"%d" % n) for n in range(1200)]
            assert identity(one.stats())
            results = await asyncio.gather(*(_result(receipt) for receipt in receipts))
        stored = {record.sequence_number: record for record in emulator.stored("welders")}
        assert len(stored) == 1200
        for n, result in enumerate(results):
            assert isinstance(result, PutResult)
            assert stored[result.sequence_number].data == b"%d" % n
            assert stored[result.sequence_number].shard_id == result.shard_id
        ended(one)
        assert one.stats()["stored"] == 1200


async def _result(receipt: Any) -> Any:
    return await receipt


async def test_receipts_awaited_late_twice_or_never() -> None:
    async with Emulator({"welders": 1}) as emulator:
        async with producer(emulator.url) as one:
            late = await one.put(b"late")
            await one.put(b"never")
            await one.flush()
            assert late.done()
        result = await late
        assert await late == result == late.result()
        assert late.exception() is None
        assert emulator.stored_count("welders") == 2
        ended(one)


async def test_callbacks_run_before_and_after_the_end() -> None:
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        called: list[Any] = []
        receipt = await one.put(b"x")
        receipt.add_done_callback(called.append)
        assert called == []
        await one.flush()
        assert called == [receipt]
        receipt.add_done_callback(called.append)
        assert called == [receipt, receipt]


async def test_a_callback_may_put_again() -> None:
    async with Emulator({"welders": 1}) as emulator:
        async with producer(emulator.url, linger_ms=0) as one:
            tasks: list[asyncio.Task[Any]] = []
            receipt = await one.put(b"first")
            receipt.add_done_callback(lambda _: tasks.append(asyncio.ensure_future(one.put(b"second"))))
            await receipt
            await (await tasks[0])
        assert sorted(record.data for record in emulator.stored("welders")) == [b"first", b"second"]


async def test_a_frame_is_one_receipt_and_an_empty_one_ends_at_once() -> None:
    async with Emulator({"welders": 2}) as emulator:
        async with producer(emulator.url) as one:
            frame = await one.put_frame(encode_frame([b"%d" % n for n in range(700)]))
            assert await frame == FrameResult(700)
            assert await (await one.put_frame(encode_frame([]))) == FrameResult(0)
            with pytest.raises(DataFormatError):
                await one.put_frame(b"\x93\x01")
        assert Counter(r.data for r in emulator.stored("welders")) == Counter(b"%d" % n for n in range(700))
        ended(one)


async def test_a_record_that_can_never_be_stored_is_refused_at_once() -> None:
    async with Emulator({"welders": 1}) as emulator:
        async with producer(emulator.url, max_record_bytes=1000) as one:
            for bad in [
                {"data": b"x" * 1001},
                {"data": b"x", "partition_key": ""},
                {"data": b"x", "partition_key": "k" * 257},
                {"data": b"x", "explicit_hash_key": str(HASH_SPACE)},
                {"data": b"x", "explicit_hash_key": "-1"},
            ]:
                with pytest.raises(RecordError):
                    await one.put(**bad)
            with pytest.raises(RecordError):
                await one.put_frame(encode_frame([b"good", b"x" * 1001]))
            assert one.stats()["received"] == 0
            for good in [b"", bytearray(b"a"), memoryview(b"b")]:
                await (await one.put(good))
        assert sorted(r.data for r in emulator.stored("welders")) == [b"", b"a", b"b"]


# -- keys --------------------------------------------------------------------------------------------


async def test_keys_given_explicit_and_drawn() -> None:
    async with Emulator({"welders": 2}) as emulator:
        async with producer(emulator.url) as one:
            await one.put(b"given", 'clé "1"')
            low = await one.put(b"low", "k", "0")
            high = await one.put(b"high", "k", str(HASH_SPACE - 1))
            await one.put(b"drawn")
            assert (await low).shard_id != (await high).shard_id
        keys = {record.data: record.partition_key for record in emulator.stored("welders")}
        assert keys[b"given"] == 'clé "1"'
        assert keys[b"low"] == keys[b"high"] == "k"
        assert len(keys[b"drawn"]) == 36


@pytest.mark.parametrize(("setting", "data", "key"), [("static:x", b"1", "x"), ("field:a.b", b'{"a":{"b":"q"}}', "q")])
async def test_the_default_key(setting: str, data: bytes, key: str) -> None:
    async with Emulator({"welders": 2}) as emulator:
        async with producer(emulator.url, partition_key=setting) as one:
            result = await (await one.put(data))
            await one.put(data, "own")
        assert [r.partition_key for r in emulator.stored("welders")].count(key) == 1
        half = int(hashlib.md5(key.encode()).hexdigest(), 16) * 2 // HASH_SPACE
        assert result.shard_id.endswith(str(half))


@pytest.mark.parametrize("setting", ["topic", "nonsense", "static:"])
def test_a_default_key_that_makes_no_sense(setting: str) -> None:
    with pytest.raises(LibraryError):
        producer("http://127.0.0.1:1", partition_key=setting)


async def test_aggregates_settle_each_record() -> None:
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.record(THROTTLED, times=2)
        async with producer(emulator.url, aggregate_bytes=20_000) as one:
            receipts = [await one.put(b"x" * 90) for _ in range(3000)]
            frame = await one.put_frame(encode_frame([b"y" * 90] * 100))
            await one.flush()
            assert all(receipt.done() and receipt.exception() is None for receipt in receipts)
            assert await frame == FrameResult(100)
            assert one.stats()["stored"] == 3100
        ended(one)


# -- backpressure ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"budget_bytes": 1}, {"budget_bytes": 5000}, {"budget_records": 1}])
async def test_a_tiny_budget_slows_and_loses_nothing(budget: dict[str, int]) -> None:
    async with Emulator({"welders": 1}) as emulator:
        async with producer(emulator.url, linger_ms=1, **budget) as one:
            async with asyncio.timeout(20):
                receipts = await asyncio.gather(*(one.put(b"%d" % n + b"." * 100) for n in range(200)))
                await one.flush()
            assert all(receipt.done() for receipt in receipts)
            assert one.stats()["peak_bytes"] < 8000
        assert emulator.stored_count("welders") == 200
        ended(one)


async def test_max_records_of_one() -> None:
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.record("InternalFailure", every=3, times=10)
        async with producer(emulator.url, max_records=1) as one:
            for n in range(50):
                await one.put(b"%d" % n)
        assert emulator.stored_count("welders") == 50
        assert one.stats()["calls"] == 60
        ended(one)


async def test_a_put_that_gives_up_waiting_takes_nothing() -> None:
    async with Emulator({"welders": 1}, latency_ms=200) as emulator:
        async with producer(emulator.url, budget_bytes=1) as one:
            await one.put(b"first")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(one.put(b"second"), 0.05)
            await (await one.put(b"third"))
        assert [record.data for record in emulator.stored("welders")] == [b"first", b"third"]
        ended(one)


# -- failures ----------------------------------------------------------------------------------------


async def test_partial_failures_are_made_good() -> None:
    async with Emulator({"welders": 2}) as emulator:
        emulator.faults.record("InternalFailure", every=7, times=200)
        emulator.faults.record(THROTTLED, every=11, times=100)
        async with producer(emulator.url) as one:
            receipts = [await one.put(b"%d" % n) for n in range(1000)]
            assert len({(await receipt).sequence_number for receipt in receipts}) == 1000
            assert one.stats()["retries"] >= 200
            assert one.stats()["throttled"] > 0
            assert one.stats()["duplicates_possible"] == 0
        assert Counter(r.data for r in emulator.stored("welders")) == Counter(b"%d" % n for n in range(1000))
        ended(one)


async def test_a_refused_record_raises_alone() -> None:
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.record("InvalidArgumentException", "no such key", contains=b"bad")
        async with producer(emulator.url) as one:
            receipts = {data: await one.put(data) for data in (b"one", b"bad", b"two")}
            frame = await one.put_frame(encode_frame([b"fine", b"bad too"]))
            with pytest.raises(RecordFailed, match="no such key") as caught:
                await receipts[b"bad"]
            assert caught.value.code == "InvalidArgumentException"
            assert not caught.value.retriable
            with pytest.raises(RecordFailed):
                await frame
            await receipts[b"one"]
            await receipts[b"two"]
            assert isinstance(receipts[b"bad"].exception(), RecordFailed)
            stats = one.stats()
            assert (stats["stored"], stats["dropped"]) == (3, 2)
        ended(one)


async def test_what_the_transport_sends_again_by_itself_may_be_there_twice() -> None:
    """Stored, then cut before the answer, on a connection that was used before."""
    async with Emulator({"welders": 1}) as emulator:
        async with producer(emulator.url, shard_map=False) as one:
            await (await one.put(b"warm"))
            assert one.stats()["duplicates_possible"] == 0
            emulator.faults.cut("after", times=1)
            for n in range(10):
                await one.put(b"%d" % n)
            await one.flush()
            assert one.stats()["duplicates_possible"] == 10
        assert emulator.stored_count("welders") == 21
        assert len({record.data for record in emulator.stored("welders")}) == 11
        ended(one)


async def test_a_cut_on_a_new_connection_is_counted_too() -> None:
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.cut("after", times=1)
        async with producer(emulator.url, shard_map=False) as one:
            await (await one.put(b"x"))
            assert one.stats()["duplicates_possible"] == 1
        assert emulator.stored_count("welders") == 2


async def test_a_split_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of yesterday would pace a closed shard, and its children not at all."""
    monkeypatch.setattr("fastkin.delivery.stream_watch._EVERY_S", 0.02)
    async with Emulator({"welders": 1}) as emulator:
        async with producer(emulator.url) as one:
            assert one._delivery.sender.shards is not None
            assert len(one._delivery.sender.shards) == 1
            split = {"ShardToSplit": "shardId-000000000000", "NewStartingHashKey": str(HASH_SPACE // 2)}
            await one._client.call("SplitShard", json.dumps({"StreamName": "welders", **split}).encode())
            async with asyncio.timeout(20):
                while len(one._delivery.sender.shards) != 2:
                    await asyncio.sleep(0.02)
            result = await (await one.put(b"x"))
            assert result.shard_id in {"shardId-000000000001", "shardId-000000000002"}
        ended(one)
        assert one._watching is not None
        assert one._watching.done()


# -- opening and closing -----------------------------------------------------------------------------


async def test_before_the_start_and_after_the_end() -> None:
    async with Emulator({"welders": 1}) as emulator:
        one = producer(emulator.url)
        for act in (lambda: one.put(b"x"), lambda: one.put_frame(encode_frame([])), one.flush):
            with pytest.raises(ClosedError, match="not started"):
                await act()
        assert one.stats()["received"] == 0
        await asyncio.gather(one.start(), one.start())
        await (await one.put(b"x"))
        assert await one.close() == 0
        assert await one.close() == 0
        for act in (lambda: one.put(b"x"), lambda: one.put_frame(encode_frame([])), one.flush, one.start):
            with pytest.raises(ClosedError, match="closed"):
                await act()


async def test_closing_with_an_unreachable_endpoint() -> None:
    one = producer(f"http://127.0.0.1:{free_port()}")
    await one.start()
    receipts = [await one.put(b"%d" % n) for n in range(700)]
    receipts.append(await one.put_frame(encode_frame([b"a", b"b"])))
    waiting = asyncio.create_task(_result(receipts[0]))
    flushing = asyncio.create_task(one.flush())
    await asyncio.sleep(0.1)
    assert await one.close(timeout_s=0.2) == 702
    for receipt in receipts:
        with pytest.raises(ClosedError):
            await receipt
    for task in (waiting, flushing):
        with pytest.raises(ClosedError):
            await asyncio.wait_for(task, 1)
    ended(one)
    assert one.stats()["dropped"] == 702
    assert await one.close() == 702


async def test_closing_at_once_tells_every_receipt() -> None:
    """Calls that were started and never took a step are among what did not end."""
    async with Emulator({"welders": 1}) as emulator:
        one = producer(emulator.url)
        await one.start()
        receipts = [await one.put(b"%d" % n) for n in range(1000)]
        left = await one.close(timeout_s=0)
        failed = [receipt for receipt in receipts if isinstance(receipt.exception(), ClosedError)]
        assert left == len(failed)
        assert len(failed) + one.stats()["stored"] == 1000
        ended(one)


async def test_a_put_that_waits_for_room_is_told_of_the_end() -> None:
    one = producer(f"http://127.0.0.1:{free_port()}", budget_bytes=1)
    await one.start()
    await one.put(b"first")
    waiting = [asyncio.create_task(one.put(b"more")) for _ in range(3)]
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(one.close(timeout_s=0.1))
    for task in waiting:
        with pytest.raises(ClosedError):
            await asyncio.wait_for(task, 1)
    assert await closing == 1
    ended(one)


async def test_a_put_woken_when_the_producer_closes_takes_nothing() -> None:
    async with Emulator({"welders": 1}) as emulator:
        one = producer(emulator.url, budget_bytes=1)
        await one.start()
        first = await one.put(b"first")
        waiting = asyncio.create_task(one.put(b"more"))
        await asyncio.sleep(0)
        await first  # room: the put was woken, and has not run yet
        await one.close()
        try:
            receipt = await asyncio.wait_for(waiting, 1)
        except ClosedError:
            pass
        else:
            assert receipt.done(), "nobody will ever end it"
        ended(one)


async def test_nothing_is_taken_while_closing() -> None:
    async with Emulator({"welders": 1}, latency_ms=100) as emulator:
        one = producer(emulator.url)
        await one.start()
        first = await one.put(b"first")
        closing = asyncio.create_task(one.close())
        await asyncio.sleep(0.02)
        with pytest.raises(ClosedError):
            await one.put(b"late")
        assert await closing == 0
        assert first.exception() is None
        ended(one)


async def test_two_who_close_both_wait() -> None:
    async with Emulator({"welders": 1}, latency_ms=150) as emulator:
        one = producer(emulator.url)
        await one.start()
        receipt = await one.put(b"x")
        assert await asyncio.gather(one.close(), one.close()) == [0, 0]
        first = asyncio.create_task(one.close())
        await first
        assert receipt.done()
        assert emulator.stored_count("welders") == 1


async def test_a_cancelled_close_still_ends_every_receipt() -> None:
    one = producer(f"http://127.0.0.1:{free_port()}")
    await one.start()
    receipt = await one.put(b"x")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(one.close(timeout_s=60), 0.1)
    assert isinstance(receipt.exception(), ClosedError)
    ended(one)


async def test_closing_during_the_start() -> None:
    async with Emulator({"welders": 1}, latency_ms=150) as emulator:
        one = producer(emulator.url)
        starting = asyncio.create_task(one.start())
        await asyncio.sleep(0.05)
        assert await one.close() == 0
        with pytest.raises((ClosedError, KinesisError)):
            await starting
        with pytest.raises(ClosedError):
            await one.put(b"x")


async def test_leaving_the_block_by_an_error_sends_what_was_put() -> None:
    async def work() -> None:
        async with producer(emulator.url) as one:
            await one.put(b"x")
            raise ZeroDivisionError

    async with Emulator({"welders": 1}) as emulator:
        with pytest.raises(ZeroDivisionError):
            await work()
        assert emulator.stored_count("welders") == 1


@pytest.mark.parametrize("options", [{"stream": None}, {"budget_bytes": 0}, {"max_records": 0}, {"access_key": "one"}])
async def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises((LibraryError, fastkin.ConfigError)):
        await Producer(**({"stream": "s", "region": "eu-west-1"} | options)).start()
