"""Which run stands in which pipeline's place, which runs are on their way out, and what all of them have counted.

A run that was replaced may take long to leave. It still holds records then, so its numbers must stay in the sums.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkin.service.counters import Carry, merged
from fastkin.service.pipeline import PipelineRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.config import Broker, Pipeline, Settings
    from fastkin.service.plan import Wanted

_LOG = logging.getLogger("fastkin.engine")


class Former(NamedTuple):
    """What a run was made from that another one replaced: enough to make it anew."""

    wanted: Wanted
    pipeline: Pipeline
    broker: Broker


class Runs:
    """The runs of one engine. A place is a pipeline's id, and has one run; a replaced one leaves, and may take long."""

    def __init__(
        self,
        settings: Settings,
        *,
        on_settled: Callable[[str], None] | None,
        on_message: Callable[[str, bytes, bytes], None] | None,
    ) -> None:
        self.settings = settings  # what they are to be
        self._on_settled = on_settled
        self._on_message = on_message
        self.pipelines: dict[str, PipelineRun] = {}
        self.leaving: list[PipelineRun] = []  # replaced or removed, and not at their end yet
        self.wanted: dict[str, Wanted] = {}
        self.former: dict[PipelineRun, Former] = {}  # of a run that replaced another
        self.troubles: dict[str, str] = {}  # pipeline -> why it is not what the settings say
        self.halts: dict[PipelineRun, asyncio.Task[int]] = {}
        self.stopped: asyncio.Event = asyncio.Event()  # all are to end
        self._carried: dict[str, Carry] = {}
        self._filters: dict[tuple[str, str], set[str]] = {}  # session (broker, client id) -> what it subscribed

    def build(self, pipeline: Pipeline, broker: Broker) -> PipelineRun:
        """A run, with all that can fail done: it opens nothing, and has no place yet. ConfigError."""
        run = PipelineRun(pipeline, broker, on_settled=self._on_settled, on_message=self._on_message)
        run.read_files()
        return run

    def place(self, run: PipelineRun, wanted: Wanted, failed: Callable[[PipelineRun], None]) -> None:
        """Put a run, not started, in the place of the one before it. `failed(run)` is called when it has ended."""
        pipeline, broker = run.pipeline, run.subscriber.broker
        if not broker.clean_session:
            subscribed = self._filters.setdefault((broker.url, broker.client_id), set())
            # A kept session has all that was ever subscribed in it. What is not wanted any more must be told to the
            # broker, else it goes on sending it.
            run.subscriber.unsubscribe = sorted(subscribed - set(pipeline.filters))
            subscribed.update(pipeline.filters)
        run.failure.add_done_callback(lambda _: failed(run))
        self.pipelines[pipeline.id] = run
        self.wanted[pipeline.id] = wanted

    # A run that leaves goes on counting, so it stays in `leaving` until it has ended.
    def leave(self, run: PipelineRun) -> None:
        """Take a run out of its place; its numbers stay in stats()."""
        if self.pipelines.get(run.name) is run:
            del self.pipelines[run.name]
            self.former.pop(run, None)
            self.wanted.pop(run.name, None)
            self.leaving.append(run)

    def halt(self, run: PipelineRun, *, linger: bool = False) -> asyncio.Task[int]:
        """Stop a run, once. It is forgotten when it has left its place and has ended."""
        task = self.halts.get(run)
        if task is None:
            task = self.halts[run] = asyncio.create_task(run.stop(linger=linger), name=f"fastkin[{run.name}].stop")
            task.add_done_callback(lambda _: self._halted(run))
        elif task.done():  # it could not go on, and was in its place until now
            self._halted(run)
        return task

    def _halted(self, run: PipelineRun) -> None:
        """The last accounting of a run that was replaced or removed stays in what stats() says."""
        if run in self.leaving:
            self.leaving.remove(run)
            self.halts.pop(run)
            beside = [each for each in (*self.leaving, *self.pipelines.values()) if each.name == run.name]
            self._carried.setdefault(run.name, Carry()).add(
                run.stats(), beside=sum(each.delivery.batcher.received for each in beside)
            )
            self._say_spool(run)

    def _say_spool(self, run: PipelineRun) -> None:
        spool = run.pipeline.spool if run.pipeline.on_full == "spool" else None
        if not spool or not run.delivery.batcher.spooled or self.stopped.is_set():
            return
        wanted = [each for each in self.settings.pipelines if each.enabled and each.on_full == "spool"]
        if os.path.realpath(spool) not in {os.path.realpath(each.spool) for each in wanted if each.spool}:
            _LOG.warning(
                "pipeline=%s stage=engine spool %s keeps %d records that were acknowledged, and nobody sends them now:"
                " set it again as the spool of a pipeline with on_full = spool, until it is empty",
                run.name, spool, run.delivery.batcher.spooled,
            )  # fmt: skip

    # -- seen from outside -----------------------------------------------------------------------

    def failed(self) -> dict[str, str | None]:
        """Of every pipeline that there is or should be: why it does nothing any more, None when it works."""
        found: dict[str, str | None] = {name: run.failed() for name, run in self.pipelines.items()}
        for name in self._missing():
            why = self.troubles.get(name)
            found[name] = why if why is not None and why.startswith("failed: ") else None
        return found

    def unready(self) -> dict[str, str | None]:
        """Of every pipeline that there is or should be: why it does not do what the settings say, or None."""
        found = {name: run.unready() or self.troubles.get(name) for name, run in self.pipelines.items()}
        for name in self._missing():
            found[name] = self.troubles.get(name, "it is not running: a reload, a start or a stop is at work")
        return found

    def _missing(self) -> list[str]:
        return [each.id for each in self.settings.pipelines if each.enabled and each.id not in self.pipelines]

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters by pipeline id, over all that stood in its place."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in (*self.leaving, *self.pipelines.values()):  # the present one last
            found.setdefault(run.name, []).append(run.stats())
        names = dict.fromkeys((*self.pipelines, *found, *self._carried))
        return {name: merged(self._carried.get(name), found.get(name, [])) for name in names}
