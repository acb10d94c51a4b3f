"""The shard map of one stream: which shards are open and which part of the hash key space each owns. Pure.

A shard owns an inclusive range of 128-bit hash keys; the MD5 of a record's partition key (or its explicit
hash key) decides. Splits and merges close shards and open their children, so a map is only ever a recent
picture: it steers pacing, and nothing that must be right depends on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

HASH_SPACE = 2**128

# The text of a throttled entry names its shard: "Rate exceeded for shard shardId-000000000001 in stream ..."
_SHARD_ID = re.compile(r"\bshardId-\d{12}\b")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard as ListShards tells it. `start` and `end` are inclusive hash keys."""

    id: str
    start: int
    end: int
    parent: str | None = None
    closed: bool = False
    adjacent_parent: str | None = None  # the second one, of a merge

    @property
    def share(self) -> float:
        """The part of uniformly drawn keys that falls to this shard, 0..1."""
        return (self.end - self.start + 1) / HASH_SPACE


class ShardMap:
    """The open shards, in hash key order. Position in `shards` is the ordinal used in batches."""

    __slots__ = ("_ordinals", "shards")

    def __init__(self, shards: Iterable[Shard]) -> None:
        """Closed shards are left out. ValueError when the open ones leave a gap or overlap."""
        self.shards: tuple[Shard, ...] = tuple(sorted((s for s in shards if not s.closed), key=lambda s: s.start))
        expected = 0
        for shard in self.shards:
            # A map with a hole or an overlap is no map: a split or merge was read half-way. It is refused as a whole,
            # and read again later.
            if shard.start != expected:
                raise ValueError(
                    f"the open shards do not cover the hash key space: {shard.id} starts at"
                    f" {shard.start}, expected {expected}"
                )
            expected = shard.end + 1
        if expected != HASH_SPACE:
            raise ValueError(f"the open shards end at {expected - 1}, not at 2**128-1")
        self._ordinals = {shard.id: at for at, shard in enumerate(self.shards)}

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def ids(self) -> list[str]:
        return [shard.id for shard in self.shards]

    @property
    def ends(self) -> list[int]:
        """The inclusive end of each open shard, ascending: what the codec's ShardTable takes."""
        return [shard.end for shard in self.shards]

    def ordinal(self, shard_id: str) -> int | None:
        return self._ordinals.get(shard_id)


def shard_in_message(message: str) -> str | None:
    """The shard a throttled entry's ErrorMessage names, or None."""
    found = _SHARD_ID.search(message)
    return found.group() if found else None
