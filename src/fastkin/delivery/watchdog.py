"""Whenever something waits, somebody will look at it again: an open call, an armed timer, a closed gate with its timer,
the spool's own turn, a task that writes dead letters. `unattended` is that invariant, in one place; it holds between
any two callbacks of the loop.

Every wake-up is one line that a change may lose, and what is lost then is told by nobody: records wait for ever in a
process that looks well. So a watchdog looks every few seconds, and what it finds it says as an ERROR, counts, and
wakes. A finding is always a bug.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fastkin._codec import Batcher
    from fastkin.delivery.backlog import Backlog
    from fastkin.delivery.flusher import Flusher
    from fastkin.delivery.sender import Sender

_LOG = logging.getLogger("fastkin.watchdog")

EVERY_S = 5.0
_AGAIN_S = 1.0  # before a finding is believed: a moment between two callbacks is none

# Told of each finding, with the pipeline's name: for test suites, to which it is a failure.
on_stall: list[Callable[[str, str], None]] = []


def unattended(batcher: Batcher, sender: Sender, flusher: Flusher, backlog: Backlog, *, aside: int = 0) -> str | None:
    """What waits in these and will be looked at by nobody, in words; None when there is no such thing.

    `aside`: groups of dead letters that are being stored.
    """
    # The spool has a turn of its own, which looks every quarter of a second.
    spool = backlog.attended
    # The order is that of a record: who is named is the first in whose hands it got lost.
    if sender.waiting and not (sender.attended or spool):
        return (
            f"batches wait to be sent, {batcher.in_flight} records are in flight, no call is open and no timer is set"
        )
    if batcher.open_records and not (
        batcher.offered or flusher.armed
    ):  # what is offered waits for the sender: see above
        return f"{batcher.open_records} records wait in the open batch and no timer will close it"
    if backlog.holds and not (sender.attended or spool or backlog.writing):
        return f"batches wait between memory and disk, {batcher.in_flight} records are in flight"
    # Somebody has each of these. What is left has nobody.
    if not batcher.in_flight or batcher.open_records or sender.waiting or sender.attended or aside:
        return None
    if backlog.holds or spool:
        return None
    return f"{batcher.in_flight} records are in flight and in nobody's hands"


class Watchdog:
    """One timer. `look()` says what is wrong, in words that change when something moves; `wake()` sets it going."""

    def __init__(
        self, name: str, loop: asyncio.AbstractEventLoop, look: Callable[[], str | None], wake: Callable[[], None]
    ) -> None:
        self.stalls: int = 0
        self._name = name
        self._loop = loop
        self._look = look
        self._wake = wake
        self._found: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_later(EVERY_S, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        found = self._look()
        # Only what is found twice in the same words is believed. The words hold counts, so they change when something
        # moves.
        again = found is not None and found != self._found
        self._found = found if again else None
        # Soon again: what is true for a moment only is gone by then.
        self._timer = self._loop.call_later(min(_AGAIN_S, EVERY_S) if again else EVERY_S, self._check)
        if found is None or again:
            return
        self.stalls += 1
        _LOG.error(
            "pipeline=%s stage=watchdog stalled: %s; woken up. Nothing is lost, but this is a bug of fastkin: keep the"
            " log and report it", self._name, found,
        )  # fmt: skip
        for hook in on_stall:
            hook(self._name, found)
        # After it was said: what is woken may raise.
        self._wake()
