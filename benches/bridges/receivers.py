"""Receivers for bench_intake.py, each a process: receivers.py NAME PORT COUNT QOS [coalesce_ms].

All subscribe, count what comes and acknowledge later, in order: the peers 500 at a time, fastkin 5 ms after
a read, so that up to 20,000 messages wait. Printed is the process's own CPU time per message.
"""

from __future__ import annotations

import asyncio
import sys

from _measure import Meter

BATCH = 500
DELAY_S = 0.005
NAME, PORT, COUNT, QOS = sys.argv[1], *map(int, sys.argv[2:5])
COALESCE_MS = float(sys.argv[5]) if len(sys.argv) > 5 else 2.0


async def with_fastkin(version: str) -> None:
    from fastkin.config import Broker
    from fastkin.mqtt._core import AckTracker, CountSink, Router
    from fastkin.mqtt.subscriber import Subscriber

    loop = asyncio.get_running_loop()
    acks, router = AckTracker(), Router()
    sink = CountSink(acks)
    router.add("plant/#", sink)
    finished = asyncio.Event()
    timer: asyncio.TimerHandle | None = None

    def acknowledge() -> None:
        nonlocal timer
        timer = None
        sink.release()
        subscriber.flush_acks()
        if sink.messages >= COUNT:
            finished.set()

    def on_read() -> None:
        nonlocal timer
        if timer is None:
            timer = loop.call_later(DELAY_S, acknowledge)

    broker = Broker(
        host="127.0.0.1",
        port=PORT,
        client_id="bench",
        protocol=version,
        receive_maximum=20_000,
        coalesce_ms=COALESCE_MS,
    )  # type: ignore[arg-type]
    subscriber = Subscriber(broker, [("plant/#", QOS)], router=router, acks=acks, on_read=on_read)
    meter = Meter()
    task = asyncio.create_task(subscriber.run())
    await finished.wait()
    meter.report(sink.messages, nbytes=sink.nbytes, reads=subscriber.traffic.reads)
    await subscriber.close()
    await task


async def with_gmqtt() -> None:
    from gmqtt import Client
    from gmqtt.mqtt.constants import MQTTv311

    finished = asyncio.Event()
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[int]] = []
    count = nbytes = 0

    def settle() -> None:
        for done in waiting:
            done.set_result(0)
        waiting.clear()

    async def on_message(client: Client, topic: str, payload: bytes, qos: int, properties: object) -> int:
        nonlocal count, nbytes
        count += 1
        nbytes += len(payload)
        if count >= COUNT:
            loop.call_soon(settle)
            loop.call_soon(finished.set)
        if not qos:
            return 0
        done: asyncio.Future[int] = loop.create_future()
        waiting.append(done)
        if len(waiting) == BATCH:
            settle()
        return await done

    client = Client("bench", clean_session=True, optimistic_acknowledgement=False)
    client.on_message = on_message
    client.on_connect = lambda client, *rest: client.subscribe("plant/#", QOS)
    meter = Meter()
    await client.connect("127.0.0.1", PORT, version=MQTTv311)
    await finished.wait()
    await asyncio.sleep(0)
    meter.report(count, nbytes=nbytes)
    await asyncio.sleep(0.2)  # its acknowledgements are tasks: let them go out
    await client.disconnect()


def with_paho() -> None:
    import threading

    import paho.mqtt.client as mqtt

    finished = threading.Event()
    waiting: list[tuple[int, int]] = []
    count = nbytes = 0

    def on_message(client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
        nonlocal count, nbytes
        count += 1
        nbytes += len(message.payload)
        if QOS:
            waiting.append((message.mid, message.qos))
        if len(waiting) >= BATCH or count >= COUNT:
            for mid, qos in waiting:
                client.ack(mid, qos)
            waiting.clear()
        if count >= COUNT:
            finished.set()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="bench", manual_ack=True)
    client.on_message = on_message
    client.on_connect = lambda client, *rest: client.subscribe("plant/#", QOS)
    meter = Meter()
    client.connect("127.0.0.1", PORT)
    client.loop_start()
    finished.wait()
    meter.report(count, nbytes=nbytes)
    client.disconnect()
    client.loop_stop()


if NAME == "paho":
    with_paho()
else:
    import uvloop

    if NAME == "gmqtt":
        uvloop.run(with_gmqtt())
    else:
        run = asyncio.run if "asyncio" in NAME else uvloop.run
        run(with_fastkin("3.1.1" if "3.1.1" in NAME else "5"))
