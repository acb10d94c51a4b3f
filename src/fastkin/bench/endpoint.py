"""The Kinesis of a run, a process of its own: the emulator, and the ledger of what it stored.

What a call stored is hashed and let go: the records of a long run would not fit into memory, and need not.
"""

from __future__ import annotations

import base64
import binascii
import re
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson

from fastkin.bench import times
from fastkin.bench.certificates import server_context
from fastkin.bench.children import run, serve
from fastkin.bench.ledger import Ledger
from fastkin.bench.meter import percentiles
from fastkin.bench.plan import STREAM
from fastkin.emulator import Emulator
from fastkin.emulator.wire import JSON, loads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.bench.plan import Plan
    from fastkin.emulator.connection import Request
    from fastkin.emulator.faults import Plan as CallPlan

_DATA = re.compile(rb'"Data":\s?"([^"]*)"')
_SAMPLES = 16  # records of a call whose age is looked at while the run goes on


def canonical(data: bytes) -> bytes:
    """The nine fields of a welder's record, numbers as they are worth: for peers that parse and write anew."""
    try:
        record = orjson.loads(data)
        return repr([(key, record[key]) for key in _FIELDS]).encode()
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return data


_FIELDS = ("name", "model", "status", *(f"sensor_{n}" for n in range(1, 7)))


class Endpoint(Emulator):
    """An emulator that tells a ledger of all it stores."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(
            {STREAM: plan.shards},
            limits=plan.limits,
            latency_ms=plan.latency_ms,
            keep="all",
            count_only=plan.counting,
            ssl_context=server_context(plan) if plan.tls_kinesis else None,
        )
        self._forms = plan.forms()
        self._plan_of_run = plan
        self._ledger = Ledger(
            self._forms, encoded=plan.counting, expand=plan.expand, canonical=canonical if plan.canonical else None
        )
        self._published = times.share(plan)
        self._found: Sequence[bytes] = ()
        self._waits: list[float] = []
        self._last = 0.0

    def answer(self, request: Request) -> tuple[bytes, bytes, CallPlan]:
        head, body, plan = super().answer(request)
        if self.count_only:
            found, self._found = self._found, ()
        else:
            found = self._drained()
        if found:
            # A record is stored when its caller can know it: the time that an answer is held back belongs to it.
            self._stored(found, time.monotonic() + plan.delay_s)
        return head, body, plan

    def _count_only(self, body: bytes, form: str) -> bytes:
        if form == JSON:
            self._found = _DATA.findall(body)
        else:
            self._found = [base64.b64encode(record["Data"]) for record in loads(body, form)["Records"]]
        return super()._count_only(body, form)

    def _drained(self) -> list[bytes]:
        """What the last call stored; it is not kept, or a long run would hold all of it."""
        self.puts.clear()
        found: list[bytes] = []
        for shard in self.service.streams[STREAM].shards:
            if shard.log:
                found += [data for _, _, data, _ in shard.log]
                shard.log.clear()
        return found

    def _stored(self, found: Sequence[bytes], now: float) -> None:
        records = self._ledger.take(found, now)
        self._last = now
        for record in records[:: max(1, len(records) // _SAMPLES)]:
            number = self._forms.number(binascii.a2b_base64(record) if self._ledger.encoded else record)
            at = -1 if number is None else number // self._forms.samples
            if 0 <= at < len(self._published) and (when := self._published[at]):
                self._waits.append((now - when) * 1000)

    # -- what the run asks ---------------------------------------------------------------------------

    def count(self) -> dict[str, Any]:
        return {"stored": self._ledger.stored}

    def report(self) -> dict[str, Any]:
        """So far; the latencies are those since the last report."""
        waits, self._waits = self._waits, []
        counters = asdict(self.counters)
        return {
            "calls": counters["operations"].get("PutRecords", 0) + counters["operations"].get("PutRecord", 0),
            "throttled": counters["throttled"],
            "refused": counters["refused"],
            "body_bytes": counters["body_bytes"],
            "kinesis_records": counters["records"],
            "stored": self._ledger.stored,
            "last": self._last,
            "latency_ms": percentiles(waits),
        }

    def balance(self) -> dict[str, Any]:
        sent = self._plan_of_run.runs(self._forms.block)
        return self._ledger.balance(sent, self._published).told()


async def main(plan: Plan) -> None:
    async with Endpoint(plan) as endpoint:
        words = {"stored": endpoint.count, "report": endpoint.report, "balance": endpoint.balance}
        await serve({"url": endpoint.url}, words)


if __name__ == "__main__":
    sys.exit(run(main))
