"""Every figure that is told of a pipeline, a row each. To add one, add a row. Pure.

A row says where the figure is read, its key in stats(), its name in Prometheus, and what a reload makes of it. From
the rows come `PipelineRun.stats()`, the page of /metrics, what goes on over a reload (service/counters.py), README's
table, and the names that dashboard and alert rules may use. So none of them can forget a figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fastkin import __version__
from fastkin.status.instruments import LabelledCounter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastkin.config import Pipeline
    from fastkin.deadletter.handler import DeadLetterHandler
    from fastkin.delivery.delivery import Delivery
    from fastkin.delivery.spool_file import Spool
    from fastkin.mqtt._core import AckTracker
    from fastkin.mqtt.subscriber import Subscriber

Unit = Literal[
    "messages", "records", "batches", "calls", "connections", "dead letters", "files", "wake-ups", "restarts", "bytes",
    "seconds", "share", "0 or 1", "iterators", "ms",
]  # fmt: skip

_SHARDS_SHOWN = 256  # the busiest ones
_FLUSH_REASONS = ("full_count", "full_bytes", "linger", "window", "idle", "drain")  # as in Batcher.flushes
_FORMAT_ERRORS = ("empty", "version", "element", "truncated", "trailing", "oversize", "partition_key")


class Run(Protocol):
    """What is read of a pipeline's run. Not PipelineRun itself: that imports the rows, and mypy reads no circles."""

    pipeline: Pipeline
    subscriber: Subscriber
    acks: AckTracker
    delivery: Delivery
    dead_letters: DeadLetterHandler

    @property
    def last_error(self) -> str | None: ...

    def oldest_s(self) -> float: ...


class Engine(Protocol):
    """What is read of an engine."""

    @property
    def pipelines(self) -> Mapping[str, Run]: ...

    def stats(self) -> dict[str, dict[str, Any]]: ...
    def failed(self) -> dict[str, str | None]: ...
    def unready(self) -> dict[str, str | None]: ...


class Reload(Enum):
    """What becomes of a figure when a reload puts another run in the place of one."""

    SUMMED = auto()  # it counts what happened: what an ended run counted stays in it, label by label, bucket by bucket
    ADDED = auto()  # it is of now: runs at work side by side add up, and one that has ended has none of it
    LATEST = auto()  # it is of now, and of the run that works in the pipeline's place alone


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure as Prometheus has it."""

    name: str  # as queries have it; of a histogram without _bucket, _sum and _count
    kind: Literal["counter", "gauge", "histogram"]
    unit: Unit
    doc: str  # one sentence without its full stop, for /metrics and README
    labels: tuple[str, ...] = ("pipeline",)
    # Values of the last label that are told from the start: to PromQL a counter that appears with its first event is
    # no increase.
    always: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of one run of a pipeline."""

    key: str | None  # in stats(); None: only /metrics tells it
    read: Callable[[Run], Any]
    reload: Reload
    metric: Metric | None = None  # None: only stats() tells it
    idle: Any = 0  # what stats() says while the pipeline has no run; a SUMMED one needs none


@dataclass(frozen=True, slots=True)
class EngineRow:
    """A figure that no run can tell."""

    read: Callable[[Engine], Mapping[str, float]]  # the label's values to the figures
    metric: Metric


# -- the kinds of rows. A counter cannot but go on over a reload.


def _counter(key: str, name: str, unit: Unit, doc: str, read: Callable[[Run], float]) -> Row:
    return Row(key, read, Reload.SUMMED, Metric(name, "counter", unit, doc))


def _labelled(
    key: str,
    name: str,
    label: str,
    unit: Unit,
    doc: str,
    read: Callable[[Run], Mapping[str, int]],
    always: tuple[str, ...] = (),
) -> Row:
    """A counter by label; the name "" is shown as "unknown"."""
    return Row(key, read, Reload.SUMMED, Metric(name, "counter", unit, doc, ("pipeline", label), always))


def _histogram(key: str, name: str, unit: Unit, doc: str, read: Callable[[Run], Mapping[str, float]]) -> Row:
    """`read` gives what Histogram.told() does."""
    return Row(key, read, Reload.SUMMED, Metric(name, "histogram", unit, doc))


def _gauge(key: str, name: str, unit: Unit, doc: str, read: Callable[[Run], float]) -> Row:
    return Row(key, read, Reload.ADDED, Metric(name, "gauge", unit, doc))


def _present(name: str, unit: Unit, doc: str, read: Callable[[Run], float]) -> Row:
    """A gauge of the run in the pipeline's place; without one it is not told."""
    return Row(None, read, Reload.LATEST, Metric(name, "gauge", unit, doc))


def _stat(key: str, reload: Reload, read: Callable[[Run], Any], idle: Any = 0) -> Row:
    """Only in stats()."""
    return Row(key, read, reload, idle=idle)


# -- readers that take more than an attribute


def unkept(run: Run) -> bool:
    """Whether the broker keeps nothing of what is in flight: nobody else has these records."""
    return run.pipeline.qos == 0 or run.subscriber.broker.clean_session


def _volatile(run: Run) -> int:
    return max(0, run.delivery.batcher.in_flight - run.delivery.backlog.safe) if unkept(run) else 0


def _dropped_by(run: Run) -> dict[str, int]:
    """Records that were given up, by policy: sums up to batcher.dropped."""
    dropped = LabelledCounter()
    dropped.update(run.dead_letters.dropped)
    if run.delivery.backlog.dropped:
        dropped.add(run.pipeline.on_full, run.delivery.backlog.dropped)
    return dropped.summing_to(run.delivery.batcher.dropped, "failed")


def _spool(read: Callable[[Spool], int]) -> Callable[[Run], int]:
    """`read` of the run's spool, or 0 without one."""
    return lambda run: 0 if run.delivery.backlog.spool is None else read(run.delivery.backlog.spool)


def _busiest_shards(run: Run) -> dict[str, float]:
    shares = sorted(run.delivery.sender.utilization().items(), key=lambda item: item[1], reverse=True)
    return dict(shares[:_SHARDS_SHOWN])


# -- the rows, along the way of a record

OF_ENGINE: tuple[EngineRow, ...] = (
    EngineRow(lambda _: {__version__: 1}, Metric("fastkin_info", "gauge", "0 or 1", "What runs", ("version",))),
    EngineRow(
        lambda engine: {name: why is None for name, why in engine.unready().items()},
        Metric("fastkin_pipeline_ready", "gauge", "0 or 1", "1: connected, subscribed, and the stream was reached"),
    ),
)

# of `fastkin run --workers N`, whose other figures have the label `worker` too
WORKER_UP = Metric("fastkin_worker_up", "gauge", "0 or 1", "1: the worker's process runs", ("worker",))
WORKER_RESTARTS = Metric(
    "fastkin_worker_restarts_total", "counter", "restarts", "Times that a worker's process ended and was started again",
    ("worker",),
)  # fmt: skip

OF_RUN: tuple[Row, ...] = (
    # intake
    _stat("state", Reload.LATEST, lambda run: run.subscriber.state, "closed"),
    _stat("last_error", Reload.LATEST, lambda run: run.last_error, None),
    _present("fastkin_intake_connected", "0 or 1", "1: connected to the broker, and subscribed",
             lambda run: run.subscriber.connected.is_set()),
    _counter("connects", "fastkin_intake_connects_total", "connections", "Connections made to the broker",
             lambda run: run.subscriber.traffic.connects),
    _counter("paused_s", "fastkin_intake_paused_seconds_total", "seconds",
             "Time that reading was paused for want of room", lambda run: run.subscriber.paused_s),
    _counter("messages", "fastkin_messages_received_total", "messages", "MQTT messages taken",
             lambda run: run.subscriber.traffic.messages),
    _counter("unrouted", "fastkin_messages_unrouted_total", "messages",
             "MQTT messages for a filter that a reload removed, which a kept session still brought: acknowledged,"
             " thrown away", lambda run: run.subscriber.router.unrouted),
    # decode
    _counter("received", "fastkin_records_received_total", "records",
             "Records taken from messages; a frame that is no frame counts as one",
             lambda run: run.delivery.batcher.received),
    _counter("decoded", "fastkin_records_decoded_total", "records", "Records that were well-formed",
             lambda run: run.delivery.batcher.received - sum(run.dead_letters.format_errors.values())),
    _labelled("format_errors", "fastkin_format_errors_total", "reason", "records",
              "Payloads and records that were malformed", lambda run: dict(run.dead_letters.format_errors),
              _FORMAT_ERRORS),
    _counter("keys_missing", "fastkin_keys_missing_total", "records",
             "Records without the field or topic level that their partition key is made of: they got a UUID",
             lambda run: run.delivery.batcher.keys_missing),
    _counter("filtered", "fastkin_records_filtered_total", "records", "Records that were not wanted",
             lambda run: run.delivery.batcher.filtered),
    # batch
    _counter("batched", "fastkin_records_batched_total", "records", "Records in batches handed to the sender",
             lambda run: run.delivery.sender.counters.batched),
    _stat("flushes", Reload.SUMMED, lambda run: run.delivery.batcher.flushes),  # as the batcher has them, without names
    _labelled("flushed_by_reason", "fastkin_batches_flushed_total", "reason", "batches",
              f"Batches closed, by why: {', '.join(_FLUSH_REASONS)}",
              lambda run: dict(zip(_FLUSH_REASONS, run.delivery.batcher.flushes, strict=True))),
    _histogram("batch_fill", "fastkin_batch_fill_ratio", "share",
               "How full a batch is, of the records or bytes it may hold",
               lambda run: run.delivery.sender.counters.batch_fill.told()),
    # what waits
    _gauge("in_flight", "fastkin_records_in_flight", "records", "Records received and not ended, in memory",
           lambda run: run.delivery.batcher.in_flight),
    _stat("volatile", Reload.ADDED, _volatile),  # of those: kept neither by the broker nor on the disk
    _gauge("buffered_bytes", "fastkin_budget_bytes", "bytes", "Memory charged for records",
           lambda run: run.delivery.budget.bytes),
    _present("fastkin_budget_bytes_limit", "bytes", "What may be charged", lambda run: run.delivery.budget.max_bytes),
    _stat("peak_bytes", Reload.LATEST, lambda run: run.delivery.budget.peak_bytes),
    _gauge("unacked", "fastkin_unacknowledged_messages", "messages", "Messages that the broker was not told of yet",
           lambda run: run.acks.unacked),
    _present("fastkin_oldest_unacknowledged_seconds", "seconds", "Age of the oldest unacknowledged message",
             lambda run: run.oldest_s()),
    _present("fastkin_broker_window_messages", "messages", "Unacknowledged messages that the broker allows",
             lambda run: run.subscriber.granted_window),
    # spool
    _gauge("spooled", "fastkin_spool_records", "records", "Records that are on disk only",
           lambda run: run.delivery.batcher.spooled),
    _counter("spooled_ever", "fastkin_records_spooled_total", "records", "Records that went to disk, ever",
             lambda run: run.delivery.backlog.spooled_total),
    _counter("spool_damaged_rows", "fastkin_spool_damaged_rows_total", "batches",
             "Batches that could not be read back from disk", lambda run: run.delivery.backlog.damaged),
    _gauge("spool_bytes", "fastkin_spool_bytes", "bytes", "Size of the spool on disk",
           _spool(lambda spool: spool.bytes)),
    _gauge("spool_bytes_limit", "fastkin_spool_bytes_limit", "bytes", "What the spool may grow to; 0 without one",
           _spool(lambda spool: spool.max_bytes)),
    _stat("spool_rows", Reload.ADDED, _spool(lambda spool: spool.rows)),
    _present("fastkin_spool_broken", "0 or 1", "1: the spool cannot be used now",
             lambda run: run.delivery.backlog.broken is not None),
    _stat("spooling", Reload.LATEST, lambda run: run.delivery.backlog.spooling, False),
    _stat("spool_error", Reload.LATEST, lambda run: run.delivery.backlog.broken, None),
    # send
    _counter("calls", "fastkin_calls_total", "calls", "Calls made to Kinesis",
             lambda run: run.delivery.sender.counters.calls),
    _gauge("calls_open", "fastkin_calls_open", "calls", "Calls without an answer yet",
           lambda run: run.delivery.sender.in_flight),
    _histogram("call_seconds", "fastkin_call_seconds", "seconds", "Time from a call to its answer",
               lambda run: run.delivery.sender.counters.call_seconds.told()),
    _stat("calls_failed", Reload.SUMMED, lambda run: run.delivery.sender.counters.calls_failed),
    _labelled("calls_failed_by_code", "fastkin_calls_failed_total", "code", "calls", "Calls that failed as a whole",
              lambda run: dict(run.delivery.sender.counters.calls_failed_by_code)),
    _counter("sent", "fastkin_records_sent_total", "records", "Records in calls made, repeats included",
             lambda run: run.delivery.sender.counters.sent),
    _stat("retries", Reload.SUMMED, lambda run: run.delivery.sender.counters.retried),
    _labelled("retried_by_code", "fastkin_records_retried_total", "code", "records",
              "Records sent again, by what failed", lambda run: dict(run.delivery.sender.counters.retried_by_code)),
    _stat("throttled", Reload.SUMMED, lambda run: sum(run.delivery.sender.counters.throttled.values())),
    _labelled("throttled_by_shard", "fastkin_records_throttled_total", "shard", "records",
              "Records throttled, by the shard that Kinesis named",
              lambda run: dict(run.delivery.sender.counters.throttled), ("",)),
    Row(None, _busiest_shards, Reload.LATEST,
        Metric("fastkin_shard_heat", "gauge", "share", "Share of a shard's limit that this process used lately, 0 to 1",
               ("pipeline", "shard"))),
    # files
    _counter("files_finished", "fastkin_files_finished_total", "files", "Files that were finished",
             lambda run: run.delivery.client.file_counters.finished),
    _counter("files_uploaded", "fastkin_files_uploaded_total", "files", "Finished files that S3 took",
             lambda run: run.delivery.client.file_counters.uploaded),
    _counter("file_upload_failures", "fastkin_file_upload_failures_total", "calls", "Attempts at S3 that failed",
             lambda run: run.delivery.client.file_counters.upload_failures),
    _gauge("files_waiting", "fastkin_files_waiting", "files", "Finished files that are not in S3 yet",
           lambda run: run.delivery.client.file_counters.waiting),
    _gauge("files_waiting_bytes", "fastkin_files_waiting_bytes", "bytes", "Their size on disk",
           lambda run: run.delivery.client.file_counters.waiting_bytes),
    # settle
    _counter("stored", "fastkin_records_stored_total", "records", "Records that Kinesis confirmed",
             lambda run: run.delivery.batcher.stored),
    _stat("dead_lettered", Reload.SUMMED, lambda run: run.delivery.batcher.dead_lettered),
    _labelled("dead_lettered_by", "fastkin_records_dead_lettered_total", "reason", "records",
              "Records set aside for good",
              lambda run: run.dead_letters.dead_lettered_by.summing_to(run.delivery.batcher.dead_lettered),
              (*_FORMAT_ERRORS, "ValidationException")),
    _counter("dead_letters_deleted", "fastkin_dead_letters_deleted_total", "dead letters",
             "Dead letters that were deleted to make room for newer ones", lambda run: run.dead_letters.deleted),
    _stat("dropped", Reload.SUMMED, lambda run: run.delivery.batcher.dropped),
    _labelled("dropped_by", "fastkin_records_dropped_total", "policy", "records", "Records given up", _dropped_by,
              ("no_dead_letter", "drop_oldest", "drop_newest", "failed")),
    _counter("duplicates_possible", "fastkin_duplicates_possible_total", "records",
             "Records that may be stored twice, an upper bound: those of calls whose outcome stayed unknown, and what"
             " fastkin_records_redelivered_total counts",
             lambda run: run.delivery.sender.counters.duplicates_possible + run.acks.repeated),
    _counter("redelivered", "fastkin_records_redelivered_total", "records",
             "Records of messages that the broker sent again (DUP)", lambda run: run.acks.repeated),
    _counter("stalls", "fastkin_stalls_total", "wake-ups",
             "Times that what waited had to be woken up because nobody would have looked at it: always a bug of"
             " fastkin", lambda run: run.delivery.watchdog.stalls),
)  # fmt: skip

# What a producer tells of itself: the rows that read nothing but its delivery. Its name stands in the label `pipeline`,
# so that one query sums up all that goes into a stream.
_OF_DELIVERY = (
    "received", "batched", "flushed_by_reason", "batch_fill", "in_flight", "buffered_bytes", "spooled", "spooled_ever",
    "spool_bytes", "spool_bytes_limit", "calls", "calls_open", "call_seconds", "calls_failed_by_code", "sent",
    "retried_by_code", "throttled_by_shard", "stored", "stalls",
)  # fmt: skip

BY_KEY = {row.key: row for row in OF_RUN if row.key is not None}  # the keys of stats()

OF_PRODUCER: tuple[Row, ...] = (
    *(BY_KEY[key] for key in _OF_DELIVERY),
    _counter("dropped", "fastkin_producer_records_dropped_total", "records",
             "Records that a producer gave up: refused for good, dropped by on_full, timed out, or closed too early",
             lambda run: run.delivery.batcher.dropped),
    _counter("duplicates_possible", "fastkin_producer_duplicates_possible_total", "records",
             "Records of a producer that may be stored twice, an upper bound",
             lambda run: run.delivery.sender.counters.duplicates_possible),
)  # fmt: skip

# What a consumer tells: a key of its stats() each. Its stream stands in the label of that name.
_READ = ("stream",)
OF_CONSUMER: tuple[tuple[str, Metric], ...] = (
    ("records", Metric("fastkin_consumer_records_total", "counter", "records", "Records handed out", _READ)),
    ("bytes", Metric("fastkin_consumer_bytes_total", "counter", "bytes", "Bytes of their data", _READ)),
    ("batches", Metric("fastkin_consumer_batches_total", "counter", "batches", "Batches of a shard taken up", _READ)),
    ("duplicates", Metric("fastkin_consumer_duplicates_total", "counter", "records",
                          "Records left out by dedupe, for they had been seen", _READ)),
    ("decode_errors", Metric("fastkin_consumer_decode_errors_total", "counter", "records",
                             "Records that were no JSON", _READ)),
    ("throttled", Metric("fastkin_consumer_throttled_total", "counter", "calls",
                         "Calls that were refused because a rate was exceeded, and made again", _READ)),
    ("reseeks", Metric("fastkin_consumer_reseeks_total", "counter", "iterators",
                       "Iterators that had expired and were replaced", _READ)),
    ("iterator_age_ms_by_shard", Metric("fastkin_consumer_iterator_age_ms", "gauge", "ms",
                                        "How far reading is behind the newest record of a shard; 0: caught up",
                                        (*_READ, "shard"))),
)  # fmt: skip


def figures(run: Run) -> dict[str, Any]:
    """What a run says in stats(), taken in one moment: so the figures fit together."""
    return {key: row.read(run) for key, row in BY_KEY.items()}
