"""MQTT in, nothing out: CPU time (user and system) of the receiving process per 152 B message, acknowledged late.

The load source is a process of its own, plays pre-encoded packets over loopback and checks every
acknowledgement and its order. In the first group it is limited by the receiver alone; in the second it
writes 50,000 messages a second one by one, as a broker does, with and without the intake's pauses
between reads. FASTKIN_BENCH_SCALE (1.0) scales the message counts.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from _processes import measured, median, scaled, server

PAYLOAD = 152

COUNTS = {
    "fastkin": 2_000_000,
    "fastkin, MQTT 3.1.1": 2_000_000,
    "fastkin on asyncio": 2_000_000,
    "gmqtt": 60_000,
    "paho": 60_000,
}
LIMIT_US = 0.3  # what the intake may cost, QoS 1 with late acknowledgements


def receive(name: str, count: int, *, qos: int, load: tuple[str, ...] = (), coalesce_ms: float = 2.0) -> dict[str, Any]:
    """One receiver over its load; its report, with what the source says."""
    play = ("-m", "fastkin.bench.source", "--window", "20000", "--messages", str(count), "--qos", str(qos), *load)
    with server(*play) as (source, port):
        report = measured("receivers.py", name, port, str(count), str(qos), str(coalesce_ms))
        out, _ = source.communicate(timeout=60)
        told = json.loads(out.splitlines()[-1])
    assert report["count"] == told["sent"] == count
    assert report["nbytes"] == count * PAYLOAD
    if qos:
        assert told["acked"] == count
        report["order_errors"] = told["order_errors"]
        assert not (name.startswith("fastkin") and report["order_errors"])
    return report


def record(benchmark: Any, reports: list[dict[str, Any]]) -> float:
    cost = median([report["us_per_message"] for report in reports])
    fastest = max(report["count"] / report["wall_s"] for report in reports)
    benchmark.extra_info |= {
        "cpu_us_per_message": round(cost, 3),
        "messages_per_s": round(fastest),
        "order_errors": max(report.get("order_errors", 0) for report in reports),
    }
    if "reads" in reports[0]:
        benchmark.extra_info["messages_per_read"] = round(reports[0]["count"] / reports[0]["reads"], 1)
    return cost


@pytest.mark.parametrize("qos", [1, 0])
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.timeout(300)
def test_received_and_acknowledged_late(benchmark: Any, name: str, qos: int) -> None:
    benchmark.group = f"MQTT QoS {qos} in, 152 B welder JSON, from a source at full speed"
    count = scaled(COUNTS[name])
    reports: list[dict[str, Any]] = []
    benchmark.pedantic(lambda: reports.append(receive(name, count, qos=qos)), rounds=3 if not benchmark.disabled else 1)
    cost = record(benchmark, reports)
    if name == "fastkin" and not benchmark.disabled:
        assert cost <= LIMIT_US


@pytest.mark.parametrize("coalesce_ms", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.timeout(300)
def test_one_write_per_message(benchmark: Any, coalesce_ms: float) -> None:
    benchmark.group = "MQTT QoS 1 in, 50,000 messages/s, one write each"
    count = scaled(150_000)
    reports: list[dict[str, Any]] = []
    load = ("--rate", "50000", "--batch", "1")
    benchmark.pedantic(
        lambda: reports.append(receive("fastkin", count, qos=1, load=load, coalesce_ms=coalesce_ms)),
        rounds=3 if not benchmark.disabled else 1,
    )
    record(benchmark, reports)
