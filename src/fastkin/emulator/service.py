"""What each operation does: a decoded body in, an answer out. No sockets, no clock of its own."""

from __future__ import annotations

import base64
import binascii
import re
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from .rules import (
    MAX_DATA_BYTES,
    RULES,
    ApiError,
    blob,
    broken_rule,
    check,
    explain_records,
    refuse,
    violations,
)
from .streams import (
    HASH_SPACE,
    MIB,
    THROTTLED,
    UNLIMITED,
    Batch,
    Keep,
    Shard,
    Stream,
    digest_of,
    throttle_message,
)
from .wire import CBOR, Millis, cbor_head, cbor_text, dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .faults import Faults

DRY_RUN_TEXT: Final = "The request was rejected because the DryRun parameter was specified."
ITERATOR_LIFE_S: Final = 300  # GetRecords: "An iterator expires 5 minutes after it is returned"
GET_RECORDS_MAX: Final = 10_000
GET_BYTES_MAX: Final = 10 * MIB
FIREHOSE_MAX_REQUEST: Final = 4 * MIB  # API_PutRecordBatch
FIREHOSE_MAX_RECORD: Final = 1000 * 1024
LARGEST_HASH_KEY: Final = HASH_SPACE - 1


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


# Firehose has no shards; a fault that asks for one finds this.
_NO_SHARD: Final = Shard(0, 0, 0, stream="", account="", created_at=0.0, limits=UNLIMITED, now=0.0)


class Service:
    """All streams of one emulated account."""

    def __init__(
        self,
        *,
        region: str,
        account: str,
        limits: bool,
        read_limits: bool,
        keep: Keep,
        max_request_bytes: int,
        max_records: int,
        create_s: float,
        faults: Faults,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.region = region
        self.account = account
        self.limits = limits
        self.read_limits = read_limits
        self.keep: Keep = keep
        self.max_request_bytes = max_request_bytes
        self.max_records = max_records
        self.create_s = create_s
        self.faults = faults
        self.wall = wall
        self.clock = clock
        self.streams: dict[str, Stream] = {}
        self.deliveries: dict[str, Delivery] = {}
        self.records = 0
        self._gone_bytes = 0
        self.throttled = 0
        self.failed = 0
        self.largest_call = 0
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "PutRecord": self._put_record,
            "ListShards": self._list_shards,
            "DescribeStream": self._describe_stream,
            "DescribeStreamSummary": self._describe_summary,
            "CreateStream": self._create_stream,
            "DeleteStream": self._delete_stream,
            "ListStreams": self._list_streams,
            "SplitShard": self._split_shard,
            "MergeShards": self._merge_shards,
            "GetShardIterator": self._get_shard_iterator,
            "GetRecords": self._get_records,
            "PutRecordBatch": self._put_record_batch,
        }

    @property
    def record_bytes(self) -> int:
        """Data and partition keys of everything stored in streams, deleted ones included."""
        return self._gone_bytes + sum(stream.stored_bytes for stream in self.streams.values())

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

    def knows(self, target: str) -> bool:
        service, _, operation = target.partition(".")
        wanted = "Firehose_20150804" if operation == "PutRecordBatch" else "Kinesis_20131202"
        return service == wanted and (operation == "PutRecords" or operation in self._operations)

    def stream_name(self, body: Mapping[str, Any]) -> str | None:
        """The name of the stream a call is about, as far as the body tells."""
        name = body.get("StreamName") or body.get("DeliveryStreamName")
        if name is None and isinstance(arn := body.get("StreamARN"), str):
            name = arn.rpartition("/")[2]
        return name if isinstance(name, str) else None

    @staticmethod
    def datas(body: Mapping[str, Any]) -> list[bytes]:
        """The data of the records of a call, as far as they are any."""
        records = body.get("Records")
        try:
            return [blob(record["Data"]) for record in records or (body,)]
        except (KeyError, TypeError, ApiError):
            return []

    def run(self, operation: str, body: dict[str, Any], content_type: str) -> bytes:
        """The body of the 200 answer, or ApiError."""
        if operation == "PutRecords":  # checks in its own fast way
            return self._put_records(body, content_type)
        check(operation, body)
        answer = self._operations[operation](body)
        return dumps(answer, content_type) if answer else b""

    # --- writing -------------------------------------------------------------------------------

    def _put_records(self, body: dict[str, Any], content_type: str) -> bytes:
        records = body.get("Records")
        if not isinstance(records, list) or not 0 < len(records) <= self.max_records:
            check("PutRecords", body)
            assert isinstance(records, list)
            # The limit is not AWS's 500, so the table did not catch it.
            most = f"Member must have length less than or equal to {self.max_records}"
            refuse([broken_rule(records, "records", most)])
        stream = self._stream(body)
        batch = self._batch(stream, records)
        self._refuse_dry_run(body)
        fault = None
        if self.faults.records:
            fault = self.faults.for_records("PutRecords", stream.name, self.account)
        entries, throttled, failed = stream.put(batch, self.wall(), self.clock(), content_type, fault)
        self._count(len(entries), throttled, failed)
        if content_type == CBOR:
            return b"".join(
                (
                    b"\xa2",
                    cbor_text("FailedRecordCount"),
                    cbor_head(0, failed),
                    cbor_text("Records"),
                    cbor_head(4, len(entries)),
                    "".join(entries).encode("latin-1"),
                )
            )
        text = ",".join(entries)
        return f'{{"FailedRecordCount":{failed},"Records":[{text}]}}'.encode("latin-1")

    def _batch(self, stream: Stream, records: list[Any]) -> Batch:
        """Validates as one: AWS refuses the whole call for one bad record."""
        try:
            datas = [blob(record["Data"]) for record in records]
            if stream.auto_keys:  # the key is optional and without effect, the hash key too
                keys = [record.get("PartitionKey") for record in records]
                raw = [key.encode() if key is not None else b"" for key in keys]
            else:
                keys = [record["PartitionKey"] for record in records]
                raw = [key.encode() for key in keys]
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            explain_records(records, "PutRecords", stream.auto_keys)
        sizes = [len(data) + len(key) for data, key in zip(datas, raw, strict=True)]
        largest = max(sizes)
        if (
            max(map(len, keys if not stream.auto_keys else [k or "" for k in keys])) > 256
            or (b"" in raw and not stream.auto_keys)
            or largest > MAX_DATA_BYTES
        ):
            self._explain_sizes(records)
        if largest > stream.max_record_bytes:
            at = sizes.index(largest) + 1
            raise ApiError(
                "InvalidArgumentException",
                f"Record {at} has {largest} bytes of data and partition key: more than the "
                f"{stream.max_record_kib} KiB that stream {stream.name} under account "
                f"{self.account} accepts.",
            )
        if sum(sizes) > self.max_request_bytes:
            raise ApiError(
                "InvalidArgumentException",
                f"Records size exceeds {self.max_request_bytes // MIB} MB limit",
            )
        digests = [stream.digest(key) for key in keys] if stream.auto_keys else None
        hash_keys = None
        if not stream.auto_keys and any(len(record) > 2 for record in records):
            hash_keys = [record.get("ExplicitHashKey") for record in records]
            if any(key is not None for key in hash_keys):
                digests = [
                    digest_of(key) if hash_key is None else self._hash_digest(hash_key, number)
                    for number, (key, hash_key) in enumerate(zip(raw, hash_keys, strict=True), 1)
                ]
            else:
                hash_keys = None
        if digests is None:
            digests = [digest_of(key) for key in raw]
        return Batch(keys, datas, sizes, digests, hash_keys)

    @staticmethod
    def _explain_sizes(records: list[Any]) -> None:
        broken: list[str] = []
        for number, record in enumerate(records, 1):
            for name in ("Data", "PartitionKey"):
                value = record.get(name)
                path = f"records.{number}.member.{name[0].lower()}{name[1:]}"
                if value is not None:
                    broken += violations(RULES[name], name, path, value)
        refuse(broken)

    def _hash_digest(self, hash_key: Any, number: int | None) -> bytes:
        path = "explicitHashKey" if number is None else f"records.{number}.member.explicitHashKey"
        refuse(list(violations(RULES["ExplicitHashKey"], "ExplicitHashKey", path, hash_key)))
        value = int(hash_key)
        if value > LARGEST_HASH_KEY:
            raise ApiError(
                "InvalidArgumentException",
                "Invalid ExplicitHashKey. ExplicitHashKey must be in the range: [0, 2^128-1]. "
                f"Specified value was {hash_key}",
            )
        return value.to_bytes(16, "big")

    def _put_record(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(body)
        if stream.auto_keys:
            if body.get("SequenceNumberForOrdering") is not None:
                raise ApiError(
                    "InvalidArgumentException",
                    "SequenceNumberForOrdering is not supported on a stream whose record "
                    "distribution strategy is AUTO.",
                )
        elif body.get("PartitionKey") is None:
            refuse([broken_rule(None, "partitionKey", "Member must not be null")])
        record = {
            name: body[name] for name in ("Data", "PartitionKey", "ExplicitHashKey") if body.get(name) is not None
        }
        batch = self._batch(stream, [record])
        self._refuse_dry_run(body)
        fault = None
        if self.faults.records:
            fault = self.faults.for_records("PutRecord", stream.name, self.account)
        shard = stream.open_shards[0]
        for each in stream.open_shards:
            if each.start <= int.from_bytes(batch.digests[0], "big") <= each.end:
                shard = each
        if fault is not None and (struck := fault(shard, batch.keys[0], batch.datas[0])):
            self._count(1, 0, 1)
            raise ApiError(*struck, status=500 if struck[0].startswith("InternalFail") else 400)
        position = shard.stored
        _, throttled, failed = stream.put(batch, self.wall(), self.clock())
        self._count(1, throttled, failed)
        if throttled:
            raise ApiError(THROTTLED, throttle_message(shard.id, stream.name, self.account))
        return {"ShardId": shard.id, "SequenceNumber": shard.sequence(position)}

    def _put_record_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["DeliveryStreamName"]
        delivery = self.deliveries.get(name)
        if delivery is None:
            raise ApiError(
                "ResourceNotFoundException",
                f"Firehose {name} under account {self.account} not found.",
            )
        records = body["Records"]
        if not all(isinstance(record, dict) and record.get("Data") is not None for record in records):
            explain_records(records, "PutRecordBatch", True)
        datas = [blob(record["Data"]) for record in records]
        if (largest := max(map(len, datas))) > FIREHOSE_MAX_RECORD:
            at = [len(data) for data in datas].index(largest)
            most = f"Member must have length less than or equal to {FIREHOSE_MAX_RECORD}"
            refuse([broken_rule(datas[at], f"records.{at + 1}.member.data", most)])
        if sum(map(len, datas)) > FIREHOSE_MAX_REQUEST:
            raise ApiError("InvalidArgumentException", "Records size exceeds 4 MB limit")
        judge = None
        if self.faults.records:
            judge = self.faults.for_records("PutRecordBatch", name, self.account)
        responses: list[dict[str, Any]] = []
        now, failed = self.wall(), 0
        for data in datas:
            struck = judge(_NO_SHARD, None, data) if judge is not None else None
            if struck is not None:
                failed += 1
                responses.append({"ErrorCode": struck[0], "ErrorMessage": struck[1]})
                continue
            delivery.count += 1
            if self.keep == "all":
                delivery.records.append((now, data))
            responses.append({"RecordId": f"{uuid.uuid4().hex}{delivery.count:020d}"})
        self.records += len(datas) - failed
        self.failed += failed
        self.largest_call = max(self.largest_call, len(datas))
        return {"FailedPutCount": failed, "Encrypted": False, "RequestResponses": responses}

    def _count(self, records: int, throttled: int, failed: int) -> None:
        self.records += records - failed
        self.throttled += throttled
        self.failed += failed - throttled
        self.largest_call = max(self.largest_call, records)

    # --- streams and shards --------------------------------------------------------------------

    def _stream(self, body: Mapping[str, Any], *, active: bool = True) -> Stream:
        arn, name = body.get("StreamARN"), body.get("StreamName")
        for key in ("StreamName", "StreamARN"):
            value = body.get(key)
            if value is not None:
                refuse(list(violations(RULES[key], key, key[0].lower() + key[1:], value)))
        if arn is not None:
            match = re.fullmatch(r"arn:aws[^:]*:kinesis:([^:]*):(\d{12}):stream/(\S+)", arn)
            assert match is not None  # the pattern of the model is the wider one
            if name is not None and name != match[3]:
                raise ApiError("InvalidArgumentException", "StreamARN and StreamName name different streams.")
            name = match[3]
            if match[2] != self.account or match[1] != self.region:
                raise self._no_stream(name, match[2])
        if name is None:
            raise ApiError(
                "InvalidArgumentException",
                "Either the stream ARN or the stream name must be given.",
            )
        stream = self.streams.get(name)
        if stream is None or (active and stream.status(self.clock()) != "ACTIVE"):
            raise self._no_stream(name, self.account)
        return stream

    @staticmethod
    def _no_stream(name: str, account: str) -> ApiError:
        return ApiError("ResourceNotFoundException", f"Stream {name} under account {account} not found.")

    def _shard(self, stream: Stream, shard_id: str) -> Shard:
        shard = stream.shard(shard_id)
        if shard is None:
            raise ApiError(
                "ResourceNotFoundException",
                f"Could not find shard {shard_id} in stream {stream.name} under account {self.account}.",
            )
        return shard

    @staticmethod
    def _refuse_dry_run(body: Mapping[str, Any]) -> None:
        if body.get("DryRun"):
            raise ApiError("DryRunOperationException", DRY_RUN_TEXT)

    def _create_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["StreamName"]
        if name in self.streams:
            raise ApiError(
                "ResourceInUseException",
                f"Stream {name} under account {self.account} already exists.",
            )
        mode = (body.get("StreamModeDetails") or {}).get("StreamMode", "PROVISIONED")
        if mode not in ("PROVISIONED", "ON_DEMAND"):
            modes = "Member must satisfy enum value set: [PROVISIONED, ON_DEMAND]"
            refuse([broken_rule(mode, "streamModeDetails.streamMode", modes)])
        auto_keys = body.get("RecordDistributionStrategy") == "AUTO"
        if auto_keys and mode != "ON_DEMAND":
            raise ApiError(
                "InvalidArgumentException",
                "RecordDistributionStrategy AUTO is only for streams in ON_DEMAND mode.",
            )
        if mode == "PROVISIONED" and body.get("ShardCount") is None:
            raise ApiError("InvalidArgumentException", "ShardCount must be given.")
        self.add_stream(
            name,
            StreamSpec(
                shards=body.get("ShardCount") or 4,  # an on-demand stream starts with four
                max_record_kib=body.get("MaxRecordSizeInKiB") or 1024,
                mode=mode,
                auto_keys=auto_keys,
            ),
            delay_s=self.create_s,
        )
        return {}

    def _delete_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(body, active=False)
        self._gone_bytes += stream.stored_bytes
        del self.streams[stream.name]
        return {}

    def _list_streams(self, body: dict[str, Any]) -> dict[str, Any]:
        start = body.get("ExclusiveStartStreamName") or body.get("NextToken") or ""
        names = sorted(name for name in self.streams if name > start)
        page = names[: body.get("Limit") or 100]
        more = len(page) < len(names)
        now = self.clock()
        answer: dict[str, Any] = {
            "StreamNames": page,
            "HasMoreStreams": more,
            "StreamSummaries": [
                {
                    "StreamName": name,
                    "StreamARN": self.streams[name].arn,
                    "StreamStatus": self.streams[name].status(now),
                    "StreamModeDetails": {"StreamMode": self.streams[name].mode},
                    "StreamCreationTimestamp": Millis(self.streams[name].created_at * 1000),
                }
                for name in page
            ],
        }
        if more:
            answer["NextToken"] = page[-1]
        return answer

    def _describe_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(body, active=False)
        start = body.get("ExclusiveStartShardId") or ""
        shards = [shard for shard in stream.shards if shard.id > start]
        page = shards[: body.get("Limit") or 100]
        return {
            "StreamDescription": {
                **self._description(stream),
                "Shards": [_shard_map(shard) for shard in page],
                "HasMoreShards": len(page) < len(shards),
            }
        }

    def _describe_summary(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(body, active=False)
        return {
            "StreamDescriptionSummary": {
                **self._description(stream),
                "OpenShardCount": len(stream.open_shards),
                "ConsumerCount": 0,
                "MaxRecordSizeInKiB": stream.max_record_kib,
                "RecordDistributionStrategy": ("AUTO" if stream.auto_keys else "USER_PARTITION_KEY"),
            }
        }

    def _description(self, stream: Stream) -> dict[str, Any]:
        return {
            "StreamName": stream.name,
            "StreamARN": stream.arn,
            "StreamStatus": stream.status(self.clock()),
            "StreamModeDetails": {"StreamMode": stream.mode},
            "RetentionPeriodHours": 24,
            "StreamCreationTimestamp": Millis(stream.created_at * 1000),
            "EnhancedMonitoring": [{"ShardLevelMetrics": []}],
            "EncryptionType": "NONE",
        }

    def _list_shards(self, body: dict[str, Any]) -> dict[str, Any]:
        token = body.get("NextToken")
        start = body.get("ExclusiveStartShardId") or ""
        if token is not None:
            if body.get("StreamName") is not None or body.get("StreamARN") is not None:
                raise ApiError("InvalidArgumentException", "NextToken and StreamName cannot be given together.")
            name, start = _unpack(token, 2, "Invalid NextToken.")
            body = {**body, "StreamName": name}
        stream = self._stream(body)
        shards = _filtered(stream, body.get("ShardFilter"))
        shards = [shard for shard in shards if shard.id > start]
        page = shards[: body.get("MaxResults") or 1000]
        answer: dict[str, Any] = {"Shards": [_shard_map(shard) for shard in page]}
        if len(page) < len(shards):
            answer["NextToken"] = _pack(stream.name, page[-1].id)
        return answer

    def _split_shard(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(body)
        shard = self._open_shard(stream, body["ShardToSplit"])
        new_start = int(body["NewStartingHashKey"])
        # The lower child may hold one hash key only, but not none.
        if not shard.start + 1 < new_start < shard.end:
            raise ApiError(
                "InvalidArgumentException",
                f"NewStartingHashKey {new_start} used in SplitShard() on shard {shard.id} in "
                f"stream {stream.name} under account {self.account} is not both greater than one "
                f"plus the shard's StartingHashKey {shard.start} and less than the shard's "
                f"EndingHashKey {shard.end}.",
            )
        stream.split(shard, new_start, self.wall(), self.clock())
        return {}

    def _merge_shards(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(body)
        one = self._open_shard(stream, body["ShardToMerge"])
        two = self._open_shard(stream, body["AdjacentShardToMerge"])
        if one.end + 1 != two.start and two.end + 1 != one.start:
            raise ApiError(
                "InvalidArgumentException",
                f"Shards {one.id} and {two.id} in stream {stream.name} under account "
                f"{self.account} are not an adjacent pair of shards eligible for merging",
            )
        stream.merge(one, two, self.wall(), self.clock())
        return {}

    def _open_shard(self, stream: Stream, shard_id: str) -> Shard:
        shard = self._shard(stream, shard_id)
        if shard.closed_at is not None:
            raise ApiError(
                "InvalidArgumentException",
                f"Shard {shard.id} in stream {stream.name} under account {self.account} has "
                "already been merged or split, and thus is not eligible for merging or splitting.",
            )
        return shard

    # --- reading -------------------------------------------------------------------------------

    def _get_shard_iterator(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(body)
        shard = self._shard(stream, body["ShardId"])
        kind = body["ShardIteratorType"]
        sequence = body.get("StartingSequenceNumber")
        if kind in ("AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER"):
            if sequence is None:
                raise ApiError("InvalidArgumentException", _WHICH.format(kind, "no"))
            position = shard.position(sequence)
            if position is None:
                raise ApiError(
                    "InvalidArgumentException",
                    f"StartingSequenceNumber {sequence} used in GetShardIterator on shard "
                    f"{shard.id} in stream {stream.name} under account {self.account} is invalid.",
                )
            # The shard's own starting number lies before every record.
            if kind == "AFTER_SEQUENCE_NUMBER" and sequence != shard.starting_sequence:
                position = min(position + 1, len(shard.log))
        elif kind == "AT_TIMESTAMP":
            when = body.get("Timestamp")
            if when is None:
                raise ApiError(
                    "InvalidArgumentException",
                    "Must specify timestampInMillis parameter for iterator of type AT_TIMESTAMP. "
                    "Current request has no timestamp parameter.",
                )
            position = shard.position_at(when / 1000 if isinstance(when, Millis) else when)
        elif sequence is not None:
            raise ApiError("InvalidArgumentException", _WHICH.format(kind, "also a"))
        else:
            position = 0 if kind == "TRIM_HORIZON" else len(shard.log)
        self._refuse_dry_run(body)
        return {"ShardIterator": self._iterator(stream, shard, position)}

    def _iterator(self, stream: Stream, shard: Shard, position: int) -> str:
        return _pack("it", stream.name, shard.id, str(position), repr(self.clock()))

    def _get_records(self, body: dict[str, Any]) -> dict[str, Any]:
        text = "Invalid ShardIterator."
        kind, name, shard_id, at, issued = _unpack(body["ShardIterator"], 5, text)
        if kind != "it" or not at.isdigit():
            raise ApiError("InvalidArgumentException", text)
        now, wall = self.clock(), self.wall()
        age = now - float(issued)
        if age > ITERATOR_LIFE_S:
            raise ApiError(
                "ExpiredIteratorException",
                f"Iterator expired. The iterator was created at time {_utc(wall - age)} while "
                f"right now it is {_utc(wall)} which is further in the future than the tolerated "
                f"delay of {ITERATOR_LIFE_S * 1000} milliseconds.",
            )
        stream = self._stream({"StreamName": name})
        shard = self._shard(stream, shard_id)
        self._refuse_dry_run(body)
        if self.read_limits and not shard.may_read(now):
            raise ApiError(THROTTLED, throttle_message(shard.id, name, self.account))
        position = int(at)
        last = min(len(shard.log), position + (body.get("Limit") or GET_RECORDS_MAX))
        records: list[dict[str, Any]] = []
        taken = 0
        while position < last:
            arrival, key, data, _ = shard.log[position]
            size = len(data) + len((key or "").encode())
            if taken + size > GET_BYTES_MAX and records:
                break
            taken += size
            record = {
                "SequenceNumber": shard.sequence(position),
                "ApproximateArrivalTimestamp": Millis(arrival * 1000),
                "Data": data,
            }
            if not stream.auto_keys:
                record["PartitionKey"] = key
            records.append(record)
            position += 1
        shard.read_bytes_left -= taken
        behind = 0
        if position < len(shard.log):
            behind = max(0, int((wall - shard.log[position][0]) * 1000))
        answer: dict[str, Any] = {"Records": records, "MillisBehindLatest": behind}
        if shard.closed_at is not None and position >= len(shard.log):
            answer["ChildShards"] = [
                {
                    "ShardId": child.id,
                    "ParentShards": [parent for parent in (child.parent, child.adjacent_parent) if parent is not None],
                    "HashKeyRange": _range(child),
                }
                for child in shard.children
            ]
        else:
            answer["NextShardIterator"] = self._iterator(stream, shard, position)
        return answer


_WHICH: Final = (
    "Must either specify (1) AT_SEQUENCE_NUMBER or AFTER_SEQUENCE_NUMBER and "
    "StartingSequenceNumber or (2) TRIM_HORIZON or LATEST and no StartingSequenceNumber. "
    "Request specified {} and {} StartingSequenceNumber."
)


def _range(shard: Shard) -> dict[str, str]:
    return {"StartingHashKey": str(shard.start), "EndingHashKey": str(shard.end)}


def _shard_map(shard: Shard) -> dict[str, Any]:
    sequences = {"StartingSequenceNumber": shard.starting_sequence}
    if shard.ending_sequence is not None:
        sequences["EndingSequenceNumber"] = shard.ending_sequence
    answer: dict[str, Any] = {
        "ShardId": shard.id,
        "HashKeyRange": _range(shard),
        "SequenceNumberRange": sequences,
    }
    if shard.parent is not None:
        answer["ParentShardId"] = shard.parent
    if shard.adjacent_parent is not None:
        answer["AdjacentParentShardId"] = shard.adjacent_parent
    return answer


def _filtered(stream: Stream, wanted: Any) -> list[Shard]:
    """ListShards' ShardFilter. Nothing is trimmed: the horizon is the stream's creation."""
    if not wanted:
        return stream.shards
    kind = wanted.get("Type")
    if kind == "AT_LATEST":
        return [shard for shard in stream.shards if shard.closed_at is None]
    if kind == "AFTER_SHARD_ID":
        return [shard for shard in stream.shards if shard.id > (wanted.get("ShardId") or "")]
    if kind == "AT_TRIM_HORIZON":
        return [shard for shard in stream.shards if shard.parent is None]
    if kind == "FROM_TRIM_HORIZON":
        return stream.shards
    when = wanted.get("Timestamp")
    if kind not in ("AT_TIMESTAMP", "FROM_TIMESTAMP") or when is None:
        raise ApiError("InvalidArgumentException", "ShardFilter needs a known Type and its field.")
    when = when / 1000 if isinstance(when, Millis) else when
    alive = [shard for shard in stream.shards if shard.closed_at is None or shard.closed_at >= when]
    if kind == "AT_TIMESTAMP":
        return [shard for shard in alive if shard.created_at <= when]
    return alive


def _pack(*parts: str) -> str:
    return base64.urlsafe_b64encode("\n".join(parts).encode()).decode()


def _unpack(token: str, count: int, text: str) -> list[str]:
    try:
        parts = base64.urlsafe_b64decode(token.encode()).decode().split("\n")
    except (binascii.Error, ValueError):
        parts = []
    if len(parts) != count:
        raise ApiError("InvalidArgumentException", text)
    return parts


def _utc(wall: float) -> str:
    return time.strftime("%a %b %d %H:%M:%S UTC %Y", time.gmtime(wall))
