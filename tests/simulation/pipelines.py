"""One pipeline: its broker, its stream, its disks; killed, stopped, started again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastkin import encode_frame
from fastkin.config import Broker as BrokerSettings
from fastkin.config import Kinesis, Pipeline
from fastkin.service.pipeline import PipelineRun
from simulation import check, disks
from simulation.broker import Broker, Message, Session
from simulation.check import Books
from simulation.loop import Finding
from simulation.scenario import KNOWN, STOP_SLACK_S, Scenario

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from simulation.world import World


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
            "ill-formed": self.ill_formed, "retained": self.retained, "poison": self.poison,
            "killed": self.kill, "stopped": self.stop,
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
            max_packet_bytes=8 << 20 if huge else world.choose("max_packet_bytes", (8 << 20, 8 << 20, 8 << 20, 1200)),
            reconnect_min_s=0.5, reconnect_max_s=world.choose("reconnect_max_s", (2.0, 30.0)),
            topic_alias_maximum=world.choose("topic_alias_maximum", (0, 0, 3)),
        )  # fmt: skip
        broker.window = window
        self.kinesis.at_aws = window < 3 or world.chance("it is AWS itself", 0.5)
        broker.five = five == "5" or world.chance("the broker knows 5.0", 0.7)
        broker.shuts = world.chance("the broker shuts the door on 5.0", 0.4)
        broker.lags = world.choose("lag", ((0.001,), (0.0,), (0.0, 0.02), (0.0, 0.001, 0.5)))
        broker.pieces = world.choose("pieces", ((65_536,), (65_536,), (65_536,), (200,), (1, 7, 300, 65_536)))
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
        self.kinesis.call_fault, self.kinesis.call_fault_share = "ConnectFailed", 1.0

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
            **({} if "no-suback" in KNOWN else {"no SUBACK": self.no_suback}),
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

    def no_suback(self) -> None:
        self.broker.no_suback = not self.broker.no_suback
        self.broker.cut()

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
        """A broker is saved, and comes back from that save a while later; it still says that it has the session."""
        world = self.world
        for session in self.broker.sessions.values():
            if session.known and not session.clean:
                after = world.choose("restored after", (0.05, 0.5, 3.0, 12.0)) * (0.5 + world.rng.random())
                world.later(after, self.restored, session, session.save())

    def restored(self, session: Session, saved: tuple[Any, ...]) -> None:
        if self.world.over or not session.known or session.clean or self.healed:
            return
        self.world.mark("a broker restored from an older save")
        self.world.note("restored from a save")
        if session.link is not None:
            link = session.link
            link.wire.cut(ConnectionResetError(104, "reset"))
            link.gone()
        session.restore(saved, self.broker.excuse)

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

    def ill_formed(self) -> None:
        """A PUBLISH that the standard forbids, from a publisher that a careless broker lets through."""
        world = self.world
        record = self.record()
        how = world.choose("ill-formed by", ("topic", "property"))
        topic = world.choose("topic", (b"t/\xed\xa0\x80", b"t/\xff", b"t/a\x00")) if how == "topic" else b"t/a"
        payload = encode_frame([record]) if self.bulk else record
        message = Message(self.serial, topic, payload, world.choose("published with QoS", (1, 2)), (record,))
        message.ill = how == "property"
        world.mark("an ill-formed message")
        self.books.messages.append(message)
        self.broker.publish(message)
        self.broker.fill()

    def retained(self) -> None:
        """It comes at once, and again with each new subscription."""
        message = self.message()
        message.retain = True
        self.broker.retained.append(message)
        self.books.messages.append(message)
        self.broker.publish(message)
        self.broker.fill()

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
        self.remember()
        self.kill_process(self.world.processes, [self.spool_path], [self.dead_path], self.broker.links)
        await asyncio.sleep(self.world.choose("until the restart", (0.0, 0.5, 20.0)))
        self.start()

    async def stop(self) -> None:
        process = self.world.processes
        await self.ended()
        self.world.mark("stopped in the middle")
        self.threads_end(process)
        self.world.loop.kill(process)
        disks.kill_spool(self.spool_path, self.world)
        await asyncio.sleep(self.world.choose("until the restart", (0.0, 0.5, 20.0)))
        self.start()

    async def ended(self) -> int:
        """stop(), in its time and with nothing left behind."""
        assert self.run is not None and self.context is not None
        loop = self.world.loop
        began = loop.now
        process = self.world.processes
        self.world.note("stop")
        self.stopped.append(self.run)
        left: int = await self.within(self.context, self.run.stop())
        took = loop.now - began
        if took > self.pipeline.shutdown_timeout_s + STOP_SLACK_S:
            raise Finding(f"stop() took {took:.1f} s, shutdown_timeout_s is {self.pipeline.shutdown_timeout_s}")
        self.inspect()
        await asyncio.sleep(0.01)
        if tasks := loop.left_over(process):
            raise Finding(f"tasks left behind by stop(): {[task.get_name() for task in tasks]}")
        self.remember()
        return left

    def live_on(self) -> None:
        if self.kinesis.poison:
            self.publish(1)

    # -- what must be true -------------------------------------------------------------------------------------------

    def inspect(self) -> None:
        assert self.run is not None
        self.watch(self.run, self.run.stats())

    async def drive(self) -> None:
        world = self.world
        self.start()
        for message in getattr(self, "first", ()):
            self.books.messages.append(message)
        pending = list(getattr(self, "first", ()))
        if pending:
            await asyncio.sleep(1.0)  # there is a session then
        for _ in range(world.between("steps", 1, self.steps)):
            if pending and self.broker.sessions:
                for message in pending:
                    self.broker.publish(message)
                self.broker.fill()
                pending = []
                await asyncio.sleep(2.0)
                self.inspect()
            self.publish(world.choose("burst", self.bursts))
            await self.act()
            await asyncio.sleep(self.pause())
            check.bugs(world)
            self.inspect()
        for message in pending:
            message.given_up = True
        self.heal()
        await self.drained()
        await asyncio.sleep(0.6)  # last words of connections that were cut
        await self.drained()
        await self.finish()

    healed = False

    def heal(self) -> None:
        super().heal()
        self.healed = True
        self.broker.heal()

    async def drained(self) -> None:
        books, broker = self.books, self.broker

        def done() -> bool:
            run = self.run
            assert run is not None
            return (
                broker.busy() == 0
                and run.delivery.batcher.in_flight == 0
                and run.delivery.batcher.spooled == 0
                and run.subscriber.connected.is_set()
                and run.delivery.budget.records == 0
            )

        def progress() -> Any:
            assert self.run is not None
            batcher = self.run.delivery.batcher
            return (
                books.answers, batcher.stored, batcher.dead_lettered, batcher.spooled, broker.busy(),
                self.run.subscriber.state, batcher.dropped,
            )  # fmt: skip

        await self.until(done, progress, self.state)

    def state(self) -> str:
        run = self.run
        assert run is not None
        delivery = run.delivery
        batcher, sender, budget, backlog = delivery.batcher, delivery.sender, delivery.budget, delivery.backlog
        return (
            f"broker queue {self.broker.busy()}, unacked {run.acks.unacked}, in_flight {batcher.in_flight}, spooled"
            f" {batcher.spooled}, open {batcher.open_records}, ready {batcher.ready}, {run.subscriber.state}, paused"
            f" {run.subscriber.paused}, budget {budget.bytes}/{budget.max_bytes}"
            f" {budget.records}/{budget.max_records} full {budget.full}, calls {sender.in_flight}, sender"
            f" idle {sender.idle}, aside {run.dead_letters.waiting}, last error {run.last_error}, backlog"
            f" {backlog and (backlog.spooling, backlog.broken, backlog.full)}, kpl"
            f" {self.pipeline.aggregation}, {self.pipeline.on_full}"
        )

    async def finish(self) -> None:
        run = self.run
        assert run is not None
        await asyncio.sleep(0.5)
        self.inspect()
        if run.delivery.budget.bytes or run.delivery.budget.records:
            raise Finding(
                f"the budget ends at {run.delivery.budget.bytes} bytes, {run.delivery.budget.records} records"
            )
        if run.acks.unacked:
            raise Finding(f"{run.acks.unacked} messages of this connection are unanswered at the end")
        if left := await self.ended():
            raise Finding(f"stop() says {left} records did not end")
        if batches := check.live_batches(run.delivery.batcher):
            raise Finding(f"{len(batches)} batches live on that nobody is charged for: {[len(one) for one in batches]}")
        check.bugs(self.world)
        self.books.settle(0, 0)

    @property
    def open_wire(self) -> Any:
        return self.broker.open
