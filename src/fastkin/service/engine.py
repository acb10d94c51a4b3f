"""The service: one or many pipelines; start, wait, reload, drain, stop.

A pipeline whose settings are wrong for good leaves the others at work. A task that ends though nobody stopped it ends
the engine: nothing may look alive that does nothing. How a reload goes is in `reload.py`, which runs there are in
`runs.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable  # noqa: TC003 - who reads our annotations needs it
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from fastkin.config import Settings  # noqa: TC001
from fastkin.errors import ConfigError, LibraryError
from fastkin.runtime.deadline import Deadline
from fastkin.service.pipeline import CLOSE_S
from fastkin.service.plan import Planner
from fastkin.service.reload import Changes, Reload
from fastkin.service.runs import Runs

if TYPE_CHECKING:
    from fastkin.service.pipeline import PipelineRun
    from fastkin.status.metrics import EngineCollector
    from fastkin.status.server import StatusServer
else:
    EngineCollector = Any  # what get_type_hints() shows: the class would load prometheus_client

_LOG = logging.getLogger("fastkin.engine")

_STOP_S = CLOSE_S + 0.2  # after the longest shutdown timeout: for all of stop()


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
        self._runs = Runs(settings, on_settled=on_settled, on_message=on_message)
        self.pipelines: dict[str, PipelineRun] = self._runs.pipelines
        self.leaving: list[PipelineRun] = self._runs.leaving  # replaced or removed, and not at their end yet
        self._planner = Planner()
        self._reload = Reload(self._runs, self._planner, partial(self._failed, reloaded=True))
        self._failure: asyncio.Future[None] | None = None  # None: not started
        self._stopping: asyncio.Task[int] | None = None
        self.status: StatusServer | None = None  # when the settings want one

    @property
    def settings(self) -> Settings:
        """What the pipelines are to be: the settings that were last taken up."""
        return self._runs.settings

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start every enabled pipeline. Returns at once: connecting goes on in the background, with retries.

        ConfigError: a setting that only shows when the parts are built (an unreadable certificate, say).
        """
        runs = self._runs
        runs.stopped = asyncio.Event()
        self._failure = asyncio.get_running_loop().create_future()
        for pipeline in self.settings.pipelines:
            if not pipeline.enabled:
                _LOG.info("pipeline=%s stage=engine disabled", pipeline.id)
        wanted = self._planner.plan(self.settings)
        for pipeline in self.settings.pipelines:
            if pipeline.enabled:
                made_of = wanted[pipeline.id]
                runs.place(runs.build(pipeline, made_of.broker), made_of, partial(self._failed, reloaded=False))
        if self.settings.status.port:
            # imported here: prometheus_client is only for who wants it
            from fastkin.status.server import EnginePage, StatusServer

            self.status = StatusServer(EnginePage(self))
            await self.status.start(self.settings.status)
        for run in self.pipelines.values():
            run.start()

    async def wait(self) -> None:
        """Return when stop() was called; raise if a pipeline failed from a bug."""
        assert self._failure is not None, "start() first"
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._runs.stopped.wait())
        try:
            await asyncio.wait([stopped, self._failure], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if self._failure.done():
            self._failure.result()

    def _failed(self, run: PipelineRun, *, reloaded: bool) -> None:
        """A run has ended. `reloaded`: it was not there at the first start."""
        assert self._failure is not None
        if run.failure.cancelled():
            return
        error = run.failure.exception()
        if error is None:
            return
        # The other pipelines do well: a wrong one must not take them along. Without others, nobody would see it.
        others = any(each.failed() is None for each in self.pipelines.values())
        if (reloaded or others) and isinstance(error, ConfigError) and self._stopping is None:
            self._reload.cannot_go_on(run, error)
        elif not self._failure.done():
            self._failure.set_exception(error)
            self._failure.add_done_callback(lambda failure: failure.exception())  # nobody may be waiting

    async def reload(self, settings: Settings, *, everything: bool = False) -> Changes:
        """Go over to `settings`: changed pipelines restart, others do not notice. Nothing that is held is lost.

        `everything`: restart unchanged pipelines too (the environment of the AWS SDK has changed, say). A pipeline
        counts as changed also when a certificate file of it was written anew. Returns when what is replaced has
        drained (`shutdown_timeout_s` at most) and what is new was started. Reloads queue; a stop() in between
        wins.

        ConfigError: the settings cannot be used, and nothing was changed. ClosedError: the engine is stopping.
        """
        if self._failure is None:
            raise LibraryError("the engine was not started: start() first")
        task = asyncio.create_task(self._reload.take_up(settings, everything=everything), name="fastkin engine reload")
        return await asyncio.shield(task)  # whoever gives up waiting does not leave it half done

    async def stop(self) -> int:
        """Stop intake, flush, settle, acknowledge, disconnect. Returns how many records did not end in time.

        May be called again, also while the first call or a reload is still at it: all return the same, when it is
        done. Who gives up waiting does not cut it short.
        """
        if self._failure is None:
            return 0
        if self._stopping is None:
            self._runs.stopped.set()
            self._stopping = asyncio.create_task(self._stop(), name="fastkin engine stop")
        return await asyncio.shield(self._stopping)

    async def _stop(self) -> int:
        # A run that lingers had all the time it needed. Now the process ends, and it has a deadline like the others.
        for run in self.leaving:
            run.hurry()
        runs = [*self.pipelines.values(), *self.leaving]
        limit = Deadline(max((run.pipeline.shutdown_timeout_s for run in runs), default=0.0) + _STOP_S, "-")
        halts = {run: self._runs.halt(run) for run in runs}
        if halts:
            await asyncio.wait(halts.values(), timeout=limit.left)
        await limit.wait(self._reload.is_over(), "a reload")
        if self.status is not None:
            await limit.wait(self.status.close(), "closing the status port")  # last: a drain can be watched
        unsettled = 0
        for run, halt in halts.items():
            if halt.done():
                unsettled += halt.result()
            else:
                _LOG.error("pipeline=%s stage=engine did not stop in time and is left behind", run.name)
                unsettled += run.delivery.batcher.in_flight
        return unsettled

    # -- seen from outside -----------------------------------------------------------------------

    def metrics(self) -> EngineCollector:
        """What the host's Prometheus registry takes: `registry.register(engine.metrics())`."""
        from fastkin.status.metrics import EngineCollector

        return EngineCollector(self)

    def failed(self) -> dict[str, str | None]:
        """Of every pipeline that there is or should be: why it does nothing any more, None when it works."""
        return self._runs.failed()

    def unready(self) -> dict[str, str | None]:
        """Of every pipeline that there is or should be: why it does not do what the settings say, or None."""
        return self._runs.unready()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters by pipeline id, over all reloads; `in_flight` and the like are those of now.

        Records: received == stored + dead_lettered + filtered + dropped + in_flight + spooled. `volatile` counts
        those of in_flight that are kept neither by the broker (QoS 0, clean session) nor on the disk.
        """
        return self._runs.stats()
