"""What Prometheus is told. Counters live in the stages; they are read when somebody asks, and cost nothing before.

One scrape is one moment: `collect` does not wait for anything, so the counters of a pipeline fit together.
prometheus_client is imported by whoever needs this module, which is not every process.

    registry.register(engine.metrics())
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastkin import __version__
from fastkin.tallies import OTHER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fastkin.pipeline import PipelineRun
    from fastkin.tallies import Histogram

# index: why a batch was closed, see _codec.pyi
FLUSH_REASONS = ("full_count", "full_bytes", "linger", "window", "idle", "drain")
_SHARDS_SHOWN = 256  # the hottest ones


class Engine(Protocol):
    @property
    def pipelines(self) -> Mapping[str, PipelineRun]: ...


class _Page:
    """Metric families by name, in the order they were first written."""

    def __init__(self) -> None:
        self.families: dict[str, Metric] = {}

    def counter(self, name: str, doc: str, value: float, pipeline: str, **labels: str) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = CounterMetricFamily(name, doc, labels=("pipeline", *labels))
        assert isinstance(family, CounterMetricFamily)
        family.add_metric((pipeline, *labels.values()), value)

    def counters(self, name: str, doc: str, values: Mapping[str, int], pipeline: str, label: str) -> None:
        for each, value in values.items():
            self.counter(name, doc, value, pipeline, **{label: each or "unknown"})

    def gauge(self, name: str, doc: str, value: float, pipeline: str, **labels: str) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = GaugeMetricFamily(name, doc, labels=("pipeline", *labels))
        assert isinstance(family, GaugeMetricFamily)
        family.add_metric((pipeline, *labels.values()), value)

    def histogram(self, name: str, doc: str, value: Histogram, pipeline: str) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = HistogramMetricFamily(name, doc, labels=("pipeline",))
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric((pipeline,), value.buckets(), value.sum)


class EngineCollector(Collector):
    """The metrics of an engine's pipelines. Scrape it in the thread of the engine's loop: it takes no lock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        # Without this a registry would collect once just to learn the names.
        return [GaugeMetricFamily("fastkin_info", "")]

    def collect(self) -> list[Metric]:
        info = GaugeMetricFamily("fastkin_info", "What runs.", labels=("version",))
        info.add_metric((__version__,), 1)
        page = _Page()
        for name, run in self._engine.pipelines.items():
            _records(page, name, run)
            _calls(page, name, run)
            _intake(page, name, run)
        return [info, *page.families.values()]


def _records(page: _Page, pipeline: str, run: PipelineRun) -> None:
    """The books: received == stored + dead_lettered + filtered + dropped + in_flight + spooled."""
    lane, sender, aside, stats = run.lane, run.sender, run.aside, run.stats()
    rejected = sum(aside.format_errors.values())
    page.counter("fastkin_records_received", "Records taken from messages.", stats["received"], pipeline)
    page.counter("fastkin_records_decoded", "Records that were well-formed.", stats["received"] - rejected, pipeline)
    page.counter("fastkin_records_batched", "Records in batches handed to the sender.", sender.batched, pipeline)
    page.counter("fastkin_records_sent", "Records in calls made, repeats included.", sender.sent, pipeline)
    page.counter("fastkin_records_stored", "Records that Kinesis confirmed.", stats["stored"], pipeline)
    page.counters(
        "fastkin_records_retried", "Records sent again, by what failed.", sender.retried_by_code, pipeline, "code"
    )
    page.counters("fastkin_records_throttled", "Records throttled, by shard.", sender.throttled, pipeline, "shard")
    dead = _accounted(aside.dead, stats["dead_lettered"], OTHER)
    page.counters("fastkin_records_dead_lettered", "Records set aside for good.", dead, pipeline, "reason")
    page.counter("fastkin_records_filtered", "Records that were not wanted.", stats["filtered"], pipeline)
    dropped = _accounted({"no_dead_letter": aside.dropped}, stats["dropped"], "failed")
    page.counters("fastkin_records_dropped", "Records given up, by policy.", dropped, pipeline, "policy")
    page.counter(
        "fastkin_duplicates_possible", "Records of calls whose outcome stayed unknown: the upper bound of duplicates.",
        sender.duplicates_possible, pipeline,
    )  # fmt: skip
    page.counter("fastkin_records_spooled", "Records that went to disk, ever.", 0, pipeline)
    page.gauge("fastkin_records_in_flight", "Records received and not ended.", stats["in_flight"], pipeline)
    page.gauge("fastkin_spool_records", "Records that are on disk only.", 0, pipeline)
    page.gauge("fastkin_spool_bytes", "Size of the spool.", 0, pipeline)
    page.gauge("fastkin_budget_bytes", "Memory charged for records.", run.budget.bytes, pipeline)
    page.gauge("fastkin_budget_bytes_limit", "What may be charged.", run.budget.max_bytes, pipeline)
    flushes = dict(zip(FLUSH_REASONS, lane.flushes, strict=True))
    page.counters("fastkin_batches_flushed", "Batches closed, by why.", flushes, pipeline, "reason")
    page.histogram(
        "fastkin_batch_fill_ratio", "How full a batch is, of its records or bytes.", sender.batch_fill, pipeline
    )


def _accounted(counted: Mapping[str, int], total: int, rest: str) -> dict[str, int]:
    """What was counted by name, and under `rest` what was not: the sum is always `total`."""
    found = {name: count for name, count in counted.items() if count}
    missing = total - sum(found.values())
    if missing or not found:
        found[rest] = found.get(rest, 0) + missing
    return found


def _calls(page: _Page, pipeline: str, run: PipelineRun) -> None:
    sender = run.sender
    page.counter("fastkin_calls", "Calls made to Kinesis.", sender.calls, pipeline)
    page.counters(
        "fastkin_calls_failed", "Calls that failed as a whole.", sender.calls_failed_by_code, pipeline, "code"
    )
    page.gauge("fastkin_calls_open", "Calls without an answer yet.", sender.in_flight, pipeline)
    page.histogram("fastkin_call_seconds", "Time from a call to its answer.", sender.call_seconds, pipeline)
    if sender.shards is not None:
        heats = sender.pacer.heat(asyncio.get_running_loop().time())
        by_heat = sorted(zip(heats, (shard.id for shard in sender.shards.shards), strict=True), reverse=True)
        for heat, shard in by_heat[:_SHARDS_SHOWN]:
            page.gauge(
                "fastkin_shard_heat", "Share of a shard's limit that we used lately.", heat, pipeline, shard=shard
            )


def _intake(page: _Page, pipeline: str, run: PipelineRun) -> None:
    intake = run.intake
    page.counter("fastkin_messages_received", "MQTT messages taken.", intake.messages, pipeline)
    page.counter(
        "fastkin_intake_paused_seconds", "Time that reading was paused for want of room.", intake.paused_s, pipeline
    )
    page.counter("fastkin_intake_connects", "Connections made to the broker.", intake.connects, pipeline)
    page.gauge("fastkin_unacknowledged_messages", "Messages not acknowledged yet.", run.ledger.unacked, pipeline)
    page.gauge("fastkin_oldest_unacknowledged_seconds", "Age of the oldest of them.", run.oldest_s(), pipeline)
    page.gauge("fastkin_intake_connected", "1: connected and subscribed.", intake.connected.is_set(), pipeline)
    page.gauge(
        "fastkin_pipeline_ready", "1: connected, subscribed, and the stream was reached.", not run.unready(), pipeline
    )
