"""What Prometheus is told. Counters live in the stages; they are read when somebody asks, and cost nothing before.

    registry.register(engine.metrics())

One scrape is one moment: nothing is waited for in between, so the counters of a pipeline fit together. They go on
over a reload. prometheus_client is imported by whoever needs this module, which is not every process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastkin import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fastkin.service.pipeline import PipelineRun

_SHARDS_SHOWN = 256  # the hottest ones
_THREAD_WAITS_S = 5.0  # a scrape in another thread, for the loop

# name, key of stats(), what it says
_COUNTERS = (
    ("messages_received", "messages", "MQTT messages taken"),
    ("messages_unrouted", "unrouted", "MQTT messages that no topic of the pipeline wants: acknowledged, thrown away"),
    ("records_received", "received", "Records taken from messages; a frame that is no frame counts as one"),
    ("records_decoded", "decoded", "Records that were well-formed"),
    ("records_batched", "batched", "Records in batches handed to the sender"),
    ("records_sent", "sent", "Records in calls made, repeats included"),
    ("records_stored", "stored", "Records that Kinesis confirmed"),
    ("records_filtered", "filtered", "Records that were not wanted"),
    ("dead_letters_deleted", "dead_letters_deleted", "Dead letters that were deleted to make room for newer ones"),
    ("records_spooled", "spooled_ever", "Records that went to disk, ever"),
    ("spool_damaged_rows", "spool_damaged_rows", "Batches that could not be read back from disk"),
    (
        "duplicates_possible",
        "duplicates_possible",
        "Records that may be stored twice: what follows, and calls not answered",
    ),
    ("records_redelivered", "redelivered", "Records of messages that the broker sent again (DUP)"),
    ("calls", "calls", "Calls made to Kinesis"),
    ("intake_connects", "connects", "Connections made to the broker"),
    ("intake_paused_seconds", "paused_s", "Time that reading was paused for want of room"),
    ("stalls", "stalls", "Times that what waited had to be woken up because nobody would have looked at it: a bug"),
)
# and the label that tells them apart
_LABELLED = (
    ("records_retried", "retried_by_code", "code", "Records sent again, by what failed"),
    ("records_throttled", "throttled_by_shard", "shard", "Records throttled, by the shard that Kinesis named"),
    ("records_dead_lettered", "dead_lettered_by", "reason", "Records set aside for good"),
    ("records_dropped", "dropped_by", "policy", "Records given up"),
    ("format_errors", "format_errors", "reason", "Payloads or records that were malformed"),
    ("batches_flushed", "flushed_by_reason", "reason", "Batches closed, by why"),
    ("calls_failed", "calls_failed_by_code", "code", "Calls that failed as a whole"),
)
# A counter that appears with its first event is no increase to PromQL: these are there from the start.
_KINDS = ("empty", "version", "element", "truncated", "trailing", "oversize", "partition_key")
_ALWAYS = {
    "records_dead_lettered": dict.fromkeys((*_KINDS, "ValidationException"), 0),
    "records_dropped": dict.fromkeys(("no_dead_letter", "drop_oldest", "drop_newest", "failed"), 0),
    "format_errors": dict.fromkeys(_KINDS, 0),
    "records_throttled": {"": 0},
}
_HISTOGRAMS = (
    ("call_seconds", "call_seconds", "Time from a call to its answer"),
    ("batch_fill_ratio", "batch_fill", "How full a batch is, of the records or bytes it may hold"),
)
_GAUGES = (
    ("records_in_flight", "in_flight", "Records received and not ended, in memory"),
    ("spool_records", "spooled", "Records that are on disk only"),
    ("budget_bytes", "buffered_bytes", "Memory charged for records"),
    ("unacknowledged_messages", "unacked", "Messages that the broker was not told of yet"),
    ("calls_open", "calls_open", "Calls without an answer yet"),
)


class Engine(Protocol):
    """What is read of an engine."""

    @property
    def pipelines(self) -> Mapping[str, PipelineRun]: ...

    def stats(self) -> dict[str, dict[str, Any]]: ...
    def failed(self) -> dict[str, str | None]: ...
    def unready(self) -> dict[str, str | None]: ...


class EngineCollector(Collector):
    """The metrics of an engine's pipelines. Make it in the engine's loop; it may be scraped in any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterable[Metric]:
        # Without this a registry would collect once just to learn the names.
        return [GaugeMetricFamily("fastkin_info", "")]

    def collect(self) -> list[Metric]:
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here or not self._loop.is_running():
            return self._collect()
        told: concurrent.futures.Future[list[Metric]] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._tell, told)
        return told.result(_THREAD_WAITS_S)

    def _tell(self, told: concurrent.futures.Future[list[Metric]]) -> None:
        try:
            told.set_result(self._collect())
        except Exception as error:  # noqa: BLE001 - for whoever waits
            told.set_exception(error)

    def _collect(self) -> list[Metric]:
        info = GaugeMetricFamily("fastkin_info", "What runs.", labels=("version",))
        info.add_metric((__version__,), 1)
        families: list[Metric] = [info]
        stats = self._engine.stats()
        for name, key, doc in _COUNTERS:
            counter = CounterMetricFamily(f"fastkin_{name}", f"{doc}.", labels=("pipeline",))
            for pipeline, counts in stats.items():
                counter.add_metric((pipeline,), counts.get(key, 0))
            families.append(counter)
        for name, key, label, doc in _LABELLED:
            counter = CounterMetricFamily(f"fastkin_{name}", f"{doc}.", labels=("pipeline", label))
            for pipeline, counts in stats.items():
                for value, count in (_ALWAYS.get(name, {}) | counts[key]).items():
                    counter.add_metric((pipeline, value or "unknown"), count)
            families.append(counter)
        for name, key, doc in _HISTOGRAMS:
            histogram = HistogramMetricFamily(f"fastkin_{name}", f"{doc}.", labels=("pipeline",))
            for pipeline, counts in stats.items():
                histogram.add_metric((pipeline,), *_cumulated(counts[key]))
            families.append(histogram)
        for name, key, doc in _GAUGES:
            gauge = GaugeMetricFamily(f"fastkin_{name}", f"{doc}.", labels=("pipeline",))
            for pipeline, counts in stats.items():
                gauge.add_metric((pipeline,), counts.get(key, 0))
            families.append(gauge)
        return families + self._of_runs()

    def _of_runs(self) -> list[Metric]:
        """What only the run that is at work can say."""
        labels = ("pipeline",)
        spool_bytes = GaugeMetricFamily("fastkin_spool_bytes", "Size of the spool on disk.", labels=labels)
        spool_limit = GaugeMetricFamily(
            "fastkin_spool_bytes_limit", "What the spool may grow to; 0 without one.", labels=labels
        )
        spool_broken = GaugeMetricFamily("fastkin_spool_broken", "1: the spool cannot be used now.", labels=labels)
        limit = GaugeMetricFamily("fastkin_budget_bytes_limit", "What may be charged.", labels=labels)
        oldest = GaugeMetricFamily(
            "fastkin_oldest_unacknowledged_seconds", "Age of the oldest unacknowledged message.", labels=labels
        )
        window = GaugeMetricFamily(
            "fastkin_broker_window_messages", "Unacknowledged messages that the broker allows.", labels=labels
        )
        connected = GaugeMetricFamily("fastkin_intake_connected", "1: connected and subscribed.", labels=labels)
        ready = GaugeMetricFamily("fastkin_pipeline_ready", "1: connected, and the stream was reached.", labels=labels)
        heat = GaugeMetricFamily(
            "fastkin_shard_heat", "Share of a shard's limit that we used lately.", labels=("pipeline", "shard")
        )
        for pipeline, run in self._engine.pipelines.items():
            overflow = run.delivery.overflow
            spool = overflow.spool if overflow is not None else None
            spool_bytes.add_metric((pipeline,), spool.bytes if spool is not None else 0)
            spool_limit.add_metric((pipeline,), spool.max_bytes if spool is not None else 0)
            spool_broken.add_metric((pipeline,), overflow is not None and overflow.broken is not None)
            limit.add_metric((pipeline,), run.delivery.budget.max_bytes)
            oldest.add_metric((pipeline,), run.oldest_s())
            window.add_metric((pipeline,), run.intake.granted_window)
            connected.add_metric((pipeline,), run.intake.connected.is_set())
            hottest = sorted(run.delivery.sender.heat().items(), key=lambda item: item[1], reverse=True)
            for shard, share in hottest[:_SHARDS_SHOWN]:
                heat.add_metric((pipeline, shard), share)
        for pipeline, why in self._engine.unready().items():
            ready.add_metric((pipeline,), why is None)
        return [spool_bytes, spool_limit, spool_broken, limit, oldest, window, connected, ready, heat]


def _cumulated(told: Mapping[str, float]) -> tuple[list[tuple[str, float]], float]:
    """(buckets as Prometheus has them: each with what is below it, sum)"""
    buckets: list[tuple[str, float]] = []
    below = 0.0
    for bound, count in told.items():
        if bound != "sum":
            below += count
            buckets.append((bound, below))
    return buckets, told["sum"]
