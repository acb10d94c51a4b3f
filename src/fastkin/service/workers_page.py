"""What the status port tells of several workers: their figures with the label `worker`, and how all of them stand.

The figures of workers are not summed here: one that is started anew begins at zero, which a query on its own series
takes for what it is, and in a sum it would look like a loss. `sum by (pipeline) (rate(...))` adds them up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from fastkin.service.channel import GoneError
from fastkin.status.metrics import family
from fastkin.status.registry import WORKER_RESTARTS, WORKER_UP
from fastkin.status.server import Health

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fastkin.service.workers import Workers

_ANSWER_S = 5.0  # a worker that takes longer is stuck


class _Told(Collector):
    """What was collected already."""

    def __init__(self) -> None:
        self.families: list[Family] = []

    def describe(self) -> Iterable[Family]:
        return []

    def collect(self) -> list[Family]:
        return self.families


class WorkersPage:
    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._told = _Told()
        self._registry = CollectorRegistry()
        self._registry.register(self._told)

    async def registry(self) -> CollectorRegistry:
        told = await self._asked("figures")
        self._told.families = [*self._own(), *_joined(told)]
        return self._registry

    async def health(self) -> Health:
        told = await self._asked("health")
        found = Health({}, {}, {}, {"workers": {}})
        if not told:
            _note(found.unready, self._workers.pipelines, "no worker answers: they are being started or stopped")
        for name, pid in self._workers.places():
            answer, trouble = told.get(name), self._workers.trouble(name)
            if answer is None and trouble is None:
                trouble = f"does not answer for {_ANSWER_S:g} s"
                _note(found.failed, self._workers.pipelines, f"worker {name}: {trouble}")
            found.more["workers"][name] = {"ok": trouble is None, "reason": trouble, "pid": pid}
            if trouble is not None:
                _note(found.unready, self._workers.pipelines, f"worker {name}: {trouble}")
            for key in ("failed", "unready", "last_error"):
                for pipeline, why in (answer or {}).get(key, {}).items():
                    into: dict[str, str | None] = getattr(found, key)
                    into[pipeline] = into.get(pipeline) or (why and f"worker {name}: {why}")
        return found

    async def _asked(self, what: str) -> dict[str, Any]:
        """The answers of those that answer, by name."""
        names = [name for name, _ in self._workers.places()]
        answers = await asyncio.gather(
            *(self._workers.ask(name, what, _ANSWER_S) for name in names), return_exceptions=True
        )
        told = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, GoneError):
                    raise answer
            elif answer is not None:
                told[name] = answer
        return told

    def _own(self) -> list[Family]:
        places = self._workers.places()
        return [
            family(WORKER_UP, {name: pid is not None for name, pid in places}),
            family(WORKER_RESTARTS, {name: self._workers.restarts(name) for name, _ in places}),
        ]


def _note(into: dict[str, str | None], names: Iterable[str], why: str) -> None:
    for name in names:
        into[name] = into.get(name) or why


def _joined(told: dict[str, Sequence[Any]]) -> list[Family]:
    """Each family once, with the samples of all workers and of this process."""
    found: dict[str, Family] = {}
    own = CollectorRegistry()
    ProcessCollector(registry=own)
    for each in own.collect():
        found[each.name] = each
    for worker, families in told.items():
        for name, doc, kind, samples in families:
            if name not in found:
                found[name] = Family(name, doc, kind)
            for sample, labels, value in samples:
                found[name].add_sample(sample, {**labels, "worker": worker}, value)
    return list(found.values())
