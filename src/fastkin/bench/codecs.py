"""The work on records alone, in this process: a message's bytes to the body of a PutRecords call.

No socket takes part, so what an intake or a transport costs cannot hide what a change to the codec does.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from fastkin._codec import DRAIN, DROPPED, Batcher, Budget, KeyPlan
from fastkin.bench.children import BenchError
from fastkin.bench.comparison import Contender, Group
from fastkin.formats import msgpack as msgpack_format

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.bench.forms import Forms
    from fastkin.bench.plan import Plan

_BUDGET = 1 << 34
_CALL_RECORDS = 500
_TARGET = b'"StreamName":"bench"'

Bodies = list[bytes]


def _ours(forms: Forms, payloads: list[bytes]) -> Callable[[bool], Bodies]:
    """Frames are taken apart in compiled code, MessagePack maps by the format written in Python."""
    batcher = Batcher(
        settler=None, budget=Budget(_BUDGET, _BUDGET), frame="bulk" if forms.form == "bulk" else "raw",
        key=KeyPlan("uuid"), target=_TARGET, max_records=_CALL_RECORDS,
    )  # fmt: skip
    maps = forms.form == "msgpack"

    def make(keep: bool) -> Bodies:
        bodies: Bodies = []
        for payload in payloads:
            if maps:
                for record in msgpack_format.records(payload):
                    batcher.offer(b"plant/7", record, 0)
            else:
                batcher.offer(b"plant/7", payload, 0)
            while batcher.dirty and (batch := batcher.take()) is not None:
                if keep:
                    bodies.append(bytes(batch))
                batch.finish(DROPPED)
        batcher.close_batch(DRAIN)
        while (batch := batcher.take()) is not None:
            if keep:
                bodies.append(bytes(batch))
            batch.finish(DROPPED)
        return bodies

    return make


def _plain(forms: Forms, payloads: list[bytes], dumps: Callable[[Any], bytes]) -> Callable[[bool], Bodies]:
    def make(keep: bool) -> Bodies:
        bodies: Bodies = []
        entries: list[dict[str, str]] = []
        for payload in payloads:
            for record in forms.records(payload):
                entries.append({"Data": base64.b64encode(record).decode(), "PartitionKey": str(uuid.uuid4())})
                if len(entries) == _CALL_RECORDS:
                    body = dumps({"Records": entries, "StreamName": "bench"})
                    entries = []
                    if keep:
                        bodies.append(body)
        if entries:
            bodies.append(dumps({"Records": entries, "StreamName": "bench"}))
        return bodies

    return make


def compare(plan: Plan, rounds: int) -> Group:
    """Rounds of each contender, in turns. BenchError: they do not make the same records."""
    forms = plan.forms()
    payloads = forms.payloads(0)[: plan.messages]
    while len(payloads) < plan.messages:
        payloads += forms.payloads(len(payloads) // forms.block)[: plan.messages - len(payloads)]
    makers = {
        "fastkin": _ours(forms, payloads),
        "msgpack, orjson, base64": _plain(forms, payloads, orjson.dumps),
        "msgpack, json, base64": _plain(forms, payloads, lambda value: json.dumps(value).encode()),
    }
    want = list(forms.all_records(0, len(payloads)))
    for name, make in makers.items():
        if _records_of(make(True)) != want:
            raise BenchError(f"{name} makes other records of form {plan.form} than were sent: report it as a bug")
    group = Group(f"{plan.form}: messages to PutRecords bodies, {forms.payload_bytes:,} B each, UUID keys")
    group.contenders = [Contender(name) for name in makers]
    for _ in range(rounds):
        for contender in group.contenders:
            begin, cpu = time.perf_counter(), time.process_time()
            makers[contender.name](False)
            cpu, passed = time.process_time() - cpu, time.perf_counter() - begin
            contender.add(cpu / len(want) * 1e6, len(want) / passed)
    return group


def _records_of(bodies: Bodies) -> list[bytes]:
    return [base64.b64decode(entry["Data"]) for body in bodies for entry in orjson.loads(body)["Records"]]
