"""What becomes of batches that memory cannot hold, as `on_full` says: here nothing, or they are dropped.

`pause` is the plain case: whoever reads or puts waits for room, and nothing else happens. Dropping makes room by the
user's own rule: whole batches, counted, acknowledged. Spooling is in spool_backlog.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastkin._codec import DRAIN, DROPPED, Budget
from fastkin.errors import RecordDropped

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin._codec import Batch, Batcher
    from fastkin.delivery.sender import Sender
    from fastkin.delivery.spool_file import Spool
    from fastkin.runtime.deadline import Deadline

_LOG = logging.getLogger("fastkin.spool")

Policy = Literal["pause", "spool", "drop_oldest", "drop_newest"]

_WARN_EVERY_S = 5.0
_MOST_OF_BUDGET = 16  # a batch is at most this part of the budget


def batch_limit(max_batch_bytes: int, max_record_bytes: int, budget_bytes: int, policy: Policy) -> int:
    """The most bytes of a batch: whoever splits or gathers has source and copy for a moment, beside the budget.

    With a spool several must fit in the share for what comes back, and a batch is what the other policies drop.
    """
    part = _MOST_OF_BUDGET // 2 if policy == "pause" else _MOST_OF_BUDGET
    # Never below one record: what fits nowhere could neither be sent nor refused.
    return min(max_batch_bytes, max(max_record_bytes, budget_bytes // part))


@dataclass(frozen=True, slots=True)
class Parts:
    """What every backlog stands between. `on_settled()` runs after batches were spooled or dropped; `name` is that of
    the log lines."""

    batcher: Batcher
    sender: Sender
    budget: Budget
    name: str
    on_settled: Callable[[], None]


class Backlog:
    """Stands between the flusher and the sender. This one, `pause`, only passes on."""

    spooling = False  # what is new goes to the disk
    dropped = 0  # records, by the policy
    task: asyncio.Task[None] | None = None  # the work in the background: what it raises is a bug

    def __init__(self, parts: Parts) -> None:
        self._batcher = parts.batcher
        self._sender = parts.sender
        self._budget = parts.budget
        self._name = parts.name
        self._on_settled = parts.on_settled

    async def start(self) -> None:
        """What takes a while."""

    @property
    def idle(self) -> bool:
        """Nothing is on its way: see Flusher."""
        return self._sender.idle

    @property
    def attended(self) -> bool:
        """A turn of our own will look at what waits in the sender and in here."""
        return False

    @property
    def writing(self) -> bool:
        """Batches are on their way to the disk, however long it takes."""
        return False

    @property
    def holds(self) -> bool:
        """Batches are in here, and neither in the sender nor on the disk."""
        return False

    @property
    def spool(self) -> Spool | None:
        return None

    @property
    def broken(self) -> str | None:
        """Why the file takes nothing."""
        return None

    @property
    def full(self) -> bool:
        """spool_max_bytes is reached."""
        return False

    @property
    def spooled_total(self) -> int:
        """Records that this run wrote to the disk."""
        return 0

    @property
    def safe(self) -> int:
        """Records in memory that are on the disk too."""
        return 0

    @property
    def damaged(self) -> int:
        """Rows of the file that were set aside."""
        return 0

    @property
    def hangs(self) -> str | None:
        """The disk has not answered for a while, in words."""
        return None

    def pump(self) -> None:
        """The batcher has closed batches."""
        self._sender.pump()

    def attend(self) -> None:
        """The budget may be full."""

    def drain(self) -> None:
        """The owner is about to stop."""

    async def close(self, limit: Deadline | None = None) -> None:
        """After the sender was closed."""

    def unsaved(self) -> list[Batch]:
        """After close(): what was taken from the sender and did not end, for the owner to fail or forget."""
        return []

    def stats(self) -> dict[str, Any]:
        return {
            "spooled": self._batcher.spooled, "spooled_ever": 0, "spooling": False, "spool_rows": 0, "spool_bytes": 0,
            "spool_bytes_limit": 0, "spool_error": None, "spool_damaged_rows": 0,
        }  # fmt: skip


class DropBacklog(Backlog):
    """`drop_oldest` and `drop_newest`."""

    def __init__(self, parts: Parts, policy: Policy) -> None:
        super().__init__(parts)
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._unsaid = 0  # records dropped since the last WARNING
        self._warned_at = -_WARN_EVERY_S

    def pump(self) -> None:
        # Sent first: what goes out now need not be dropped.
        self._sender.pump()
        self.attend()

    def attend(self) -> None:
        if self._budget.full:
            self._drop()

    def _drop(self) -> None:
        # The open batch too, or drop_newest would drop what is older than what is kept.
        self._batcher.close_batch(DRAIN)
        # Halves of a refused call stay. Each is on its way to be judged, and there are few of them.
        waiting = deque(self._sender.withdraw(alone=False))
        dropped = 0
        error = RecordDropped(f"memory was full and on_full is {self._policy!r}")
        # Also when what comes next is larger than what is free at the low mark.
        while waiting and self._budget.full:
            batch = waiting.popleft() if self._policy == "drop_oldest" else waiting.pop()
            # A finished batch has no length any more.
            flush_generation, count = batch.flush_generation, len(batch)
            dropped += batch.user_records
            batch.finish(DROPPED, error)
            self._sender.forget(flush_generation, count)
        if waiting:
            self._sender.requeue_front(list(waiting))
        if dropped:
            self._say_dropped(dropped)
        # To close the batch may have made room. Who waits for it must hear so, or waits for ever.
        if dropped or not self._budget.full:
            self._on_settled()
        self._sender.pump()

    def _say_dropped(self, dropped: int) -> None:
        self.dropped += dropped
        self._unsaid += dropped
        now = self._loop.time()
        if now - self._warned_at >= _WARN_EVERY_S:
            _LOG.warning(
                "pipeline=%s stage=batch memory is full: %d records dropped (on_full = %s)",
                self._name, self._unsaid, self._policy,
            )  # fmt: skip
            self._warned_at = now
            self._unsaid = 0
