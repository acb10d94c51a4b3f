"""What a run has found, and how it is told: a table, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkin import __version__
from fastkin.bench.ledger import Balance
from fastkin.bench.meter import slope

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan, Sample

_SLOPE_S = 30.0  # of a shorter run it says nothing
_WARM_SHARE = 0.2  # of a run: memory grows while everything is used for the first time
_HALVES = 4  # samples: two are a slope


@dataclass(slots=True, kw_only=True)
class Result:
    """One run. `measured` names the process whose memory, CPU and wake-ups are told."""

    plan: Plan
    measured: str
    seconds: float = 0.0  # from the first message published to the last record stored
    watched_s: float = 0.0  # in which CPU and wake-ups were counted
    messages: int = 0  # that were published
    records: int = 0  # that were stored
    cpu_s: float = 0.0
    wakeups: int = 0
    rss_mb: float = 0.0  # the most that was seen
    calls: int = 0
    throttled: int = 0
    repeated: int = 0  # messages that were published again
    order_errors: int = 0  # acknowledgements out of order
    balance: Balance = field(default_factory=Balance)
    latency_of: str = "published to stored"
    samples: list[Sample] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """All was published, nothing is lost, and nothing was stored that nobody published."""
        return self.balance.good and not self.unpublished

    @property
    def unpublished(self) -> int:
        """Records of the plan that nobody took from the machines: what was measured stood still, or has ended."""
        return max(0, self.plan.records - self.balance.published)

    @property
    def per_s(self) -> float:
        return self.records / self.seconds if self.seconds else 0.0

    @property
    def cpu_us(self) -> float:
        """Per record."""
        return self.cpu_s / self.records * 1e6 if self.records else 0.0

    @property
    def cpu_percent(self) -> float:
        """Of one core."""
        return 100 * self.cpu_s / self.watched_s if self.watched_s else 0.0

    @property
    def wakeups_per_s(self) -> float:
        return self.wakeups / self.watched_s if self.watched_s else 0.0

    @property
    def calls_per_s(self) -> float:
        return self.calls / self.watched_s if self.watched_s else 0.0

    @property
    def rss_slope(self) -> float:
        """MB per hour, of what comes after the first fifth of the run."""
        return slope(self._warm) * 3600

    @property
    def growth(self) -> float | None:
        """MB per hour by which memory goes on growing: the least slope of the warm run and of its halves.

        A leak grows in both halves. An arena that is taken once is a step in one of them, and no growth. None: there
        are too few samples.
        """
        warm = self._warm
        if len(warm) < _HALVES:
            return None
        middle = len(warm) // 2
        return min(slope(part) for part in (warm, warm[:middle], warm[middle:])) * 3600

    @property
    def _warm(self) -> list[tuple[float, float]]:
        """Seconds and MB, without what was taken at first."""
        points = [(each.seconds, each.rss_mb) for each in self.samples if each.rss_mb]
        begin = points[-1][0] * _WARM_SHARE if points else 0.0
        return [point for point in points if point[0] >= begin]

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, figure and meaning."""
        watched = self.watched_s
        rows = [
            ("rate", f"{self.per_s:,.0f}/s", f"records, {self.records:,} in {self.seconds:,.2f} s"),
            ("CPU", f"{self.cpu_us:,.2f} us", f"per record, user and system, of {self.measured}"),
            ("CPU share", f"{self.cpu_percent:,.1f} %", f"of one core, in {watched:,.1f} s"),
            ("RSS", f"{self.rss_mb:,.1f} MB", "the most that was seen"),
            ("wake-ups", f"{self.wakeups_per_s:,.1f}/s", f"voluntary context switches, {self.wakeups:,} in all"),
        ]
        if watched >= _SLOPE_S:
            rows.insert(4, ("RSS slope", f"{self.rss_slope:+,.2f} MB/h", "after the first fifth of the run"))
        if self.calls:
            rows.append(("calls", f"{self.calls_per_s:,.1f}/s", f"{self.records / self.calls:,.1f} records each"))
        rows += [(name, f"{value:,.2f} ms", self.latency_of) for name, value in self.balance.latency_ms.items()]
        if self.throttled:
            rows.append(("throttled", f"{self.throttled:,}", "entries refused for a shard's limit, and sent again"))
        return rows

    def ledger(self) -> list[tuple[str, str, str]]:
        balance = self.balance
        rows = [
            ("published", f"{balance.published:,}", "records"),
            ("stored", f"{balance.stored:,}", "looked up by their bytes"),
            ("duplicates", f"{balance.duplicates:,}", "stored more than once"),
            ("lost", f"{balance.lost:,}", "published, and not stored"),
        ]
        if balance.foreign:
            rows.append(("foreign", f"{balance.foreign:,}", "stored, and never published"))
        return rows

    def told(self) -> dict[str, Any]:
        """For JSON."""
        names = (
            "measured", "seconds", "watched_s", "messages", "records", "per_s", "cpu_s", "cpu_us", "cpu_percent",
            "rss_mb", "rss_slope", "growth", "wakeups", "wakeups_per_s", "calls", "calls_per_s",
            "throttled", "repeated", "order_errors", "latency_of",
        )  # fmt: skip
        return {
            "plan": self.plan.told(),
            "machine": machine(),
            "good": self.good,
            **{name: getattr(self, name) for name in names},
            "ledger": self.balance.told(),
            "samples": [asdict(sample) for sample in self.samples],
        }


def machine() -> dict[str, Any]:
    """Where it was measured: figures of two machines cannot be compared."""
    return {
        "fastkin": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    return text.partition("model name")[2].partition("\n")[0].strip("\t :") or platform.machine()


def table(title: str, rows: list[tuple[str, str, str]]) -> str:
    """Lines for people, in columns."""
    lines = [title]
    lines += [f"  {name:<12}{figure:>16}   {what}" for name, figure, what in rows]
    return "\n".join(lines)


def as_json(told: Any) -> str:
    return json.dumps(told, indent=2)


def samples_csv(samples: list[Sample]) -> str:
    """One row a sample; milliseconds of the latencies, empty when there was nothing to measure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = (
        "seconds", "published", "stored", "per_s", "in_flight", "throttled", "rss_mb", "cpu_percent", "wakeups_per_s",
        "calls_per_s",
    )  # fmt: skip
    shares = ("p50", "p99", "p99.9")
    writer.writerow([*names, *(f"{share}_ms" for share in shares)])
    for each in samples:
        figures = [round(getattr(each, name), 3) for name in names]
        writer.writerow([*figures, *(_rounded(each.latency_ms.get(share)) for share in shares)])
    return out.getvalue()


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)
