"""From one set of settings to the next, while the pipelines run.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastkin.errors import ClosedError, ConfigError
from fastkin.service.runs import Former
from fastkin.status.registry import unkept

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastkin.config import Broker, Pipeline, Settings
    from fastkin.service.pipeline import PipelineRun
    from fastkin.service.plan import Planner, Wanted
    from fastkin.service.runs import Runs

_LOG = logging.getLogger("fastkin.engine")

# parts of the settings that only a new process takes up
_FIXED = ("status", "workers")


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


class Reload:
    """Compares what runs with what is wanted, replaces what differs, gives the old back when the new cannot work."""

    def __init__(self, runs: Runs, planner: Planner, failed: Callable[[PipelineRun], None]) -> None:
        """`failed(run)` is called when a run that was placed here has ended."""
        self._runs = runs
        self._planner = planner
        self._failed = failed
        self._returning: set[asyncio.Task[None]] = set()
        self._replaced = 0
        self._turn = asyncio.Lock()

    async def take_up(self, settings: Settings, *, everything: bool) -> Changes:
        """See Engine.reload(). One after the other."""
        async with self._turn:
            self._go_on()
            runs = self._runs
            if settings.broker.client_id_drawn and runs.settings.broker.client_id_drawn:
                # drawn at each reading: that alone is no change
                broker = dataclasses.replace(settings.broker, client_id=runs.settings.broker.client_id)
                settings = dataclasses.replace(settings, broker=broker)
            # plan() notes which pipeline has which client id. When the settings turn out to be wrong that is taken
            # back.
            plain = dict(self._planner.plain)
            wanted = self._planner.plan(settings)
            by_id = {pipeline.id: pipeline for pipeline in settings.pipelines}
            gone = [name for name in runs.pipelines if name not in wanted]
            new = [name for name in wanted if name not in runs.pipelines]
            changed = [
                name
                for name in wanted
                if name in runs.pipelines and (everything or wanted[name] != runs.wanted.get(name))
            ]
            # All that can fail is done before what runs is touched, and it is these very objects that are used.
            try:
                made = self._build(by_id, {name: wanted[name].broker for name in (*new, *changed)}, changed)
            except ConfigError:
                self._planner.plain = plain
                raise
            # From here on nothing raises for the sake of the settings: what can fail has been done.
            before, runs.settings = runs.settings, settings
            for name, run in runs.pipelines.items():
                # What needs no new run (`_LIVE` in plan.py) is read from the run's own settings when it is needed.
                if name in wanted and name not in changed:
                    run.pipeline = by_id[name]

            runs.troubles = {name: why for name, why in runs.troubles.items() if name in wanted and name not in made}
            unsettled = await self._replace(made, wanted, gone, changed)
            self._go_on()
            failed = [name for name in made if name in runs.troubles]
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

    def _build(
        self, by_id: Mapping[str, Pipeline], brokers: Mapping[str, Broker], changed: Sequence[str]
    ) -> dict[str, PipelineRun]:
        """The runs that are to come, none of them started. ConfigError names the pipeline that cannot be made."""
        made: dict[str, PipelineRun] = {}
        for name, broker in brokers.items():
            if name in changed and broker.client_id_drawn:
                self._replaced += 1
                # A broker ends the older of two connections with one client id. A drawn id has no session to keep, so
                # the new run gets another suffix: both can be connected at once, and nothing that is published in
                # between is lost. The suffix counts on: the run before may still be there under the last one.
                broker = dataclasses.replace(broker, client_id=f"{broker.client_id}-{self._replaced}")
            try:
                made[name] = self._runs.build(by_id[name], broker)
            except ConfigError:
                raise
            except ValueError as error:  # LibraryError too: settings that were made in code, past the checks
                raise ConfigError(f"pipeline {name!r}", str(error)) from error
        return made

    async def is_over(self) -> None:
        """No reload is at work any more. One that was sees that the engine stops, and starts nothing."""
        async with self._turn:
            pass

    def cannot_go_on(self, run: PipelineRun, error: ConfigError) -> None:
        """A run has ended for a wrong setting, and the others go on: it is red until the next reload, or, when it never
        worked, goes back to what was there before it."""
        runs = self._runs
        _LOG.error("pipeline=%s stage=engine cannot go on: %s; correct it and reload", run.name, error)
        replaced = runs.pipelines.get(run.name) is not run
        if not replaced:
            runs.wanted.pop(run.name, None)
        halt = runs.halt(run, linger=replaced and _lingers(run))
        former = runs.former.pop(run, None)
        if not replaced and former is not None and not run.ready:
            task = asyncio.create_task(self._go_back(run, former, halt, str(error)))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)

    async def _go_back(self, run: PipelineRun, former: Former, halt: asyncio.Task[int], why: str) -> None:
        """What a reload brought never worked: the run before it is made anew."""
        # The former run needs the session and the spool that this one still holds.
        await asyncio.wait([halt])
        async with self._turn:
            if not self._runs.stopped.is_set() and self._runs.pipelines.get(run.name) is run:
                self._start_again(run.name, former, why, run)

    def _start_again(self, name: str, former: Former, why: str, instead_of: PipelineRun | None) -> None:
        runs = self._runs
        runs.troubles[name] = f"the settings of the last reload do not work ({why}): going on with the former ones"
        try:
            again = runs.build(former.pipeline, former.broker)
        except Exception as error:  # noqa: BLE001 - then it is red, and the settings can be mended
            runs.troubles[name] = f"failed: {why}; and the former settings do not work any more: {error}"
            _LOG.error("pipeline=%s stage=engine %s; correct it and reload", name, runs.troubles[name])
            return
        if instead_of is not None:
            runs.leave(instead_of)
            runs.halt(instead_of)
        runs.place(again, former.wanted, self._failed)
        runs.wanted.pop(name, None)  # the next reload tries what the settings say then
        again.start()
        _LOG.error("pipeline=%s stage=engine %s", name, runs.troubles[name])

    async def _replace(
        self, made: dict[str, PipelineRun], wanted: dict[str, Wanted], gone: list[str], changed: list[str]
    ) -> int:
        """Put the runs that were made in their places. Returns how many records of old runs did not end."""
        runs = self._runs
        old = {name: runs.pipelines[name] for name in (*changed, *gone)}
        formers = {
            name: Former(runs.wanted.get(name, wanted[name]), old[name].pipeline, old[name].subscriber.broker)
            for name in changed
        }
        # Early runs start before the old ones leave, so nothing is missed. Late ones need what an old run still
        # holds.
        early, late = self._beside(made, old)

        # First those that can stand beside what they replace.
        begun: list[PipelineRun] = []
        for name in early:
            run = made[name]
            if name in old:
                runs.leave(old[name])
            if self._started(run, wanted[name], formers.get(name)):
                begun.append(run)
            elif name in old:  # it keeps its place
                runs.leaving.remove(old[name])
                runs.pipelines[name] = old.pop(name)
        if begun and old:
            await self._subscribed(begun)
            self._go_on()

        unsettled = await self._drain(old, gone)

        # Then those that take a place up.
        for name in late:
            if not self._started(made[name], wanted[name], formers.get(name)) and name in formers:
                self._start_again(name, formers[name], runs.troubles[name].removeprefix("failed: "), None)
        return unsettled

    def _beside(self, made: dict[str, PipelineRun], old: dict[str, PipelineRun]) -> tuple[list[str], list[str]]:
        """Which of them can stand beside what they replace, and which need its session or its spool."""
        runs = self._runs
        taken = {
            (run.subscriber.broker.url, run.subscriber.client_id) for run in (*runs.pipelines.values(), *runs.leaving)
        }
        spools = {spool for run in old.values() if (spool := run.pipeline.spool)}
        early: list[str] = []
        late: list[str] = []
        for name, run in made.items():
            broker = run.subscriber.broker
            session_free = not broker.client_id or (broker.url, broker.client_id) not in taken
            (early if session_free and run.pipeline.spool not in spools else late).append(name)
        return early, late

    async def _drain(self, old: dict[str, PipelineRun], gone: list[str]) -> int:
        """The old ones store what they hold, and leave. Those that nobody else keeps records for go on in the
        background. Returns how many records did not end."""
        runs = self._runs
        waits = []
        for name, run in old.items():
            runs.leave(run)
            linger = _lingers(run)
            waits.append(_out_of_the_way(run, runs.halt(run, linger=linger), linger))
            if name in gone:
                _say_gone(run)
        # the others go on when one cannot end in order
        results = await asyncio.gather(*waits, return_exceptions=True)
        self._go_on()
        unsettled = 0
        for run, result in zip(old.values(), results, strict=True):
            if isinstance(result, BaseException):
                _LOG.error("pipeline=%s stage=engine could not stop in order", run.name, exc_info=result)
                unsettled += run.delivery.batcher.in_flight
            else:
                unsettled += result
        return unsettled

    def _started(self, run: PipelineRun, wanted: Wanted, former: Former | None) -> bool:
        """Place and start a run. If that fails it has no place, which is told and shown."""
        runs = self._runs
        try:
            runs.place(run, wanted, self._failed)
            run.start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are not touched
            runs.pipelines.pop(run.name, None)
            runs.wanted.pop(run.name, None)
            runs.troubles[run.name] = f"failed: {type(error).__name__}: {error}"
            _LOG.exception("pipeline=%s stage=engine cannot be started", run.name)
            return False
        if former is not None:
            runs.former[run] = former
        return True

    async def _subscribed(self, runs: list[PipelineRun]) -> None:
        """Wait until the new ones receive, as long as a connection may take."""
        limit = max(run.subscriber.broker.connect_timeout_s for run in runs)
        connected = asyncio.gather(*(run.subscriber.connected.wait() for run in runs))
        stopped = asyncio.ensure_future(self._runs.stopped.wait())
        waits: list[asyncio.Future[Any]] = [connected, stopped]
        await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for run in runs:
            if not run.subscriber.connected.is_set():
                _LOG.warning(
                    "pipeline=%s stage=engine is not connected after %g s: what it replaces leaves all the same",
                    run.name, limit,
                )  # fmt: skip

    def _go_on(self) -> None:
        if self._runs.stopped.is_set():
            raise ClosedError("the engine is stopping: the settings were not taken up")

    def _say(self, settings: Settings, changes: Changes) -> None:
        _LOG.info("stage=engine settings taken up: %s", changes)
        for name in changes.needs_restart:
            _LOG.warning("stage=engine [%s] has changed: that needs a restart of the process", name)
        client_id = settings.broker.client_id
        owner = self._planner.plain.get(client_id)
        first = settings.pipelines[0].id if settings.pipelines else owner
        if client_id and not settings.broker.clean_session and owner != first:
            _LOG.warning(
                "stage=engine pipeline %r is the first now, but %r has the client id as it stands. After a restart of"
                " the process their sessions are others, and what the broker keeps in them is not read: put %r first",
                first, owner, owner,
            )  # fmt: skip


def _lingers(run: PipelineRun) -> bool:
    """Whether a run that leaves takes the time it needs: nobody else has what it holds."""
    return unkept(run) and not run.pipeline.spool


async def _out_of_the_way(run: PipelineRun, stopping: asyncio.Task[int], linger: bool) -> int:
    """A run that lingers is out of the way when it has left the broker, another one when it has ended."""
    if not linger:
        return await stopping
    left = asyncio.ensure_future(run.left.wait())
    await asyncio.wait([stopping, left], return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    return 0


def _say_gone(run: PipelineRun) -> None:
    broker = run.subscriber.broker
    if broker.clean_session:
        return
    _LOG.warning(
        "pipeline=%s stage=engine broker=%s the broker keeps the session of client %s and goes on collecting"
        " messages for it: the pipeline finds them when it comes back. To end the session, connect once with this"
        " client id and a clean session, for example mosquitto_sub -E -i ID -t x",
        run.name, broker.url, ascii(run.subscriber.client_id),
    )  # fmt: skip
