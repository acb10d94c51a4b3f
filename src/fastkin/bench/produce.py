"""Who puts records in a run of `producer`, a process of its own, which is also what is measured."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any

from fastkin.bench import times
from fastkin.bench.children import run, serve
from fastkin.bench.peers.producers import Putter, putter
from fastkin.errors import FastkinError

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan

CHUNK = 500  # records that are put one after another: what one PutRecords call takes


class Production:
    """Puts the records of a plan."""

    def __init__(self, plan: Plan, put: Putter) -> None:
        self._plan = plan
        self._put = put
        self._published = times.share(plan)
        self._sent = 0  # messages
        self._task: asyncio.Task[None] | None = None

    def go(self) -> dict[str, Any]:
        self._task = asyncio.create_task(self._run(), name="fastkin-bench producer")
        return {}

    async def _run(self) -> None:
        plan, forms = self._plan, self._plan.forms()
        # A chunk is put at once. At a rate it is as small as a wake-up every two milliseconds allows.
        most = max(1, CHUNK // forms.samples)
        chunk = most if plan.rate is None else max(1, min(most, int(plan.rate * 0.002)))
        begin = time.monotonic()
        for block in range(-(-plan.messages // forms.block)):
            payloads = forms.payloads(block)[: plan.messages - block * forms.block]
            for at in range(0, len(payloads), chunk):
                due = 0.0 if plan.rate is None else begin + self._sent / plan.rate
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                records = [record for payload in payloads[at : at + chunk] for record in forms.records(payload)]
                messages = len(payloads[at : at + chunk])
                times.mark(self._published, self._sent, messages, time.monotonic())
                await self._put.send(records)
                self._sent += messages
        await self._put.flush()

    def report(self) -> dict[str, Any]:
        done = self._task is not None and self._task.done()
        error = ""
        if done and self._task is not None and (raised := self._task.exception()) is not None:
            error = str(raised) if isinstance(raised, FastkinError) else f"{type(raised).__name__}: {raised}"
        return {
            "published": self._sent,
            "acked": self._sent if done else 0,  # flush() came back: every outcome is known
            "repeated": 0,
            "order_errors": 0,
            "done": done,
            "error": error,
            "began": self._published[0],
            "latency_ms": {},
        }


async def main(plan: Plan) -> None:
    async with putter(plan) as put:
        production = Production(plan, put)
        await serve({}, {"go": production.go, "report": production.report})


if __name__ == "__main__":
    sys.exit(run(main))
