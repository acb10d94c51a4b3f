"""What Prometheus is told. Counters live in the stages; they are read when somebody asks, and cost nothing before.

    registry.register(engine.metrics())

One scrape is one moment: nothing is waited for in between, so the counters of a pipeline fit together. They go on
over a reload. prometheus_client is imported by whoever needs this module, which is not every process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from fastkin.status.registry import OF_CONSUMER, OF_ENGINE, OF_PRODUCER, OF_RUN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fastkin.delivery.delivery import Delivery
    from fastkin.status.registry import Engine, Metric

_THREAD_WAITS_S = 5.0  # a scrape in another thread, for the loop


class _InLoop(Collector):
    """Reads its figures in the loop in which they change. Make it there; it may be scraped in any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterable[Family]:
        # Without this a registry would collect once just to learn the names. It lets no two in that describe one name,
        # and a program may have several producers and consumers: their labels tell them apart.
        return []

    def collect(self) -> list[Family]:
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        # In another thread the counters would be read while the loop changes them, and the identity would not hold.
        if here or not self._loop.is_running():
            return self._collect()
        told: concurrent.futures.Future[list[Family]] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._tell, told)
        return told.result(_THREAD_WAITS_S)

    def _tell(self, told: concurrent.futures.Future[list[Family]]) -> None:
        try:
            told.set_result(self._collect())
        except Exception as error:  # noqa: BLE001 - for whoever waits
            told.set_exception(error)

    def _collect(self) -> list[Family]:
        raise NotImplementedError


class EngineCollector(_InLoop):
    """The metrics of an engine's pipelines."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def describe(self) -> Iterable[Family]:
        return [GaugeMetricFamily("fastkin_info", "")]  # one engine a registry

    def _collect(self) -> list[Family]:
        families = [family(row.metric, row.read(self._engine)) for row in OF_ENGINE]
        stats = self._engine.stats()
        for row in OF_RUN:
            if row.metric is None:
                continue
            if row.key is None:  # no sum over runs: only the one that is at work can say it
                told = {name: row.read(run) for name, run in self._engine.pipelines.items()}
            else:
                told = {name: figures[row.key] for name, figures in stats.items()}
            families.append(family(row.metric, told))
        return families


class ProducerCollector(_InLoop):
    """The metrics of one producer, whose name is the label `pipeline`."""

    def __init__(self, name: str, delivery: Delivery) -> None:
        super().__init__()
        self._name = name
        # What OF_PRODUCER reads of a run is its delivery, and nothing else.
        self._run: Any = SimpleNamespace(delivery=delivery)

    def _collect(self) -> list[Family]:
        return [family(row.metric, {self._name: row.read(self._run)}) for row in OF_PRODUCER if row.metric is not None]


class ConsumerCollector(_InLoop):
    """The metrics of one consumer, by its stream."""

    def __init__(self, stream: str, stats: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__()
        self._stream = stream
        self._stats = stats

    def _collect(self) -> list[Family]:
        stats = self._stats()
        return [family(metric, {self._stream: stats[key]}) for key, metric in OF_CONSUMER]


def family(metric: Metric, told: Mapping[str, Any]) -> Family:
    """`told`: the value of the first label to the figure, or to figures by the second label."""
    doc = f"{metric.doc}."
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, doc, labels=metric.labels)
        for first, counts in told.items():
            histogram.add_metric((first,), *_cumulated(counts))
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made = kind(metric.name, doc, labels=metric.labels)
    for first, value in told.items():
        if len(metric.labels) == 1:
            made.add_metric((first,), value)
            continue
        for second, count in (dict.fromkeys(metric.always, 0) | value).items():
            made.add_metric((first, second or "unknown"), count)
    return made


def _cumulated(told: Mapping[str, float]) -> tuple[list[tuple[str, float]], float]:
    """(buckets as Prometheus has them: each with what is below it, sum)"""
    buckets: list[tuple[str, float]] = []
    below = 0.0
    for bound, count in told.items():
        if bound != "sum":
            below += count
            buckets.append((bound, below))
    return buckets, told["sum"]
