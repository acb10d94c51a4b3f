"""What stays of a run that a reload replaced: its counters go on in its successor's. Pure.

Counters of one pipeline must not go backwards when it is restarted, and the accounting identity must hold at every
look. Records that a run left unsettled are owed: the broker sends them again (or the spool gives them back), and the
successor counts them as received again. Until it has received as many, they count as in flight, and the first ones it
receives are not counted twice.
"""

from __future__ import annotations

from operator import add
from typing import Any

from fastkin.status.registry import BY_KEY, Reload

_SUMS = frozenset(key for key, row in BY_KEY.items() if row.reload is Reload.SUMMED)
# what is told of a pipeline that has no run just now
_IDLE = {key: row.idle for key, row in BY_KEY.items() if key not in _SUMS}


class Carry:
    """The sums of the runs of one pipeline that have ended."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.owed: int = 0
        self.lost: int = 0  # were in flight, and nobody kept them
        self._from = 0  # what runs at work had received when the debt was last reckoned: that pays none of it

    def paid(self, received: int) -> int:
        """How much of the debt is paid when the runs at work have received so many."""
        return min(self.owed, max(0, received - self._from))

    # An example: a run received 100 and stored 90, then it is replaced; 10 are owed. The broker sends these 10 again
    # and 5 new ones. The successor has received 15, of which 10 pay the debt: together 105, and no counter went back.
    def add(self, stats: dict[str, Any], *, beside: int = 0) -> None:
        """The last numbers of a run; `volatile` says how many in flight nobody else keeps. `beside`: what other
        runs of the pipeline, which are at work, have received so far."""
        paid = self.paid(stats.get("received", 0) + beside)
        lost = stats.get("volatile", 0)
        self.lost += lost
        self.owed += stats.get("in_flight", 0) + stats.get("spooled", 0) - lost - paid
        self._from = beside
        _add(self.sums, {key: value for key, value in stats.items() if key in _SUMS})
        self.sums["received"] = self.sums.get("received", 0) - paid


def merged(carry: Carry | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one pipeline: what ended, what is leaving, and what is at work, which comes last."""
    if carry is None and len(runs) == 1:
        return runs[0]
    found: dict[str, Any] = {}
    for run in runs:
        _add(found, run)
    found = _IDLE | found
    if carry is not None:
        # Records that the broker sent once more were counted by the run that ended: they are one record, and count
        # once.
        again = carry.paid(found.get("received", 0))
        _add(found, carry.sums)
        found["received"] -= again
        found["in_flight"] += carry.owed - again + carry.lost
        found["volatile"] += carry.lost
    return found


def _add(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        latest = key not in into or BY_KEY[key].reload is Reload.LATEST
        into[key] = value if latest else _sum(into[key], value)


def _sum(one: Any, other: Any) -> Any:
    """Of two figures of a kind: label by label, bucket by bucket, place by place. Both stay as they are."""
    if isinstance(one, dict):
        return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}
    if isinstance(one, tuple):
        return tuple(map(add, one, other))
    return one + other
