"""What stages count with. To count costs one access to a list or a dict, for it happens on the way of the data.

Names may come from a peer. So their number is bounded: a hostile peer must not fill memory with them. Pure.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

OTHER = "other"

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{0,64}")


class LabelledCounter(dict[str, int]):
    """Counts by name. Names come from peers: what is not fit for a label, or one too many, counts as "other"."""

    def __init__(self, most: int = 32) -> None:
        super().__init__()
        self.most = most  # names kept, besides "other"

    def add(self, name: str, count: int) -> None:
        if name not in self and (len(self) >= self.most or not _NAME.fullmatch(name)):
            name = OTHER
        self[name] = self.get(name, 0) + count

    def summing_to(self, total: int, rest: str = OTHER) -> dict[str, int]:
        """A copy in which what nobody counted by name stands under `rest`: its sum is `total`."""
        found = {name: count for name, count in self.items() if count}
        if missing := total - sum(found.values()):
            found[rest] = found.get(rest, 0) + missing
        return found


class Histogram:
    """How many values fell at or below each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds: tuple[float, ...] = tuple(bounds)
        self.counts: list[int] = [0] * (len(self.bounds) + 1)
        self.sum: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def told(self) -> dict[str, float]:
        """Upper bound to how many values fell below it and not below the one before; "sum" to their sum."""
        counts = dict(zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True))
        return {**counts, "sum": self.sum}


@dataclass(slots=True)
class FileCounters:
    """Of a pipeline into files."""

    finished: int = 0
    uploaded: int = 0
    upload_failures: int = 0  # rounds that ended with one
    waiting: int = 0  # finished files that are not in S3 yet
    waiting_bytes: int = 0
