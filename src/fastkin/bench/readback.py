"""The ledger of a run against a Kinesis that is not ours: the stream is read again from where the run began."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from fastkin.bench.ledger import Balance, Ledger
from fastkin.consumer import Consumer, Position, ShardIteratorType

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan

_QUIET_S = 15.0  # without a new record: what is missing then is not there
_EARLIER_S = 5.0  # the endpoint's clock may be behind ours


async def read_back(plan: Plan, began: float) -> Balance:
    """`began`: seconds since the epoch. Records that are not of this plan are left out: others may write too."""
    forms = plan.forms()
    ledger = Ledger(forms, expand="lines" if plan.expand == "lines" else "none")  # the reader takes KPL's apart
    last = time.monotonic()
    numbers = plan.runs(forms.block)
    end = numbers[-1][0] + numbers[-1][1]
    async with Consumer(
        plan.stream, region=plan.region, endpoint_url=plan.endpoint_url, raw=True, patience_s=30.0
    ) as consumer:

        async def read() -> None:
            nonlocal last
            begin = Position(ShardIteratorType.AT_TIMESTAMP, timestamp=began - _EARLIER_S)
            async for record in consumer.stream(begin):
                number = forms.number(record.data)
                if number is not None and number // forms.samples < end:
                    last = time.monotonic()
                    ledger.take([record.data], last)

        task = asyncio.create_task(read())
        while not task.done() and ledger.stored < plan.records and time.monotonic() - last < _QUIET_S:
            await asyncio.wait([task], timeout=0.2)
        if task.done():
            task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return ledger.balance(numbers)
