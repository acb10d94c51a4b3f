"""The guarantee under force: SIGKILL in mid-flow, and a stream that takes a tenth of what is offered."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from fastkin.emulator import Emulator
from support.running import CountingProxy, PeakRss, Plant, service, wait_until
from support.servers import mosquitto

if TYPE_CHECKING:
    from pathlib import Path


MIB = 2**20
# 20 s show what fills up and for how long nothing grows; ci/run takes the 60 s that are promised.
DEAD_S = float(os.environ.get("TEST_DEAD_S", "20"))

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "guarantee"
clean_session = false
receive_maximum = {window}

[kinesis]
stream = "welders"
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "welders"
topics = ["plant/#"]
budget_bytes = {budget}
"""


def numbers(emulator: Emulator) -> Counter[int]:
    return Counter(int(record.data.split(b"-", 1)[0]) for record in emulator.stored("welders"))


@pytest.mark.timeout(240)
def test_sigkill_in_mid_flow_loses_nothing(tmp_path: Path) -> None:
    """Killed three times; what comes twice was in flight at a kill."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def main() -> None:
        async with Emulator({"welders": 4}, latency_ms=30) as emulator:
            await asyncio.to_thread(attack, emulator)

    def attack(emulator: Emulator) -> None:
        with (
            mosquitto("max_queued_messages 0\n") as broker,
            CountingProxy(broker.port) as proxy,
            service(tmp_path, SETTINGS.format(port=proxy.port, window=1000, url=emulator.url, budget=16 * MIB)) as run,
        ):
            wait_until(lambda: "subscribed" in run.log(), 20, "subscribed")
            in_flight = 0
            with Plant(broker, rate=2500, size=152) as plant:
                for _ in range(3):
                    target = emulator.stored_count("welders") + 2000
                    wait_until(lambda t=target: emulator.stored_count("welders") > t, 30, "records flow")
                    time.sleep(rng.random() * 0.5)
                    run.kill()
                    wait_until(lambda: proxy.closed, 10, "the connection is gone")
                    in_flight += proxy.unacked_at_cut[-1]
                    run.start()
                plant.stop()
                total = plant.published
            wait_until(lambda: emulator.stored_count("welders") >= total, 60, f"{total} messages are stored")
            wait_until(lambda: len(numbers(emulator)) == total, 10, "every message is stored")
            wait_until(lambda: proxy.unacked == 0, 20, "every message is acknowledged")
            assert run.terminate() == 0, run.log()[-4000:]
            stored = numbers(emulator)
            assert set(stored) == set(range(total)), "messages are lost"
            assert in_flight > 0, "nothing was in flight at any kill: this run proves nothing"
            duplicates = stored.total() - total
            assert duplicates <= in_flight, f"{duplicates} duplicates, {in_flight} were in flight"

    asyncio.run(main())


@pytest.mark.timeout(240)
def test_throttling_to_a_tenth_bounds_memory_and_loses_nothing(tmp_path: Path) -> None:
    """30 s at a tenth of the offered load: RSS within budget + 10 %, full rate within 2 s after, nothing lost."""
    offered, budget = 2000.0, 16 * MIB

    async def main() -> None:
        async with Emulator({"welders": 4}, latency_ms=20) as emulator:
            await asyncio.to_thread(attack, emulator)

    def attack(emulator: Emulator) -> None:
        with (
            mosquitto("max_queued_messages 0\n") as broker,
            service(tmp_path, SETTINGS.format(port=broker.port, window=20000, url=emulator.url, budget=budget)) as run,
        ):
            wait_until(lambda: "subscribed" in run.log(), 20, "subscribed")
            with Plant(broker, offered, size=600) as plant:
                wait_until(lambda: emulator.stored_count("welders") > 5 * offered, 30, "records flow")
                with PeakRss(run) as memory:
                    emulator.scale_limits("welders", offered / 10 / 4000)
                    time.sleep(30.0)
                throttled = emulator.stored_count("welders")
                emulator.scale_limits("welders", 1.0)
                time.sleep(2.0)
                whole = emulator.stored_count("welders")
                time.sleep(2.0)
                rate = (emulator.stored_count("welders") - whole) / 2.0
                plant.stop()
                total = plant.published
                assert throttled < total - 10 * offered, "the throttle did not bite"
                wait_until(lambda: emulator.stored_count("welders") >= total, 60, f"{total} messages are stored")
                wait_until(lambda: len(numbers(emulator)) == total, 10, "every message is stored")
                assert run.terminate() == 0, run.log()[-4000:]
                assert set(numbers(emulator)) == set(range(total)), "messages are lost"
                assert memory.growth <= budget * 1.1, f"RSS grew by {memory.growth / MIB:.1f} MiB"
                print(f"RSS grew by {memory.growth / MIB:.1f} MiB, {rate:.0f} records/s after")
                assert rate >= offered, (
                    f"{rate:.0f} records/s two seconds after the throttle, {offered:.0f} are offered"
                )

    asyncio.run(main())


@pytest.mark.timeout(160 + DEAD_S)  # what it waits for besides: 20 s, 30 s and 60 s at most, and the ends of processes
def test_a_dead_kinesis_bounds_memory_and_loses_nothing(tmp_path: Path) -> None:
    """No answer while the plant goes on: RSS within budget + 10 %, then everything is stored."""
    budget = 8 * MIB

    async def main() -> None:
        async with Emulator({"welders": 8}) as emulator:
            await asyncio.to_thread(attack, emulator)

    def attack(emulator: Emulator) -> None:
        with (
            mosquitto("max_queued_messages 0\n") as broker,
            service(tmp_path, SETTINGS.format(port=broker.port, window=20000, url=emulator.url, budget=budget)) as run,
        ):
            wait_until(lambda: "subscribed" in run.log(), 20, "subscribed")
            with Plant(broker, 2000.0, size=600) as plant:
                wait_until(lambda: emulator.stored_count("welders") > 4000, 30, "records flow")
                before = peak = run.rss()
                dead = emulator.faults.cut("before", operation="PutRecords")
                until = time.monotonic() + DEAD_S
                while time.monotonic() < until:
                    peak = max(peak, run.rss())
                    time.sleep(0.1)
                calls = emulator.counters.calls
                dead.remove()
                plant.stop()
                total = plant.published
            wait_until(lambda: emulator.stored_count("welders") >= total, 60, f"{total} messages are stored")
            peak = max(peak, run.rss())
            assert run.terminate() == 0, run.log()[-4000:]
            assert set(numbers(emulator)) == set(range(total)), "messages are lost"
            assert peak - before <= budget * 1.1, f"RSS grew by {(peak - before) / MIB:.1f} MiB"
            assert calls < 400, f"{calls} calls: a retry storm"

    asyncio.run(main())
