"""What a pipeline sets aside: bad frames, oversize records, records that Kinesis refuses for good.

Durable first, settled after: a record ends as dead-lettered only when its letter is stored, and its message is
acknowledged then and not before.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from fastkin._codec import DEAD, DROPPED
from fastkin.deadletter import DeadLetterError
from fastkin.logs import Repeats
from fastkin.tallies import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastkin._codec import Batch, Lane, Reject
    from fastkin.deadletter import DeadLetters

_LOG = logging.getLogger("fastkin.pipeline")

_RETRY_S = 5.0  # between attempts at a disk that an operator must mend
_HEX_BYTES = 32  # of a bad payload shown in the log
_TOPIC_CHARS = 1024  # of a topic
_LINES_PER_S = 10  # of bad payloads of one kind; what is more is counted


class Aside:
    """Takes over what can never be stored, and settles it."""

    def __init__(
        self,
        name: str,
        lane: Lane,
        dead_letters: DeadLetters | None,
        *,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        on_settled: Callable[[], None],
    ) -> None:
        """`dead_letters` None: what is set aside is logged and counted as dropped. `spawn(coroutine, name)` runs
        a task of the pipeline; `on_settled()` runs after each group that ended."""
        self._name = name
        self._lane = lane
        self._dead_letters = dead_letters
        self._spawn = spawn
        self._on_settled = on_settled
        self._lines = Repeats(_LOG, asyncio.get_running_loop().call_later, most=_LINES_PER_S, per_s=1.0)
        self.format_errors: dict[str, int] = {}  # kind -> payloads or records set aside
        self.dead_lettered_by = Tally()  # records dead-lettered, by kind of Reject; "refused" by Kinesis
        self.dropped = Tally()  # records that ended here without a letter
        # letters to write, each group with its kind and what settles it once it is stored
        self._waiting: list[tuple[str, list[dict[str, Any]], Callable[[int], None]]] = []
        self._writing: asyncio.Task[None] | None = None

    @property
    def writing(self) -> bool:
        return self._writing is not None

    def rejected(self, reject: Reject) -> None:
        """A payload, or one record of it, that is no record."""
        self.format_errors[reject.kind] = self.format_errors.get(reject.kind, 0) + 1
        topic = reject.topic.decode("utf-8", "replace")
        where = "" if reject.index is None else f" record={reject.index}"
        self._lines.say(
            logging.ERROR, reject.kind,
            "pipeline=%s stage=decode topic=%s%s byte %d: %s (%d bytes, first %s)",
            self._name, ascii(topic[:_TOPIC_CHARS]), where, reject.offset, reject.reason,
            len(reject.payload), reject.payload[:_HEX_BYTES].hex() or "none",
        )  # fmt: skip
        letter = {
            "topic": topic,
            "reason": reject.reason,
            "offset": reject.offset,
            "index": reject.index,
            "payload": reject.payload,
        }
        self._lay(reject.kind, [letter], lambda outcome: self._lane.settle_reject(reject, outcome))

    def refused(self, batch: Batch, reason: str) -> None:
        """Kinesis will never take these records."""
        self._lines.say(
            logging.ERROR, "refused",
            "pipeline=%s stage=send %d records refused for good: %s", self._name, len(batch), reason,
        )  # fmt: skip
        letters = [{"reason": reason, "partition_key": key, "payload": data} for data, key, _ in batch.entries()]
        self._lay("refused", letters, batch.finish)

    def close(self) -> None:
        self._lines.close()
        if self._dead_letters is not None and self._writing is None:  # else a thread may still have the file
            self._dead_letters.close()

    def _lay(self, kind: str, letters: list[dict[str, Any]], settle: Callable[[int], None]) -> None:
        self._waiting.append((kind, letters, settle))
        if self._writing is None:
            self._writing = self._spawn(self._write(), "dead-letters")

    async def _write(self) -> None:
        while self._waiting:
            # They stay in the list until they are settled: a stop in between must not end them.
            work = list(self._waiting)
            outcome = DROPPED
            if self._dead_letters is not None:
                outcome = DEAD
                letters = [{"pipeline": self._name, **one} for _, group, _ in work for one in group]
                await self._write_until_durable(self._dead_letters, letters)
            del self._waiting[: len(work)]
            for kind, _, settle in work:
                dead, dropped = self._lane.dead_lettered, self._lane.dropped
                settle(outcome)
                self.dead_lettered_by.add(kind, self._lane.dead_lettered - dead)
                self.dropped.add("no_dead_letter", self._lane.dropped - dropped)
            self._on_settled()
        self._writing = None

    async def _write_until_durable(self, dead_letters: DeadLetters, letters: list[dict[str, Any]]) -> None:
        while True:
            try:
                await asyncio.to_thread(dead_letters.write, letters)
            except DeadLetterError as error:
                _LOG.error(
                    "pipeline=%s stage=settle %s; %d records wait, trying again in %.0f s",
                    self._name, error, len(letters), _RETRY_S,
                )  # fmt: skip
                await asyncio.sleep(_RETRY_S)
            else:
                return
