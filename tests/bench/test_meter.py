"""What a process costs, and the figures that are made of samples."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastkin.bench.meter import Cost, cost, percentiles, slope

# A process of its own: threads that ended in this one keep their time only to 10 ms.
SLEEPER = """
import os, time
from fastkin.bench.meter import cost
before = cost(os.getpid())
for _ in range(20):
    time.sleep(0.001)
after = cost(os.getpid())
print(after.wakeups - before.wakeups, after.cpu_s - before.cpu_s, after.rss_mb)
"""


@pytest.mark.process
def test_the_cost_of_a_process() -> None:
    done = subprocess.run([sys.executable, "-c", SLEEPER], capture_output=True, text=True, check=True)
    wakeups, cpu_s, rss_mb = map(float, done.stdout.split())
    assert wakeups >= 20
    assert cpu_s > 0  # less than a tick of 10 ms is seen too
    assert 5 < rss_mb < 5000


def test_a_process_that_is_gone_costs_nothing() -> None:
    assert cost(2**22 + 1) == Cost(0.0, 0.0, 0)


def test_percentiles_are_the_nearest_rank() -> None:
    values = [float(n) for n in range(1000, 0, -1)]
    assert percentiles(values) == {"p50": 500.0, "p99": 990.0, "p99.9": 999.0, "max": 1000.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p99": 3.0, "p99.9": 3.0, "max": 3.0}
    assert percentiles([]) == {}


def test_the_slope_is_that_of_the_line_through_the_points() -> None:
    assert slope([(0.0, 30.0), (10.0, 32.0), (20.0, 34.0)]) == pytest.approx(0.2)
    assert slope([(1.0, 5.0), (1.0, 9.0)]) == 0.0
    assert slope([(1.0, 5.0)]) == 0.0
