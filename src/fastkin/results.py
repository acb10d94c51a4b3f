"""What a receipt resolves to."""

from __future__ import annotations

from typing import NamedTuple


class PutResult(NamedTuple):
    """Where Kinesis stored one record; `spooled`: it is durable on disk, and its place is not known yet."""

    shard_id: str | None
    sequence_number: str | None
    encryption_type: str | None = None
    spooled: bool = False


class FrameResult(NamedTuple):
    """A bulk frame is stored: `records` counts its records, 0 for an empty frame.

    `spooled`: some of them are durable on disk and will be sent later.
    """

    records: int
    spooled: bool = False
