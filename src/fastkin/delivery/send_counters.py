"""What the sender counts. It counts what happened and decides nothing, so nothing is ever taken back here.

Figures for the user are in status/registry.py, which reads these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkin.status.instruments import Histogram, LabelledCounter

if TYPE_CHECKING:
    from fastkin._codec import Batch

# Upper bounds: seconds of one call, and how full a batch is of what it may hold (records or bytes, the fuller).
_CALL_BOUNDS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_FILL_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_SHARDS_COUNTED = 256  # shards with a throttle counter of their own


class SendCounters:
    """`batched`, `sent` and what is counted by code are in records as they were given: an aggregate counts as what is
    in it. `retried` and `failed_by_code` count entries of calls."""

    def __init__(self, max_records: int, max_batch_bytes: int) -> None:
        self._max_records = max_records
        self._max_batch_bytes = max_batch_bytes
        self.batched: int = 0  # records of batches taken from the batcher
        self.batch_fill: Histogram = Histogram(_FILL_BOUNDS)
        self.calls = 0
        self.call_seconds: Histogram = Histogram(_CALL_BOUNDS_S)
        self.calls_failed: int = 0
        self.calls_failed_by_code: LabelledCounter = LabelledCounter()
        self.sent = 0  # records of calls made, repeats included
        self.retried: int = 0  # entries sent again
        self.retried_by_code: LabelledCounter = LabelledCounter()  # records that go again, by what failed
        self.failed_by_code: LabelledCounter = LabelledCounter()  # entries
        self.throttled: LabelledCounter = LabelledCounter(_SHARDS_COUNTED)  # shard id ("" when not told) -> records
        self.duplicates_possible = 0  # records of calls whose outcome stayed unknown

    def taken(self, batch: Batch) -> None:
        """A new batch was taken from the batcher."""
        self.batched += batch.user_records
        # By the fuller of the two: a batch is full when either is.
        self.batch_fill.observe(max(len(batch) / self._max_records, batch.size / self._max_batch_bytes))

    def call_failed(self, code: str, batch: Batch) -> None:
        """A call failed as a whole."""
        # Entries too: nothing of the call is known to be stored.
        self.calls_failed += 1
        self.failed_by_code.add(code, len(batch))
        self.calls_failed_by_code.add(code, 1)

    def goes_again(self, code: str, batch: Batch) -> None:
        """These entries will be sent once more."""
        self.retried += len(batch)
        self.retried_by_code.add(code, batch.user_records)
