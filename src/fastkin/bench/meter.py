"""What a process costs, as /proc tells it: memory, CPU time and wake-ups.

Wake-ups are voluntary context switches, of all threads. They are the figure to trust at low rates.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of all threads of a process, those that have ended too."""

    rss_mb: float = 0.0  # memory that is in RAM now
    cpu_s: float = 0.0  # user and system, since its start
    wakeups: int = 0  # voluntary context switches of the threads that are there: waits that came to an end


def cost(pid: int) -> Cost:
    """Now; zeros when the process has ended, or where there is no /proc."""
    proc = Path(f"/proc/{pid}")
    try:
        ticks = (proc / "stat").read_text().rpartition(")")[2].split()
        pages = int((proc / "statm").read_text().split()[1])
        threads = [_thread(task) for task in (proc / "task").iterdir()]
    except (OSError, IndexError):
        return Cost()
    # The process has the time of ended threads too, to 10 ms; its threads have theirs to the nanosecond.
    cpu = max((int(ticks[11]) + int(ticks[12])) * _TICK_S, sum(on_cpu for on_cpu, _ in threads) / 1e9)
    return Cost(pages * _PAGE / 1e6, cpu, sum(wakeups for _, wakeups in threads))


def _thread(task: Path) -> tuple[int, int]:
    """Nanoseconds on a CPU, and waits that came to an end."""
    try:
        status = (task / "status").read_text()
        on_cpu = (task / "schedstat").read_text()
    except OSError:  # a thread that ended while we looked
        return 0, 0
    return int(on_cpu.split()[0]), int(status.partition("\nvoluntary_ctxt_switches:")[2].split(maxsplit=1)[0])


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares: how much y grows with each x. 0 for fewer than two places of x."""
    if len(points) < 2:
        return 0.0
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99, p99.9 and max of some values, by nearest rank; {} of none. Sorts them in place."""
    if not values:
        return {}
    values.sort()
    last = len(values) - 1
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    # nearest rank: the smallest value that is not below the share of all
    return {name: values[min(last, math.ceil(share * len(values)) - 1)] for name, share in shares.items()}
