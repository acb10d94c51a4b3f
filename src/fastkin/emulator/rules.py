"""The constraints of the API model, and Kinesis's words for breaking them.

The table repeats what the service model says (kinesis/2013-12-02/service-2.json: lengths, patterns,
enums, what is required). The texts are those the real service gives, as kinesalite recorded them.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .wire import decode_base64

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_DATA_BYTES: Final = 10_485_760  # model: Data max, since the large-record feature
HASH_KEY_PATTERN: Final = r"0|([1-9]\d{0,38})"


class ApiError(Exception):
    """An error answer: the type and message a client sees, and the HTTP status."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        self.code = code
        self.message = message
        self.status = status
        super().__init__(f"{code}: {message}")


@dataclass(frozen=True, slots=True)
class Rule:
    kind: type | tuple[type, ...]
    low: int | None = None
    high: int | None = None
    pattern: str | None = None
    enum: tuple[str, ...] = ()


_NAME = Rule(str, 1, 128, r"[a-zA-Z0-9_.-]+")
_HASH_KEY = Rule(str, pattern=HASH_KEY_PATTERN)
_TIME = Rule((int, float))

RULES: Final[Mapping[str, Rule]] = {
    "StreamName": _NAME,
    "StreamARN": Rule(str, 1, 2048, r"arn:aws.*:kinesis:.*:\d{12}:stream/\S+"),
    "StreamId": Rule(str, 1, 24),
    "DryRun": Rule(bool),
    "Records": Rule(list, 1, 500),
    "Data": Rule((str, bytes), None, MAX_DATA_BYTES),
    "PartitionKey": Rule(str, 1, 256),
    "ExplicitHashKey": _HASH_KEY,
    "SequenceNumberForOrdering": Rule(str, pattern=r"0|([1-9]\d{0,128})"),
    "StartingSequenceNumber": Rule(str, pattern=r"0|([1-9]\d{0,128})"),
    "ShardId": _NAME,
    "ShardToSplit": _NAME,
    "ShardToMerge": _NAME,
    "AdjacentShardToMerge": _NAME,
    "NewStartingHashKey": _HASH_KEY,
    "ExclusiveStartShardId": _NAME,
    "ExclusiveStartStreamName": _NAME,
    "ShardCount": Rule(int, 1, None),
    "Limit": Rule(int, 1, 10_000),
    "MaxResults": Rule(int, 1, 10_000),
    "MaxRecordSizeInKiB": Rule(int, 1024, 10_240),
    "NextToken": Rule(str, 1, 1_048_576),
    "ShardIterator": Rule(str, 1, 512),
    "ShardIteratorType": Rule(
        str,
        enum=(
            "AFTER_SEQUENCE_NUMBER",
            "LATEST",
            "AT_TIMESTAMP",
            "AT_SEQUENCE_NUMBER",
            "TRIM_HORIZON",
        ),
    ),
    "RecordDistributionStrategy": Rule(str, enum=("AUTO", "USER_PARTITION_KEY")),
    "Timestamp": _TIME,
    "StreamCreationTimestamp": _TIME,
    "ShardFilter": Rule(dict),
    "StreamModeDetails": Rule(dict),
    "DeliveryStreamName": Rule(str, 1, 64, r"[a-zA-Z0-9_.-]+"),
}

# What must be there; a stream is named by name or ARN, which `Service` looks after.
REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "PutRecords": ("Records",),
    "PutRecord": ("Data",),
    "GetShardIterator": ("ShardId", "ShardIteratorType"),
    "GetRecords": ("ShardIterator",),
    "CreateStream": ("StreamName",),
    "SplitShard": ("ShardToSplit", "NewStartingHashKey"),
    "MergeShards": ("ShardToMerge", "AdjacentShardToMerge"),
    "PutRecordBatch": ("DeliveryStreamName", "Records"),
    "DescribeDeliveryStream": ("DeliveryStreamName",),
}

_KIND_NAMES: Final = {
    str: "String",
    int: "Integer",
    list: "List",
    dict: "Structure",
    bool: "Boolean",
}


def serialization_error(message: str) -> ApiError:
    return ApiError("SerializationException", message)


def check(operation: str, body: Mapping[str, Any]) -> None:
    """Raises SerializationException for a wrong type, ValidationException for all else at once."""
    broken = [
        broken_rule(None, _lower(name), "Member must not be null")
        for name in REQUIRED.get(operation, ())
        if body.get(name) is None
    ]
    for name, value in body.items():
        rule = RULES.get(name)
        if rule is not None and value is not None:
            broken += violations(rule, name, _lower(name), value)
    refuse(broken)


def refuse(broken: list[str]) -> None:
    if broken:
        plural = "s" if len(broken) > 1 else ""
        raise ApiError(
            "ValidationException",
            f"{len(broken)} validation error{plural} detected: {'; '.join(broken)}",
        )


def violations(rule: Rule, name: str, path: str, value: Any) -> Iterator[str]:
    # To Python a bool is an int; to the service `true` is no number.
    if not isinstance(value, rule.kind) or (isinstance(value, bool) and rule.kind is not bool):
        wanted = rule.kind if isinstance(rule.kind, type) else rule.kind[0]
        raise serialization_error(
            f"{type(value).__name__} cannot be converted to "
            f"{'Blob' if name == 'Data' else _KIND_NAMES.get(wanted, 'Double')}"
        )
    if name == "Data":
        value = blob(value)
    size = value if isinstance(value, int | float) else len(value)
    has = f"Member must have {'value' if isinstance(value, int | float) else 'length'}"
    if rule.pattern is not None and isinstance(value, str) and not re.fullmatch(rule.pattern, value, re.ASCII):
        yield broken_rule(value, path, f"Member must satisfy regular expression pattern: {rule.pattern}")
    if rule.low is not None and size < rule.low:
        yield broken_rule(value, path, f"{has} greater than or equal to {rule.low}")
    if rule.high is not None and size > rule.high:
        yield broken_rule(value, path, f"{has} less than or equal to {rule.high}")
    if rule.enum and value not in rule.enum:
        enum = ", ".join(rule.enum)
        yield broken_rule(value, path, f"Member must satisfy enum value set: [{enum}]")


def blob(value: Any) -> bytes:
    """Data: base64 text in JSON, a byte string in CBOR."""
    if isinstance(value, bytes):
        return value
    try:
        return decode_base64(value)
    except (binascii.Error, ValueError):
        raise serialization_error(f"'{value[:40]}' can not be converted to a Blob: not base64") from None


def explain_records(records: list[Any], operation: str, auto_keys: bool) -> NoReturn:
    """Says what is wrong with the records of a call; the caller knows that something is."""
    # The quick path only asks whether all is well. The sentences are made here, when something is not, and cost good
    # calls nothing.
    broken: list[str] = []
    required = ("Data",) if auto_keys or operation == "PutRecordBatch" else ("Data", "PartitionKey")
    for number, record in enumerate(records, 1):
        path = f"records.{number}.member"
        if not isinstance(record, dict):
            raise serialization_error(f"{type(record).__name__} cannot be converted to Structure")
        broken += [
            broken_rule(None, f"{path}.{_lower(name)}", "Member must not be null")
            for name in required
            if record.get(name) is None
        ]
        for name in ("Data", "PartitionKey", "ExplicitHashKey"):
            value = record.get(name)
            if value is not None:
                broken += violations(RULES[name], name, f"{path}.{_lower(name)}", value)
    refuse(broken or ["the records break a constraint"])
    raise AssertionError("unreachable")


def broken_rule(value: Any, path: str, constraint: str) -> str:
    if isinstance(value, bytes):
        shown = f"'java.nio.HeapByteBuffer[pos=0 lim={len(value)} cap={len(value)}]'"
    elif isinstance(value, list):
        shown = f"'[{len(value)} members]'"
    else:
        shown = "null" if value is None else f"'{str(value)[:300]}'"
    return f"Value {shown} at '{path}' failed to satisfy constraint: {constraint}"


def _lower(name: str) -> str:
    return name[:1].lower() + name[1:]
