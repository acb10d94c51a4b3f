"""Where keys go that are drawn here: anywhere, until that is not good enough.

Keys drawn at random spread evenly. As long as each shard takes its part nobody has to know where one falls, and one
bucket paces them all. When a shard refuses its part the whole stream would have to wait for that one. So from then on
keys are drawn for shards that have room: where a key falls is looked up, which costs its MD5, and one that falls into a
shard with less room than the others is drawn anew, the more likely the less room there is. Each such record is paced by
the bucket of its shard. When no shard has refused anything for a while keys are spread evenly again, and also when most
of them refuse: then it is the stream that is short, and one bucket finds out sooner by how much than one each.

A key is drawn anew only for a record that is surely not stored: with another key nobody would know it again.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from fastkin.delivery.retry_queue import EVEN

if TYPE_CHECKING:
    from collections.abc import Container

    from fastkin._codec import Batch, Batcher
    from fastkin.delivery.pacing import Pacer

_LOG = logging.getLogger("fastkin.pipeline")

_EVERY_S = 0.1  # a bucket's rate grows by a fifth in this time: more often would find nothing new
_CALM_S = 10.0
# A shard with records in line for it has less room than its rate says. Not none: its line may be short.
_IN_LINE = 0.5
_OFTEN = 2.5  # answers: a single full second is no reason, and its bucket slows down for that
# A few shards are short when a quarter of them refused nearly all that was refused lately.
_FEW = 4
_NEARLY_ALL = 0.8
_LATELY_S = 10.0


class Spreading:
    """Draws a batcher's keys for shards that have room, while a few shards have less than their part."""

    __slots__ = ("_batcher", "_busy_at", "_name", "_next", "_pacer", "_refused", "_refused_at", "active")

    def __init__(self, batcher: Batcher, pacer: Pacer, name: str) -> None:
        self._batcher = batcher
        self._pacer = pacer
        self._name = name
        self.active = False
        self._next = 0.0
        self._busy_at = 0.0
        self._refused: dict[int, float] = {}  # shard -> answers in which it refused some, older ones count less
        self._refused_at = 0.0

    def refused(self, shard: int, now: float) -> bool:
        """A shard has refused some. True: from now on keys are not spread evenly, and were until now."""
        fade = math.exp((self._refused_at - now) / _LATELY_S)
        self._refused = {each: count * fade for each, count in self._refused.items()}
        self._refused[shard] = self._refused.get(shard, 0.0) + 1.0
        self._refused_at = now
        if self.active or self._refused[shard] < _OFTEN or not self._few:
            return False
        self._pacer.by_shard(now)
        self.active = True
        self._busy_at = now
        _LOG.info("pipeline=%s stage=send a shard takes less than its part: keys are drawn for the others", self._name)
        return True

    def look(self, now: float, lines: Container[int | str]) -> None:
        """See where there is room. `lines`: has an ordinal when records wait for that shard."""
        table = self._batcher.shards
        if not self.active or now < self._next or table is None:
            return
        self._next = now + _EVERY_S
        busy = [shard in lines for shard in range(len(table))]
        if self._pacer.adapted or any(busy) or EVEN in lines:
            self._busy_at = now
        if now - self._busy_at > _CALM_S or not self._few:
            self._next = 0.0
            self.active = False
            table.set_odds(None)
            self._pacer.spread_again(now)
            return
        room = self._pacer.room(now)
        room = [each * _IN_LINE if waits else each for each, waits in zip(room, busy, strict=True)]
        table.set_odds([each / max(room) for each in room])

    def place(self, batch: Batch, *, again: bool = False) -> None:
        """Its drawn keys get a shard, and one that has room; `again`: also those that have a shard. While keys are
        spread evenly they have none."""
        batch.place(self._batcher.shards if self.active else None, again)

    def reset(self) -> None:
        """The shards are others now, or not known."""
        self.active = False
        self._next = 0.0
        self._refused = {}
        if self._batcher.shards is not None:
            self._batcher.shards.set_odds(None)

    @property
    def _few(self) -> bool:
        """What was refused lately was refused by a few shards."""
        table = self._batcher.shards
        if table is None or len(table) < 2:
            return False
        most = sorted(self._refused.values(), reverse=True)
        return sum(most[: max(1, len(table) // _FEW)]) >= _NEARLY_ALL * sum(most)
