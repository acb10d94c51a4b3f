"""Embedding: records of 200 B one by one or in lists of 500, an outcome for each, CPU of the producer per record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from _processes import counting_kinesis, measured, median, read_back, scaled

if TYPE_CHECKING:
    from collections.abc import Iterable

COUNTS = {"fastkin": 400_000, "fastkin-many": 400_000, "aiobotocore": 40_000, "capo-kinesis": 40_000, "aiokpl": 5_000}


def produce(name: str) -> dict[str, Any]:
    with counting_kinesis(*(["routed"] if name == "aiokpl" else [])) as (_, url):
        return measured("produce.py", name, url, str(scaled(COUNTS[name])), "200")


def check_outputs(names: Iterable[str], count: int = 3_000) -> None:
    """All of them store the records they were given."""
    want = sorted(b"%08d" % (n % 1000) + b"x" * 192 for n in range(count))
    for name in names:
        with counting_kinesis("keep") as (_, url):
            measured("produce.py", name, url, str(count), "200")
            assert read_back(url) == want, f"{name} stored something else than was put"


@pytest.mark.timeout(300)
def test_all_store_the_same() -> None:
    check_outputs(name for name in COUNTS if name != "aiokpl")  # which aggregates


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.timeout(600)
def test_put_with_an_outcome_per_record(benchmark: Any, name: str) -> None:
    benchmark.group = "put, 200 B, outcome per record"
    reports: list[dict[str, Any]] = []
    benchmark.pedantic(lambda: reports.append(produce(name)), rounds=1 if benchmark.disabled else 3)
    benchmark.extra_info |= {
        "cpu_us_per_record": round(median([report["us_per_message"] for report in reports]), 2),
        "rss_mb": round(max(report["rss_mb"] for report in reports), 1),
    }
