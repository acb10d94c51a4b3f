"""Who publishes in a run, a process of its own: the built-in source, or a publisher at a real broker."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from fastkin.bench import times
from fastkin.bench.certificates import server_context
from fastkin.bench.children import run, serve
from fastkin.bench.source import Source
from fastkin.bench.tape import PlantTape
from fastkin.errors import FastkinError
from fastkin.mqtt.publisher import Publisher
from fastkin.settings import load

if TYPE_CHECKING:
    from fastkin.bench.forms import Forms
    from fastkin.bench.plan import Plan

_TICK_S = 0.002  # of a paced publisher that is not behind


async def from_source(plan: Plan) -> None:
    forms, published = plan.forms(), times.share(plan)

    def source(first: int, count: int, siblings: list[Source]) -> Source:
        def written(at: int, messages: int) -> None:
            times.mark(published, first + at, messages, time.monotonic())

        return Source(
            count,
            qos=plan.qos,
            window=plan.window,
            rate=None if plan.rate is None else plan.rate / plan.pipelines,
            batch=plan.batch,
            latency=True,
            tape=lambda version: PlantTape(forms, qos=plan.qos, version=version, first=first),
            held=True,
            on_write=written,
            tls=server_context(plan) if plan.tls_broker else None,
            siblings=siblings,
        )

    first, *others = plan.runs(forms.block)
    siblings = [source(*each, []) for each in others]
    async with source(*first, siblings) as main:
        sources = [main, *siblings]

        async def subscribed() -> dict[str, Any]:
            for each in sources:
                await each.subscribed.wait()
            return {}

        def go() -> dict[str, Any]:
            for each in sources:
                each.go()
            return {}

        def report() -> dict[str, Any]:
            told = [each.report() for each in sources]
            return {
                "published": sum(min(each["sent"], each["messages"]) for each in told),
                "acked": sum(each["acked"] for each in told),
                "repeated": sum(max(0, each["sent"] - each["messages"]) for each in told),
                "order_errors": sum(each["order_errors"] for each in told),
                "done": all(each["done"] for each in told),
                "began": min((published[begin] for begin, _ in plan.runs(forms.block)), default=0.0),
                "latency_ms": told[0].get("latency_ms", {}),
            }

        await serve({"port": main.port}, {"subscribed": subscribed, "go": go, "report": report})


class Machines:
    """Publishes to a broker, as the machines of the plant would."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._forms = plan.forms()
        self._published = times.share(plan)
        self._publisher: Publisher | None = None
        self._task: asyncio.Task[None] | None = None
        self._sent = 0

    def go(self) -> dict[str, Any]:
        self._task = asyncio.create_task(self._run(self._forms), name="fastkin-bench machines")
        return {}

    async def _run(self, forms: Forms) -> None:
        plan = self._plan
        broker = dataclasses.replace(
            load(plan.path("bench.toml")).broker, client_id=f"fastkin-bench-{os.urandom(4).hex()}", clean_session=True
        )
        async with Publisher(broker) as publisher:
            self._publisher = publisher
            begin = time.monotonic()
            ((_, count),) = plan.runs(forms.block)
            for block in range(-(-count // forms.block)):
                for at, payload in enumerate(forms.payloads(block)[: count - block * forms.block]):
                    if plan.rate is not None and (wait := begin + self._sent / plan.rate - time.monotonic()) > 0:
                        await asyncio.sleep(max(wait, _TICK_S) if plan.rate > 1 / _TICK_S else wait)
                    topic = forms.topic(at)
                    if not publisher.publish_nowait(topic, payload, plan.qos):
                        await publisher.publish(topic, payload, plan.qos)
                    times.mark(self._published, self._sent, 1, time.monotonic())
                    self._sent += 1
            await publisher.drain()

    def report(self) -> dict[str, Any]:
        done = self._task is not None and self._task.done()
        error = ""
        if done and self._task is not None and (raised := self._task.exception()) is not None:
            if not isinstance(raised, FastkinError):
                raise raised
            error = str(raised)
        return {
            "published": self._sent,
            "acked": self._publisher.acked if self._publisher is not None else 0,
            "repeated": 0,
            "order_errors": 0,
            "done": done,
            "error": error,
            "began": self._published[0],
            "latency_ms": {},
        }


async def to_broker(plan: Plan) -> None:
    machines = Machines(plan)
    await serve({}, {"go": machines.go, "report": machines.report, "subscribed": dict})


async def main(plan: Plan) -> None:
    await (to_broker if plan.broker_url else from_source)(plan)


if __name__ == "__main__":
    sys.exit(run(main))
