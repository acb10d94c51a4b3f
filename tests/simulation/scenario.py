"""What happens in one seed: what is set, what is published, what breaks, how it heals, and what is demanded then.

Three kinds of seed: one pipeline (with kills and restarts), an engine with reloads, a producer. Which faults may happen
is drawn first, so that each seed has its own climate: with all at once the rare ones would hide behind the common.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextvars import Context
from typing import TYPE_CHECKING, Any

from fastkin import encode_frame
from fastkin.config import Broker as BrokerSettings
from fastkin.config import Kinesis, Pipeline
from fastkin.pipeline import PipelineRun
from simulation import check, disks
from simulation.broker import Broker, Message
from simulation.check import Books
from simulation.kinesis import ANSWER_FAULTS, CALL_FAULTS, ENTRY_FAULTS, Stream
from simulation.loop import PROCESS, Finding

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulation.world import World

RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# Faults of the tree that are known and not mended yet: left out of the seeds until they are.
KNOWN = frozenset(os.environ.get("FASTKIN_SIM_KNOWN", "kpl slow-stop").split())
QUIET_S = 150.0  # without any progress after everything has healed: more than any backoff
MOST_S = 4 * 3600.0  # to drain
STOP_SLACK_S = 15.0  # what a stop may take beyond its timeout: goodbyes and cancelled calls

SCALES = {  # steps, messages of a burst, weight
    "tiny": (4, (0, 1, 1, 2, 5), 58),
    "small": (8, (0, 1, 5, 20), 28),
    "medium": (16, (0, 3, 20, 60), 12),
    "rich": (30, (0, 5, 60, 400), 2),
}


class Scenario:
    """What all kinds share: the climate, the streams' and disks' faults."""

    kind = ""

    def __init__(self, world: World) -> None:
        self.world = world
        self.folder = tempfile.mkdtemp(prefix="fastkin-sim-", dir=RAM)
        self.serial = 0
        self.real_spool = False
        names = [name for name, (_, _, weight) in SCALES.items() for _ in range(weight)]
        self.scale = world.choose("scale", names)
        self.steps, self.bursts, _ = SCALES[self.scale]
        self.streams: list[Stream] = []
        self.disk_list: list[disks.Disk] = []
        self.acts: list[Callable[[], Any]] = []
        world.job_delay = self._job_delay

    def _job_delay(self, func: Callable[..., Any]) -> tuple[float, float]:
        return self.disk_list[0].lag() if self.disk_list else (0.0, 0.0)

    def climate(self, acts: dict[str, Callable[[], Any]]) -> None:
        """Which of these may happen in this seed."""
        share = self.world.choose("climate", (0.0, 0.15, 0.35, 0.7))
        for name, act in acts.items():
            if self.world.chance(f"it may happen: {name}", share):
                self.acts.append(act)

    async def act(self) -> None:
        if self.acts and self.world.chance("something happens", 0.7):
            act = self.world.choose("it is", self.acts)
            self.world.note(act.__name__)
            result = act()
            if asyncio.iscoroutine(result):
                await result

    def pause(self) -> float:
        return self.world.choose("time passes", (0.0, 0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 40.0)) * (
            0.5 + self.world.rng.random()
        )

    # -- Kinesis -------------------------------------------------------------------------------------

    def stream(self, name: str, books: Books) -> Stream:
        world = self.world
        stream = Stream(world, name, world.choose("shards", (1, 1, 2, 4)), books)
        stream.shard_rate = world.choose("shard takes", (1000.0, 1000.0, 50.0))
        stream.latencies = world.choose("latency", ((0.005,), (0.02,), (0.005, 0.3)))
        self.streams.append(stream)
        world.streams[name] = stream
        return stream

    def any_stream(self) -> Stream:
        return self.world.choose("stream", self.streams)

    def kinesis_call_fault(self) -> None:
        stream = self.any_stream()
        stream.call_fault = self.world.choose("calls fail with", ("", *CALL_FAULTS))
        stream.call_fault_share = self.world.choose("share", (0.3, 0.8, 1.0))

    def kinesis_entry_fault(self) -> None:
        stream = self.any_stream()
        stream.entry_fault = self.world.choose("entries fail with", ("", *ENTRY_FAULTS))
        stream.entry_fault_share = self.world.choose("share", (0.1, 0.5, 1.0))

    def kinesis_answer_fault(self) -> None:
        stream = self.any_stream()
        stream.answer_fault = self.world.choose("answers are", ("", *ANSWER_FAULTS))
        stream.answer_fault_share = self.world.choose("share", (0.3, 0.7))

    def kinesis_hangs(self) -> None:
        stream = self.any_stream()
        stream.hangs = not stream.hangs

    def kinesis_slow(self) -> None:
        self.any_stream().latencies = self.world.choose("latency", ((0.005,), (0.05, 1.0), (2.0, 8.0)))

    def kinesis_limits(self) -> None:
        stream = self.any_stream()
        stream.limits = not stream.limits

    def kinesis_reshard(self) -> None:
        stream = self.any_stream()
        if len(stream.open) < 8:
            stream.reshard()

    def kinesis_control_fault(self) -> None:
        self.any_stream().control_fault = self.world.choose(
            "questions fail with", ("", "AccessDeniedException", "LimitExceededException", "ServiceUnavailable")
        )

    def kinesis_acts(self) -> dict[str, Callable[[], Any]]:
        return {
            "calls fail": self.kinesis_call_fault,
            "entries fail": self.kinesis_entry_fault,
            "answers are spoilt": self.kinesis_answer_fault,
            "Kinesis hangs": self.kinesis_hangs,
            "Kinesis is slow": self.kinesis_slow,
            "shards throttle": self.kinesis_limits,
            "shards change": self.kinesis_reshard,
            "questions fail": self.kinesis_control_fault,
        }

    # -- disks -----------------------------------------------------------------------------------------

    def disk(self, path: str) -> disks.Disk:
        found = disks.DISKS[path] = disks.Disk(self.world)
        self.disk_list.append(found)
        return found

    def disk_fails(self) -> None:
        if self.disk_list:
            disk = self.world.choose("disk", self.disk_list)
            disk.failing = not disk.failing

    def disk_slow(self) -> None:
        if self.disk_list:
            self.disk_list[0].lags = self.world.choose("disk takes", ((0.0,), (0.001, 0.05), (0.5, 5.0)))

    def disk_hangs(self) -> None:
        if self.disk_list:
            self.disk_list[0].hangs = not self.disk_list[0].hangs

    def disk_acts(self) -> dict[str, Callable[[], Any]]:
        return {"a disk fails": self.disk_fails, "a disk is slow": self.disk_slow, "a disk hangs": self.disk_hangs}

    def heal(self) -> None:
        self.world.note("everything heals")
        for stream in self.streams:
            stream.heal()
        for disk in self.disk_list:
            disk.heal()

    # -- life ----------------------------------------------------------------------------------------------

    async def drive(self) -> None:
        raise NotImplementedError

    def spawn_context(self) -> Context:
        self.world.processes += 1
        context = Context()
        context.run(PROCESS.set, self.world.processes)
        return context

    def within(self, context: Context, coroutine: Any) -> asyncio.Task[Any]:
        return self.world.loop.create_task(coroutine, context=context)

    async def until(self, done: Callable[[], bool], progress: Callable[[], Any], say: Callable[[], str]) -> None:
        """Wait for what must come, as long as something moves."""
        loop = self.world.loop
        began = at = loop.now
        seen: Any = None
        pause = 0.05
        while not done():
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 2.0)
            check.bugs(self.world)
            self.inspect()
            now = progress()
            if now != seen:
                seen, at = now, loop.now
            if loop.now - at > QUIET_S or loop.now - began > MOST_S:
                raise Finding(f"stuck for {loop.now - at:.0f} s after everything has healed: {say()}")

    def inspect(self) -> None:
        """What must be true at any moment."""

    def end(self) -> None:
        disks.forget()
        disks.tidy(self.folder)

    def filler(self) -> bytes:
        return b"." * self.world.choose("size", (0, 8, 60, 200, 200, 1500))


class PipelineScenario(Scenario):
    """One pipeline, its broker, its stream, its disks; killed and started again."""

    kind = "pipeline"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.books = world.books = Books(world)
        self.broker = Broker(world, self.books)
        self.kinesis = self.stream("s", self.books)
        self.run: PipelineRun | None = None
        self.context: Context | None = None
        self.dead_path = f"{self.folder}/dead"
        self.spool_path = f"{self.folder}/spool"
        self.settle_settings()
        self.climate({
            **self.broker_acts(), **self.kinesis_acts(), **self.disk_acts(),
            "killed": self.kill, "stopped": self.stop, "poison": self.poison,
        })  # fmt: skip

    # -- what is set -------------------------------------------------------------------------------------

    def settle_settings(self) -> None:
        world, broker, books = self.world, self.broker, self.books
        on_full = world.choose("on_full", ("pause", "pause", "spool", "spool", "drop_oldest", "drop_newest"))
        self.bulk = world.chance("bulk", 0.5)
        kpl = world.chance("kpl", 0.2) and "kpl" not in KNOWN
        qos = world.choose("qos", (1, 1, 1, 2, 2, 0))
        clean = world.chance("clean session", 0.08)
        five = world.choose("protocol", ("5", "3.1.1", "auto"))
        window = world.choose("window", (1, 2, 20, 20, 100, 10_000, 65_535))
        huge = world.rng.random() < 0.002
        if huge:
            self.huge(qos or 1)
            window, qos, on_full, kpl, clean = 65_535, qos or 1, "pause", False, False
        kept = world.chance("dead letters are kept", 0.9)
        if kept:
            disks.DISKS[self.dead_path] = self.disk(self.dead_path)
            books.letters = disks.Letters(self.dead_path)
        else:
            books.unkept = True
        books.drops = on_full.startswith("drop")
        books.volatile = qos == 0 or clean
        if on_full == "spool":
            self.real_spool = world.chance("the spool is SQLite's", 0.15)
            self.disk(self.spool_path)
            disks.BOOKS[self.spool_path] = books.spool = disks.SpoolBooks(self.kinesis._users)
        self.topics = world.choose("topics", (("t/#",), ("t/a", "t/b/+"), ("$share/g/t/#",)))
        self.pipeline = Pipeline(
            id="p",
            topics=self.topics,
            qos=qos,
            format="bulk" if self.bulk else "raw",
            kinesis=Kinesis(stream="s", region="r", max_connections=world.choose("max_connections", (1, 3, 16))),
            partition_key=world.choose("partition_key", ("uuid", "uuid", "topic", "static:one")),
            linger_ms=world.choose("linger_ms", (0, 5, 50, 2000)),
            max_records=world.choose("max_records", (1, 7, 500, 500)),
            budget_bytes=world.choose("budget_bytes", (1 << 20, 1 << 20, 4 << 20)) if not huge else 128 << 20,
            budget_records=world.choose("budget_records", (20, 60, 400, 1_000_000)) if not huge else 1_000_000,
            max_record_bytes=world.choose("max_record_bytes", (1000, 65_536)),
            max_batch_bytes=world.choose("max_batch_bytes", (2000, 1 << 18)) if not kpl else 1 << 18,
            aggregation="kpl" if kpl else "none",
            on_full=on_full,  # type: ignore[arg-type]
            spool=self.spool_path if on_full == "spool" else None,
            spool_max_bytes=world.choose("spool_max_bytes", (1 << 16, 1 << 18, 1 << 24)),
            spool_after_s=world.choose("spool_after_s", (0.5, 5.0)),
            dead_letter=self.dead_path if kept else None,
            dead_letter_max_bytes=0,
            shutdown_timeout_s=world.choose("shutdown_timeout_s", (1.0, 20.0)),
            startup_check=world.choose("startup_check", ("none", "describe", "describe", "dry_run")),
        )
        self.broker_settings = BrokerSettings(
            host="broker", client_id="c", protocol=five, clean_session=clean,  # type: ignore[arg-type]
            keep_alive_s=world.choose("keep_alive_s", (10, 30, 30)),
            receive_maximum=window if window > 100 else world.choose("receive_maximum", (20, 10_000, 10_000)),
            connect_timeout_s=world.choose("connect_timeout_s", (3.0, 10.0)),
            reconnect_min_s=0.5, reconnect_max_s=world.choose("reconnect_max_s", (2.0, 30.0)),
            topic_alias_maximum=world.choose("topic_alias_maximum", (0, 0, 3)),
        )  # fmt: skip
        broker.window = window
        broker.five = five == "5" or world.chance("the broker knows 5.0", 0.7)
        broker.shuts = world.chance("the broker shuts the door on 5.0", 0.4)
        broker.lags = world.choose("lag", ((0.001,), (0.0, 0.02), (0.0, 0.001, 0.5)))
        broker.pieces = world.choose("pieces", ((65_536,), (65_536,), (65_536,), (1, 7, 300, 65_536)))
        broker.lowest_ids = window <= 100 and world.chance("lowest identifiers first", 0.4)
        broker.says_dup = not world.chance("redelivers without DUP", 0.1)
        broker.uses_identifiers = world.chance("the broker tells identifiers", 0.7)
        broker.keep_alive = world.choose("server keep-alive", (0, 0, 0, 7))
        broker.overruns = world.choose("beyond Receive Maximum", (0, 0, 5))

    def huge(self, qos: int) -> None:
        """A window beyond what the protocol can tell apart."""
        self.steps, self.bursts = 2, (1,)
        self.world.mark("more than 65,535 messages wait")
        self.first = [Message(at, b"t/a", b"%x:" % at, qos, (b"%x:" % at,)) for at in range(70_000)]
        self.serial = len(self.first)

    # -- what is published ---------------------------------------------------------------------------------

    def message(self) -> Message:
        world = self.world
        topic = world.choose("topic", (b"t/a", b"t/a", b"t/b/c"))
        qos = world.choose("published with QoS", (1, 1, 1, 2, 2, 0)) if not self.books.volatile else 1
        if self.bulk:
            return self.frame(topic, qos)
        record = self.record()
        message = Message(self.serial, topic, record, qos, (record,))
        if len(record) + 36 > self.pipeline.max_record_bytes:
            message.whole = True
        return message

    def record(self) -> bytes:
        self.serial += 1
        return b"%x:" % self.serial + self.filler()

    def frame(self, topic: bytes, qos: int) -> Message:
        world = self.world
        records = [self.record() for _ in range(world.choose("records in the frame", (1, 2, 5, 9, 30)))]
        payload = encode_frame(records)
        message = Message(self.serial, topic, payload, qos, records)
        if world.chance("the frame is bad", 0.04):
            world.mark("a bad frame")
            message.payload = payload[:-1] if len(payload) > 6 else payload + b"\x01"
            message.whole = True
        return message

    def publish(self, count: int) -> None:
        for _ in range(count):
            message = self.message()
            self.books.messages.append(message)
            self.broker.publish(message)
        self.broker.fill()

    # -- what happens -----------------------------------------------------------------------------------------

    def broker_acts(self) -> dict[str, Callable[[], Any]]:
        return {
            "cut": self.cut,
            "the broker is down": self.broker_down,
            "the broker refuses": self.broker_refuses,
            "the broker is silent": self.broker_silent,
            "half open": self.freeze,
            "the broker does not read": self.broker_deaf,
            "slow SUBACK": self.slow_suback,
            "filters are refused": self.denies,
            "redelivery": self.redeliver,
            "the session is lost": self.amnesia,
            "restored from a save": self.restore,
            "PUBREL is lost": self.pubrel,
        }

    def cut(self) -> None:
        self.broker.cut(error=self.world.chance("with an error", 0.5))

    def broker_down(self) -> None:
        self.broker.down = not self.broker.down
        if self.broker.down:
            self.broker.cut(error=True)

    def broker_refuses(self) -> None:
        self.broker.refusing = not self.broker.refusing
        self.broker.cut()

    def broker_silent(self) -> None:
        self.broker.silent = not self.broker.silent

    def freeze(self) -> None:
        for link in self.broker.links:
            if not link.closed:
                link.wire.frozen = True
                self.world.mark("a half-open connection")

    def broker_deaf(self) -> None:
        self.broker.deaf = not self.broker.deaf
        if not self.broker.deaf:
            for link in self.broker.links:
                link.wire._send()

    def slow_suback(self) -> None:
        self.broker.slow_suback = not self.broker.slow_suback

    def denies(self) -> None:
        self.broker.denies = not self.broker.denies

    def redeliver(self) -> None:
        for link in self.broker.links:
            if not link.closed:
                link.redeliver()

    def amnesia(self) -> None:
        self.broker.amnesia = True
        self.broker.cut()

    def restore(self) -> None:
        """A broker that comes back from an older save, and still says that it has the session."""
        broker, world = self.broker, self.world
        for client, session in broker.sessions.items():
            if client in broker.saved and world.chance("restore", 0.6):
                world.mark("a broker restored from an older save")
                if session.link is not None:
                    session.link.wire.cut(ConnectionResetError(104, "reset"))
                    if session.link is not None:
                        session.link.gone()
                session.restore(broker.saved.pop(client), broker.excuse)
                session.known = True
            elif session.known and not session.clean:
                broker.saved[client] = session.save()

    def pubrel(self) -> None:
        self.broker.loses_pubrel = True

    def poison(self) -> None:
        """A record that Kinesis refuses for good."""
        if self.kinesis.stored:
            record = self.record()
            self.kinesis.poison.add(record)
            payload = encode_frame([record]) if self.bulk else record
            message = Message(self.serial, b"t/a", payload, 1, (record,))
            self.books.messages.append(message)
            self.broker.publish(message)
            self.broker.fill()
            self.world.mark("a record that is refused for good")

    # -- processes ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.context = self.spawn_context()
        self.run = self.context.run(PipelineRun, self.pipeline, self.broker_settings)
        self.context.run(self.run.start)

    def remember(self) -> None:
        """What a run that is at its end has told."""
        assert self.run is not None
        stats = self.run.stats()
        self.books.possible += stats["duplicates_possible"]
        self.books.dropped += stats["dropped"]

    async def kill(self) -> None:
        world, loop = self.world, self.world.loop
        process = world.processes
        self.remember()
        world.note("SIGKILL")
        world.mark("killed")
        for job in [job for job in loop.jobs if job.process == process]:
            if world.chance("a thread came to its end before the kill", 0.5):
                world.mark("killed between a write and the word of it")
                job.process = 0
                job.told_after = 0.0
                job.future = loop.create_future()
                job.work()
                if job.future.done() and not job.future.cancelled():
                    job.future.exception()
            else:
                loop.jobs.remove(job)
        loop.kill(process)
        disks.kill_spool(self.spool_path, world)
        disks.kill_letters(self.dead_path, world)
        for link in list(self.broker.links):
            if not link.closed and link.wire.process == process:
                if world.chance("the broker does not notice", 0.3):
                    link.wire.frozen = True
                else:
                    link.wire.cut(None)
        await asyncio.sleep(world.choose("until the restart", (0.0, 0.5, 20.0)))
        self.start()

    async def stop(self) -> None:
        await self.ended()
        self.world.mark("stopped in the middle")
        await asyncio.sleep(self.world.choose("until the restart", (0.0, 0.5, 20.0)))
        self.start()

    async def ended(self) -> int:
        """stop(), in its time and with nothing left behind."""
        assert self.run is not None and self.context is not None
        loop = self.world.loop
        began = loop.now
        process = self.world.processes
        self.world.note("stop")
        left: int = await self.within(self.context, self.run.stop())
        took = loop.now - began
        hung = "slow-stop" in KNOWN and self.disk_list
        if took > self.pipeline.shutdown_timeout_s + STOP_SLACK_S and not hung:
            raise Finding(f"stop() took {took:.1f} s, shutdown_timeout_s is {self.pipeline.shutdown_timeout_s}")
        self.inspect()
        await asyncio.sleep(0.01)
        if tasks := loop.left_over(process):
            raise Finding(f"tasks left behind by stop(): {[task.get_name() for task in tasks]}")
        self.remember()
        return left

    # -- what must be true -------------------------------------------------------------------------------------------

    def inspect(self) -> None:
        run = self.run
        assert run is not None
        if run.failure.done() and not run.failure.cancelled() and (error := run.failure.exception()) is not None:
            raise Finding(f"the pipeline has failed: {error!r}") from error
        stats = run.stats()
        check.identity(stats)
        held = run.budget.records + (run.overflow.safe if run.overflow is not None else 0)
        if held != stats["in_flight"]:
            raise Finding(f"in_flight is {stats['in_flight']}, the budget holds {held} records")
        check.look(self.world, run, stats)

    async def drive(self) -> None:
        world = self.world
        self.start()
        for message in getattr(self, "first", ()):
            self.books.messages.append(message)
        pending = list(getattr(self, "first", ()))
        for _ in range(world.between("steps", 1, self.steps)):
            if pending and self.broker.sessions:
                for message in pending:
                    self.broker.publish(message)
                self.broker.fill()
                pending = []
            self.publish(world.choose("burst", self.bursts))
            await self.act()
            await asyncio.sleep(self.pause())
            check.bugs(world)
            self.inspect()
        for message in pending:
            message.given_up = True
        self.heal()
        await self.drained()
        await self.finish()

    def heal(self) -> None:
        super().heal()
        self.broker.heal()

    async def drained(self) -> None:
        books, broker = self.books, self.broker

        def done() -> bool:
            run = self.run
            assert run is not None
            return (
                broker.busy() == 0
                and run.lane.in_flight == 0
                and run.lane.spooled == 0
                and run.intake.connected.is_set()
                and run.budget.records == 0
            )

        def progress() -> Any:
            assert self.run is not None
            lane = self.run.lane
            return (
                books.answers, lane.stored, lane.dead_lettered, lane.spooled, broker.busy(), self.run.intake.state,
                lane.dropped,
            )  # fmt: skip

        await self.until(done, progress, self.state)

    def state(self) -> str:
        run = self.run
        assert run is not None
        lane, sender = run.lane, run.sender
        return (
            f"broker queue {self.broker.busy()}, unacked {run.ledger.unacked}, in_flight {lane.in_flight}, spooled"
            f" {lane.spooled}, open {lane.open_records}, ready {lane.ready}, intake {run.intake.state}, paused"
            f" {run.intake.paused}, budget {run.budget.bytes}/{run.budget.max_bytes}"
            f" {run.budget.records}/{run.budget.max_records} full {run.budget.full}, calls {sender.in_flight}, sender"
            f" idle {sender.idle}, aside {run.aside.waiting}, last error {run.last_error}, overflow"
            f" {run.overflow and (run.overflow.spooling, run.overflow.broken, run.overflow.full)}, kpl"
            f" {self.pipeline.aggregation}, {self.pipeline.on_full}"
        )

    async def finish(self) -> None:
        run = self.run
        assert run is not None
        await asyncio.sleep(0.5)
        self.inspect()
        if run.budget.bytes or run.budget.records:
            raise Finding(f"the budget ends at {run.budget.bytes} bytes, {run.budget.records} records")
        if run.ledger.unacked:
            raise Finding(f"{run.ledger.unacked} messages of this connection are unanswered at the end")
        if left := await self.ended():
            raise Finding(f"stop() says {left} records did not end")
        if batches := check.live_batches(run.lane):
            raise Finding(f"{len(batches)} batches live on that nobody is charged for: {[len(one) for one in batches]}")
        check.bugs(self.world)
        self.books.settle(0, 0)

    @property
    def open_wire(self) -> Any:
        return self.broker.open


def kind_of(world: World) -> type[Scenario]:
    return PipelineScenario
