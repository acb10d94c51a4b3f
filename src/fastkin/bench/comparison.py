"""Contenders beside each other: a number of rounds each, in turns, medians and ratios to the first."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass, field
from typing import Any

from fastkin.bench.result import machine


@dataclass(slots=True)
class Contender:
    """Its rounds: CPU microseconds a record, records a second, memory in MB (0: not measured)."""

    name: str
    says: str = ""
    cpu_us: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)

    def add(self, cpu_us: float, per_s: float, rss_mb: float = 0.0) -> None:
        self.cpu_us.append(cpu_us)
        self.per_s.append(per_s)
        self.rss_mb.append(rss_mb)


@dataclass(slots=True)
class Group:
    """Contenders at the same work; the first is fastkin."""

    title: str
    contenders: list[Contender] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # what is not installed, and what it needs

    def rows(self) -> list[dict[str, Any]]:
        ours = statistics.median(self.contenders[0].cpu_us)
        return [
            {
                "group": self.title,
                "name": each.name,
                "cpu_us": statistics.median(each.cpu_us),
                "per_s": statistics.median(each.per_s),
                "rss_mb": max(each.rss_mb),
                "ratio": statistics.median(each.cpu_us) / ours if ours else 0.0,
                "rounds": each.cpu_us,
                "says": each.says,
            }
            for each in self.contenders
        ]

    def table(self) -> str:
        rows = self.rows()
        lines = [self.title, f"  {'':<28}{'CPU us':>10}{'records/s':>14}{'RSS MB':>9}{'ratio':>8}"]
        for row in rows:
            memory = f"{row['rss_mb']:.1f}" if row["rss_mb"] else "-"
            figures = f"{row['cpu_us']:>10.2f}{row['per_s']:>14,.0f}{memory:>9}{row['ratio']:>8.1f}"
            lines.append(f"  {row['name']:<28}{figures}   {row['says']}".rstrip())
        lines += [f"  {name}: left out, needs {needs}" for name, needs in self.left_out]
        return "\n".join(lines)


def told(groups: list[Group], plan: dict[str, Any]) -> dict[str, Any]:
    """For JSON."""
    return {
        "plan": plan,
        "machine": machine(),
        "groups": [{"title": each.title, "rows": each.rows(), "left_out": each.left_out} for each in groups],
    }


def rounds_csv(groups: list[Group]) -> str:
    """One row for each round of each contender."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "contender", "round", "cpu_us", "records_per_s", "rss_mb"])
    for group in groups:
        for each in group.contenders:
            for at, figures in enumerate(zip(each.cpu_us, each.per_s, each.rss_mb, strict=True), 1):
                writer.writerow([group.title, each.name, at, *(round(figure, 3) for figure in figures)])
    return out.getvalue()
