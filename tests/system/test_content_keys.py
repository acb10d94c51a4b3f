"""Keys made from content, over a crash: what the broker sends again is stored under the key that it had."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastkin import Consumer, content_key, encode_frame
from fastkin.config import Broker
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from support.running import service, wait_until
from support.servers import ACCESS_KEY, SECRET_KEY, Server, mosquitto

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "content"
clean_session = false

[kinesis]
stream = "welders"
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "welders"
topics = ["plant/#"]
bulk_label = "A"
partition_key = "content"
"""

EVENTS = [b'{"n":%d}' % n for n in range(20)]
FRAME = [b"5", b"5", b"6"]
BULK_TOPIC = "/devices/7/bulkData/A"


async def publish(broker: Server) -> None:
    async with Publisher(Broker(host=broker.host, port=broker.port, clean_session=True)) as publisher:
        for event in EVENTS:
            await publisher.publish("plant/7", event, 1)
        await publisher.publish(BULK_TOPIC, encode_frame(FRAME), 1)
        await publisher.drain()


async def consumed(url: str, count: int) -> list[bytes]:
    """What a consumer with `dedupe` is given, when it has looked at so many records."""
    taken: list[bytes] = []
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "region": "us-east-1"}
    async with Consumer("welders", endpoint_url=url, **keys, raw=True, dedupe=1000, partition_key="content") as one:

        async def read() -> None:
            async for record in one.stream("trim_horizon"):
                taken.append(record.raw)  # noqa: PERF401 - it is looked at when this is cancelled

        reading = asyncio.create_task(read())
        async with asyncio.timeout(30):
            while one.stats()["records"] + one.stats()["duplicates"] < count:
                await asyncio.sleep(0.02)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return taken


def test_a_redelivery_after_sigkill_has_the_same_key(tmp_path: Path) -> None:
    """Everything is stored and nothing answered when the process is killed: everything comes twice."""
    many = len(EVENTS) + len(FRAME)

    async def main() -> None:
        async with Emulator({"welders": 4}) as emulator:
            await asyncio.to_thread(attack, emulator)
            assert sorted(await consumed(emulator.url, 2 * many)) == sorted(EVENTS + FRAME)

    def attack(emulator: Emulator) -> None:
        with (
            mosquitto() as broker,
            service(tmp_path, SETTINGS.format(port=broker.port, url=emulator.url)) as run,
        ):
            wait_until(lambda: "subscribed" in run.log(), 20, "subscribed")
            silent = emulator.faults.latency(60_000, operation="PutRecords")  # behind the storing
            asyncio.run(publish(broker))
            wait_until(lambda: emulator.stored_count("welders") == many, 20, "everything is stored")
            run.kill()
            silent.remove()
            run.start()
            wait_until(lambda: emulator.stored_count("welders") == 2 * many, 20, "everything is stored again")
            assert run.terminate() == 0, run.log()[-4000:]
        stored = sorted((record.data, record.partition_key) for record in emulator.stored("welders"))
        frame = encode_frame(FRAME)
        expected = [(event, content_key(event, "plant/7")) for event in EVENTS]
        expected += [(data, content_key(frame, BULK_TOPIC, index)) for index, data in enumerate(FRAME)]
        assert stored == sorted(2 * expected)

    asyncio.run(main())
