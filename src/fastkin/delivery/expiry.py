"""Gives up what has no outcome in time: `delivery_timeout_s` of a producer.

A batch that waits ends there and then: its records leave memory, and its receipts say whether an earlier call may have
stored them. A batch whose call is open cannot be taken back. Its receipts are told that it may be stored, and the call
goes on: if it fails, the batch is given up like one that waits.

Time counts from when a batch is taken from the batcher. Until somebody can send it, a batch stays open there and grows,
so what stays there over a whole look is taken by the look. That makes an end up to two looks late, and never early.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkin._codec import DRAIN, FAILED
from fastkin.errors import DeliveryTimeout

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fastkin._codec import Batch, Batcher
    from fastkin.delivery.sender import Sender

LOOKS = 16  # in one timeout


class Expiry:
    """One timer. `expired` counts the records that were given up."""

    def __init__(
        self,
        batcher: Batcher,
        sender: Sender,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
        on_settled: Callable[[], None],
    ) -> None:
        self._batcher = batcher
        self._sender = sender
        self._loop = loop
        self._timeout_s = timeout_s
        self._on_settled = on_settled
        self._opened = -1  # open batches there had been at the last look
        self._timer: asyncio.TimerHandle | None = None
        self.expired: int = 0

    def start(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s / LOOKS, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self.start()
        before = self._loop.time() - self._timeout_s
        for batch in self._sender.called():
            if batch.taken_at <= before and not batch.restored:
                batch.expire(self._error(may_be_stored=True))
        batcher = self._batcher
        stays = batcher.ready > 0 or (batcher.open_records > 0 and batcher.opened == self._opened)
        self._opened = batcher.opened
        oldest = self._sender.oldest
        if stays or (oldest is not None and oldest <= before):
            self._give_up(before)

    def _give_up(self, before: float) -> None:
        self._batcher.close_batch(DRAIN)
        kept: list[Batch] = []
        given_up = 0
        for batch in self._sender.withdraw():
            if batch.taken_at > before:
                kept.append(batch)
                continue
            # A finished batch has neither any more.
            generation, count = batch.flush_generation, len(batch)
            given_up += batch.user_records
            batch.finish(FAILED, self._error(may_be_stored=batch.uncertain > 0))
            self._sender.forget(generation, count)
        self._sender.requeue_front(kept)
        self.expired += given_up
        # Closing the open batch may have made room, also when nothing was given up.
        self._on_settled()

    def _error(self, *, may_be_stored: bool) -> DeliveryTimeout:
        return DeliveryTimeout(self._timeout_s, may_be_stored=may_be_stored, last_error=self._sender.last_error)
