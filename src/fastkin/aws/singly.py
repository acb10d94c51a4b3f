"""One call for each record of a batch: for who is allowed kinesis:PutRecord and not kinesis:PutRecords.

Batches, retries and limits stay what they are: a finished body is taken apart here, and from the answers to its records
one is made that looks like that of PutRecords. It costs a call for each record, and nothing of it is on the path of who
does not ask for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from fastkin.aws.error_table import classify_record
from fastkin.errors import Action, KinesisError, NotSent, UnexpectedResponse

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from fastkin.aws.client import Client

# What such an answer says is about one record, or about its shard. After any other the rest would be told the same.
_OF_A_RECORD = frozenset({Action.REJECTED, Action.STRANGE, Action.THROTTLE})


class _One(bytes):
    """The body of one call, and the batch that the record is of."""

    whole: Buffer


def whole(body: Buffer) -> Buffer:
    """The batch that a body belongs to: what the sender knows."""
    return body.whole if isinstance(body, _One) else body


async def singly(client: Client, operation: str, body: Buffer) -> bytes:
    """Call `operation` for each record of a finished body, one after the other. Returns an answer of PutRecords.

    KinesisError: none of the records was stored.
    """
    request = orjson.loads(memoryview(body))
    entries: list[dict[str, Any]] = []
    errors: list[KinesisError] = []
    records = request.pop("Records")
    encryption = None
    for record in records:
        if errors and errors[-1].action not in _OF_A_RECORD:
            entries.append(_failed(errors[-1]))
            continue
        one = _One(orjson.dumps({**record, **request}))
        one.whole = body
        try:
            entry, encryption = _stored(await client.call(operation, one))
        except KinesisError as error:
            errors.append(error)
            entry = _failed(error)
        entries.append(entry)
    failed = sum("ErrorCode" in entry for entry in entries)
    told = None
    if failed == len(entries):
        # As a call that failed. What is no record's own fault comes first: the others were perhaps not judged for it.
        told = next((each for each in errors if each.action is not Action.REJECTED), errors[0])
    for untold in errors:
        if untold is not told and client.on_resend is not None and _maybe_stored(untold):
            client.on_resend(body)  # an answer has no word for that
    if told is not None:
        raise told
    answer = {"FailedRecordCount": failed, "Records": entries}
    return orjson.dumps(answer if encryption is None else {**answer, "EncryptionType": encryption})


def _stored(answer: bytes) -> tuple[dict[str, Any], object]:
    """The entry that PutRecords would have, and the encryption, of an answer of PutRecord. UnexpectedResponse."""
    try:
        told = orjson.loads(answer)
    except orjson.JSONDecodeError:
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("SequenceNumber"), str):
        raise UnexpectedResponse("UnexpectedResponse", "the answer cannot be used: it has no sequence number")
    return {name: told.get(name) for name in ("SequenceNumber", "ShardId")}, told.get("EncryptionType")


def _maybe_stored(error: KinesisError) -> bool:
    return not isinstance(error, NotSent) and (error.http_status is None or error.http_status >= 500)


def _failed(error: KinesisError) -> dict[str, Any]:
    """The entry of a record that was not stored, with a code that means there what the error means here."""
    same = classify_record(error.code) is error.action
    return {"ErrorCode": error.code if same else "InternalFailure", "ErrorMessage": error.message}
