"""For Lambda functions behind the stream: no record of an event is lost, and one bad record fails alone.

    from fastkin import lambdas  # or copy this one file into the function's package, and import lambdas:
                                            # it needs the standard library only

    def handler(event, context):            # data transformation of a Firehose delivery stream
        return lambdas.transform(event, lambda record: record.data + b"\\n")

    def handler(event, context):            # event source mapping of a Kinesis stream,
        return lambdas.batch_item_failures(event, store)    # with FunctionResponseTypes: [ReportBatchItemFailures]

Nothing here knows an SDK or an event loop.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

__all__ = [
    "BatchItemFailures",
    "Record",
    "Transformed",
    "batch_item_failures",
    "deaggregate",
    "iter_records",
    "transform",
]

_LOG = logging.getLogger("fastkin.lambdas")

# Lambda's bound on an answer is 6 MB; whichever megabyte is meant, this is below it.
MAX_RESPONSE_BYTES = 6_000_000

_KPL_MAGIC = b"\xf3\x89\x9a\xc2"
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Record:
    """One record as the producer gave it.

    record_id           Firehose's id; "" for a Kinesis event
    sequence_number     of the record in the stream; inner records of an aggregate share it and differ in
    subsequence_number  their place within the aggregate, 0 for a plain record
    arrival             seconds since 1970, None when the event does not say

    What describes the stream is "" when Firehose was written to directly.
    """

    data: bytes
    record_id: str = ""
    partition_key: str = ""
    shard_id: str = ""
    sequence_number: str = ""
    subsequence_number: int = 0
    arrival: float | None = None


class Transformed(TypedDict):
    """What Firehose wants back: every recordId once."""

    records: list[dict[str, str]]


class BatchItemFailures(TypedDict):
    """What an event source mapping wants back; an empty list: all done."""

    batchItemFailures: list[dict[str, str]]


def iter_records(event: Mapping[str, Any]) -> Iterator[Record]:
    """The records of a Firehose transformation event or of a Kinesis event, KPL aggregates taken apart.

    (Firehose takes aggregates apart itself before it calls the function.) ValueError for an event of
    another kind, and at a record that cannot be read: `transform` and `batch_item_failures` go on then.
    """
    for raw in _raw(event):
        yield from _read(raw)


def transform(
    event: Mapping[str, Any],
    fn: Callable[[Record], bytes | str | None],
    *,
    max_response_bytes: int = MAX_RESPONSE_BYTES,
) -> Transformed:
    """Answer a Firehose transformation event: `fn` gives each record's new data, or None to drop it.

    Every recordId comes back once, in order: Ok, Dropped, or ProcessingFailed for a record whose `fn`
    raised, which Firehose then writes to the error prefix as it came in. A record whose result no longer fits
    into `max_response_bytes` fails too (Firehose would fail all of them): lower the buffer size of the
    transformation when the log says so. ValueError for an event that is none of Firehose's.
    """
    if "records" not in event:
        raise ValueError("the event has no 'records': this is no Firehose data transformation event")
    raws = event["records"]
    failed = [{"recordId": raw["recordId"], "result": "ProcessingFailed"} for raw in raws]
    # Every record has its place, if only as failed: what is Ok takes the room that is left.
    # Counted as the answer will be written: Lambda refuses an answer that is too long as a whole, with every record
    # in it.
    used = len('{"records": []}') + sum(map(_size, failed))
    records: list[dict[str, str]] = []
    crowded = 0
    for raw, failure in zip(raws, failed, strict=True):
        answer = _transformed(raw, fn) or failure
        more = _size(answer) - _size(failure)
        if used + more > max_response_bytes:
            crowded += 1
            answer = failure
        else:
            used += more
        records.append(answer)
    if crowded:
        _LOG.error(
            "%d of %d records failed because the answer would pass %d bytes: lower BufferSizeInMBs of the"
            " transformation, or make the results smaller", crowded, len(records), max_response_bytes,
        )  # fmt: skip
    return {"records": records}


def batch_item_failures(event: Mapping[str, Any], fn: Callable[[Record], object]) -> BatchItemFailures:
    """Hand the records of a Kinesis event to `fn` in order; the answer of an event source mapping.

    `fn` returns when the record is stored, and raises when it is not. A shard is read up to its first failure:
    Lambda takes the lowest sequence number in the answer and delivers everything from there again, so
    what would come after it must not be done now, in the wrong order and twice. Inner records of
    an aggregate share a sequence number, so those before a failed one come again: let `fn` be idempotent.

    The mapping must have FunctionResponseTypes = ["ReportBatchItemFailures"], or Lambda ignores the answer;
    give it MaximumRetryAttempts and an OnFailure destination, or one bad record holds its shard until it expires.
    TypeError when `fn` is a coroutine function, ValueError for an event that is none of Kinesis'.
    """
    if "Records" not in event:
        raise ValueError("the event has no 'Records': this is no event of a Kinesis event source mapping")
    failures: list[dict[str, str]] = []
    stopped: set[str] = set()  # shards; a real event has one
    for raw in _raw(event):
        number = raw["kinesis"]["sequenceNumber"]
        shard = _shard(raw)
        if shard in stopped:
            continue
        try:
            for record in _read(raw):
                _done(fn(record), fn)
        # Not a failed record: the function is wrong for all of them, and the deployment must fail.
        except _NotAwaitedError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was: this record is not stored
            _LOG.error("%s sequence=%s failed, it will be delivered again: %s", shard, number, _tell(error))
            failures.append({"itemIdentifier": number})
            stopped.add(shard)
    return {"batchItemFailures": failures}


class _NotAwaitedError(TypeError):
    """The caller's function is a coroutine function: it would store nothing, for any record."""


def _done(result: object, fn: object) -> object:
    if isinstance(result, Awaitable):
        if close := getattr(result, "close", None):
            # Closed, so that the interpreter does not warn of a coroutine that was never awaited as well.
            close()
        # A coroutine that nobody awaits stores nothing, and without this every record would count as done.
        raise _NotAwaitedError(
            f"{getattr(fn, '__qualname__', fn)} returned an awaitable, which nobody would wait for:"
            " give a plain function, such as lambda record: asyncio.run(store(record))"
        )
    return result


def _transformed(raw: Mapping[str, Any], fn: Callable[[Record], bytes | str | None]) -> dict[str, str] | None:
    """The answer for one record, None when it failed."""
    name = raw["recordId"]
    try:
        [record] = _read(raw)
        data = _done(fn(record), fn)
        if data is None:
            return {"recordId": name, "result": "Dropped"}
        if isinstance(data, str):
            data = data.encode()
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"the function returned {type(data).__name__}, not bytes, str or None")
    except _NotAwaitedError:
        raise
    except Exception as error:  # noqa: BLE001 - this record fails, the others do not
        _LOG.error("recordId=%s failed: %s", name, _tell(error))
        return None
    return {"recordId": name, "result": "Ok", "data": base64.b64encode(data).decode("ascii")}


def _size(answer: Mapping[str, str]) -> int:
    return len(json.dumps(answer)) + 2  # and the comma


def _tell(error: Exception) -> str:
    # One line, ASCII: messages quote payloads, and those come from strangers.
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {ascii(str(error))[1:-1]} ({last.filename}:{last.lineno} in {last.name})"


# -- reading -----------------------------------------------------------------------------------


def _raw(event: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    raws = event.get("records", event.get("Records"))
    if raws is None:
        raise ValueError("the event has neither 'records' (Firehose) nor 'Records' (Kinesis)")
    for raw in raws:
        if "recordId" not in raw and "kinesis" not in raw:
            raise ValueError(
                f"a record of {raw.get('eventSource', 'an unknown source')} is neither Firehose's nor Kinesis'"
            )
    return list(raws)


def _shard(raw: Mapping[str, Any]) -> str:
    return str(raw.get("eventID", "")).partition(":")[0]  # "shardId-000000000006:4959..."


def _read(raw: Mapping[str, Any]) -> list[Record]:
    """The records of one entry of an event: several when it is an aggregate."""
    kinesis = raw.get("kinesis")
    if kinesis is None:
        return [_of_firehose(raw)]
    data = base64.b64decode(kinesis["data"], validate=True)
    key = str(kinesis.get("partitionKey") or "")
    return [
        Record(
            data=inner,
            partition_key=key if inner_key is None else inner_key,
            shard_id=_shard(raw),
            sequence_number=str(kinesis["sequenceNumber"]),
            subsequence_number=n,
            arrival=kinesis.get("approximateArrivalTimestamp"),
        )
        for n, (inner_key, inner) in enumerate(deaggregate(data))
    ]


def _of_firehose(raw: Mapping[str, Any]) -> Record:
    stream = raw.get("kinesisRecordMetadata") or {}
    millis = stream.get("approximateArrivalTimestamp", raw.get("approximateArrivalTimestamp"))
    return Record(
        data=base64.b64decode(raw["data"], validate=True),
        record_id=raw["recordId"],
        partition_key=str(stream.get("partitionKey") or ""),
        shard_id=str(stream.get("shardId") or ""),
        sequence_number=str(stream.get("sequenceNumber") or ""),
        subsequence_number=int(stream.get("subsequenceNumber") or 0),
        arrival=None if millis is None else millis / 1000,
    )


# An aggregate: four bytes of magic; a protobuf message of tables of keys (fields 1 and 2) and records (field 3, each
# with the index of its key in field 1 and its data in field 3); the MD5 of the message.
def deaggregate(data: bytes) -> list[tuple[str | None, bytes]]:
    """Keys and data of a KPL aggregate; what is none (as KCL sees it: magic, MD5, message) stays as it is."""
    plain: list[tuple[str | None, bytes]] = [(None, data)]
    message = data[len(_KPL_MAGIC) : -_DIGEST_BYTES]
    if not data.startswith(_KPL_MAGIC) or len(data) <= len(_KPL_MAGIC) + _DIGEST_BYTES:
        return plain
    # Magic alone is not enough: plain records may begin with these four bytes, and must come through unchanged.
    if hashlib.md5(message, usedforsecurity=False).digest() != data[-_DIGEST_BYTES:]:
        return plain
    try:
        keys: list[str] = []
        inner: list[tuple[int, bytes]] = []
        for number, value in _fields(message):
            if number == 1 and isinstance(value, bytes):
                keys.append(value.decode())
            elif number == 3 and isinstance(value, bytes):
                fields = dict(_fields(value))
                index, content = fields[1], fields[3]
                if not isinstance(index, int) or not isinstance(content, bytes):
                    return plain
                inner.append((index, content))
        return [(keys[index], content) for index, content in inner] or plain
    except (ValueError, LookupError):
        return plain


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message. ValueError when it is cut short or of an odd type."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        elif tag & 7 == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("a field is cut short")
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {tag & 7}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        # More than ten bytes are no number of protobuf, and would grow without end.
        if at == len(message) or shift > 63:
            raise ValueError("a number is cut short")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
