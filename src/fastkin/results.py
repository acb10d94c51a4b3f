"""What a receipt resolves to, and what `put_record` and `put_records` return."""

from __future__ import annotations

import enum
from typing import NamedTuple


class EncryptionType(enum.StrEnum):
    """How Kinesis keeps the records of a stream."""

    NONE = "NONE"
    KMS = "KMS"


class PutResult(NamedTuple):
    """What became of one record.

    shard_id, sequence_number: where Kinesis stored it; None when it did not, or when its place is not known yet.
    encryption_type: an EncryptionType; NONE where the answer has none, None for a record that is not stored.
    spooled: it is durable on disk, and is sent later.
    error_code, error_message: why this record of a `put_records` was not stored, None when it was. A receipt raises
    instead.
    """

    shard_id: str | None
    sequence_number: str | None
    encryption_type: str | None = None
    spooled: bool = False
    error_code: str | None = None
    error_message: str | None = None


class PutRecordsResult(NamedTuple):
    """What one PutRecords call did: as many results as records were given, in their order."""

    failed_record_count: int
    results: list[PutResult]


class FrameResult(NamedTuple):
    """A bulk frame is stored: `records` counts its records, 0 for an empty frame.

    `spooled`: some of them are durable on disk and will be sent later.
    """

    records: int
    spooled: bool = False
