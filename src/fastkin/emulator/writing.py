"""Answers PutRecords, PutRecord and PutRecordBatch: what is stored, and which entries fail.

Limits are those of the service, by shard and second, because a sender that is only tried against a stream without
limits is never tried.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final

from .rules import MAX_DATA_BYTES, RULES, ApiError, blob, broken_rule, check, explain_records, refuse, violations
from .state import refuse_dry_run
from .streams import HASH_SPACE, MIB, THROTTLED, UNLIMITED, Batch, Shard, Stream, digest_of, throttle_message
from .wire import CBOR, cbor_head, cbor_text

if TYPE_CHECKING:
    from .state import State

FIREHOSE_MAX_REQUEST: Final = 4 * MIB  # API_PutRecordBatch
FIREHOSE_MAX_RECORD: Final = 1000 * 1024
LARGEST_HASH_KEY: Final = HASH_SPACE - 1

# Firehose has no shards; a fault that asks for one finds this.
_NO_SHARD: Final = Shard(0, 0, 0, stream="", account="", created_at=0.0, limits=UNLIMITED, now=0.0)


class Writing:
    """What puts records."""

    def __init__(self, state: State) -> None:
        self._state = state

    def put_records(self, body: dict[str, Any], content_type: str) -> bytes:
        records = body.get("Records")
        # The fast way: what is right is not looked at by the table of rules. Only a call that is wrong pays for its
        # words.
        if not isinstance(records, list) or not 0 < len(records) <= self._state.max_records:
            check("PutRecords", body)
            assert isinstance(records, list)
            # The limit is not AWS's 500, so the table did not catch it.
            most = f"Member must have length less than or equal to {self._state.max_records}"
            refuse([broken_rule(records, "records", most)])
        stream = self._state.stream(body)
        batch = self._batch(stream, records)
        # Behind the checks: a DryRun is to say what the real call would.
        refuse_dry_run(body)
        fault = None
        if self._state.faults.records:
            fault = self._state.faults.for_records("PutRecords", stream.name, self._state.account)
        entries, throttled, failed = stream.put(batch, self._state.wall(), self._state.clock(), content_type, fault)
        self._state.count(len(entries), throttled, failed)
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

    def put_record(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._state.stream(body)
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
        refuse_dry_run(body)
        fault = None
        if self._state.faults.records:
            fault = self._state.faults.for_records("PutRecord", stream.name, self._state.account)
        shard = stream.open_shards[0]
        for each in stream.open_shards:
            if each.start <= int.from_bytes(batch.digests[0], "big") <= each.end:
                shard = each
        if fault is not None and (struck := fault(shard, batch.keys[0], batch.datas[0])):
            self._state.count(1, 0, 1)
            raise ApiError(*struck, status=500 if struck[0].startswith("InternalFail") else 400)
        position = shard.stored
        _, throttled, failed = stream.put(batch, self._state.wall(), self._state.clock())
        self._state.count(1, throttled, failed)
        if throttled:
            raise ApiError(THROTTLED, throttle_message(shard.id, stream.name, self._state.account))
        return {"ShardId": shard.id, "SequenceNumber": shard.sequence(position)}

    def put_record_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["DeliveryStreamName"]
        delivery = self._state.delivery(name)
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
        if self._state.faults.records:
            judge = self._state.faults.for_records("PutRecordBatch", name, self._state.account)
        responses: list[dict[str, Any]] = []
        now, failed = self._state.wall(), 0
        for data in datas:
            struck = judge(_NO_SHARD, None, data) if judge is not None else None
            if struck is not None:
                failed += 1
                responses.append({"ErrorCode": struck[0], "ErrorMessage": struck[1]})
                continue
            delivery.count += 1
            if self._state.keep == "all":
                delivery.records.append((now, data))
            responses.append({"RecordId": f"{uuid.uuid4().hex}{delivery.count:020d}"})
        self._state.count(len(datas), 0, failed)
        return {"FailedPutCount": failed, "Encrypted": False, "RequestResponses": responses}

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
        # Something about a record is not as it must be. Which record and what is looked for now, when it is known
        # that one is.
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
                f"{self._state.account} accepts.",
            )
        if sum(sizes) > self._state.max_request_bytes:
            raise ApiError(
                "InvalidArgumentException",
                f"Records size exceeds {self._state.max_request_bytes // MIB} MB limit",
            )
        digests = [stream.digest(key) for key in keys] if stream.auto_keys else None
        hash_keys = None
        # Two members are data and key. Only a record with more of them can have an explicit hash key.
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

    @staticmethod
    def _hash_digest(hash_key: Any, number: int) -> bytes:
        path = f"records.{number}.member.explicitHashKey"
        refuse(list(violations(RULES["ExplicitHashKey"], "ExplicitHashKey", path, hash_key)))
        value = int(hash_key)
        if value > LARGEST_HASH_KEY:
            raise ApiError(
                "InvalidArgumentException",
                "Invalid ExplicitHashKey. ExplicitHashKey must be in the range: [0, 2^128-1]. "
                f"Specified value was {hash_key}",
            )
        return value.to_bytes(16, "big")
