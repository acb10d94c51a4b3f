"""The service: one or many pipelines; start, wait, drain, stop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Self

from fastkin.pipeline import PipelineRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.config import Settings

_LOG = logging.getLogger("fastkin.engine")


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
        self._stopped: asyncio.Event | None = None
        self._stopping: asyncio.Task[int] | None = None

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
        enabled = [p for p in self.settings.pipelines if p.enabled]
        for pipeline in self.settings.pipelines:
            if not pipeline.enabled:
                _LOG.info("pipeline=%s stage=engine disabled", pipeline.id)
        for pipeline in enabled:
            broker = self.settings.broker
            if broker.client_id and pipeline is not self.settings.pipelines[0]:
                # The first keeps the id as it stands, so that adding a pipeline does not orphan its session.
                broker = dataclasses.replace(broker, client_id=f"{broker.client_id}-{pipeline.id}")
            self.pipelines[pipeline.id] = PipelineRun(
                pipeline, broker, on_settled=self._on_settled, on_message=self._on_message
            )
        for run in self.pipelines.values():
            run.start()

    async def wait(self) -> None:
        """Return when stop() was called; raise if a pipeline failed from a bug."""
        assert self._stopped is not None, "start() first"
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stopped.wait())
        failures: list[asyncio.Future[Any]] = [run.failure for run in self.pipelines.values()]
        try:
            await asyncio.wait([stopped, *failures], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        for failure in failures:
            if failure.done() and not failure.cancelled():
                failure.result()

    async def stop(self) -> int:
        """Stop intake, flush, settle, acknowledge, disconnect. Returns how many records did not end in time.

        May be called again, also while the first call is still at it: all return the same, when it is done.
        """
        if self._stopped is None:
            return 0
        if self._stopping is None:
            self._stopped.set()
            self._stopping = asyncio.create_task(self._stop(), name="fastkin engine stop")
        return await self._stopping

    async def _stop(self) -> int:
        results = await asyncio.gather(*(run.stop() for run in self.pipelines.values()), return_exceptions=True)
        unsettled = 0
        for result in results:
            if isinstance(result, BaseException):
                raise result
            unsettled += result
        return unsettled

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters by pipeline id, in records.

        received == stored + dead_lettered + filtered + dropped + in_flight + spooled, at any moment.
        """
        return {name: run.stats() for name, run in self.pipelines.items()}
