"""The service with a spool as a process: SIGKILL in an outage and in the replay, QoS 0, memory."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from fastkin.emulator import Emulator
from support.running import PeakRss, Plant, service, wait_until
from support.servers import mosquitto

if TYPE_CHECKING:
    from pathlib import Path


MIB = 2**20

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "spool"
clean_session = false
receive_maximum = 20000

[kinesis]
stream = "welders"
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "welders"
topics = ["plant/#"]
qos = {qos}
budget_bytes = {budget}
on_full = "spool"
spool = "{path}"
spool_after_s = 0.5
shutdown_timeout_s = 2
"""


def numbers(emulator: Emulator) -> list[int]:
    return [int(record.data.split(b"-", 1)[0]) for record in emulator.stored("welders")]


@pytest.mark.timeout(180)
def test_killed_in_an_outage_and_in_the_replay(tmp_path: Path) -> None:
    """Nothing is lost; what comes twice was on its way when the process died; memory keeps its bound."""
    budget = 8 * MIB

    async def main() -> None:
        async with Emulator({"welders": 8}) as emulator:
            await asyncio.to_thread(attack, emulator)

    def attack(emulator: Emulator) -> None:
        path = tmp_path / "spool.db"
        with mosquitto("max_queued_messages 0\n") as broker:
            toml = SETTINGS.format(port=broker.port, url=emulator.url, qos=1, budget=budget, path=path)
            with service(tmp_path, toml) as run:
                wait_until(lambda: "subscribed" in run.log(), 20, "subscribed")
                with Plant(broker, 2000.0, 600, 1) as plant:
                    wait_until(lambda: emulator.stored_count("welders") > 1000, 20, "records flow")
                    dead = emulator.faults.cut("before", operation="PutRecords")
                    wait_until(lambda: "spooling to" in run.log(), 20, "it spools")
                    with PeakRss(run) as memory:
                        time.sleep(4.0)
                        size = path.stat().st_size
                        assert size > budget // 3, "little was spooled"
                    run.kill()
                    run.start()
                    wait_until(lambda: "of a former run: they go first" in run.log(), 20, "the spool is found")
                    time.sleep(1.0)
                    before = emulator.stored_count("welders")
                    dead.remove()
                    wait_until(lambda: emulator.stored_count("welders") > before + 1500, 30, "replay")
                    run.kill()
                    run.start()
                    total = plant.stop()
                wait_until(lambda: len(set(numbers(emulator))) >= total, 60, f"{total} messages are stored")
                assert run.terminate() == 0, run.log()[-4000:]
                assert sorted(set(numbers(emulator))) == list(range(total))
                duplicates = len(numbers(emulator)) - total
                print(f"{total} messages, {duplicates} twice, RSS grew by {memory.growth / MIB:.1f} MiB")
                # the share of the budget that is read back, and what was in flight to the broker
                assert duplicates <= budget // 4 // 600 + 4000
                assert memory.growth <= budget * 1.1

    asyncio.run(main())


@pytest.mark.timeout(120)
def test_qos_0_survives_an_outage_and_a_stop(tmp_path: Path) -> None:
    """Stopped while Kinesis is away: exit status 0, everything taken is on the disk, the next run sends it."""

    async def main() -> None:
        async with Emulator({"welders": 4}) as emulator:
            await asyncio.to_thread(attack, emulator)

    def attack(emulator: Emulator) -> None:
        with mosquitto("max_queued_messages 0\n") as broker:
            path = tmp_path / "spool.db"
            toml = SETTINGS.format(port=broker.port, url=emulator.url, qos=0, budget=2 * MIB, path=path)
            with service(tmp_path, toml) as run:
                wait_until(lambda: "subscribed" in run.log(), 20, "subscribed")
                dead = emulator.faults.cut("before", operation="PutRecords")
                with Plant(broker, 1500.0, 600, 0) as plant:
                    time.sleep(5.0)
                    total = plant.stop()
                time.sleep(1.0)
                assert run.terminate() == 0, run.log()[-4000:]
                assert emulator.stored_count("welders") == 0
                dead.remove()
                run.start()
                wait_until(lambda: emulator.stored_count("welders") >= total, 60, f"{total} messages are stored")
                assert run.terminate() == 0
                assert sorted(numbers(emulator)) == list(range(total))

    asyncio.run(main())
