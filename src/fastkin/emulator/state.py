"""What one emulated account holds: its streams, what was put into them, and how a call finds its stream.

Apart from what the operations do, so that tests and the ledger look into it without a call.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from .rules import RULES, ApiError, refuse, violations
from .streams import Keep, Shard, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .faults import Faults

DRY_RUN_TEXT: Final = "The request was rejected because the DryRun parameter was specified."


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """A stream to begin with, where a shard count alone does not say enough."""

    shards: int = 4
    max_record_kib: int = 1024
    mode: Literal["PROVISIONED", "ON_DEMAND"] = "PROVISIONED"
    auto_keys: bool = False  # RecordDistributionStrategy=AUTO: Kinesis chooses the shard


@dataclass(slots=True)
class Delivery:
    """A Firehose delivery stream: what came in, in order."""

    name: str
    records: list[tuple[float, bytes]]
    count: int = 0


@dataclass(kw_only=True, eq=False)
class State:
    """All streams of one emulated account."""

    region: str
    account: str
    limits: bool
    read_limits: bool
    keep: Keep
    max_request_bytes: int
    max_records: int
    create_s: float
    faults: Faults
    wall: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    streams: dict[str, Stream] = field(default_factory=dict)
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    records: int = 0
    throttled: int = 0
    failed: int = 0
    largest_call: int = 0
    gone_bytes: int = 0  # of streams that were deleted

    @property
    def record_bytes(self) -> int:
        """Data and partition keys of everything stored in streams, deleted ones included."""
        return self.gone_bytes + sum(stream.stored_bytes for stream in self.streams.values())

    def add_stream(self, name: str, spec: StreamSpec, *, delay_s: float = 0.0) -> Stream:
        now = self.clock()
        stream = Stream.make(
            name,
            spec.shards,
            region=self.region,
            account=self.account,
            wall=self.wall(),
            now=now,
            limits=self.limits,
            keep=self.keep,
            mode=spec.mode,
            max_record_kib=spec.max_record_kib,
            auto_keys=spec.auto_keys,
            active_at=now + delay_s,
        )
        self.streams[name] = stream
        return stream

    def add_delivery(self, name: str) -> None:
        self.deliveries[name] = Delivery(name, [])

    def delivery(self, name: str) -> Delivery:
        found = self.deliveries.get(name)
        if found is None:
            raise ApiError("ResourceNotFoundException", f"Firehose {name} under account {self.account} not found.")
        return found

    def stream(self, body: Mapping[str, Any], *, active: bool = True) -> Stream:
        arn, name = body.get("StreamARN"), body.get("StreamName")
        for key in ("StreamName", "StreamARN"):
            # The form of a name is checked before it is looked up: a wrong form is a mistake of the caller.
            value = body.get(key)
            if value is not None:
                refuse(list(violations(RULES[key], key, key[0].lower() + key[1:], value)))
        if arn is not None:
            match = re.fullmatch(r"arn:aws[^:]*:kinesis:([^:]*):(\d{12}):stream/(\S+)", arn)
            assert match is not None  # the pattern of the model is the wider one
            if name is not None and name != match[3]:
                raise ApiError("InvalidArgumentException", "StreamARN and StreamName name different streams.")
            name = match[3]
            # A stream of another account is answered as one that does not exist.
            if match[2] != self.account or match[1] != self.region:
                raise self.no_stream(name, match[2])
        if name is None:
            raise ApiError(
                "InvalidArgumentException",
                "Either the stream ARN or the stream name must be given.",
            )
        stream = self.streams.get(name)
        # Records for a stream that is still being made have the same answer as for one that does not exist, as
        # clients see it right after CreateStream.
        if stream is None or (active and stream.status(self.clock()) != "ACTIVE"):
            raise self.no_stream(name, self.account)
        return stream

    @staticmethod
    def no_stream(name: str, account: str) -> ApiError:
        return ApiError("ResourceNotFoundException", f"Stream {name} under account {account} not found.")

    def shard(self, stream: Stream, shard_id: str) -> Shard:
        shard = stream.shard(shard_id)
        if shard is None:
            raise ApiError(
                "ResourceNotFoundException",
                f"Could not find shard {shard_id} in stream {stream.name} under account {self.account}.",
            )
        return shard

    def count(self, records: int, throttled: int, failed: int) -> None:
        # Throttled entries are among the failed ones that the service counts, but here the two are told apart: tests
        # look for the one or the other.
        self.records += records - failed
        self.throttled += throttled
        self.failed += failed - throttled
        self.largest_call = max(self.largest_call, records)


def refuse_dry_run(body: Mapping[str, Any]) -> None:
    if body.get("DryRun"):
        raise ApiError("DryRunOperationException", DRY_RUN_TEXT)
