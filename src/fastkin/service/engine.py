"""The service: one or many pipelines; start, wait, reload, drain, stop.

How a reload replaces a pipeline depends on what the broker keeps for us meanwhile:

- It keeps the session (QoS 1 or 2, a persistent session under the same client id): the old run drains and leaves,
  the new one takes the same session up. What comes in between waits at the broker.
- It keeps nothing (QoS 0, a clean session): the new run is subscribed before the old one leaves, if they can have
  different client ids; else the old one leaves and the new one connects at once. Either way the old run stores what
  it holds in the background, without a deadline: nobody else has these records.
- The session is another one (new broker, new client id): the new run is subscribed before the old one leaves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from fastkin.config import client_id_of
from fastkin.errors import ClosedError, ConfigError, LibraryError
from fastkin.runtime.deadline import Deadline
from fastkin.service.counters import Carry, merged
from fastkin.service.pipeline import CLOSE_S, PipelineRun
from fastkin.status.registry import unkept

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.config import Broker, Pipeline, Settings
    from fastkin.status.metrics import EngineCollector
    from fastkin.status.server import StatusServer

_LOG = logging.getLogger("fastkin.engine")

_STOP_S = CLOSE_S + 0.2  # after the longest shutdown timeout: for all of stop()
# what a run needs not be replaced for
_LIVE: dict[str, Any] = {"description": "", "shutdown_timeout_s": 0.0, "stdout": False}
# parts of the settings that only a new process takes up
_FIXED = ("status",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a reload did, by pipeline id."""

    started: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()  # removed from the settings, or disabled
    unchanged: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()  # could not be started: the former run goes on, if there was one
    needs_restart: tuple[str, ...] = ()  # tables whose change only a new process takes up
    unsettled: int = 0  # records that did not end in time: the broker sends them again

    def __str__(self) -> str:
        parts = [
            f"{word} {', '.join(names)}"
            for word, names in (
                ("started", self.started),
                ("restarted", self.restarted),
                ("stopped", self.stopped),
                ("unchanged", self.unchanged),
                ("failed", self.failed),
            )
            if names
        ]
        return "; ".join(parts) or "no pipeline"


class _Wanted(NamedTuple):
    """All that a run is made from: runs are replaced when it differs."""

    pipeline: Pipeline  # without what needs no new run
    broker: Broker
    files: tuple[tuple[str, int, int], ...]  # certificates: path, time of change, size


class Engine:
    """The service, embeddable: `async with Engine(settings) as engine: await engine.wait()`."""

    def __init__(
        self,
        settings: Settings,
        *,
        on_settled: Callable[[str], None] | None = None,
        on_message: Callable[[str, bytes, bytes], None] | None = None,
    ) -> None:
        """`on_settled(pipeline_id)` runs after each answered call; `on_message(pipeline_id, topic, payload)` sees
        every payload as it is taken and costs a Python call per message: leave it out where speed counts."""
        self.settings = settings
        self._on_settled = on_settled
        self._on_message = on_message
        self.pipelines: dict[str, PipelineRun] = {}
        self.leaving: list[PipelineRun] = []  # replaced or removed, and not at their end yet
        self._wanted: dict[str, _Wanted] = {}
        self._carried: dict[str, Carry] = {}
        self._halts: dict[PipelineRun, asyncio.Task[int]] = {}
        self._plain: dict[str, str] = {}  # client id as it stands -> the pipeline that has it
        self._filters: dict[tuple[str, str], set[str]] = {}  # session (broker, client id) -> what it subscribed
        self._reloading = False  # the first start() is over
        self._former: dict[PipelineRun, tuple[_Wanted, Pipeline, Broker]] = {}  # of a run that replaced another
        self._troubles: dict[str, str] = {}  # pipeline -> why it is not what the settings say
        self._returning: set[asyncio.Task[None]] = set()
        self._replaced = 0
        self._turn = asyncio.Lock()
        self._stopped: asyncio.Event | None = None
        self._failure: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[int] | None = None
        self.status: StatusServer | None = None  # when the settings want one

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start every enabled pipeline. Returns at once: connecting goes on in the background, with retries.

        ConfigError: a setting that only shows when the parts are built (an unreadable certificate, say).
        """
        self._stopped = asyncio.Event()
        self._failure = asyncio.get_running_loop().create_future()
        for pipeline in self.settings.pipelines:
            if not pipeline.enabled:
                _LOG.info("pipeline=%s stage=engine disabled", pipeline.id)
        wanted = self._plan(self.settings)
        for pipeline in self.settings.pipelines:
            if pipeline.enabled:
                self._place(self._build(pipeline, wanted[pipeline.id].broker), wanted[pipeline.id])
        if self.settings.status.port:
            # imported here: prometheus_client is only for who wants it
            from fastkin.status.server import StatusServer

            self.status = StatusServer(self)
            await self.status.start(self.settings.status)
        for run in self.pipelines.values():
            run.start()
        self._reloading = True

    async def wait(self) -> None:
        """Return when stop() was called; raise if a pipeline failed from a bug."""
        assert self._stopped is not None, "start() first"
        assert self._failure is not None
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait([stopped, self._failure], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if self._failure.done():
            self._failure.result()

    # -- making runs -----------------------------------------------------------------------------

    def _plan(self, settings: Settings) -> dict[str, _Wanted]:
        """What every enabled pipeline is to be made from."""
        wanted = {}
        for pipeline in settings.pipelines:
            if not pipeline.enabled:
                continue
            broker = self._broker_of(settings, pipeline.id)
            paths = (broker.tls.ca, broker.tls.cert, broker.tls.key, pipeline.kinesis.ca_bundle)
            wanted[pipeline.id] = _Wanted(
                dataclasses.replace(pipeline, **_LIVE), broker, tuple(_stamp(path) for path in paths if path)
            )
        return wanted

    def _broker_of(self, settings: Settings, name: str) -> Broker:
        """The first pipeline has the client id as it stands, so that adding one does not orphan its session.

        Whoever has it keeps it as long as this process lives, and the others theirs, in whatever order they come:
        a session belongs to its client id.
        """
        broker = settings.broker
        if not broker.client_id:
            return broker
        owner = self._plain.setdefault(broker.client_id, settings.pipelines[0].id)
        return dataclasses.replace(broker, client_id=client_id_of(settings, name, owner))

    def _build(self, pipeline: Pipeline, broker: Broker) -> PipelineRun:
        """A run, with all that can fail done: it opens nothing, and has no place yet. ConfigError."""
        run = PipelineRun(pipeline, broker, on_settled=self._on_settled, on_message=self._on_message)
        run.read_files()
        return run

    def _place(self, run: PipelineRun, wanted: _Wanted) -> None:
        """Put a run, not started, in the place of the one before it."""
        pipeline, broker = run.pipeline, run.intake.broker
        if not broker.clean_session:
            subscribed = self._filters.setdefault((broker.url, broker.client_id), set())
            run.intake.unsubscribe = sorted(subscribed - set(pipeline.topics))
            subscribed.update(pipeline.topics)
        reloaded = self._reloading
        run.failure.add_done_callback(lambda _: self._failed(run, reloaded))
        self.pipelines[pipeline.id] = run
        self._wanted[pipeline.id] = wanted

    def _failed(self, run: PipelineRun, reloaded: bool) -> None:
        assert self._failure is not None
        if run.failure.cancelled():
            return
        error = run.failure.exception()
        if error is None:
            return
        # The other pipelines do well: a wrong one must not take them along. Without others, nobody would see it.
        others = any(each.failed() is None for each in self.pipelines.values())
        if (reloaded or others) and isinstance(error, ConfigError) and self._stopping is None:
            _LOG.error("pipeline=%s stage=engine cannot go on: %s; correct it and reload", run.name, error)
            replaced = self.pipelines.get(run.name) is not run
            if not replaced:
                self._wanted.pop(run.name, None)
            halt = self._halt(run, linger=replaced and unkept(run) and not run.pipeline.spool)
            former = self._former.pop(run, None)
            if not replaced and former is not None and not run.ready:
                task = asyncio.create_task(self._go_back(run, former, halt, str(error)))
                self._returning.add(task)
                task.add_done_callback(self._returning.discard)
        elif not self._failure.done():
            self._failure.set_exception(error)
            self._failure.add_done_callback(lambda failure: failure.exception())  # nobody may be waiting

    async def _go_back(
        self, run: PipelineRun, former: tuple[_Wanted, Pipeline, Broker], halt: asyncio.Task[int], why: str
    ) -> None:
        """What a reload brought never worked: the run before it is made anew."""
        await asyncio.wait([halt])
        async with self._turn:
            if self._stopping is not None or self.pipelines.get(run.name) is not run:
                return
            self._start_again(run.name, former, why, run)

    def _start_again(
        self, name: str, former: tuple[_Wanted, Pipeline, Broker], why: str, instead_of: PipelineRun | None
    ) -> None:
        wanted, pipeline, broker = former
        self._troubles[name] = f"the settings of the last reload do not work ({why}): going on with the former ones"
        try:
            again = self._build(pipeline, broker)
        except Exception as error:  # noqa: BLE001 - then it is red, and the settings can be mended
            self._troubles[name] = f"failed: {why}; and the former settings do not work any more: {error}"
            _LOG.error("pipeline=%s stage=engine %s; correct it and reload", name, self._troubles[name])
            return
        if instead_of is not None:
            self._leave(instead_of)
            self._halt(instead_of)
        self._place(again, wanted)
        self._wanted.pop(name, None)  # the next reload tries what the settings say then
        again.start()
        _LOG.error("pipeline=%s stage=engine %s", name, self._troubles[name])

    # -- reload ----------------------------------------------------------------------------------

    async def reload(self, settings: Settings, *, everything: bool = False) -> Changes:
        """Go over to `settings`: changed pipelines restart, others do not notice. Nothing that is held is lost.

        `everything`: restart unchanged pipelines too (the environment of the AWS SDK has changed, say). A pipeline
        counts as changed also when a certificate file of it was written anew. Returns when what is replaced has
        drained (`shutdown_timeout_s` at most) and what is new was started. Reloads queue; a stop() in between
        wins.

        ConfigError: the settings cannot be used, and nothing was changed. ClosedError: the engine is stopping.
        """
        if self._stopped is None:
            raise LibraryError("the engine was not started: start() first")
        task = asyncio.create_task(self._reload(settings, everything), name="fastkin engine reload")
        return await asyncio.shield(task)  # whoever gives up waiting does not leave it half done

    async def _reload(self, settings: Settings, everything: bool) -> Changes:
        async with self._turn:
            self._go_on()
            if settings.broker.client_id_drawn and self.settings.broker.client_id_drawn:
                # drawn at each reading: that alone is no change
                broker = dataclasses.replace(settings.broker, client_id=self.settings.broker.client_id)
                settings = dataclasses.replace(settings, broker=broker)
            plain = dict(self._plain)
            wanted = self._plan(settings)
            by_id = {pipeline.id: pipeline for pipeline in settings.pipelines}
            gone = [name for name in self.pipelines if name not in wanted]
            new = [name for name in wanted if name not in self.pipelines]
            changed = [
                name
                for name in wanted
                if name in self.pipelines and (everything or wanted[name] != self._wanted.get(name))
            ]
            # All that can fail is done before what runs is touched, and it is these very objects that are used.
            made: dict[str, PipelineRun] = {}
            try:
                for name in (*new, *changed):
                    broker = wanted[name].broker
                    if name in changed and broker.client_id_drawn:
                        self._replaced += 1
                        broker = dataclasses.replace(broker, client_id=f"{broker.client_id}-{self._replaced}")
                    made[name] = self._build(by_id[name], broker)
            except ConfigError:
                self._plain = plain
                raise
            except ValueError as error:  # LibraryError too: settings that were made in code, past the checks
                self._plain = plain
                raise ConfigError(f"pipeline {name!r}", str(error)) from error
            before = self.settings
            self.settings = settings
            for name, run in self.pipelines.items():
                if name in wanted and name not in changed:
                    run.pipeline = by_id[name]

            self._troubles = {name: why for name, why in self._troubles.items() if name in wanted and name not in made}
            unsettled = await self._replace(made, wanted, gone, changed)
            self._go_on()
            failed = [name for name in made if name in self._troubles]
            changes = Changes(
                started=tuple(name for name in new if name not in failed),
                restarted=tuple(name for name in changed if name not in failed),
                stopped=tuple(gone),
                failed=tuple(failed),
                unchanged=tuple(name for name in wanted if name not in {*new, *changed}),
                needs_restart=tuple(
                    name for name in _FIXED if getattr(before, name, None) != getattr(settings, name, None)
                ),
                unsettled=unsettled,
            )
            self._say(settings, changes)
            return changes

    async def _replace(
        self, made: dict[str, PipelineRun], wanted: dict[str, _Wanted], gone: list[str], changed: list[str]
    ) -> int:
        """Put the runs that were made in their places. Returns how many records of old runs did not end."""
        old = {name: self.pipelines[name] for name in (*changed, *gone)}
        formers = {
            name: (self._wanted.get(name, wanted[name]), old[name].pipeline, old[name].intake.broker)
            for name in changed
        }
        taken = {(run.intake.broker.url, run.intake.client_id) for run in (*self.pipelines.values(), *self.leaving)}
        spools = {spool for run in old.values() if (spool := run.pipeline.spool)}

        # First those that can stand beside what they replace.
        early: list[PipelineRun] = []
        late: list[str] = []
        kept: set[str] = set()  # of the old ones
        for name, run in made.items():
            broker = run.intake.broker
            session_free = not broker.client_id or (broker.url, broker.client_id) not in taken
            if not session_free or run.pipeline.spool in spools:
                late.append(name)
                continue
            if name in old:
                self._leave(old[name])
            if self._started(run, wanted[name], formers.get(name)):
                early.append(run)
            elif name in old:
                kept.add(name)
                self.leaving.remove(old[name])
                self.pipelines[name] = old[name]
        old = {name: run for name, run in old.items() if name not in kept}
        if early and old:
            await self._subscribed(early)
            self._go_on()

        # Then the old ones drain. Those that nobody else keeps records for go on in the background.
        waits = []
        for name, run in old.items():
            self._leave(run)
            linger = unkept(run) and not run.pipeline.spool
            waits.append(_out_of_the_way(run, self._halt(run, linger=linger), linger))
            if name in gone:
                self._say_gone(run)
        # the others go on when one cannot end in order
        results = await asyncio.gather(*waits, return_exceptions=True)
        self._go_on()
        unsettled = 0
        for run, result in zip(old.values(), results, strict=True):
            if isinstance(result, BaseException):
                _LOG.error("pipeline=%s stage=engine could not stop in order", run.name, exc_info=result)
                unsettled += run.delivery.lane.in_flight
            else:
                unsettled += result

        # Then those that take a place up.
        for name in late:
            if not self._started(made[name], wanted[name], formers.get(name)) and name in formers:
                self._start_again(name, formers[name], self._troubles[name].removeprefix("failed: "), None)
        return unsettled

    def _started(self, run: PipelineRun, wanted: _Wanted, former: tuple[_Wanted, Pipeline, Broker] | None) -> bool:
        """Place and start a run. If that fails it has no place, which is told and shown."""
        try:
            self._place(run, wanted)
            run.start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are not touched
            self.pipelines.pop(run.name, None)
            self._wanted.pop(run.name, None)
            self._troubles[run.name] = f"failed: {type(error).__name__}: {error}"
            _LOG.exception("pipeline=%s stage=engine cannot be started", run.name)
            return False
        if former is not None:
            self._former[run] = former
        return True

    async def _subscribed(self, runs: list[PipelineRun]) -> None:
        """Wait until the new ones receive, as long as a connection may take."""
        assert self._stopped is not None
        limit = max(run.intake.broker.connect_timeout_s for run in runs)
        connected = asyncio.gather(*(run.intake.connected.wait() for run in runs))
        stopped = asyncio.ensure_future(self._stopped.wait())
        waits: list[asyncio.Future[Any]] = [connected, stopped]
        await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for run in runs:
            if not run.intake.connected.is_set():
                _LOG.warning(
                    "pipeline=%s stage=engine is not connected after %g s: what it replaces leaves all the same",
                    run.name, limit,
                )  # fmt: skip

    def _go_on(self) -> None:
        assert self._stopped is not None
        if self._stopped.is_set():
            raise ClosedError("the engine is stopping: the settings were not taken up")

    def _leave(self, run: PipelineRun) -> None:
        """Take a run out of its place; its numbers stay in stats()."""
        if self.pipelines.get(run.name) is run:
            del self.pipelines[run.name]
            self._former.pop(run, None)
            self._wanted.pop(run.name, None)
            self.leaving.append(run)

    def _halt(self, run: PipelineRun, *, linger: bool = False) -> asyncio.Task[int]:
        """Stop a run, once. It is forgotten when it has left its place and has ended."""
        task = self._halts.get(run)
        if task is None:
            task = self._halts[run] = asyncio.create_task(run.stop(linger=linger), name=f"fastkin[{run.name}].stop")
            task.add_done_callback(lambda _: self._halted(run))
        elif task.done():  # it could not go on, and was in its place until now
            self._halted(run)
        return task

    def _halted(self, run: PipelineRun) -> None:
        """The last accounting of a run that was replaced or removed stays in what stats() says."""
        if run in self.leaving:
            self.leaving.remove(run)
            self._halts.pop(run)
            beside = [each for each in (*self.leaving, *self.pipelines.values()) if each.name == run.name]
            self._carried.setdefault(run.name, Carry()).add(
                run.stats(), beside=sum(each.delivery.lane.received for each in beside)
            )
            self._say_spool(run)

    def _say_gone(self, run: PipelineRun) -> None:
        broker = run.intake.broker
        if broker.clean_session:
            return
        _LOG.warning(
            "pipeline=%s stage=engine broker=%s the broker keeps the session of client %s and goes on collecting"
            " messages for it: the pipeline finds them when it comes back. To end the session, connect once with this"
            " client id and a clean session, for example mosquitto_sub -E -i ID -t x",
            run.name, broker.url, ascii(run.intake.client_id),
        )  # fmt: skip

    def _say_spool(self, run: PipelineRun) -> None:
        spool = run.pipeline.spool if run.pipeline.on_full == "spool" else None
        if not spool or not run.delivery.lane.spooled or self._stopping is not None:
            return
        wanted = [each for each in self.settings.pipelines if each.enabled and each.on_full == "spool"]
        if os.path.realpath(spool) not in {os.path.realpath(each.spool) for each in wanted if each.spool}:
            _LOG.warning(
                "pipeline=%s stage=engine spool %s keeps %d records that were acknowledged, and nobody sends them now:"
                " set it again as the spool of a pipeline with on_full = spool, until it is empty",
                run.name, spool, run.delivery.lane.spooled,
            )  # fmt: skip

    def _say(self, settings: Settings, changes: Changes) -> None:
        _LOG.info("stage=engine settings taken up: %s", changes)
        for name in changes.needs_restart:
            _LOG.warning("stage=engine [%s] has changed: that needs a restart of the process", name)
        client_id = settings.broker.client_id
        owner = self._plain.get(client_id)
        first = settings.pipelines[0].id if settings.pipelines else owner
        if client_id and not settings.broker.clean_session and owner != first:
            _LOG.warning(
                "stage=engine pipeline %r is the first now, but %r has the client id as it stands. After a restart of"
                " the process their sessions are others, and what the broker keeps in them is not read: put %r first",
                first, owner, owner,
            )  # fmt: skip

    # -- stop ------------------------------------------------------------------------------------

    async def stop(self) -> int:
        """Stop intake, flush, settle, acknowledge, disconnect. Returns how many records did not end in time.

        May be called again, also while the first call or a reload is still at it: all return the same, when it is
        done. Who gives up waiting does not cut it short.
        """
        if self._stopped is None:
            return 0
        if self._stopping is None:
            self._stopped.set()
            self._stopping = asyncio.create_task(self._stop(), name="fastkin engine stop")
        return await asyncio.shield(self._stopping)

    async def _stop(self) -> int:
        for run in self.leaving:
            run.hurry()
        runs = [*self.pipelines.values(), *self.leaving]
        limit = Deadline(max((run.pipeline.shutdown_timeout_s for run in runs), default=0.0) + _STOP_S, "-")
        halts = {run: self._halt(run) for run in runs}
        if halts:
            await asyncio.wait(halts.values(), timeout=limit.left)
        await limit.wait(self._reload_is_over(), "a reload")
        if self.status is not None:
            await limit.wait(self.status.close(), "closing the status port")  # last: a drain can be watched
        unsettled = 0
        for run, halt in halts.items():
            if halt.done():
                unsettled += halt.result()
            else:
                _LOG.error("pipeline=%s stage=engine did not stop in time and is left behind", run.name)
                unsettled += run.delivery.lane.in_flight
        return unsettled

    async def _reload_is_over(self) -> None:
        async with self._turn:  # one that was at it sees that we stop, and starts nothing
            pass

    def metrics(self) -> EngineCollector:
        """What the host's Prometheus registry takes: `registry.register(engine.metrics())`."""
        from fastkin.status.metrics import EngineCollector

        return EngineCollector(self)

    # -- seen from outside -----------------------------------------------------------------------

    def failed(self) -> dict[str, str | None]:
        """Of every pipeline that there is or should be: why it does nothing any more, None when it works."""
        found: dict[str, str | None] = {name: run.failed() for name, run in self.pipelines.items()}
        for name in self._missing():
            why = self._troubles.get(name)
            found[name] = why if why is not None and why.startswith("failed: ") else None
        return found

    def unready(self) -> dict[str, str | None]:
        """Of every pipeline that there is or should be: why it does not do what the settings say, or None."""
        found = {name: run.unready() or self._troubles.get(name) for name, run in self.pipelines.items()}
        for name in self._missing():
            found[name] = self._troubles.get(name, "it is not running: a reload, a start or a stop is at work")
        return found

    def _missing(self) -> list[str]:
        return [each.id for each in self.settings.pipelines if each.enabled and each.id not in self.pipelines]

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters by pipeline id, over all reloads; `in_flight` and the like are those of now.

        Records: received == stored + dead_lettered + filtered + dropped + in_flight + spooled. `volatile` counts
        those of in_flight that are kept neither by the broker (QoS 0, clean session) nor on the disk.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for run in (*self.leaving, *self.pipelines.values()):  # the present one last
            found.setdefault(run.name, []).append(run.stats())
        names = dict.fromkeys((*self.pipelines, *found, *self._carried))
        return {name: merged(self._carried.get(name), found.get(name, [])) for name in names}


async def _out_of_the_way(run: PipelineRun, stopping: asyncio.Task[int], linger: bool) -> int:
    """A run that lingers is out of the way when it has left the broker, another one when it has ended."""
    if not linger:
        return await stopping
    left = asyncio.ensure_future(run.left.wait())
    await asyncio.wait([stopping, left], return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    return 0


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return path, 0, 0
    return path, found.st_mtime_ns, found.st_size
