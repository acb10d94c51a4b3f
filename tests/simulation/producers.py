"""A producer inside a host: puts from several tasks, receipts, flush, close, kill, the spool of the one before."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastkin import encode_frame
from fastkin.errors import ClosedError, RecordDropped, RecordError, RecordFailed
from fastkin.producer import Producer
from simulation import check, disks
from simulation.check import Books
from simulation.loop import Finding
from simulation.scenario import Scenario

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Context

    from simulation.world import World

CLOSE_SLACK_S = 15.0
START_TRIES = 200


class ProducerScenario(Scenario):
    kind = "producer"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.books = world.books = Books(world)
        self.kinesis = self.stream("s", self.books)
        self.producer: Producer | None = None
        self.context: Context | None = None
        self.spool_path = f"{self.folder}/spool"
        on_full = world.choose("on_full", ("pause", "pause", "spool", "drop_oldest", "drop_newest"))
        self.books.drops = on_full.startswith("drop")
        self.books.unkept = True  # a host that is told of a failure has the record itself
        if on_full == "spool":
            self.real_spool = world.chance("the spool is SQLite's", 0.15)
            self.disk(self.spool_path)
            disks.BOOKS[self.spool_path] = self.books.spool = disks.SpoolBooks(self.kinesis._users)
        kpl = world.chance("kpl", 0.2)
        self.most_bytes = world.choose("max_record_bytes", (1000, 65_536))
        self.options: dict[str, Any] = {
            "region": "r",
            "partition_key": world.choose("partition_key", ("uuid", "uuid", "static:one")),
            "linger_ms": world.choose("linger_ms", (0.0, 5.0, 50.0, 2000.0)),
            "max_records": world.choose("max_records", (1, 7, 500, 500)),
            "max_batch_bytes": 1 << 18 if kpl else world.choose("max_batch_bytes", (2000, 1 << 18)),
            "max_record_bytes": self.most_bytes,
            "max_connections": world.choose("max_connections", (1, 3, 16)),
            "budget_bytes": world.choose("budget_bytes", (1 << 16, 1 << 20, 4 << 20)),
            "budget_records": world.choose("budget_records", (20, 60, 400, 1_000_000)),
            "aggregate_bytes": world.choose("aggregate_bytes", (500, 20_000)) if kpl else 0,
            "shard_map": world.chance("shard map", 0.7),
            "on_full": on_full,
            "spool": self.spool_path if on_full == "spool" else None,
            "spool_max_bytes": world.choose("spool_max_bytes", (1 << 16, 1 << 24)),
            "spool_after_s": world.choose("spool_after_s", (0.5, 5.0)),
        }
        self.given: dict[bytes, str] = {}  # record -> how its receipt ended, "" until then
        self.putting = 0
        self.failed = 0
        self.ended_receipts = 0
        self.climate({
            **self.kinesis_acts(), **self.disk_acts(), "puts": self.puts, "frames": self.frames, "flush": self.flush,
            "killed": self.kill, "closed": self.close, "poison": self.poison,
        })  # fmt: skip

    # -- what is put ---------------------------------------------------------------------------------

    def record(self) -> bytes:
        self.serial += 1
        return b"%x:" % self.serial + self.filler()

    def puts(self) -> None:
        assert self.context is not None and self.producer is not None
        world = self.world
        records = [self.record() for _ in range(world.choose("burst", self.bursts))]
        key = world.choose("key", (None, None, f"k{self.serial}"))
        self.within(self.context, self.put(self.producer, records, key))

    def frames(self) -> None:
        assert self.context is not None and self.producer is not None
        records = [self.record() for _ in range(self.world.choose("records in the frame", (0, 1, 5, 30)))]
        self.within(self.context, self.put_frame(self.producer, records))

    async def put(self, producer: Producer, records: Sequence[bytes], key: str | None) -> None:
        self.putting += 1
        try:
            for record in records:
                explicit = str(self.world.rng.getrandbits(128)) if key and self.world.rng.random() < 0.3 else None
                try:
                    receipt = await producer.put(record, key, explicit)
                except RecordError:
                    if len(record) + 256 <= self.most_bytes:
                        raise
                    self.world.mark("put() refuses a record")
                    continue
                except ClosedError:
                    return
                self.given[record] = ""
                receipt.add_done_callback(lambda done, record=record: self.told([record], done))
        finally:
            self.putting -= 1

    async def put_frame(self, producer: Producer, records: Sequence[bytes]) -> None:
        if any(len(record) + 256 > self.most_bytes for record in records):
            return
        self.putting += 1
        try:
            receipt = await producer.put_frame(encode_frame(records))
        except ClosedError:
            return
        finally:
            self.putting -= 1
        for record in records:
            self.given[record] = ""
        receipt.add_done_callback(lambda done: self.told(records, done))

    def told(self, records: Sequence[bytes], receipt: Any) -> None:
        """A receipt has ended. What it says must be true now."""
        if self.world.over:
            return
        self.ended_receipts += 1
        error = receipt.exception()
        word = "stored" if error is None else type(error).__name__
        self.world.note(f"receipt of {len(records)}: {word}")
        for record in records:
            if self.given[record]:
                raise Finding(f"the receipt of {record[:20]!r} has ended twice: {self.given[record]}, now {word}")
            self.given[record] = word
        if error is None:
            missing = [record for record in records if not self.books.safe(record)]
            if missing:
                self.wrong(f"a receipt says stored, and {missing[0][:40]!r} is nowhere")
            if records and receipt.result().spooled:
                self.world.mark("a receipt of what was spooled")
        elif isinstance(error, RecordDropped):
            self.world.mark("a receipt of what was dropped")
            if not self.books.drops:
                self.wrong(f"a record was dropped although on_full says nothing of it: {error}")
        elif isinstance(error, RecordFailed):
            self.failed += len(records)
            self.world.mark("a receipt of what was refused")
        elif not isinstance(error, ClosedError):
            self.wrong(f"a receipt ends with {error!r}")

    def wrong(self, text: str) -> None:
        """In a callback of the codec nothing may be raised: it is told by the next look."""
        self.world.stalls.append(text)

    # -- what happens ------------------------------------------------------------------------------------

    def flush(self) -> None:
        assert self.context is not None and self.producer is not None
        self.within(self.context, self._flush(self.producer))

    async def _flush(self, producer: Producer) -> None:
        waiting = [record for record, word in self.given.items() if not word]
        try:
            await producer.flush()
        except ClosedError:
            return
        self.world.mark("flush()")
        left = [record for record in waiting if not self.given[record]]
        if left:
            self.wrong(f"flush() returned with {len(left)} receipts open that were given before it")

    def poison(self) -> None:
        if self.kinesis.stored:
            assert self.context is not None and self.producer is not None
            record = self.record()
            self.kinesis.poison.add(record)
            self.within(self.context, self.put(self.producer, [record], None))

    async def start(self) -> None:
        self.context = self.spawn_context()
        self.producer = self.context.run(lambda: Producer("s", **self.options))
        await self.within(self.context, self.producer.start())

    def remember(self) -> None:
        assert self.producer is not None
        stats = self.producer.stats()
        self.books.possible += stats["duplicates_possible"]
        self.books.dropped += stats["dropped"]

    async def kill(self) -> None:
        self.remember()
        self.kill_process(self.world.processes, [self.spool_path], [], [])
        self.void()
        await asyncio.sleep(self.world.choose("until the restart", (0.0, 0.5, 20.0)))
        await self.start()

    def void(self) -> None:
        """Receipts of a process that is gone."""
        self.putting = 0
        for record, word in self.given.items():
            if not word:
                self.given[record] = "gone"

    async def close(self) -> None:
        process = self.world.processes
        await self.closed(self.world.choose("close() waits", (0.0, 1.0, 30.0)))
        self.world.mark("closed in the middle")
        self.threads_end(process)
        self.world.loop.kill(process)
        disks.kill_spool(self.spool_path, self.world)
        await asyncio.sleep(self.world.choose("until the restart", (0.0, 0.5)))
        await self.start()

    async def closed(self, timeout_s: float) -> int:
        assert self.context is not None and self.producer is not None
        loop = self.world.loop
        began, process = loop.now, self.world.processes
        left: int = await self.within(self.context, self.producer.close(timeout_s))
        if loop.now - began > timeout_s + CLOSE_SLACK_S:
            raise Finding(f"close({timeout_s:g}) took {loop.now - began:.1f} s")
        await asyncio.sleep(0.01)
        if tasks := loop.left_over(process):
            raise Finding(f"tasks left behind by close(): {[task.get_name() for task in tasks]}")
        open_receipts = [record for record, word in self.given.items() if not word]
        if open_receipts:
            raise Finding(f"close() left {len(open_receipts)} receipts that never end")
        self.inspect()
        self.remember()
        return left

    def live_on(self) -> None:
        if self.kinesis.poison:
            assert self.context is not None and self.producer is not None
            self.within(self.context, self.put(self.producer, [self.record()], None))

    # -- what must be true -----------------------------------------------------------------------------------

    def inspect(self) -> None:
        assert self.producer is not None
        stats = self.producer.stats()
        if stats["calls"] or stats["received"]:
            check.identity(stats)
        if found := self.producer.stuck():
            raise Finding(f"nobody will look at what waits: {found}")

    async def drive(self) -> None:
        world = self.world
        await self.start()
        for _ in range(world.between("steps", 1, self.steps)):
            self.puts()
            await self.act()
            await asyncio.sleep(self.pause())
            check.bugs(world)
            self.inspect()
        self.heal()

        def done() -> bool:
            assert self.producer is not None
            stats = self.producer.stats()
            return not self.putting and stats["in_flight"] == 0 and stats["spooled"] == 0

        def progress() -> Any:
            assert self.producer is not None
            stats = self.producer.stats()
            return self.ended_receipts, stats["stored"], stats["spooled"], stats["received"], self.putting

        await self.until(done, progress, lambda: str(self.producer and self.producer.stats()))
        check.bugs(world)
        assert self.producer is not None
        if self.producer._delivery.budget.bytes or self.producer._delivery.budget.records:
            raise Finding(f"the budget ends at {self.producer._delivery.budget.bytes} bytes")
        if batches := check.live_batches(self.producer._delivery.batcher):
            raise Finding(f"{len(batches)} batches live on that nobody is charged for")
        if left := await self.closed(30.0):
            raise Finding(f"close() says {left} records did not end")
        check.bugs(world)
        lost = [
            record for record, word in self.given.items()
            if word == "" or (word == "stored" and not self.books.safe(record))
        ]  # fmt: skip
        if len(lost) > self.books.dropped:  # a record may be refused for good after its receipt said spooled
            raise Finding(f"{len(lost)} records are lost: {lost[0][:40]!r}")
        self.books.settle(0, 0)
