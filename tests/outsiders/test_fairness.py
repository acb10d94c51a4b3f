"""First come, first served, per shard: a place is never lost by waiting, and nobody else pays for it."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING

from delivery.test_sender import TEXT, THROTTLED, Rig, Scripted, Verdict, all_stored, until
from fastkin._codec import DRAIN, ShardTable
from fastkin.aws.shards import HASH_SPACE, Shard, ShardMap
from fastkin.errors import KinesisError

if TYPE_CHECKING:
    import pytest

LARGE = b"large".ljust(900_000, b".")


def two_shards() -> tuple[ShardMap, str, str]:
    """The map, a key of the first shard, one of the second."""
    half = HASH_SPACE // 2
    shards = ShardMap([Shard("shardId-000000000000", 0, half - 1), Shard("shardId-000000000001", half, HASH_SPACE - 1)])
    table = ShardTable(shards.ends)
    one, other = (next(f"k{n}" for n in range(100) if table.find(f"k{n}") == shard) for shard in (0, 1))
    return shards, one, other


def shared(rig: Rig) -> tuple[str, str]:
    shards, one, other = two_shards()
    rig.batcher.shards = ShardTable(shards.ends)
    rig.sender.set_shards(shards)
    return one, other


def put(rig: Rig, data: bytes, key: str) -> None:
    rig.batcher.add(data, key=key)
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()


def order(rig: Rig, key: str) -> list[bytes]:
    return [data[:12].rstrip(b".") for data, its in rig.client.stored if its == key]


async def end(rig: Rig) -> None:
    async with asyncio.timeout(30):
        await rig.sender.flush()
    rig.check()
    await rig.sender.close()


async def test_a_large_record_on_a_busy_shard_is_not_overtaken() -> None:
    """Small ones would always fit before it: the shard's bucket never holds enough while they go on."""
    rig = Rig(Scripted(all_stored), max_calls=1)
    hot, _ = shared(rig)
    for n in range(60):  # 1.5 MB a second for a shard that takes 1 MiB
        if n == 20:
            put(rig, LARGE, hot)
        for part in range(10):
            rig.batcher.add(b"%d-%d" % (n, part) + b"." * 2_500, key=hot)
        rig.batcher.close_batch(DRAIN)
        rig.sender.pump()
        await asyncio.sleep(1 / 60)
    await end(rig)
    stored = order(rig, hot)
    assert len(stored) == 601
    assert stored.index(b"large") == 200, "who came later was sent before it"
    assert [data for data in stored if data != b"large"] == [b"%d-%d" % (n, p) for n in range(60) for p in range(10)]


async def test_the_shard_beside_it_does_not_wait() -> None:
    rig = Rig(Scripted(all_stored))
    hot, cold = shared(rig)
    for _ in range(6):
        put(rig, LARGE, hot)  # five seconds of the shard
    for n in range(200):
        rig.batcher.add(b"%d" % n, key=(hot, cold)[n % 2])
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    await until(lambda: len(order(rig, cold)) == 100)
    assert order(rig, hot).count(b"large") < 6
    await end(rig)
    assert order(rig, hot)[:6] == [b"large"] * 6


async def test_what_was_throttled_goes_before_what_came_later() -> None:
    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        return [(THROTTLED, TEXT.format(0)) if call in (2, 5, 6) else None] * len(records)

    rig = Rig(Scripted(script), max_calls=1)
    hot, _ = shared(rig)
    for n in range(100):
        put(rig, b"%d" % n, hot)
        await asyncio.sleep(0.002)
    await end(rig)
    assert order(rig, hot) == [b"%d" % n for n in range(100)]


async def test_order_is_kept_when_a_call_fails_that_is_older_than_what_waits() -> None:
    """Calls are open side by side: the older one fails as a whole after the younger one was throttled."""
    release = asyncio.Event()

    class Slow(Scripted):
        async def call(self, target: str, body: object) -> bytes:
            if self.calls == 0 and not release.is_set():
                self.calls += 1
                await release.wait()
                raise KinesisError("ServiceUnavailable", "later", http_status=503)
            return await super().call(target, body)  # type: ignore[arg-type]

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        if not release.is_set():
            return [(THROTTLED, TEXT.format(0))] * len(records)
        return [None] * len(records)

    rig = Rig(Slow(script), max_calls=2)
    hot, _ = shared(rig)
    put(rig, b"first", hot)
    await asyncio.sleep(0)
    put(rig, b"second", hot)
    await until(lambda: sum(rig.sender.counters.throttled.values()) > 0 and rig.sender.in_flight == 1)
    release.set()
    put(rig, b"third", hot)
    await end(rig)
    assert order(rig, hot) == [b"first", b"second", b"third"]


async def test_a_large_record_gets_its_turn_where_shards_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No map, so nobody can tell which records go to its shard: all stand back for a moment."""
    monkeypatch.setattr("fastkin.delivery.answers.CLAIM_AFTER_S", 0.1)
    monkeypatch.setattr("fastkin.delivery.answers.CLAIM_S", 0.6)
    monkeypatch.setattr("fastkin.delivery.answers.CLAIM_EVERY_S", 1.0)
    loop = asyncio.get_running_loop()
    quiet_since = loop.time()

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        """The large one fits when nothing was stored for 0.4 s, the small ones always do."""
        nonlocal quiet_since
        out: list[Verdict] = []
        for record in records:
            fits = not base64.b64decode(record["Data"]).startswith(b"large") or loop.time() - quiet_since > 0.4
            out.append(None if fits else (THROTTLED, TEXT.format(0)))
            if fits:
                quiet_since = loop.time()
        return out

    rig = Rig(Scripted(script), max_calls=2)

    async def plant() -> None:
        n = 0
        while True:
            put(rig, b"%d" % n, "k")
            n += 1
            await asyncio.sleep(0.01)

    planting = asyncio.create_task(plant())
    await asyncio.sleep(0.1)
    put(rig, b"large", "k")
    try:
        await until(lambda: b"large" in order(rig, "k"), 15.0)
    finally:
        planting.cancel()
    await end(rig)
