"""What the codec's tests share: a batcher with its books open, and answers."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from fastkin._codec import DRAIN, STORED, Batch, Batcher, Budget, CallbackSettler, KeyPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

SHARD = "shardId-000000000001"
Settlement = tuple[int, int, int, Any, int]


class Rig:
    """A batcher whose settlements are written down."""

    def __init__(self, *, frame: Any = "raw", key: KeyPlan | None = None, budget: Budget | None = None,
                 **options: Any) -> None:  # fmt: skip
        self.budget = budget or Budget(1 << 30, 1 << 30)
        told: list[Settlement] = []
        self.told = told
        self.batcher = Batcher(
            settler=CallbackSettler(lambda *args: told.append(args)),
            budget=self.budget,
            frame=frame,
            key=key or KeyPlan("uuid"),
            target=b'"StreamName":"s"',
            **options,
        )

    def drain(self) -> list[Batch]:
        self.batcher.close_batch(DRAIN)
        batches = []
        while (batch := self.batcher.take()) is not None:
            batches.append(batch)
        return batches

    def store(self) -> list[list[tuple[bytes, str | None, str | None]]]:
        """Everything that waits is stored; the entries, call by call."""
        calls = []
        for batch in self.drain():
            calls.append(batch.entries())
            assert batch.settle(stored(len(batch))) == []
        return calls

    def counts(self) -> dict[int, int]:
        """Token -> records that were stored."""
        out: dict[int, int] = {}
        for token, count, outcome, _, _ in self.told:
            assert outcome == STORED
            out[token] = out.get(token, 0) + count
        return out

    def settled(self) -> None:
        """Nothing is held, nothing in flight."""
        assert self.budget.bytes == 0
        assert self.budget.records == 0
        assert self.batcher.in_flight == 0
        assert self.batcher.open_records == 0
        assert self.batcher.ready == 0


def entry(shard: str = SHARD, number: str = "4957", **more: Any) -> dict[str, Any]:
    return {"SequenceNumber": number, "ShardId": shard, **more}


def failure(code: str = "InternalFailure", message: str = "Internal Service Failure") -> dict[str, Any]:
    return {"ErrorCode": code, "ErrorMessage": message}


def answer(entries: Sequence[dict[str, Any]], **more: Any) -> bytes:
    failed = sum(1 for one in entries if one.get("ErrorCode"))
    return json.dumps({"FailedRecordCount": failed, "Records": list(entries), **more}).encode()


def stored(count: int) -> bytes:
    return answer([entry(number=str(i)) for i in range(count)])


def payloads(count: int, size: int = 40, seed: int = 1) -> list[bytes]:
    draw = random.Random(seed)
    return [draw.randbytes(draw.randint(0, size)) for _ in range(count)]
