"""What stays of a run that a reload replaced: its counters go on in its successor's. Pure.

Counters of one pipeline must not go backwards when it is restarted, and the accounting identity must hold at every
look. Records that a run left unsettled are owed: the broker sends them again (or the spool gives them back), and the
successor counts them as received again. Until it has received as many, they count as in flight, and the first ones it
receives are not counted twice.
"""

from __future__ import annotations

from typing import Any

# What adds up over runs. Everything else is of now, and an ended run has none of it.
SUMS = frozenset({
    "received", "decoded", "stored", "dead_lettered", "filtered", "dropped", "messages", "unrouted", "batched", "sent",
    "calls", "calls_failed", "retries", "throttled", "duplicates_possible", "redelivered", "connects", "paused_s",
    "flushes", "spooled_ever", "spool_damaged_rows", "dead_letters_deleted", "format_errors", "dead_lettered_by",
    "dropped_by", "retried_by_code", "throttled_by_shard", "calls_failed_by_code", "flushed_by_reason", "call_seconds",
    "batch_fill", "stalls",
})  # fmt: skip
# of now: the present run's alone; of runs that are at work at once the other numbers add up
_PRESENT = frozenset({"peak_bytes", "state", "last_error", "spooling", "spool_error"})
# what is told of a pipeline that has no run just now
_GAUGES = ("volatile", "buffered_bytes", "calls_open", "unacked", "spool_rows", "spool_bytes", "spool_bytes_limit")


class Carry:
    """The sums of the runs of one pipeline that have ended."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.owed = 0
        self.lost = 0  # were in flight, and nobody kept them
        self._from = 0  # what runs at work had received when the debt was last reckoned: that pays none of it

    def paid(self, received: int) -> int:
        """How much of the debt is paid when the runs at work have received so many."""
        return min(self.owed, max(0, received - self._from))

    def add(self, stats: dict[str, Any], *, beside: int = 0) -> None:
        """The last numbers of a run; `volatile` says how many in flight nobody else keeps. `beside`: what other
        runs of the pipeline, which are at work, have received so far."""
        paid = self.paid(stats.get("received", 0) + beside)
        lost = stats.get("volatile", 0)
        self.lost += lost
        self.owed += stats.get("in_flight", 0) + stats.get("spooled", 0) - lost - paid
        self._from = beside
        _add(self.sums, {name: value for name, value in stats.items() if name in SUMS})
        self.sums["received"] = self.sums.get("received", 0) - paid


def merged(carry: Carry | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one pipeline: what ended, what is leaving, and what is at work, which comes last."""
    if carry is None and len(runs) == 1:
        return runs[0]
    found: dict[str, Any] = {"state": "closed", "last_error": None}
    for run in runs:
        _add(found, run)
    for name in ("in_flight", "spooled", "peak_bytes", *_GAUGES):
        found.setdefault(name, 0)
    if carry is not None:
        again = carry.paid(found.get("received", 0))
        _add(found, carry.sums)
        found["received"] -= again
        found["in_flight"] += carry.owed - again + carry.lost
        found["volatile"] += carry.lost
    return found


def _add(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if name in _PRESENT or isinstance(value, bool):
            into[name] = value
        elif isinstance(value, dict):
            into[name] = dict(into.get(name, {}))
            _add(into[name], value)
        elif isinstance(value, list | tuple) and value and all(isinstance(each, int | float) for each in value):
            before = into.get(name) or [0] * len(value)
            into[name] = type(value)(one + other for one, other in zip(before, value, strict=True))
        elif isinstance(value, int | float):
            into[name] = into.get(name, 0) + value
        else:
            into[name] = value
