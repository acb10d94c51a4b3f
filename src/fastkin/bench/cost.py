"""What a plant costs on Kinesis, for each way to pack its records: bytes, records, calls, shards, and AWS's bill.

Nothing is sent. The messages of one linger are packed by the codec itself, so that sizes are those of the bodies it
would send; the rest is arithmetic with prices that the caller gives, for AWS changes them, and they differ by region.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastkin._codec import DRAIN, DROPPED, Batcher, Budget, KeyPlan
from fastkin.formats import msgpack as msgpack_format
from fastkin.limits import CALL_RECORDS, RECORD_BYTES

if TYPE_CHECKING:
    from fastkin.bench.forms import Forms

WAYS: Final = ("none", "lines", "kpl")  # of `aggregation`
MONTH_H: Final = 730.0
# https://docs.aws.amazon.com/streams/latest/dev/service-sizes-and-limits.html
SHARD_RECORDS_PER_S: Final = 1000.0
SHARD_BYTES_PER_S: Final = 1024.0 * 1024.0
# https://aws.amazon.com/kinesis/data-streams/pricing/
PUT_UNIT: Final = 25 * 1024  # a record is counted in units of this size, rounded up
ON_DEMAND_UNIT: Final = 1024  # bytes of a record are rounded up to this
_GB: Final = 1024.0**3
_PACKED_BYTES: Final = 51_200  # of a packed record, as a pipeline makes it
_MOST: Final = 50_000  # records that are packed to find out: more in a linger are like these


@dataclass(frozen=True, slots=True)
class Prices:
    """In dollars. The defaults are us-east-1's as they were published in 2023: look yours up."""

    shard_hour: float = 0.015
    million_put_units: float = 0.014
    stream_hour: float = 0.04  # on demand
    gb_in: float = 0.08  # on demand


@dataclass(frozen=True, slots=True)
class Cost:
    """One way to pack. Figures for a message are means over those of one linger."""

    aggregation: str
    messages_per_record: float  # of Kinesis
    wire_bytes: float  # of the bodies of calls, for a message
    calls_per_s: float
    shards: int
    provisioned_month: float
    provisioned_million: float  # for a million messages
    on_demand_month: float
    on_demand_million: float


def costs(forms: Forms, *, rate: float, linger_s: float, prices: Prices, used: float = 0.8) -> list[Cost]:
    """For `rate` messages a second. `used`: the share of a shard's limits that one is planned to take, 0 to 1."""
    return [_cost(forms, way, rate, linger_s, prices, used) for way in WAYS]


def table(found: list[Cost]) -> str:
    """Lines for people."""
    head = (
        f"{'aggregation':<12}{'messages/':>10}{'bytes on':>10}{'calls':>8}{'shards':>8}"
        f"{'provisioned, $':>20}{'on demand, $':>20}\n"
        f"{'':<12}{'record':>10}{'the wire':>10}{'a s':>8}{'':>8}" + f"{'month':>10}{'million':>10}" * 2
    )
    rows = [
        f"{each.aggregation:<12}{each.messages_per_record:>10.4g}{each.wire_bytes:>10.0f}{each.calls_per_s:>8.1f}"
        f"{each.shards:>8}{each.provisioned_month:>10.2f}{each.provisioned_million:>10.4f}"
        f"{each.on_demand_month:>10.2f}{each.on_demand_million:>10.4f}"
        for each in found
    ]
    return "\n".join([head, *rows])


def _cost(forms: Forms, way: str, rate: float, linger_s: float, prices: Prices, used: float) -> Cost:
    messages = max(1, min(_MOST // forms.samples, round(rate * linger_s)))
    sizes, body_bytes, calls = _packed(forms, way, messages)
    times = rate / messages  # how often a second this happens
    records_s = len(sizes) * times
    bytes_s = sum(sizes) * times
    shards = math.ceil(max(records_s / SHARD_RECORDS_PER_S, bytes_s / SHARD_BYTES_PER_S) / used) or 1
    seconds = MONTH_H * 3600
    units = sum(-(-size // PUT_UNIT) for size in sizes) * times * seconds
    rounded = sum(-(-size // ON_DEMAND_UNIT) * ON_DEMAND_UNIT for size in sizes) * times * seconds
    provisioned = shards * MONTH_H * prices.shard_hour + units / 1e6 * prices.million_put_units
    on_demand = MONTH_H * prices.stream_hour + rounded / _GB * prices.gb_in
    millions = rate * seconds / 1e6
    return Cost(
        way, messages / len(sizes), body_bytes / messages, calls * times, shards, provisioned, provisioned / millions,
        on_demand, on_demand / millions,
    )  # fmt: skip


def _packed(forms: Forms, way: str, messages: int) -> tuple[list[int], int, int]:
    """So many messages in one linger: the sizes of their records, the bytes of all bodies, how many calls."""
    budget = Budget(1 << 34, 1 << 30)
    batcher = Batcher(
        settler=None, budget=budget, frame="bulk" if forms.form == "bulk" else "raw",
        key=KeyPlan("uuid"), target=b'"StreamName":"welders"', max_records=CALL_RECORDS, max_record_bytes=RECORD_BYTES,
        aggregate_bytes=_PACKED_BYTES if way == "kpl" else 0, line_bytes=_PACKED_BYTES if way == "lines" else 0,
    )  # fmt: skip
    payloads = (payload for block in itertools.count() for payload in forms.payloads(block))
    for payload in itertools.islice(payloads, messages):
        for record in msgpack_format.records(payload) if forms.form == "msgpack" else [payload]:
            batcher.offer(b"plant/7", record, 0)
    batcher.close_batch(DRAIN)
    sizes: list[int] = []
    body_bytes = calls = 0
    while (batch := batcher.take()) is not None:
        sizes += [len(data) + len(key or "") for data, key, _ in batch.entries()]
        body_bytes += batch.nbytes
        calls += 1
        batch.finish(DROPPED)
    return sizes, body_bytes, calls
