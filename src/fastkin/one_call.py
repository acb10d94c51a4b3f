"""`put_record` and `put_records`: exactly one request each, no retry, results in the order of the records.

They pass by batching, pacing and retries. The body of a PutRecords call is made by a batcher all the same: its own one,
of which each call takes all that it has put there, so that an entry looks the same whichever way it goes.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import orjson

from fastkin._codec import DRAIN, FAILED, Batcher, Budget, KeyPlan
from fastkin.aws.error_table import response_of, telling_requests
from fastkin.errors import ClosedError, KinesisError, LibraryError, RecordError, RecordFailed, UnexpectedResponse
from fastkin.limits import MIB
from fastkin.record import Record
from fastkin.results import EncryptionType, PutRecordsResult, PutResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin._codec import Batch, Receipt
    from fastkin.aws.client import Client

# The caller holds the records, so their bytes bound nothing here: enough for one call of the largest kind.
_BUDGET_BYTES = 64 * MIB


class OneCall:
    """Makes single calls with a producer's client."""

    def __init__(self, client: Client, max_record_bytes: int) -> None:
        """`max_record_bytes`: data and key of a record, at most."""
        to = client.destination
        self._client = client
        self._most = to.call_records
        self._call_bytes = to.call_bytes
        self._record_bytes = min(max_record_bytes, to.record_bytes)
        self._batcher = Batcher(
            settler=None, budget=Budget(_BUDGET_BYTES, 2 * to.call_records), frame="raw", key=KeyPlan("uuid"),
            target=client.target_json(), answer=to.answer, max_records=to.call_records,
            max_batch_bytes=to.call_bytes, max_record_bytes=self._record_bytes,
        )  # fmt: skip

    async def put_record(self, record: Record, *, auto_keys: bool) -> PutResult:
        """One PutRecord request. `auto_keys`: the stream is known to choose shards itself."""
        if not isinstance(record, Record):
            raise LibraryError(_wrong("record", "a Record", record), failed_record_count=1)
        if record.prev_sequence_number is not None and auto_keys:
            what = "prev_sequence_number: the stream chooses shards itself and orders nothing; leave it out"
            raise LibraryError(what, failed_record_count=1)
        size = len(record.payload) + len(record.partition_key.encode())
        if size > self._record_bytes:
            what = f"record: {size} bytes of data and key, at most {self._record_bytes}: split it"
            raise LibraryError(what, failed_record_count=1)
        body = {"Data": base64.b64encode(record.payload).decode(), "PartitionKey": record.partition_key}
        if record.explicit_hash_key is not None:
            body["ExplicitHashKey"] = record.explicit_hash_key
        if record.prev_sequence_number is not None:
            body["SequenceNumberForOrdering"] = record.prev_sequence_number
        try:
            answer = await self._client.call("PutRecord", _with_target(self._client, body), once=True)
            with telling_requests():
                return _result(answer)
        except KinesisError as error:
            error.failed_record_count = 1
            raise

    async def put_records(self, records: Sequence[Record]) -> PutRecordsResult:
        """One PutRecords request."""
        batch, receipts = self._batch(records)
        answer = b""
        try:
            answer = await self._client.call(self._client.destination.put, batch, once=True)
            with telling_requests():
                failures = batch.settle(answer)
        except BaseException as error:
            if isinstance(error, KinesisError):
                error.failed_record_count = len(receipts)
            if isinstance(error, UnexpectedResponse):
                error.http_status, error.http_response = 200, response_of(answer)
            batch.finish(FAILED, error if isinstance(error, Exception) else ClosedError("the call was cancelled"))
            raise
        for failure in failures:
            failure.batch.finish(FAILED, RecordFailed(failure.code, failure.message))
        results = [_outcome(receipt) for receipt in receipts]
        return PutRecordsResult(sum(result.error_code is not None for result in results), results)

    def _batch(self, records: Sequence[Record]) -> tuple[Batch, list[Receipt[PutResult]]]:
        """All of them, as the body of one call. LibraryError: they are none, or none that one call can take."""
        if not isinstance(records, list | tuple):
            raise LibraryError(_wrong("records", "a list of Record", records))
        count = len(records)
        if not records:
            raise LibraryError("Non empty argument required: records", failed_record_count=0)
        if count > self._most:
            what = f"records: {count}, and one PutRecords call takes {self._most}: make several calls, or use put_many"
            raise LibraryError(what, failed_record_count=count)
        for number, record in enumerate(records):
            if not isinstance(record, Record):
                raise LibraryError(_wrong(f"records[{number}]", "a Record", record), failed_record_count=count)
        batcher = self._batcher
        receipts: list[Receipt[PutResult]] = []
        try:
            for record in records:
                receipts.append(batcher.put(record.payload, record.partition_key, record.explicit_hash_key))  # noqa: PERF401 - on an error their number tells which
        except RecordError as error:
            batcher.abandon(error)
            raise LibraryError(f"records[{len(receipts)}]: {error}", failed_record_count=count) from None
        except BaseException as error:
            batcher.abandon(error)
            raise
        batcher.close_batch(DRAIN)
        # What does not fit into one call was closed into a second batch.
        if batcher.ready > 1:
            what = f"records: more than the {self._call_bytes} bytes that one PutRecords call takes: make several calls"
            too_much = LibraryError(what, failed_record_count=count)
            batcher.abandon(too_much)
            raise too_much
        batch = batcher.take()
        assert batch is not None
        return batch, receipts


def _with_target(client: Client, body: dict[str, str]) -> bytes:
    return orjson.dumps(body)[:-1] + b"," + client.target_json() + b"}"


def _wrong(argument: str, wanted: str, given: object) -> str:
    return f"Wrong type of argument: {argument} is {wanted}, not {type(given).__name__}"


def _outcome(receipt: Receipt[PutResult]) -> PutResult:
    error = receipt.exception()
    if isinstance(error, KinesisError):
        return PutResult(None, None, error_code=error.code, error_message=error.message)
    return receipt.result()


def _result(answer: bytes) -> PutResult:
    """Of PutRecord."""
    try:
        told: Any = orjson.loads(answer)
    except orjson.JSONDecodeError:
        told = None
    if not isinstance(told, dict):
        raise _unexpected("it is no JSON object", answer)
    for name in ("ShardId", "SequenceNumber"):
        if not isinstance(told.get(name), str):
            raise _unexpected(f"{name} is missing", answer)
    return PutResult(told["ShardId"], told["SequenceNumber"], _encryption(told.get("EncryptionType")))


def _encryption(told: object) -> str:
    """NONE where nothing is told; a text that nobody documented stays as it is."""
    if not isinstance(told, str):
        return EncryptionType.NONE
    return EncryptionType.__members__.get(told, told)


def _unexpected(why: str, answer: bytes) -> UnexpectedResponse:
    return UnexpectedResponse(
        "UnexpectedResponse", f"the answer cannot be used: {why}", http_status=200, http_response=response_of(answer)
    )
