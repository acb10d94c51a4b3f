"""The whole path, MQTT QoS 1 in to stored and acknowledged, as one process each: fastkin beside its peers.

A load source plays pre-encoded 152 B welder messages over loopback, a counting Kinesis answers; both are
processes of their own. What is compared is the CPU time (user and system) of the bridging process per
message, from its start of connecting to the last stored record. FASTKIN_BENCH_SCALE scales the counts.
"""

from __future__ import annotations

import json
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import pytest
from _processes import counting_kinesis, measured, median, read_back, scaled, server

from fastkin.bench.source import welders

if TYPE_CHECKING:
    from collections.abc import Iterable

# script, more arguments, messages, when it acknowledges
BRIDGES = {
    "fastkin": ("with_fastkin.py", [], 400_000, "after storing"),
    "paho+boto3": ("with_paho_boto3.py", [], 15_000, "before storing"),
    "gmqtt+aiobotocore": ("with_gmqtt_aiobotocore.py", [], 40_000, "before storing"),
    "gmqtt+aiobotocore, ack after": ("with_gmqtt_aiobotocore.py", ["after"], 40_000, "after storing"),
}


def bridge(name: str, *, qos: int = 1, count: int = 0, stored: list[bytes] | None = None) -> dict[str, Any]:
    """Run one bridge over its load; its report, checked against what the source saw. `stored` gets what was stored."""
    script, more, messages, _ = BRIDGES[name]
    count = count or scaled(messages)
    load = ("-m", "fastkin.bench.source", "--messages", str(count), "--qos", str(qos), "--window", "20000")
    kinesis = counting_kinesis(*([] if stored is None else ["keep"]))
    with kinesis as (_, url), server(*load) as (source, port):
        report = measured(script, port, url, str(count), str(qos), *more)
        out, _ = source.communicate(timeout=60)
        if stored is not None:
            stored += read_back(url)
    seen = json.loads(out.splitlines()[-1])
    assert seen["sent"] >= count
    if qos:
        assert seen["acked"] == count
        assert seen["order_errors"] == 0
    return report


def check_outputs(names: Iterable[str], count: int = 3_000) -> None:
    """All of them store what the source sent."""
    want = sorted(islice(cycle(welders()), count))
    for name in names:
        stored: list[bytes] = []
        bridge(name, count=count, stored=stored)
        assert stored == want, f"{name} stored something else than was sent"


@pytest.mark.timeout(300)
def test_all_store_the_same() -> None:
    check_outputs(BRIDGES)


@pytest.mark.parametrize("name", BRIDGES)
@pytest.mark.timeout(600)
def test_qos1_to_stored_and_acknowledged(benchmark: Any, name: str) -> None:
    benchmark.group = "MQTT QoS 1 to stored, 152 B welder JSON"
    reports: list[dict[str, Any]] = []
    benchmark.pedantic(lambda: reports.append(bridge(name)), rounds=1 if benchmark.disabled else 3)
    benchmark.extra_info |= {
        "acknowledges": BRIDGES[name][3],
        "cpu_us_per_message": round(median([report["us_per_message"] for report in reports]), 2),
        "rss_mb": round(max(report["rss_mb"] for report in reports), 1),
    }
