"""What a receipt resolves to."""

from __future__ import annotations

from typing import NamedTuple


class PutResult(NamedTuple):
    """Where Kinesis stored one record."""

    shard_id: str
    sequence_number: str
    encryption_type: str | None = None


class FrameResult(NamedTuple):
    """A bulk frame is stored: `records` counts its records, 0 for an empty frame."""

    records: int
