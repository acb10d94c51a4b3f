"""The claims about speed as a gate: fastkin beside its peers, interleaved, outputs compared first, medians of rounds.

    python benches/ratios.py [--rounds N]

CPU time per record (user and system) of the process measured, so that a busy machine disturbs it little, and bounds
well under what a quiet machine shows. Exit code 1, with one line that says so, when a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

os.environ.setdefault("FASTKIN_BENCH_SCALE", "0.5")

import bench_codec
import bench_pipeline
import bench_producer
from _processes import median
from bench_intake import receive

from fastkin import encode_frame

if TYPE_CHECKING:
    from collections.abc import Callable

# -- a bulk frame to a PutRecords body


def spent(run: Callable[[], object], times: int) -> Callable[[], float]:
    """CPU microseconds per record."""

    def measure() -> float:
        began = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - began) / times / bench_codec.RECORDS * 1e6

    return measure


def codecs() -> dict[str, Callable[[], float]]:
    records = bench_codec.records_of(200)
    frame = encode_frame(records)
    for make in (bench_codec.body_of, bench_codec.peer_orjson, bench_codec.peer_json):
        bench_codec.check(make(frame), records)
    return {
        "fastkin": spent(bench_codec.ours(frame), 4000),
        "msgpack, orjson, pybase64": spent(lambda: bench_codec.peer_orjson(frame), 40),
        "msgpack, json, base64": spent(lambda: bench_codec.peer_json(frame), 40),
    }


# -- whole programs


def bridges() -> dict[str, Callable[[], float]]:
    names = ("fastkin", "paho+boto3", "gmqtt+aiobotocore")
    bench_pipeline.check_outputs(names)
    return {name: of(bench_pipeline.bridge, name) for name in names}


def producers() -> dict[str, Callable[[], float]]:
    names = ("fastkin", "aiobotocore")
    bench_producer.check_outputs(names)
    return {name: of(bench_producer.produce, name) for name in names}


def of(run: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> Callable[[], float]:
    return lambda: float(run(*arguments, **options)["us_per_message"])


# what is compared, our contender first; peer -> how many times as much CPU time it must take at least
GROUPS: list[tuple[str, Callable[[], dict[str, Callable[[], float]]], dict[str, float]]] = [
    (
        "bulk frame to request body, 500 x 200 B, UUID keys",
        codecs,
        {"msgpack, orjson, pybase64": 20, "msgpack, json, base64": 20},
    ),
    (
        "intake: MQTT QoS 1 in, acknowledged late, 152 B",
        lambda: {name: of(receive, name, COUNTS[name], qos=1) for name in ("fastkin", "gmqtt", "paho")},
        {"gmqtt": 20, "paho": 20},
    ),
    (
        "pipeline: MQTT QoS 1 in to stored, 152 B",
        bridges,
        {"paho+boto3": 10, "gmqtt+aiobotocore": 10},
    ),
    (
        "producer: put, an outcome per record, 200 B",
        producers,
        {"aiobotocore": 5},
    ),
]
COUNTS = {"fastkin": 1_000_000, "gmqtt": 15_000, "paho": 15_000}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each contender, in turns (%(default)s)")
    rounds = parser.parse_args().rounds
    began = time.monotonic()
    missed = []
    print(f"{'CPU per record, medians of ' + str(rounds):<52} {'us':>9} {'x ours':>7} {'bound':>6}")
    for title, contenders, bounds in GROUPS:
        print(title)
        runs = contenders()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                taken[name].append(run())
        ours = median(taken["fastkin"])
        for name, values in taken.items():
            cost = median(values)
            bound = bounds.get(name)
            print(f"  {name:<50} {cost:9.3f}", "" if bound is None else f"{cost / ours:7.1f} {bound:6.0f}", flush=True)
            if bound is not None and cost < ours * bound:
                missed.append(
                    f"{title.partition(':')[0]}: {name} takes {cost / ours:.1f}x our CPU time, not {bound:g}x"
                )
    print(f"took {time.monotonic() - began:.0f} s")
    if missed:
        print("ratios: MISSED:", "; ".join(missed), file=sys.stderr)
        return 1
    print("ratios: every bound is held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
