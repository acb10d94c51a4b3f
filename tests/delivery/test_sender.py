"""The sender against a scripted Kinesis: what fails goes again, what cannot be stored is set aside, nothing is lost."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from aws_kinesis_agg.deaggregator import messages_pb2

from fastkin._codec import DRAIN, DROPPED, Batch, Batcher, Budget, KeyPlan, ShardTable
from fastkin.aws.shards import HASH_SPACE, Shard, ShardMap
from fastkin.delivery.retry_queue import RetryQueue
from fastkin.delivery.sender import Sender
from fastkin.errors import Action, ClosedError, KinesisError, NotSent, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable

THROTTLED = "ProvisionedThroughputExceededException"
TEXT = "Rate exceeded for shard shardId-{:012d} in stream s under account 123456789012."

# what a scripted call may do with one record: None stores it, (code, message) fails it
Verdict = tuple[str, str] | None


class Scripted:
    """A Kinesis whose every call is decided by `script(call number, records)`."""

    def __init__(self, script: Callable[[int, list[dict[str, str]]], list[Verdict] | Exception | bytes]) -> None:
        self.script = script
        self.calls = 0
        self.stored: list[tuple[bytes, str]] = []
        self.open = 0
        self.most_open = 0

    async def call(self, target: str, body: Batch) -> bytes:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0)
        self.open -= 1
        self.calls += 1
        records = json.loads(bytes(body))["Records"]
        verdicts = self.script(self.calls, records)
        if isinstance(verdicts, Exception):
            raise verdicts
        if isinstance(verdicts, bytes):
            return verdicts
        entries: list[dict[str, Any]] = []
        for record, verdict in zip(records, verdicts, strict=True):
            if verdict is None:
                self.stored.append((base64.b64decode(record["Data"]), record["PartitionKey"]))
                entries.append({"SequenceNumber": str(len(self.stored)), "ShardId": "shardId-000000000000"})
            else:
                entries.append({"ErrorCode": verdict[0], "ErrorMessage": verdict[1]})
        failed = sum(verdict is not None for verdict in verdicts)
        return json.dumps({"FailedRecordCount": failed, "Records": entries}).encode()


class Rig:
    def __init__(self, client: Scripted, *, key: str = "uuid", aggregate_bytes: int = 0, **options: Any) -> None:
        self.budget = Budget(64 * 2**20, 100_000)
        plan = KeyPlan("uuid") if key == "uuid" else KeyPlan("parts", [("text", key)])
        self.batcher = Batcher(
            settler=None, budget=self.budget, frame="raw", key=plan, target=b'"StreamName":"s"',
            aggregate_bytes=aggregate_bytes,
        )  # fmt: skip
        self.client = client
        self.aside: list[tuple[bytes, str]] = []
        self.settled = 0
        self.sender = Sender(
            self.batcher,
            client,
            name="test",
            stream="s",
            dead_letter=self._dead_letter,
            on_settled=self._settled,
            **({"max_calls": 4, "random": Random(5)} | options),
        )

    def _dead_letter(self, batch: Batch, reason: str) -> None:
        self.aside += [(data, reason) for data, _, _ in batch.entries()]
        batch.finish(DROPPED)

    def _settled(self) -> None:
        self.settled += 1

    async def send(self, records: list[bytes], timeout: float = 20.0) -> None:
        for record in records:
            self.batcher.add(record)
        self.batcher.close_batch(DRAIN)
        async with asyncio.timeout(timeout):
            await self.sender.flush()
        self.check()
        await self.sender.close()

    def check(self) -> None:
        batcher = self.batcher
        assert batcher.in_flight == 0
        assert batcher.received == batcher.stored + batcher.dropped + batcher.dead_lettered + batcher.filtered
        assert self.budget.bytes == 0
        assert self.budget.records == 0


def numbered(count: int) -> list[bytes]:
    return [b"%d" % n for n in range(count)]


def all_stored(call: int, records: list[dict[str, str]]) -> list[Verdict]:
    return [None] * len(records)


async def test_stores_everything_in_full_calls() -> None:
    rig = Rig(Scripted(all_stored))
    await rig.send(numbered(1700))
    assert rig.client.calls == 4
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(1700))
    assert rig.settled == 4


async def test_only_failed_entries_go_again_with_the_same_key() -> None:
    sent: dict[str, set[str]] = {}

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        for record in records:
            sent.setdefault(record["Data"], set()).add(record["PartitionKey"])
        if call > 3:
            return [None] * len(records)
        return [("InternalFailure", "Internal Service Failure") if n % 7 == 3 else None for n in range(len(records))]

    rig = Rig(Scripted(script))
    await rig.send(numbered(1000))
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(1000))
    assert all(len(keys) == 1 for keys in sent.values())
    assert rig.sender.counters.retried == rig.sender.counters.failed_by_code["InternalFailure"]
    assert rig.sender.counters.duplicates_possible == 0


async def test_a_throttled_shard_slows_the_sender_and_loses_nothing() -> None:
    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        if call > 6:
            return [None] * len(records)
        return [(THROTTLED, TEXT.format(n % 2)) if n >= 50 else None for n in range(len(records))]

    rig = Rig(Scripted(script))
    await rig.send(numbered(2000))
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(2000))
    assert set(rig.sender.counters.throttled) == {"shardId-000000000000", "shardId-000000000001"}
    assert rig.sender.pacer.even.stored_per_s > 0


@pytest.mark.parametrize(
    "error",
    [
        KinesisError("ServiceUnavailable", "later", action=Action.RETRY, http_status=503),
        KinesisError("ThrottlingException", "slow", action=Action.THROTTLE, http_status=400),
        TransportError("ConnectionClosed", "cut", action=Action.RETRY),
        KinesisError("RequestAborted", "perhaps", action=Action.RETRY, http_status=400),
        NotSent("ConnectFailed", "nobody listens"),
        KinesisError("NoCredentials", "none yet"),
    ],
    ids=lambda error: error.code,
)
async def test_a_failed_call_goes_again_whole(error: KinesisError) -> None:
    rig = Rig(Scripted(lambda call, records: error if call <= 3 else [None] * len(records)))
    await rig.send(numbered(1200))
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(1200))
    assert rig.sender.counters.calls_failed == 3
    assert (rig.sender.counters.duplicates_possible > 0) == (
        error.code
        in {
            "ConnectionClosed",
            "RequestAborted",
            "ServiceUnavailable",
        }
    )


async def test_no_retry_storm_while_kinesis_is_down() -> None:
    """In a second of outage sixteen batchers' worth of data costs a handful of calls."""
    loop = asyncio.get_running_loop()
    up_at = loop.time() + 1.0
    down = TransportError("ConnectionRefused", "down", action=Action.RETRY)
    rig = Rig(Scripted(lambda call, records: down if loop.time() < up_at else [None] * len(records)), max_calls=16)
    await rig.send(numbered(8000))
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(8000))
    assert rig.sender.counters.calls_failed < 45


async def test_an_answer_that_makes_no_sense_settles_nothing() -> None:
    answers = {1: b"<html>", 2: b'{"FailedRecordCount":0,"Records":[]}', 3: b"{}"}
    rig = Rig(Scripted(lambda call, records: answers.get(call) or [None] * len(records)))
    await rig.send(numbered(10))
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(10))
    assert rig.sender.counters.calls_failed == 3
    assert rig.sender.counters.duplicates_possible == 30


async def test_a_refused_call_is_halved_down_to_the_bad_record() -> None:
    bad = {b"77", b"333"}

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        if any(base64.b64decode(record["Data"]) in bad for record in records):
            return KinesisError("ValidationException", "no", action=Action.REJECTED, http_status=400)
        return [None] * len(records)

    rig = Rig(Scripted(script))
    await rig.send(numbered(1000))
    assert {data for data, _ in rig.aside} == bad
    assert all("ValidationException" in reason for _, reason in rig.aside)
    assert Counter(data for data, _ in rig.client.stored) == Counter(set(numbered(1000)) - bad)
    assert rig.client.calls < 60


async def test_when_nothing_is_ever_taken_the_data_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that refuses every call is a wrong destination: dead-lettering everything would be a loss."""
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.02)
    error = KinesisError("ValidationException", "no such thing", action=Action.REJECTED, http_status=400)
    rig = Rig(Scripted(lambda call, records: error if call <= 30 else [None] * len(records)))
    await rig.send(numbered(4))
    assert rig.aside == []
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(4))
    assert rig.sender.counters.calls_failed == 30
    assert sum(rig.sender.counters.calls_failed_by_code.values()) == 30


async def test_an_entry_refused_for_good_is_set_aside_alone() -> None:
    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        return [("InvalidArgumentException", "bad key") if r["Data"] == "NQ==" else None for r in records]

    rig = Rig(Scripted(script))
    await rig.send(numbered(20))
    assert rig.aside == [(b"5", "InvalidArgumentException: bad key")]
    assert len(rig.client.stored) == 19


def records_in(data: bytes) -> list[bytes]:
    """Of an aggregate, or the plain record."""
    if not data.startswith(b"\xf3\x89\x9a\xc2"):
        return [data]
    return [record.data for record in messages_pb2.AggregatedRecord.FromString(data[4:-16]).records]


@pytest.mark.parametrize("how", ["call", "entry", "strange"])
async def test_one_bad_record_of_an_aggregate_is_set_aside_alone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that there is may be in one aggregate: nothing else is stored, and none of the others is lost with it."""
    monkeypatch.setattr("fastkin.delivery.answers._STRANGE_CAP_S", 0.01)

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        bad = [b"77" in records_in(base64.b64decode(record["Data"])) for record in records]
        if how == "call" and any(bad):
            return KinesisError("ValidationException", "no", action=Action.REJECTED, http_status=400)
        code = "InvalidArgumentException" if how == "entry" else "Strange"
        return [(code, "bad") if one else None for one in bad]

    rig = Rig(Scripted(script), aggregate_bytes=50_000)
    await rig.send(numbered(100), timeout=60)
    assert [data for data, _ in rig.aside] == [b"77"]
    stored = [one for data, _ in rig.client.stored for one in records_in(data)]
    assert Counter(stored) == Counter(set(numbered(100)) - {b"77"})
    assert len({key for _, key in rig.client.stored}) == 1
    if how != "strange":
        assert rig.client.calls < 20


async def test_an_undocumented_entry_error_is_tried_a_while_then_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.delivery.answers._STRANGE_CAP_S", 0.02)

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        return [("Strange", "?") if r["Data"] == "NQ==" else None for r in records]

    rig = Rig(Scripted(script), random=Random(1))
    await rig.send(numbered(20), timeout=60)
    assert [data for data, _ in rig.aside] == [b"5"]
    assert rig.client.calls == 36


async def test_never_more_calls_open_than_allowed() -> None:
    rig = Rig(Scripted(all_stored), max_calls=3)
    await rig.send(numbered(9000))
    assert rig.client.most_open == 3


async def test_a_hot_shard_waits_alone_and_the_others_go_on() -> None:
    half = HASH_SPACE // 2
    shards = ShardMap([Shard("shardId-000000000000", 0, half - 1), Shard("shardId-000000000001", half, HASH_SPACE - 1)])
    table = ShardTable(shards.ends)
    hot = next(f"k{n}" for n in range(100) if table.find(f"k{n}") == 0)
    cold = next(f"k{n}" for n in range(100) if table.find(f"k{n}") == 1)
    rig = Rig(Scripted(all_stored))
    rig.batcher.shards = table
    rig.sender.set_shards(shards)
    for n in range(3000):
        rig.batcher.add(b"hot%d" % n, key=hot)
        if n % 10 == 0:
            rig.batcher.add(b"cold%d" % n, key=cold)
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    await asyncio.sleep(0.3)
    stored = Counter(key for _, key in rig.client.stored)
    assert stored[cold] == 300, "records of the free shard waited for the hot one"
    assert stored[hot] < 1500, "the hot shard was sent more than it takes"
    async with asyncio.timeout(10):
        await rig.sender.flush()
    assert len(rig.client.stored) == 3300
    rig.check()
    await rig.sender.close()


async def test_flush_waits_for_what_was_there_and_not_for_what_comes_later() -> None:
    gate = asyncio.Event()

    class Slow(Scripted):
        async def call(self, target: str, body: Batch) -> bytes:
            if b"late" in [base64.b64decode(r["Data"]) for r in json.loads(bytes(body))["Records"]]:
                await gate.wait()
            return await super().call(target, body)

    rig = Rig(Slow(all_stored))
    for record in numbered(10):
        rig.batcher.add(record)
    rig.batcher.close_batch(DRAIN)
    flushed = asyncio.create_task(rig.sender.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # those who ask in one turn of the loop are served together, in the next
    rig.batcher.add(b"late")
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    await asyncio.wait_for(flushed, 5)
    assert rig.batcher.in_flight == 1
    gate.set()
    await asyncio.wait_for(rig.sender.flush(), 5)
    rig.check()
    await rig.sender.close()


async def test_close_leaves_what_has_not_ended_to_the_owner() -> None:
    rig = Rig(Scripted(lambda call, records: TransportError("ConnectionRefused", "down", action=Action.RETRY)))
    for record in numbered(700):
        rig.batcher.add(record)
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    await asyncio.sleep(0.1)
    await rig.sender.close()
    left = rig.sender.unsent()
    assert sum(len(batch) for batch in left) == rig.batcher.in_flight == 700
    for batch in left:
        batch.finish(DROPPED)
    rig.check()


async def test_a_body_that_goes_again_is_not_hashed_again() -> None:
    digests: list[str | None] = []

    class Hashing(Scripted):
        async def call(self, target: str, body: Batch) -> bytes:
            digests.append(body.digest)
            body.digest = "kept"
            return await super().call(target, body)

    error = KinesisError("ServiceUnavailable", "later", action=Action.RETRY, http_status=503)
    rig = Rig(Hashing(lambda call, records: error if call == 1 else [None] * len(records)))
    await rig.send(numbered(10))
    assert digests == [None, "kept"]


async def test_closing_before_a_call_took_its_first_step_loses_nothing() -> None:
    rig = Rig(Scripted(all_stored))
    for record in numbered(700):
        rig.batcher.add(record)
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    await rig.sender.close()
    assert rig.batcher.in_flight == 700
    left = rig.sender.unsent()
    assert sum(len(batch) for batch in left) == 700
    assert rig.sender.counters.duplicates_possible == 0
    for batch in left:
        batch.finish(DROPPED)
    rig.check()


async def test_a_call_cancelled_from_outside_goes_again() -> None:
    waiting = asyncio.Event()

    class Hanging(Scripted):
        async def call(self, target: str, body: Batch) -> bytes:
            if not waiting.is_set():
                waiting.set()
                await asyncio.sleep(60)
            return await super().call(target, body)

    rig = Rig(Hanging(all_stored))
    rig.batcher.add(b"one")
    rig.batcher.close_batch(DRAIN)
    flushed = asyncio.create_task(rig.sender.flush())
    await waiting.wait()
    rig.sender._calls.tasks()[0].cancel()
    await asyncio.wait_for(flushed, 5)
    assert rig.client.stored[0][0] == b"one"
    assert rig.sender.counters.duplicates_possible == 1
    rig.check()
    await rig.sender.close()


async def test_an_error_nobody_foresaw_keeps_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug, or a setting that shows only when a call is made: told to the loop, and the call goes again."""
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.02)
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    rig = Rig(Scripted(lambda call, records: OSError("odd") if call <= 2 else [None] * len(records)))
    await rig.send(numbered(10))
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(10))
    assert [str(context["exception"]) for context in told] == ["odd", "odd"]


async def test_closing_ends_a_flush_with_an_error_and_not_with_a_cancellation() -> None:
    rig = Rig(Scripted(lambda call, records: NotSent("ConnectFailed", "down", action=Action.RETRY)))
    rig.batcher.add(b"one")
    rig.batcher.close_batch(DRAIN)
    flushed = asyncio.create_task(rig.sender.flush())
    await asyncio.sleep(0.05)
    await rig.sender.close()
    with pytest.raises(ClosedError):
        await flushed
    with pytest.raises(ClosedError):
        await asyncio.wait_for(rig.sender.flush(), 1)
    assert rig.sender.counters.duplicates_possible == 0, "nothing had left this machine"
    for batch in rig.sender.unsent():
        batch.finish(DROPPED)
    rig.check()


async def test_flushes_that_were_given_up_leave_nothing_behind() -> None:
    rig = Rig(Scripted(lambda call, records: NotSent("ConnectFailed", "down", action=Action.RETRY)))
    rig.batcher.add(b"one")
    rig.batcher.close_batch(DRAIN)
    for _ in range(20):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rig.sender.flush(), 0.005)
    assert not rig.sender._generations.awaited
    assert len(rig.sender._generations._open) <= 2
    await rig.sender.close()
    for batch in rig.sender.unsent():
        batch.finish(DROPPED)
    rig.check()


async def test_attempts_in_an_outage_do_not_count_against_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed calls and throttles say nothing about a record: an odd error afterwards is its first."""
    monkeypatch.setattr("fastkin.delivery.answers._ENTRY_CAP_S", 0.1)
    monkeypatch.setattr("fastkin.delivery.gate._CALL_CAP_S", 0.1)

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        if call <= 6:
            return KinesisError("ServiceUnavailable", "later", action=Action.RETRY, http_status=503)
        if call <= 12:
            return [(THROTTLED, TEXT.format(0))] * len(records)
        return [("Strange", "?")] * len(records) if call <= 15 else [None] * len(records)

    rig = Rig(Scripted(script))
    await rig.send(numbered(20), timeout=60)
    assert rig.aside == []
    assert len(rig.client.stored) == 20


async def test_a_record_is_not_given_up_for_the_failures_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.delivery.answers._STRANGE_CAP_S", 0.05)
    monkeypatch.setattr("fastkin.delivery.gate._CALL_CAP_S", 0.1)

    async def more() -> None:
        n = 0
        while True:
            rig.batcher.add(b"new%d" % n)
            rig.batcher.close_batch(DRAIN)
            rig.sender.pump()
            n += 1
            await asyncio.sleep(0.02)

    tries: Counter[str] = Counter()

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        out: list[Verdict] = []
        for record in records:
            tries[record["Data"]] += 1
            bad = base64.b64decode(record["Data"]) == b"bad" or tries[record["Data"]] <= 2
            out.append(("Strange", "?") if bad else None)
        return out

    rig = Rig(Scripted(script))
    rig.batcher.add(b"bad")
    feeder = asyncio.create_task(more())
    async with asyncio.timeout(40):
        while not rig.aside:
            await asyncio.sleep(0.05)
    feeder.cancel()
    await rig.sender.flush()
    assert [data for data, _ in rig.aside] == [b"bad"]
    rig.check()
    await rig.sender.close()


async def test_a_flush_returns_under_a_lasting_throttle_with_a_steady_load() -> None:
    random = Random(3)

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        return [(THROTTLED, "Rate exceeded") if random.random() < 0.6 else None for _ in records]

    rig = Rig(Scripted(script))

    async def more() -> None:
        while True:
            for record in numbered(40):
                rig.batcher.add(record)
            rig.batcher.close_batch(DRAIN)
            rig.sender.pump()
            await asyncio.sleep(0.02)

    for record in numbered(100):
        rig.batcher.add(record)
    rig.batcher.close_batch(DRAIN)
    flushed = asyncio.create_task(rig.sender.flush())
    await asyncio.sleep(0)
    feeder = asyncio.create_task(more())
    try:
        await asyncio.wait_for(flushed, 12)
    finally:
        feeder.cancel()
    await rig.sender.close()
    for batch in rig.sender.unsent():
        batch.finish(DROPPED)
    rig.batcher.abandon(ClosedError("end"))
    rig.check()


async def test_a_server_that_asks_for_an_hour_is_asked_again_sooner() -> None:
    error = KinesisError("ServiceUnavailable", "", action=Action.RETRY, http_status=503, retry_after=3600.0)
    rig = Rig(Scripted(lambda call, records: error))
    rig.batcher.add(b"one")
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    await asyncio.sleep(0.05)
    assert rig.sender.gate.opens_at - asyncio.get_running_loop().time() <= 30.0
    await rig.sender.close()
    for batch in rig.sender.unsent():
        batch.finish(DROPPED)


def refuses(call: int, records: list[dict[str, str]]) -> KinesisError:
    return KinesisError("ValidationException", "no such thing", action=Action.REJECTED, http_status=400)


async def until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_destination_that_worked_and_then_refuses_everything_keeps_the_data(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.02)
    broken = False
    rig = Rig(Scripted(lambda call, records: refuses(call, records) if broken else [None] * len(records)))
    rig.batcher.add(b"before")
    rig.batcher.close_batch(DRAIN)
    await rig.sender.flush()
    broken = True
    for record in numbered(200):
        rig.batcher.add(record)
    rig.batcher.close_batch(DRAIN)
    flushed = asyncio.create_task(rig.sender.flush())
    # counted by single records that were refused: ten are set aside at most, and from then on the data is kept
    await until(lambda: len(rig.aside) == 10)
    calls = rig.client.calls
    await until(lambda: rig.client.calls > calls + 30)
    assert len(rig.aside) == 10
    broken = False
    async with asyncio.timeout(20):
        await flushed
    assert len(rig.aside) == 10
    assert {data for data, _ in rig.client.stored} | {data for data, _ in rig.aside} == {b"before", *numbered(200)}
    assert "check the destination" in caplog.text
    rig.check()
    await rig.sender.close()


async def test_many_bad_records_in_a_row_do_not_keep_the_good_ones_behind_them_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.02)

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        if any(base64.b64decode(record["Data"]).startswith(b"bad") for record in records):
            return refuses(call, records)
        return [None] * len(records)

    rig = Rig(Scripted(script), max_calls=1)
    for group in ([b"good"], [b"bad%d" % n for n in range(40)], numbered(5), numbered(5)):
        for record in group:
            rig.batcher.add(record)
        rig.batcher.close_batch(DRAIN)
    flushed = asyncio.create_task(rig.sender.flush())
    n = 0
    async with asyncio.timeout(30):
        while not flushed.done():  # the plant goes on
            rig.batcher.add(b"more%d" % n)
            rig.batcher.close_batch(DRAIN)
            n += 1
            await asyncio.sleep(0.01)
    assert sorted(data for data, _ in rig.aside) == sorted(b"bad%d" % n for n in range(40))
    await rig.sender.flush()
    rig.check()
    await rig.sender.close()


async def test_keys_that_come_back_are_noticed_soon_and_without_a_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for at most every ten seconds in life; here the scale is a hundredth."""
    monkeypatch.setattr("fastkin.delivery.gate._CREDENTIALS_BASE_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.gate._CREDENTIALS_CAP_S", 0.1)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 30.0)
    error: KinesisError | None = KinesisError("ExpiredTokenException", "old", action=Action.CREDENTIALS)
    rig = Rig(Scripted(lambda call, records: error or [None] * len(records)))
    rig.batcher.add(b"x")
    rig.batcher.close_batch(DRAIN)
    flushed = asyncio.create_task(rig.sender.flush())
    await asyncio.sleep(1.0)
    assert 5 <= rig.client.calls <= 101
    error = None
    async with asyncio.timeout(5):
        await flushed
    rig.check()
    await rig.sender.close()


async def test_what_goes_again_is_gathered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source and copy are both in memory for a moment: large pieces are sent as they are."""
    gathered: list[int] = []
    gather = RetryQueue._gather

    def noting(sender: Sender, picked: list[Batch]) -> Batch:
        gathered.append(sum(batch.nbytes for batch in picked))
        return gather(sender, picked)

    monkeypatch.setattr(RetryQueue, "_gather", noting)

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        return [(THROTTLED, TEXT.format(n % 50)) if call <= 4 else None for n in range(len(records))]

    rig = Rig(Scripted(script))
    await rig.send([b"%05d" % n + b"." * 20_000 for n in range(800)])
    assert len({data for data, _ in rig.client.stored}) == 800
    assert max(gathered) < 1.6 * 2**20


async def test_many_hot_shards_at_once_are_sorted_quickly() -> None:
    """Splitting off shard by shard would copy a batch as often as there are shards."""
    count = 256
    step = HASH_SPACE // count
    shards = ShardMap([
        Shard(f"shardId-{n:012d}", n * step, HASH_SPACE - 1 if n == count - 1 else (n + 1) * step - 1)
        for n in range(count)
    ])  # fmt: skip
    table = ShardTable(shards.ends)
    rig = Rig(Scripted(all_stored), max_calls=1)
    rig.batcher.shards = table
    rig.sender.set_shards(shards)
    keys: dict[int, str] = {}
    n = 0
    while len(keys) < count:
        keys.setdefault(table.find(f"k{n}"), f"k{n}")
        n += 1
    for load in range(count):
        rig.sender.pacer.sent({load: (1000, 0)})  # no shard has room
    for n in range(2000):
        rig.batcher.add(b"%d" % n, key=keys[n % count])
    rig.batcher.close_batch(DRAIN)
    async with asyncio.timeout(30):
        await rig.sender.flush()
    rig.check()
    await rig.sender.close()
    stored: dict[str, list[int]] = {}
    for data, key in rig.client.stored:
        stored.setdefault(key, []).append(int(data))
    assert Counter(len(numbers) for numbers in stored.values()).keys() <= {7, 8}
    assert all(numbers == sorted(numbers) for numbers in stored.values())


async def refused_by_all(rig: Rig, seconds: float) -> None:
    """Four records, every call refused for so long, then all are taken."""
    for record in numbered(4):
        rig.batcher.add(record)
        rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    await asyncio.sleep(seconds)


@pytest.mark.parametrize("known", [None, False])
async def test_wrong_settings_cost_no_record(monkeypatch: pytest.MonkeyPatch, known: bool | None) -> None:
    """Nothing was ever stored, and a harmless record is refused as well, or that cannot be known: all is kept."""
    monkeypatch.setattr("fastkin.delivery.refusals.REFUSED_FOR_S", 0.05)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.02)

    async def harmless() -> bool | None:
        return known

    broken = True
    rig = Rig(
        Scripted(lambda call, records: refuses(call, records) if broken else [None] * len(records)), harmless=harmless
    )
    await refused_by_all(rig, 1.0)
    assert rig.client.calls > 10
    assert rig.aside == []
    assert rig.sender.operator_error is not None
    broken = False
    async with asyncio.timeout(10):
        await rig.sender.flush()
    assert sorted(data for data, _ in rig.client.stored) == numbered(4)
    rig.check()
    await rig.sender.close()


async def test_one_record_in_a_minute_at_most_is_given_up_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harmless record would be taken, yet every one of ours is refused: perhaps a limit of the whole stream."""
    monkeypatch.setattr("fastkin.delivery.refusals.REFUSED_FOR_S", 0.4)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.02)

    async def harmless() -> bool:
        return True

    broken = True
    rig = Rig(
        Scripted(lambda call, records: refuses(call, records) if broken else [None] * len(records)), harmless=harmless
    )
    loop = asyncio.get_running_loop()
    given_up: list[float] = []
    monkeypatch.setattr(
        rig.sender, "_dead_letter", lambda batch, reason: (given_up.append(loop.time()), batch.finish(DROPPED))
    )
    began = loop.time()
    await refused_by_all(rig, 1.0)
    broken = False
    async with asyncio.timeout(10):
        await rig.sender.flush()
    assert 1 <= len(given_up) <= 3
    assert given_up[0] - began >= 0.4
    assert all(later - one >= 0.4 for one, later in itertools.pairwise(given_up))
    rig.check()
    await rig.sender.close()


async def test_an_endpoint_that_takes_all_and_hangs_is_not_asked_in_small_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._CALL_CAP_S", 0.05)
    sizes: list[int] = []

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        sizes.append(len(records))
        if call > 30:
            return [None] * len(records)
        error = TransportError("RequestTimeout", "nothing came")
        error.unsent_bytes = 0
        return error

    rig = Rig(Scripted(script))
    await rig.send(numbered(1000))
    assert set(sizes) == {500}


async def test_calls_get_no_smaller_than_some_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the line takes nothing at all."""
    monkeypatch.setattr("fastkin.delivery.gate._CALL_CAP_S", 0.02)
    sizes: list[int] = []

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        sizes.append(len(records))
        if call > 60:
            return [None] * len(records)
        error = TransportError("RequestTimeout", "nothing left")
        error.unsent_bytes = 1000
        return error

    rig = Rig(Scripted(script))
    await rig.send([number.ljust(100, b".") for number in numbered(1000)], timeout=60)
    assert min(sizes) > 20


async def test_one_strange_record_alone_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else can be stored before it has ended: then it counts that a harmless record would be."""
    monkeypatch.setattr("fastkin.delivery.answers._STRANGE_CAP_S", 0.01)
    monkeypatch.setattr("fastkin.delivery.answers._STORED_LATELY_S", 0.05)

    async def harmless() -> bool:
        return True

    for known, ends in ((None, False), (harmless, True)):
        rig = Rig(Scripted(lambda call, records: [("Strange", "?")] * len(records)), harmless=known)
        rig.batcher.add(b"strange")
        rig.batcher.close_batch(DRAIN)
        rig.sender.pump()
        await until(lambda: rig.client.calls > 50 or bool(rig.aside))  # noqa: B023
        assert bool(rig.aside) is ends
        await rig.sender.close()
        for batch in rig.sender.unsent():
            batch.finish(DROPPED)
        rig.check()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_somebody_will_look(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """All that can go wrong, in random order: between any two steps what waits is attended, and all of it ends."""
    for name in ("_OPERATOR_BASE_S", "_OPERATOR_CAP_S", "_CALL_CAP_S", "_CREDENTIALS_BASE_S", "_CREDENTIALS_CAP_S"):
        monkeypatch.setattr(f"fastkin.delivery.gate.{name}", 0.02)
    for name in ("_ENTRY_CAP_S", "_STRANGE_CAP_S", "CLAIM_AFTER_S", "CLAIM_S"):
        monkeypatch.setattr(f"fastkin.delivery.answers.{name}", 0.02)
    monkeypatch.setattr("fastkin.delivery.refusals.REFUSED_FOR_S", 0.02)
    random = Random(seed)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + 1.5
    codes = [THROTTLED, "InternalFailure", "AccessDeniedException", "Strange", "InvalidArgumentException"]

    def fail(bad: list[bool]) -> Exception | None:
        kind = random.random()
        if kind < 0.05:
            return KinesisError("ServiceUnavailable", "later", http_status=503)
        if kind < 0.08:
            error = TransportError("RequestTimeout", "late")
            error.unsent_bytes = random.choice([0, 1000])
            return error
        if kind < 0.10:
            return KinesisError("RequestEntityTooLarge", "", action=Action.REJECTED, http_status=413)
        if kind < 0.12:
            return KinesisError("AccessDenied", "no", action=Action.OPERATOR)
        return refuses(0, []) if any(bad) else None

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        bad = [base64.b64decode(record["Data"]).startswith(b"bad") for record in records]
        if loop.time() > until_s:
            return refuses(0, []) if any(bad) else [None] * len(records)
        if error := fail(bad):
            return error
        return [
            (random.choice(codes), TEXT.format(random.randrange(4))) if random.random() < 0.2 else None for _ in bad
        ]

    async def harmless() -> bool | None:
        await asyncio.sleep(0.001)
        return random.choice([True, True, False, None])

    rig = Rig(Scripted(script), max_calls=random.choice([1, 4]), harmless=harmless)
    step = HASH_SPACE // 4
    shards = ShardMap([Shard(f"shardId-{n:012d}", n * step, (n + 1) * step - 1) for n in range(4)])
    sender, batcher = rig.sender, rig.batcher
    n = 0
    async with asyncio.timeout(50):
        while loop.time() < until_s or batcher.in_flight:
            if loop.time() < until_s:
                for _ in range(random.randrange(30)):
                    data = b"bad" if random.random() < 0.002 else b"%d" % n
                    batcher.add(data.ljust(random.choice([20, 3000])), key=f"k{random.randrange(50)}")
                    n += 1
                batcher.close_batch(DRAIN)
                sender.pump()
                if random.random() < 0.02:
                    batcher.shards = ShardTable(shards.ends) if random.random() < 0.7 else None
                    sender.set_shards(shards if batcher.shards is not None else None)
                if random.random() < 0.05:
                    sender.requeue_front(sender.withdraw(alone=random.random() < 0.5))
            assert not sender.waiting or sender.attended
            await asyncio.sleep(random.choice([0, 0.001]))
    rig.check()
    await until(lambda: sender.idle, 2.0)
    await rig.sender.close()
