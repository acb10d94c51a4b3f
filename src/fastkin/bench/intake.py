"""The intake alone, a process of its own: messages are taken, counted and acknowledged a little later.

Later, because stored records are: an intake that acknowledges at once would never fill its window.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from fastkin.bench.children import run, serve
from fastkin.mqtt._core import AckTracker, CountSink, Router
from fastkin.mqtt.subscriber import Subscriber
from fastkin.settings import load

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan

_DELAY_S = 0.005  # between a read and its acknowledgements: a stored record takes at least as long


async def main(plan: Plan) -> None:
    loop = asyncio.get_running_loop()
    acks, router = AckTracker(), Router()
    sink = CountSink(acks)
    subscription = plan.forms().filter
    router.add(subscription, sink)
    timer: asyncio.TimerHandle | None = None

    def acknowledge() -> None:
        nonlocal timer
        timer = None
        sink.release()
        subscriber.flush_acks()

    def on_read() -> None:
        nonlocal timer
        if timer is None:
            timer = loop.call_later(_DELAY_S, acknowledge)

    broker = load(plan.path("bench.toml")).broker
    subscriber = Subscriber(broker, [(subscription, plan.qos)], router=router, acks=acks, on_read=on_read)

    def report() -> dict[str, Any]:
        return {"received": sink.messages, "bytes": sink.nbytes, "reads": subscriber.traffic.reads}

    async def subscribed() -> None:
        await subscriber.connected.wait()

    task = asyncio.create_task(subscriber.run())
    try:
        await serve({}, {"report": report, "subscribed": subscribed})
    finally:
        await subscriber.close()
        await task


if __name__ == "__main__":
    sys.exit(run(main))
