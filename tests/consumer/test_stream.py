"""All shards: parents before children, nothing missing and nothing twice, whatever happens on the way."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from typing import Any

import pytest

from consumer.rig import FIRST, HALF, aggregate, consumer, put, take
from fastkin import ClosedError, KinesisError, Position, ShardIteratorType
from fastkin.consumer import MemoryCheckpoints, all_shards, calls, shard_reader
from fastkin.emulator import Emulator
from fastkin.emulator.control import Control
from support.readback import kinesis_client
from support.servers import kinesis_mock

THROTTLED = "ProvisionedThroughputExceededException"


def values(records: list[Any]) -> list[Any]:
    return [record.data for record in records]


async def test_every_shard_is_read() -> None:
    """EI-29."""
    async with Emulator({"s": 4}) as emulator:
        await put(emulator.url, [b"%d" % n for n in range(700)])
        records = await take(consumer(emulator.url), 700)
    assert sorted(values(records)) == list(range(700))
    assert len({record.shard_id for record in records}) == 4


async def test_latest_hands_out_only_what_arrives() -> None:
    async with Emulator({"s": 2}) as emulator, consumer(emulator.url) as one:
        await put(emulator.url, [b'"old"'])
        reading = asyncio.create_task(take(one, 2, "latest"))
        while len(one.stats()["iterator_age_ms_by_shard"]) < 2 or emulator.counters.calls < 8:
            await asyncio.sleep(0.02)
        await put(emulator.url, [b'"new1"', b'"new2"'])
        assert sorted(values(await reading)) == ["new1", "new2"]


async def test_a_time_is_a_position() -> None:
    """EI-25: what was stored before is left out."""
    wall = [1_764_000_000.0]
    async with Emulator({"s": 1}, wall=lambda: wall[0]) as emulator:
        await put(emulator.url, [b"1"])
        wall[0] += 10
        await put(emulator.url, [b"2"])
        begin = Position(ShardIteratorType.AT_TIMESTAMP, timestamp=wall[0] - 5)
        assert values(await take(consumer(emulator.url), 1, begin)) == [2]


async def test_throttles_and_failures_are_waited_out() -> None:
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        await put(emulator.url, [b"1"])
        faults = [
            emulator.faults.call(THROTTLED, times=2, operation="GetRecords"),
            emulator.faults.cut("before", times=1, skip=2, operation="GetRecords"),
            emulator.faults.call("InternalFailureException", times=1, operation="GetShardIterator"),
            emulator.faults.call("LimitExceededException", times=1, operation="ListShards"),
        ]
        assert values(await take(one, 1)) == [1]
        assert [fault.hits for fault in faults] == [2, 1, 1, 1]
        assert one.stats()["throttled"] == 3


@pytest.mark.parametrize(
    ("code", "operation"),
    [
        ("ResourceNotFoundException", "ListShards"),
        ("AccessDeniedException", "GetShardIterator"),
        ("InvalidArgumentException", "GetRecords"),
    ],
)
async def test_what_does_not_pass_is_raised(code: str, operation: str) -> None:
    async with Emulator({"s": 2}) as emulator:
        await put(emulator.url, [b"1"])
        emulator.faults.call(code, times=1, operation=operation)
        with pytest.raises(KinesisError) as refused:
            await take(consumer(emulator.url), 2)
        assert refused.value.code == code


async def test_trouble_on_the_way_is_borne_as_long_as_is_said() -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.call("InternalFailureException", operation="GetRecords")
        with pytest.raises(KinesisError, match="InternalFailure"):
            await take(consumer(emulator.url, patience_s=0), 1)


async def test_an_expired_iterator_is_replaced_without_gap_or_duplicate() -> None:
    """EI-26: five minutes pass on the server's clock between the batches."""
    now = [1000.0]
    emulating = Emulator({"s": 1}, limits=False, clock=lambda: now[0])
    async with emulating as emulator, consumer(emulator.url, limit=100) as one:
        await put(emulator.url, [b"%d" % n for n in range(1500)], key="k")
        taken: list[int] = []
        async for record in one.stream("trim_horizon"):
            taken.append(record.data)
            if len(taken) % 300 == 0:
                now[0] += 301
            if len(taken) == 1500:
                break
        assert one.stats()["reseeks"] >= 4
    assert taken == list(range(1500))


async def test_latest_that_expires_before_its_first_record_is_the_same_place() -> None:
    """EI-26: records that come while nobody can read are not passed over."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        emulator.faults.call(THROTTLED, times=2, operation="GetRecords")
        emulator.faults.call("ExpiredIteratorException", times=1, skip=2, operation="GetRecords")
        reading = asyncio.create_task(take(one, 1, "latest"))
        while one.stats()["throttled"] == 0:
            await asyncio.sleep(0.01)
        await put(emulator.url, [b'"meanwhile"'])
        assert values(await asyncio.wait_for(reading, 20)) == ["meanwhile"]
        assert one.stats()["reseeks"] == 1


async def test_an_iterator_that_always_expires_ends_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not of its age, and a peer that answers so would be asked as fast as it answers."""
    async with Emulator({"s": 1}) as emulator:
        expired = emulator.faults.call("ExpiredIteratorException", operation="GetRecords")
        with pytest.raises(KinesisError, match="ExpiredIterator"):
            await asyncio.wait_for(take(consumer(emulator.url, patience_s=0), 1), 20)
        assert expired.hits == 1
        # As old as can be, the first is replaced at once; the second one has no batch before it.
        monkeypatch.setattr(shard_reader, "YOUNG_S", 0.0)
        with pytest.raises(KinesisError, match="ExpiredIterator"):
            await asyncio.wait_for(take(consumer(emulator.url, patience_s=0), 1), 20)
        assert expired.hits == 3


async def test_an_old_iterator_that_expires_costs_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "YOUNG_S", 0.0)
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b"1", b"2"], key="k")
        fail = emulator.faults.call
        code = "ExpiredIteratorException"
        expired = [fail(code, times=1, skip=skip, operation="GetRecords") for skip in (0, 2)]  # a batch is between
        assert values(await take(consumer(emulator.url, patience_s=0, limit=1), 2)) == [1, 2]
        assert [fault.hits for fault in expired] == [1, 1]


async def test_a_young_iterator_that_expires_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b"1"])
        expired = emulator.faults.call("ExpiredIteratorException", times=2, operation="GetRecords")
        assert values(await take(consumer(emulator.url), 1)) == [1]
        assert expired.hits == 2
    assert "stage=read goes again: ExpiredIteratorException" in caplog.text


async def test_a_page_that_always_expires_ends_with_patience() -> None:
    async with Emulator({"s": 1}) as emulator:
        expired = emulator.faults.call("ExpiredNextTokenException", operation="ListShards")
        with pytest.raises(KinesisError, match="ExpiredNextToken"):
            await asyncio.wait_for(take(consumer(emulator.url, patience_s=0), 1), 20)
        assert expired.hits == 2


async def test_a_list_that_is_older_than_the_end_of_a_shard_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_shards, "CHILDREN_S", 0.0)
    looks = 0
    marks = MemoryCheckpoints({FIRST: "SHARD_END"})
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url, checkpoints=marks) as one:
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey=HALF)
        await put(emulator.url, [b"1"] * 5)
        listed = one._calls.list_shards

        async def older() -> list[Any]:
            nonlocal looks
            looks += 1
            return [dataclasses.replace(shard, closed=shard.closed and looks > 2) for shard in await listed()]

        monkeypatch.setattr(one._calls, "list_shards", older)
        assert values(await take(one, 5)) == [1] * 5
    assert looks == 3


@pytest.mark.parametrize("portion", [1, 2, 3, 5])
async def test_portions_keep_the_place_that_a_whole_batch_keeps(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is left: one cannot go on in the middle of an aggregate, and behind it nothing is repeated."""
    async with Emulator({"s": 1}, limits=False) as emulator:
        five, three = (aggregate([(0, b"%d" % n) for n in numbers], ["k"]) for numbers in (range(5), range(6, 9)))
        await put(emulator.url, [five, b"5", three, b"9"], key="k")
        numbers = [one.sequence_number for one in await take(consumer(emulator.url), 10)]
        monkeypatch.setattr(calls, "PORTION", portion)
        for count in range(1, 10):
            marks = MemoryCheckpoints()
            one = consumer(emulator.url, checkpoints=marks)
            assert values(await take(one, count)) == list(range(count))
            # The last one counts when the next is asked for.
            whole = {number for number in numbers[: count - 1] if number not in numbers[count - 1 :]}
            assert marks.marks == ({FIRST: max(whole, key=int)} if whole else {})
        one = consumer(emulator.url, checkpoints=MemoryCheckpoints())
        assert values(await take(one, 10)) == list(range(10))
        [batch] = [await one.get_records(await one.get_shard_iterator(FIRST, "TRIM_HORIZON"))]
        assert values(batch.records) == list(range(10))
        await one.close()


async def test_strict_hands_out_none_of_many_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PORTION", 2)
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [aggregate([(0, b"%d" % n) for n in range(9)] + [(0, b"x")], ["k"])])
        with pytest.raises(KinesisError, match="no JSON"):
            await anext(consumer(emulator.url, strict=True).stream("trim_horizon"))


async def test_the_list_is_begun_again_when_the_token_of_a_page_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Control.list_shards
    monkeypatch.setattr(Control, "list_shards", lambda self, body: whole(self, {**body, "MaxResults": 3}))
    async with Emulator({"s": 8}) as emulator:
        await put(emulator.url, [b"%d" % n for n in range(100)])
        expired = emulator.faults.call("ExpiredNextTokenException", times=1, skip=1, operation="ListShards")
        records = await take(consumer(emulator.url), 100)
        assert expired.hits == 1
    assert sorted(values(records)) == list(range(100))


async def test_parents_come_before_their_children() -> None:
    """EI-29: after a split."""
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b'"parent"'] * 3)
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey=HALF)
        await put(emulator.url, [b'"child"'] * 20)
        assert values(await take(consumer(emulator.url), 23)) == ["parent"] * 3 + ["child"] * 20


async def test_both_parents_come_before_the_merged_shard() -> None:
    """EI-29: the one that has much to read, too."""
    async with Emulator({"s": 2}, limits=False) as emulator:
        await put(emulator.url, [b"0"] * 3000)
        async with kinesis_client(emulator.url) as client:
            await client.merge_shards(StreamName="s", ShardToMerge=FIRST, AdjacentShardToMerge="shardId-000000000001")
        await put(emulator.url, [b"1"] * 500)
        assert values(await take(consumer(emulator.url, limit=50), 3500)) == [0] * 3000 + [1] * 500


async def test_a_split_while_reading_is_followed() -> None:
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        reading = asyncio.create_task(take(one, 21, "latest"))
        while not one.stats()["iterator_age_ms_by_shard"] or emulator.counters.calls < 4:
            await asyncio.sleep(0.02)
        await put(emulator.url, [b'"before"'])
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey=HALF)
        await put(emulator.url, [b'"after"'] * 20)
        assert values(await asyncio.wait_for(reading, 20)) == ["before"] + ["after"] * 20


async def test_children_that_are_not_listed_yet_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list may be older than the end of a shard: the stream has not ended then."""
    whole, hidden = Control.list_shards, [2]

    def list_shards(self: Control, body: dict[str, Any]) -> dict[str, Any]:
        answer = whole(self, body)
        if hidden[0] > 0:
            hidden[0] -= 1
            answer["Shards"] = answer["Shards"][:1]
        return answer

    monkeypatch.setattr(Control, "list_shards", list_shards)
    async with Emulator({"s": 1}) as emulator:
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey=HALF)
        await put(emulator.url, [b"%d" % n for n in range(10)])
        assert sorted(values(await take(consumer(emulator.url), 10))) == list(range(10))
    assert hidden == [0]


async def test_a_stream_of_closed_shards_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can follow when every shard is closed and none has children."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        await put(emulator.url, [b"1"])
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey=HALF)
        listed, read = one._calls.list_shards, one._calls.records

        async def parent_only() -> list[Any]:
            return (await listed())[:1]

        async def childless(iterator: str, limit: int | None, shard_id: str | None = None) -> Any:
            return (await read(iterator, limit, shard_id))._replace(child_shards=[])

        monkeypatch.setattr(one._calls, "list_shards", parent_only)
        monkeypatch.setattr(one._calls, "records", childless)
        assert values([record async for record in one.stream("trim_horizon")]) == [1]


async def test_close_ends_who_waits_for_a_record() -> None:
    async with Emulator({"s": 1}) as emulator:
        one = consumer(emulator.url)
        await one.start()
        reading = asyncio.create_task(take(one, 1))
        while not one.stats()["iterator_age_ms_by_shard"]:
            await asyncio.sleep(0.01)
        await one.close()
        with pytest.raises(ClosedError):
            await asyncio.wait_for(reading, 10)


async def test_memory_is_bounded_by_who_reads_slowly() -> None:
    """One batch of a shard waits, one more is being read: nothing is fetched ahead of a reader who stands still."""
    async with Emulator({"s": 1}, limits=False) as emulator, consumer(emulator.url, limit=10) as one:
        await put(emulator.url, [b"1"] * 1000)
        records = one.stream("trim_horizon")
        await anext(records)
        before = -1
        while before != emulator.counters.calls:  # until nobody calls any more
            before = emulator.counters.calls
            await asyncio.sleep(0.5)
        # 2 puts, ListShards, GetShardIterator, and three batches: in hand, waiting, read
        assert before == 7
        await records.aclose()


async def test_iterator_age_is_how_far_the_slowest_shard_is_behind() -> None:
    """EI-30: 0 when caught up; more while records wait."""
    wall = [1_764_000_000.0]
    async with Emulator({"s": 1}, wall=lambda: wall[0]) as emulator, consumer(emulator.url, limit=1) as one:
        assert one.iterator_age_ms == 0
        await put(emulator.url, [b"1", b"2"], key="k")
        wall[0] += 7
        records = one.stream("trim_horizon")
        await anext(records)
        assert one.iterator_age_ms in (7000, 0)  # the next batch may be read already
        ages = one.stats()["iterator_age_ms_by_shard"]
        assert list(ages) == [FIRST]
        await anext(records)
        assert one.iterator_age_ms == 0
        await records.aclose()


async def test_aggregates_are_taken_apart_unless_told_otherwise() -> None:
    inner = aggregate([(0, b"1"), (1, b"2"), (0, b"3")], ["a", "b"])
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [inner])
        records = await take(consumer(emulator.url), 3)
        [stored] = await take(consumer(emulator.url, as_stored=True, raw=True), 1)
    assert [(one.data, one.partition_key, one.subsequence_number) for one in records] == [
        (1, "a", 0), (2, "b", 1), (3, "a", 2),
    ]  # fmt: skip
    assert len({one.sequence_number for one in records}) == 1
    assert (stored.data, stored.subsequence_number) == (inner, None)


async def test_the_sdk_reads_the_same() -> None:
    async with Emulator({"s": 2}) as emulator:
        await put(emulator.url, [b"%d" % n for n in range(50)])
        assert sorted(values(await take(consumer(emulator.url, transport="sdk"), 50))) == list(range(50))


@pytest.mark.process
@pytest.mark.parametrize(
    ("count", "shards"), [pytest.param(10_000, 2), pytest.param(100_000, 40, marks=pytest.mark.long)]
)
@pytest.mark.timeout(1200)  # the server writes a few hundred records a second on a busy machine
async def test_kinesis_mock_is_split_and_merged_under_load(count: int, shards: int) -> None:
    """EI-29: none missing, none twice, parents before children, while somebody writes.

    What the server needs for a call grows with what the shard holds, for writing too: 30,000 records in two shards take
    it ten times as long as in fifty.
    """
    with kinesis_mock() as server:
        server.create_stream("s", shards)

        async def write() -> None:
            for at in range(0, count, 500):
                # the key says where it may be read: one key, one order
                await put(server.url, [b"%d" % n for n in range(at, at + 500)])
                if at == count // 4:
                    await reshape("split_shard", ShardToSplit=FIRST, NewStartingHashKey=str((1 << 127) // shards))
                if at == count // 2:
                    await reshape(
                        "merge_shards", ShardToMerge=f"shardId-{shards:012}",
                        AdjacentShardToMerge=f"shardId-{shards + 1:012}",
                    )  # fmt: skip

        async def reshape(operation: str, **more: Any) -> None:
            async with kinesis_client(server.url) as client:
                await getattr(client, operation)(StreamName="s", **more)
                while (await client.describe_stream_summary(StreamName="s"))["StreamDescriptionSummary"][
                    "StreamStatus"
                ] != "ACTIVE":
                    await asyncio.sleep(0.02)

        # the server walks a shard from its beginning at each call
        async with consumer(server.url, checkpoints=MemoryCheckpoints(), poll_s=1.0, limit=10_000) as one:
            writing = asyncio.create_task(write())
            records = await take(one, count)
            await writing
            found = {shard.id: shard for shard in await one.list_shards()}
    times = Counter(record.data for record in records)
    assert times == Counter(range(count))
    first, last = {}, {}
    for at, record in enumerate(records):
        first.setdefault(record.shard_id, at)
        last[record.shard_id] = at
    for name, shard in found.items():
        for parent in {shard.parent, shard.adjacent_parent} & last.keys():
            assert name not in first or last[parent] < first[name], f"{name} began before {parent} ended"
    assert len(found) == shards + 3


async def test_a_stream_that_ends_leaves_another_one_its_connections() -> None:
    """Of a consumer that nobody started, the last stream() closes what the first has opened."""
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b"1", b"2", b"3"], key="k")
        one = consumer(emulator.url, limit=1)
        records = one.stream("trim_horizon")
        assert (await anext(records)).data == 1
        assert values(await take(one, 2)) == [1, 2]
        assert one._started
        assert [(await anext(records)).data for _ in range(2)] == [2, 3]
        await records.aclose()
        assert not one._started


async def test_a_wait_that_is_cancelled_ends_the_stream_and_another_one_goes_on() -> None:
    marks = MemoryCheckpoints()
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url, checkpoints=marks) as one:
        await put(emulator.url, [b"1"], key="k")
        records = one.stream("trim_horizon")
        assert (await anext(records)).data == 1
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(records), 0.3)
        await put(emulator.url, [b"2"], key="k")
        assert values(await take(one, 1)) == [2]
