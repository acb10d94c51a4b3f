"""A Lambda function that keeps machine records of a stream in two DynamoDB tables.

Event source mapping: the stream, FunctionResponseTypes = ["ReportBatchItemFailures"], MaximumRetryAttempts and
an OnFailure destination (one record that never fits must not hold its shard), BisectBatchOnFunctionError.
Environment: DATA_TABLE (SparkData), METADATA_TABLE (SparkMetadata).

Takes the envelopes {"type", "host", "data"}: `record` puts one item, `metadata` sets one attribute of the host's item,
`connection_test` is ignored. The answer names the first record that is not written, and a write is waited for.

SparkData's key is machine_id (S) and timestamp (N). The timestamp is the record's time plus the half hour that
consumers of this table expect, with the milliseconds and twelve digits of the record's SHA-256 behind
the point. So two records of one second are two items, and a record that comes twice is one. Let the
table's time to live use the attribute `expires`, which has whole seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from functools import cache
from typing import Any

from fastkin import lambdas

TTL_S = 1800
RESERVED = ("machine_id", "timestamp", "expires")
TYPES = {"char": "S", "bool": "BOOL", "number": "N"}


@cache
def dynamodb() -> Any:
    import boto3  # Lambda's runtime has it

    return boto3.client("dynamodb")


def handler(event: dict[str, Any], _context: object) -> lambdas.BatchItemFailures:
    return lambdas.batch_item_failures(event, store)


def store(record: lambdas.Record) -> None:
    """Write one record; returns when DynamoDB has it, raises when not."""
    # JSON is UTF-8. Numbers stay as they are written: DynamoDB takes them as text.
    message = json.loads(record.data.decode("utf-8"), parse_float=str, parse_int=str)
    if message["type"] == "metadata":
        dynamodb().update_item(
            TableName=os.environ.get("METADATA_TABLE", "SparkMetadata"),
            Key={"spark_id": {"S": message["host"]}},
            UpdateExpression="SET #M = :m",
            ExpressionAttributeNames={"#M": message["data"]["info"]["fullname"]},
            ExpressionAttributeValues={":m": {"S": _as_written(record.data)}},
        )
    elif message["type"] == "record":
        dynamodb().put_item(
            TableName=os.environ.get("DATA_TABLE", "SparkData"),
            Item=item(message["host"], message["data"], hashlib.sha256(record.data).digest()),
        )
    elif message["type"] != "connection_test":
        raise ValueError(f"no such type: {message['type']!r}")


def item(host: str, data: dict[str, Any], digest: bytes) -> dict[str, dict[str, Any]]:
    moment = datetime.fromisoformat(data["time"])
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    millis = round(moment.timestamp() * 1000) + TTL_S * 1000
    unique = int.from_bytes(digest[:8], "big") % 10**12
    found: dict[str, dict[str, Any]] = {
        "machine_id": {"S": f"{host}/{data['machine']}"},
        "timestamp": {"N": f"{millis // 1000}.{millis % 1000:03}{unique:012}"},
        "expires": {"N": str(millis // 1000)},
    }
    for attribute in data["attributes"].values():
        name = attribute["name"]
        if name in RESERVED:
            name += "_"  # a variable must not take the place of the key
        kind = TYPES.get(attribute.get("outputFormat", attribute.get("format")), "N")
        found[name] = {kind: _value(kind, attribute["value"])}
    return found


def _value(kind: str, value: Any) -> str | bool:
    text = str(value).lower() if isinstance(value, bool) else value
    if not isinstance(text, str):
        raise ValueError(f"no value: {value!r}")  # noqa: TRY004
    if kind != "BOOL":
        return text
    if text.lower() not in ("true", "false"):
        raise ValueError(f"neither true nor false: {text!r}")
    return text.lower() == "true"


def _as_written(data: bytes) -> str:
    return json.dumps(json.loads(data)["data"], ensure_ascii=False, separators=(",", ":"))
