"""Keys drawn for shards that have room: one short shard slows down nobody else. On virtual time, by real buckets."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from hashlib import md5
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from delivery.test_sender import TEXT, THROTTLED, Rig
from fastkin._codec import DRAIN, DROPPED, SPOOLED, Batch, Batcher, Budget, KeyPlan, ShardTable, _seed_keys
from fastkin.aws.shards import HASH_SPACE, Shard, ShardMap
from fastkin.delivery.generations import NO_GENERATION
from fastkin.errors import LibraryError
from simulation.loop import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

SHARDS = 8
ENDS = [HASH_SPACE // SHARDS * (n + 1) - 1 for n in range(SHARDS)]
PER_S = 1000.0  # of a shard, and as many at once


@pytest.fixture(autouse=True)
def same_keys() -> Iterator[None]:
    _seed_keys(7)
    yield
    _seed_keys(None)


class Kinesis:
    """Shards with a second's worth of tokens, each at `factor` of what AWS gives it."""

    def __init__(self) -> None:
        self.factor = [1.0] * SHARDS
        self.tokens = [PER_S] * SHARDS
        self.at = asyncio.get_running_loop().time()
        self.stored: Counter[int] = Counter()
        self.refused: Counter[int] = Counter()
        self.open = self.most_open = 0
        self.on_resend = None
        self.calls = 0
        self.keys: set[str] = set()  # of what is stored

    async def call(self, target: str, body: Batch) -> bytes:
        self.calls += 1
        await asyncio.sleep(0.02)
        now = asyncio.get_running_loop().time()
        for n in range(SHARDS):
            most = PER_S * self.factor[n]
            self.tokens[n] = min(most, self.tokens[n] + (now - self.at) * most)
        self.at = now
        entries: list[dict[str, Any]] = []
        failed = 0
        for record in json.loads(bytes(body))["Records"]:
            n = (
                int.from_bytes(md5(record["PartitionKey"].encode(), usedforsecurity=False).digest())
                * SHARDS
                // HASH_SPACE
            )
            if self.tokens[n] >= 1.0:
                self.tokens[n] -= 1.0
                self.stored[n] += 1
                self.keys.add(record["PartitionKey"])
                entries.append({"SequenceNumber": "1", "ShardId": f"shardId-{n:012d}"})
            else:
                self.refused[n] += 1
                failed += 1
                entries.append({"ErrorCode": THROTTLED, "ErrorMessage": TEXT.format(n)})
        return json.dumps({"FailedRecordCount": failed, "Records": entries}).encode()


class Plant:
    """Offers records at a rate, as far as there is room."""

    def __init__(self) -> None:
        self.kinesis = Kinesis()
        self.rig = Rig(self.kinesis, max_calls=16)  # type: ignore[arg-type]
        self.rig.budget.max_records = 8000
        shards = [Shard(f"shardId-{n:012d}", end - HASH_SPACE // SHARDS + 1, end) for n, end in enumerate(ENDS)]
        self.rig.batcher.shards = ShardTable(ENDS)
        self.rig.sender.set_shards(ShardMap(shards))

    async def offer(self, per_s: float, seconds: float) -> tuple[Counter[int], Counter[int]]:
        """What was stored and what was refused meanwhile, by shard."""
        stored, refused = self.kinesis.stored.copy(), self.kinesis.refused.copy()
        batcher, loop = self.rig.batcher, asyncio.get_running_loop()
        until, due = loop.time() + seconds, 0.0
        while loop.time() < until:
            due += per_s * 0.01
            while due >= 1.0:
                due -= 1.0
                if not self.rig.budget.full:
                    batcher.add(b"x")
            batcher.offer_open(DRAIN)
            self.rig.sender.pump()
            await asyncio.sleep(0.01)
        return self.kinesis.stored - stored, self.kinesis.refused - refused

    @property
    def spreading(self) -> bool:
        return not self.rig.sender.draws_for_room

    async def end(self) -> None:
        self.kinesis.factor = [1.0] * SHARDS
        await self.rig.sender.flush()
        self.rig.check()
        await self.rig.sender.close()


def on_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    loop = VirtualLoop(lambda job: (0.0, 0.0))
    try:
        loop.run_until_complete(main)
        assert not loop.bugs
    finally:
        loop.close()


@pytest.mark.parametrize(("offered", "most_refused"), [(0.8, 0.01), (1.5, 0.05)])
def test_one_shard_at_a_tenth_slows_down_no_other(offered: float, most_refused: float) -> None:
    async def main() -> None:
        plant = Plant()
        await plant.offer(offered * SHARDS * PER_S, 3.0)
        assert plant.spreading, "nothing was refused: any key will do"
        plant.kinesis.factor[2] = 0.1
        await plant.offer(offered * SHARDS * PER_S, 3.0)
        stored, refused = await plant.offer(offered * SHARDS * PER_S, 6.0)
        want = min(offered * SHARDS * PER_S, (SHARDS - 1) * PER_S) * 6.0
        assert stored.total() >= 0.98 * want
        assert stored[2] >= 0.8 * 0.1 * PER_S * 6.0, "what the short one takes is used as well"
        assert refused.total() <= most_refused * stored.total()
        assert not plant.spreading
        await plant.end()

    on_virtual_time(main())


def test_keys_are_spread_evenly_again_when_all_have_room() -> None:
    async def main() -> None:
        plant = Plant()
        plant.kinesis.factor[2] = 0.1
        await plant.offer(0.7 * SHARDS * PER_S, 4.0)
        assert not plant.spreading
        plant.kinesis.factor[2] = 1.0
        await plant.offer(0.7 * SHARDS * PER_S, 14.0)
        assert plant.spreading
        stored, refused = await plant.offer(0.7 * SHARDS * PER_S, 4.0)
        assert not refused
        assert min(stored.values()) > 0.9 * max(stored.values())
        await plant.end()

    on_virtual_time(main())


def test_a_stream_that_is_short_as_a_whole_is_paced_as_a_whole() -> None:
    """Somebody else takes half of it: to draw other keys would help nobody."""

    async def main() -> None:
        plant = Plant()
        plant.kinesis.factor = [0.5] * SHARDS
        await plant.offer(SHARDS * PER_S, 6.0)
        stored, refused = await plant.offer(SHARDS * PER_S, 10.0)
        assert plant.spreading
        assert stored.total() >= 0.9 * 0.5 * SHARDS * PER_S * 10.0
        assert refused.total() <= 0.08 * stored.total()
        await plant.end()

    on_virtual_time(main())


def test_a_stream_of_one_shard_has_no_other() -> None:
    async def main() -> None:
        plant = Plant()
        plant.rig.batcher.shards = ShardTable([HASH_SPACE - 1])
        plant.rig.sender.set_shards(ShardMap([Shard("shardId-000000000002", 0, HASH_SPACE - 1)]))
        plant.kinesis.factor = [0.1] * SHARDS
        plant.kinesis.tokens = [0.0] * SHARDS
        await plant.offer(PER_S, 3.0)
        assert plant.kinesis.refused
        assert plant.spreading
        await plant.end()

    on_virtual_time(main())


def test_what_came_back_from_a_disk_keeps_its_keys_and_waits() -> None:
    """It may have been stored before it came to the disk. And no call is made for it without a wait."""

    async def main() -> None:
        plant = Plant()
        plant.kinesis.factor[2] = 0.1
        await plant.offer(0.8 * SHARDS * PER_S, 4.0)
        assert not plant.spreading
        batcher, sender = plant.rig.batcher, plant.rig.sender
        other = Batcher(
            settler=None, budget=Budget(1 << 30, 1 << 20), frame="raw", key=KeyPlan("uuid"), target=b'"StreamName":"s"'
        )
        for _ in range(400):
            other.add(b"x")
        spooled = closed(other)
        body = bytes(spooled)
        before = keys(spooled)
        spooled.finish(SPOOLED)
        batcher.adopt_spooled(400)
        restored = batcher.restore(body, b"", 1)
        assert not restored.drawn
        restored.flush_generation = NO_GENERATION
        sender.requeue_front([restored])
        calls = plant.kinesis.calls
        await plant.offer(0.8 * SHARDS * PER_S, 4.0)
        assert plant.kinesis.calls - calls < 1500, "it was sent again and again"
        assert set(before) <= plant.kinesis.keys
        await plant.end()

    on_virtual_time(main())


# -- what is drawn ---------------------------------------------------------------------------------


def batcher(key: KeyPlan | None = None) -> Batcher:
    return Batcher(
        settler=None, budget=Budget(1 << 30, 1 << 20), frame="raw", key=key or KeyPlan("uuid"),
        target=b'"StreamName":"s"', max_records=1000,
    )  # fmt: skip


def keys(batch: Batch) -> list[str]:
    return [record["PartitionKey"] for record in json.loads(bytes(batch))["Records"]]


def closed(one: Batcher) -> Batch:
    one.close_batch(DRAIN)
    batch = one.take()
    assert batch is not None
    return batch


def test_keys_fall_where_the_odds_say_and_the_batch_knows_it() -> None:
    one = batcher()
    one.shards = table = ShardTable(ENDS)
    table.set_odds([1.0] * 4 + [0.25, 0.0, 1.0, 1.0])
    for _ in range(1000):
        one.add(b"x")
    batch = closed(one)
    found = Counter(map(table.find, keys(batch)))
    assert {n: records for n, (records, _) in batch.shard_load().items()} == found
    assert found[5] <= 5, "next to none"
    assert 15 <= found[4] <= 75, "a quarter of what others have"
    assert min(found[n] for n in (0, 1, 2, 3, 6, 7)) > 100
    batch.finish(DROPPED)


def test_drawn_keys_are_placed_later_but_not_of_what_may_be_stored() -> None:
    table = ShardTable(ENDS)
    table.set_odds([1.0] + [0.0] * (SHARDS - 1))
    for uncertain in (0, 1):
        one = batcher()
        for _ in range(200):
            one.add(b"x")
        one.add(b"y", key="given")
        batch = closed(one)
        before = keys(batch)
        batch.digest = "of the former body"
        batch.uncertain = uncertain
        assert batch.drawn
        assert batch.shard_load().keys() == {-1}
        batch.place(table)
        after = keys(batch)
        assert after[-1] == "given"
        load = Counter(map(table.find, after[:-1])) + Counter({-1: 1})
        assert {n: records for n, (records, _) in batch.shard_load().items()} == load
        assert (batch.digest is None) == (uncertain == 0)
        if uncertain:
            assert after == before, "who reads it twice knows it again"
        else:
            assert load[0] > 150
            assert len(set(before) & set(after)) < 100
        batch.finish(DROPPED)


@pytest.mark.parametrize("second", ["another map", "none"])
def test_batches_that_were_placed_by_different_maps_share_a_call(second: str) -> None:
    """Nobody knows where the keys of both fall: they count as spread evenly until they are placed again."""
    one = batcher()
    for count in (3, 2, 4):
        for _ in range(count):
            one.add(b"x")
        one.add(b"y", key="given")
        one.close_batch(DRAIN)
    batches = [batch for _ in range(3) if (batch := one.take()) is not None]
    first, other, last = batches
    told = [key for batch in batches for key in keys(batch)]
    table = ShardTable(ENDS)
    first.place(table)
    last.place(table)
    if second == "another map":
        other.place(ShardTable(ENDS[3:]))
    (batch,) = Batch.gather(batches)
    assert keys(batch) == told
    assert {n: records for n, (records, _) in batch.shard_load().items()} == {-1: 12}
    batch.place(table)
    found = Counter(table.find(key) for key in told if key != "given") + Counter({-1: 3})
    assert {n: records for n, (records, _) in batch.shard_load().items()} == found
    batch.finish(DROPPED)


def test_a_body_that_somebody_reads_is_not_changed() -> None:
    table = ShardTable(ENDS)
    table.set_odds([1.0] + [0.0] * (SHARDS - 1))
    one = batcher()
    for _ in range(50):
        one.add(b"x")
    batch = closed(one)
    with memoryview(batch) as view:
        before = bytes(view)
        batch.place(table)
        assert bytes(view) == before
    batch.place(table, again=True)
    assert bytes(batch) != before
    batch.finish(DROPPED)


@pytest.mark.parametrize("odds", [[], [1.0] * 7, [0.5] * 8, [1.0] * 7 + [-0.1], [1.1] + [1.0] * 7])
def test_odds_that_are_none(odds: list[float]) -> None:
    with pytest.raises(LibraryError, match="odds are"):
        ShardTable(ENDS).set_odds(odds)


def test_other_keys_are_never_drawn_anew() -> None:
    for plan in (KeyPlan("content"), KeyPlan("none"), KeyPlan("parts", [("text", "static")])):
        one = batcher(plan)
        one.add(Random(1).randbytes(50))
        batch = closed(one)
        assert not batch.drawn
        before = bytes(batch)
        batch.place(ShardTable(ENDS), again=True)
        assert bytes(batch) == before
        batch.finish(DROPPED)
