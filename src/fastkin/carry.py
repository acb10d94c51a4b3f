"""What stays of a run that a reload replaced: its counters go on in its successor's. Pure.

Counters of one pipeline must not go backwards when it is restarted, and the accounting identity must hold at every
look. Records that a run left unsettled are owed: the broker sends them again (or the spool gives them back), and the
successor counts them as received again. Until it has received as many, they count as in flight, and the first ones it
receives are not counted twice.
"""

from __future__ import annotations

from typing import Any

# of now: the present run's alone; everything else that is a number adds up
_PRESENT = frozenset({"peak_bytes", "state", "last_error", "spooling", "spool_error"})
# of now as well, and an ended run has none
_GAUGES = ("volatile", "buffered_bytes", "calls_open", "unacked", "spool_rows", "spool_bytes", "spool_bytes_limit")


class Carry:
    """The sums of the runs of one pipeline that have ended."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.owed = 0
        self.lost = 0  # were in flight, and nobody kept them

    def add(self, stats: dict[str, Any]) -> None:
        """The last numbers of a run; `volatile` says how many in flight nobody else keeps."""
        stats = dict(stats)
        paid = min(self.owed, stats.get("received", 0))
        self.owed -= paid
        stats["received"] = stats.get("received", 0) - paid
        lost = stats.get("volatile", 0)
        self.lost += lost
        self.owed += stats.pop("in_flight", 0) + stats.pop("spooled", 0) - lost
        for name in _GAUGES:
            stats.pop(name, None)
        _add(self.sums, stats)


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
        again = min(carry.owed, found.get("received", 0))
        _add(found, {name: value for name, value in carry.sums.items() if name not in _PRESENT})
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
