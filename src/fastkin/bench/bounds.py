"""What a soak may cost: CPU, growth of memory, wake-ups and calls, each with a bound that a gate can rely on.

Wake-ups and calls hardly depend on what else the machine does; the CPU share does, so its bound can be widened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkin.bench.result import Result

RATE = 100.0  # messages a second that the defaults are for; of a higher rate they are as many times more
CPU_PERCENT = 1.5  # of one core: 150 us a message
GROWTH_MB_H = 1.0
# Tables that fill once are no leak: a session's has a place for each of 65,535 packet ids, and at 100 messages a second
# eleven minutes pass before all are used. A leak of 11 bytes a message passes
# in 60,000 messages, and a smaller one in more.
ONCE_MB = 0.5
WAKEUPS_PER_S = 200.0  # a message is read, and its call is answered: more is a timer that nobody needs
CALLS_PER_S = 70.0  # a hundred would be a call for each message: linger gathers none then
_STEADY_S = 30.0  # a start is dearer than what follows
_GROWTH_S = 300.0  # at 1 MB/h memory has grown by 20 pages then


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure beside its bound."""

    name: str
    figure: float | None  # None: it could not be measured
    most: float
    unit: str
    judged: bool  # False: the run was too short to say anything

    @property
    def held(self) -> bool:
        """What was to be judged and could not be measured is not held: a gate must not pass for want of figures."""
        return not self.judged or (self.figure is not None and self.figure <= self.most)

    def row(self) -> tuple[str, str, str]:
        """As `table` of result.py wants it."""
        how = "too short a run to judge" if not self.judged else "held" if self.held else "EXCEEDED"
        return self.name, f"{self.text} {self.unit}", f"at most {self.most:,.4g} {self.unit}: {how}"

    @property
    def text(self) -> str:
        return "?" if self.figure is None else f"{self.figure:,.2f}"

    def told(self) -> dict[str, Any]:
        return {
            "name": self.name, "figure": self.figure, "most": self.most, "unit": self.unit, "judged": self.judged,
            "held": self.held,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """None: the default, which is judged when the run is long enough. One that is given is judged always."""

    cpu_percent: float | None = None
    growth_mb_h: float | None = None
    wakeups_per_s: float | None = None
    calls_per_s: float | None = None

    def verdicts(self, result: Result) -> list[Verdict]:
        faster = max(1.0, (result.plan.rate or RATE) / RATE)
        growth = GROWTH_MB_H + (ONCE_MB * 3600 / result.watched_s if result.watched_s else 0.0)
        # without /proc there are only zeros
        measured = result.rss_mb > 0
        steady, long = result.watched_s >= _STEADY_S, result.watched_s >= _GROWTH_S

        def verdict(
            name: str, figure: float | None, given: float | None, default: float, unit: str, enough: bool
        ) -> Verdict:
            most = default if given is None else given
            return Verdict(name, figure if measured else None, most, unit, enough or given is not None)

        return [
            verdict("CPU share", result.cpu_percent, self.cpu_percent, CPU_PERCENT * faster, "%", steady),
            verdict("RSS growth", result.growth, self.growth_mb_h, growth, "MB/h", long),
            verdict("wake-ups", result.wakeups_per_s, self.wakeups_per_s, WAKEUPS_PER_S * faster, "/s", steady),
            verdict("calls", result.calls_per_s, self.calls_per_s, CALLS_PER_S * faster, "/s", steady),
        ]
