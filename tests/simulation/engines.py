"""The service with several pipelines: reloads of every kind, also one over another, stops and kills."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastkin.config import Broker as BrokerSettings
from fastkin.config import Kinesis, Pipeline, Settings
from fastkin.errors import ClosedError, ConfigError
from fastkin.service.engine import Engine
from simulation import check, disks
from simulation.broker import Message
from simulation.loop import Finding
from simulation.pipelines import PipelineScenario
from simulation.scenario import STOP_SLACK_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.service.pipeline import PipelineRun


class EngineScenario(PipelineScenario):
    kind = "engine"

    def settle_settings(self) -> None:
        world, broker, books = self.world, self.broker, self.books
        self.bulk = False
        self.engine: Engine | None = None
        self.reloads = 0
        self.reloading: set[asyncio.Task[Any]] = set()
        self.names = ["a", "b", "c"][: world.between("pipelines", 1, 3)]
        clean = world.chance("clean session", 0.15)
        books.letters = disks.Letters(self.dead_path)
        self.disk(self.dead_path)
        books.spool = disks.SpoolBooks(self.kinesis._users)
        pipelines = []
        for name in self.names:
            on_full = world.choose("on_full", ("pause", "pause", "spool"))
            path = f"{self.folder}/spool-{name}"
            if on_full == "spool":
                self.disk(path)
                disks.BOOKS[path] = disks.SpoolBooks(self.kinesis._users)
            stream = "s" if name == "a" else f"s-{name}"
            if stream != "s":
                self.stream(stream, books)
            pipelines.append(
                Pipeline(
                    id=name,
                    topics=(f"{name}/#",),
                    qos=world.choose("qos", (1, 1, 2, 0)),
                    kinesis=Kinesis(stream=stream, region="r", max_connections=world.choose("max_connections", (1, 4))),
                    linger_ms=world.choose("linger_ms", (0, 50)),
                    max_records=world.choose("max_records", (7, 500)),
                    budget_bytes=1 << 20,
                    budget_records=world.choose("budget_records", (20, 1_000_000)),
                    max_record_bytes=65_536,
                    on_full=on_full,  # type: ignore[arg-type]
                    spool=path if on_full == "spool" else None,
                    spool_max_bytes=1 << 22,
                    spool_after_s=0.5,
                    dead_letter=self.dead_path,
                    dead_letter_max_bytes=0,
                    shutdown_timeout_s=world.choose("shutdown_timeout_s", (1.0, 20.0)),
                    startup_check=world.choose("startup_check", ("none", "describe")),
                )
            )
        books.volatile = clean or any(each.qos == 0 for each in pipelines)
        books.spools = [disks.BOOKS[each.spool] for each in pipelines if each.spool]
        self.pipeline = pipelines[0]
        self.broker_settings = BrokerSettings(
            host="broker", client_id="c", protocol=world.choose("protocol", ("5", "3.1.1", "auto")),
            clean_session=clean, keep_alive_s=30, connect_timeout_s=5.0, reconnect_max_s=5.0,
        )  # fmt: skip
        self.settings = Settings(broker=self.broker_settings, pipelines=tuple(pipelines))
        self.base = self.settings
        broker.window = world.choose("window", (1, 20, 100))
        for stream in self.streams:
            stream.at_aws = True
        broker.lags = world.choose("lag", ((0.001,), (0.0, 0.02)))

    def broker_acts(self) -> dict[str, Callable[[], Any]]:
        return {
            **super().broker_acts(),
            "a reload": self.reload,
            "two reloads": self.reload_twice,
            "reload back": self.back,
        }

    def message(self) -> Message:
        record = self.record()
        topic = f"{self.world.choose('pipeline', self.names)}/x".encode()
        return Message(self.serial, topic, record, self.world.choose("published with QoS", (1, 1, 2, 0)), (record,))

    # -- reloads --------------------------------------------------------------------------------------

    def changed(self) -> Settings:
        world = self.world
        pipelines = list(self.settings.pipelines)
        at = world.between("pipeline", 0, len(pipelines) - 1)
        one = pipelines[at]
        change = world.choose(
            "change", ("linger", "disabled", "removed", "added", "filter", "broker", "nothing", "description", "stream")
        )
        settings = self.settings
        if change == "linger":
            one = replace(one, linger_ms=7 if one.linger_ms != 7 else 50)
        elif change == "disabled":
            one = replace(one, enabled=not one.enabled)
        elif change == "filter":
            extra = f"extra/{one.id}"
            one = replace(one, topics=one.topics[:1] if extra in one.topics else (*one.topics, extra))
        elif change == "description":
            one = replace(one, description="other", shutdown_timeout_s=5.0)
        elif change == "stream":
            one = replace(one, kinesis=replace(one.kinesis, stream="s"))
        elif change == "broker":
            broker = replace(settings.broker, keep_alive_s=20 if settings.broker.keep_alive_s == 30 else 30)
            settings = replace(settings, broker=broker)
        pipelines[at] = one
        if change == "removed" and len(pipelines) > 1 and at > 0:
            del pipelines[at]
        elif change == "added":
            missing = [each for each in self.base.pipelines if each.id not in {one.id for one in pipelines}]
            pipelines += missing[:1]
        return replace(settings, pipelines=tuple(pipelines))

    def reload(self) -> None:
        self.take_up(self.changed(), everything=self.world.chance("everything", 0.2))

    def reload_twice(self) -> None:
        self.world.mark("a reload over a reload")
        self.reload()
        self.reload()

    def back(self) -> None:
        self.take_up(self.base)

    def take_up(self, settings: Settings, *, everything: bool = False) -> asyncio.Task[Any]:
        assert self.context is not None and self.engine is not None
        self.settings = settings
        task = self.within(self.context, self._reload(self.engine, settings, everything))
        self.reloading.add(task)
        task.add_done_callback(self.reloading.discard)
        return task

    async def _reload(self, engine: Engine, settings: Settings, everything: bool) -> None:
        try:
            changes = await engine.reload(settings, everything=everything)
        except ClosedError:
            self.world.mark("a reload that a stop overtook")
            return
        self.reloads += 1
        self.world.note(f"reloaded: {changes}")
        if changes.restarted:
            self.world.mark("a pipeline restarted by a reload")
        if changes.stopped:
            self.world.mark("a pipeline stopped by a reload")

    # -- processes -----------------------------------------------------------------------------------------

    def runs(self) -> list[PipelineRun]:
        assert self.engine is not None
        return [*self.engine.leaving, *self.engine.pipelines.values()]

    def start(self) -> None:
        self.context = self.spawn_context()
        self.engine = self.context.run(Engine, self.settings)
        self.reloading = set()
        self.starting = self.within(self.context, self.engine.start())

    def remember(self) -> None:
        assert self.engine is not None
        for stats in self.engine.stats().values():
            self.books.possible += stats.get("duplicates_possible", 0)
            self.books.dropped += stats.get("dropped", 0)

    def spool_paths(self) -> list[str]:
        return [each.spool for each in self.base.pipelines if each.spool]

    async def kill(self) -> None:
        self.remember()
        self.kill_process(self.world.processes, self.spool_paths(), [self.dead_path], self.broker.links)
        await asyncio.sleep(self.world.choose("until the restart", (0.0, 0.5, 20.0)))
        self.start()

    async def stop(self) -> None:
        process = self.world.processes
        await self.ended()
        self.world.mark("an engine stopped in the middle")
        self.threads_end(process)
        self.world.loop.kill(process)
        for path in self.spool_paths():
            disks.kill_spool(path, self.world)
        self.start()

    async def ended(self) -> int:
        assert self.engine is not None and self.context is not None
        loop = self.world.loop
        await asyncio.sleep(0)
        began, process = loop.now, self.world.processes
        self.world.note("stop")
        self.stopped += self.runs()
        most = max(run.pipeline.shutdown_timeout_s for run in self.runs()) if self.runs() else 0.0
        left: int = await self.within(self.context, self.engine.stop())
        took = loop.now - began
        if took > 2 * max(most, 20.0) + STOP_SLACK_S:
            raise Finding(f"stop() took {took:.1f} s, the longest shutdown_timeout_s is {most}")
        await asyncio.sleep(0.01)
        if tasks := loop.left_over(process):
            raise Finding(f"tasks left behind by stop(): {[task.get_name() for task in tasks]}")
        self.remember()
        return left

    # -- what must be true --------------------------------------------------------------------------------------

    def inspect(self) -> None:
        assert self.engine is not None
        for name, stats in self.engine.stats().items():
            try:
                check.identity(stats)
            except Finding as finding:
                raise Finding(f"pipeline {name}: {finding}") from None
        for run in self.runs():
            if run in self.engine.leaving:
                self.stopped.append(run)
            self.watch(run, run.stats())

    async def drained(self) -> None:
        assert self.engine is not None
        if self.engine is not None and not self.reloads_ended:
            self.reloads_ended = True
            with contextlib.suppress(ConfigError):
                await self.take_up(self.base)
        books, broker = self.books, self.broker

        def done() -> bool:
            assert self.engine is not None
            runs = self.engine.pipelines.values()
            return (
                not self.engine.leaving
                and not self.reloading
                and len(runs) == len(self.base.pipelines)
                and self.busy() == 0
                and all(
                    run.delivery.batcher.in_flight == 0
                    and run.delivery.batcher.spooled == 0
                    and run.subscriber.connected.is_set()
                    for run in self.runs()
                )
            )

        def progress() -> Any:
            return (
                books.answers, self.busy(), len(self.reloading),
                [(at.stored, at.spooled, run.subscriber.state) for run in self.runs() for at in [run.delivery.batcher]],
            )  # fmt: skip

        await self.until(done, progress, self.state)
        for session in broker.sessions.values():
            if session.link is None:  # a client id that nobody uses any more: the log says so
                for message in (*session.queue, *(flight.message for flight in session.flights.values())):
                    message.given_up = True

    reloads_ended = False

    def busy(self) -> int:
        waiting = 0
        for session in self.broker.sessions.values():
            if session.known and session.link is not None:
                waiting += len(session.queue) + len(session.flights) + bool(session.link.wire.inbox)
        return waiting

    def state(self) -> str:
        assert self.engine is not None
        told = [
            f"{run.name} {run.subscriber.state} in_flight {batcher.in_flight} spooled {batcher.spooled}"
            f" error {run.last_error}"
            for run in self.runs()
            for batcher in [run.delivery.batcher]
        ]
        return f"busy {self.busy()}, leaving {len(self.engine.leaving)}, reloading {len(self.reloading)}: {told}"

    async def finish(self) -> None:
        await asyncio.sleep(0.5)
        self.inspect()
        runs = self.runs()
        for run in runs:
            if run.delivery.budget.bytes or run.delivery.budget.records:
                raise Finding(f"the budget of {run.name} ends at {run.delivery.budget.bytes} bytes")
        if left := await self.ended():
            raise Finding(f"stop() says {left} records did not end")
        for run in runs:
            if batches := check.live_batches(run.delivery.batcher):
                raise Finding(f"{len(batches)} batches live on that nobody is charged for")
        check.bugs(self.world)
        self.books.settle(0, 0)
