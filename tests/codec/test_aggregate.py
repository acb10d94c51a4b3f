"""Aggregates in the KPL's format, read back with AWS's own de-aggregation."""

from __future__ import annotations

import base64
import hashlib
import itertools
import random
import sys
import uuid
from typing import Any

import pytest
from aws_kinesis_agg import deaggregator
from hypothesis import given
from hypothesis import strategies as st

from fastkin import encode_frame
from fastkin._codec import DEAD, DRAIN, DROPPED, FAILED, Batch, KeyPlan, ShardTable
from fastkin.errors import LibraryError, RecordError
from fastkin.results import FrameResult
from support.codec_rig import Rig, answer, entry, failure, payloads, stored

MAGIC = b"\xf3\x89\x9a\xc2"
FRAME_OF_CALL = len('{"Records":[],"StreamName":"s"}') - 1  # an entry's comma is charged, the first has none
ENTRY_BYTES = 32  # what an entry takes besides its text
ENDS = [2**127 - 1, 2**128 - 1]


def opened(data: bytes) -> tuple[list[str], list[bytes]]:
    """Keys and records of an aggregate, checked; of a plain record: no keys and the record."""
    if not data.startswith(MAGIC):
        return [], [data]
    message = data[4:-16]
    assert hashlib.md5(message).digest() == data[-16:]
    parsed = deaggregator.messages_pb2.AggregatedRecord()
    parsed.ParseFromString(message)
    assert parsed.SerializeToString() == message
    assert list(parsed.explicit_hash_key_table) == []
    assert {record.partition_key_index for record in parsed.records} == {0}
    return list(parsed.partition_key_table), [record.data for record in parsed.records]


def read(calls: list[list[tuple[bytes, str | None, str | None]]]) -> list[tuple[str | None, list[bytes]]]:
    """Every entry as (its key, its records)."""
    out = []
    for call in calls:
        for data, key, _ in call:
            keys, records = opened(data)
            assert keys in ([], [key])
            out.append((key, records))
    return out


def rig_of(limit: int = 51_200, **options: Any) -> Rig:
    return Rig(aggregate_bytes=limit, **options)


def test_one_key_for_all() -> None:
    rig = rig_of(frame="bulk")
    records = payloads(300)
    assert rig.batcher.offer(b"t", encode_frame(records), 5) == 300
    assert rig.batcher.open_records == 300
    [(key, got)] = read(rig.store())
    assert got == records
    assert key is not None
    assert uuid.UUID(key).version == 4
    assert rig.told[0][:3] == (5, 300, 0)
    rig.settled()


def test_awss_own_reader_agrees() -> None:
    rig = rig_of(4000)
    records = payloads(500, 200)
    for i, record in enumerate(records):
        rig.batcher.offer(b"t", record, i + 1)
    got = []
    for call in rig.store():
        for data, key, _ in call:
            kinesis = {
                "kinesisSchemaVersion": "1.0",
                "approximateArrivalTimestamp": 0,
                "data": base64.b64encode(data).decode(),
                "partitionKey": key,
                "sequenceNumber": "1",
            }
            for one in deaggregator.iter_deaggregate_records([{"kinesis": kinesis}]):
                assert one["kinesis"]["partitionKey"] == key
                got.append(base64.b64decode(one["kinesis"]["data"]))
    assert got == records
    assert rig.counts() == {i + 1: 1 for i in range(500)}
    rig.settled()


@given(
    st.lists(st.integers(0, 300), max_size=60),
    st.integers(60, 700),
    st.integers(300, 800),
    st.sampled_from(["uuid", "k", "ab"]),
)
def test_limits(sizes: list[int], limit: int, record_limit: int, how: str) -> None:
    plan = KeyPlan("uuid") if how == "uuid" else KeyPlan("parts", [("text", how)])
    rig = rig_of(limit, max_record_bytes=record_limit, key=plan)
    records = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    kept = []
    for i, record in enumerate(records):
        rig.batcher.offer(b"t", record, i + 1)
        if not rig.batcher.take_rejects():
            kept.append(record)
    calls = rig.store()
    entries = read(calls)
    assert [record for _, one in entries for record in one] == kept
    key_bytes = 36 if how == "uuid" else len(how)
    for call in calls:
        for data, _, _ in call:
            assert len(data) + key_bytes <= record_limit
            assert len(data) <= limit or not data.startswith(MAGIC)
    # an aggregate is closed only when the next record does not fit
    for (_, one), (_, after) in itertools.pairwise(entries):
        if len(one) > 1:
            whole = 4 + 2 + key_bytes + sum(_cost(len(record)) for record in [*one, after[0]]) + 16
            assert whole > limit or whole + key_bytes > record_limit
    rig.settled()


def _cost(size: int) -> int:
    inner = 3 + _varint(size) + size
    return 1 + _varint(inner) + inner


def _varint(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)


@pytest.mark.parametrize("size", [0, 1, 119, 120, 121, 127, 128, 129, 16_370, 16_383, 16_384, 16_385])
def test_lengths_of_every_width(size: int) -> None:
    rig = rig_of(200_000)
    for _ in range(3):
        rig.batcher.add(b"r" * size, 1)
    [(_, got)] = read(rig.store())
    assert got == [b"r" * size] * 3
    rig.settled()


def test_one_record_goes_out_plain() -> None:
    rig = rig_of()
    rig.batcher.add(b"alone", 4)
    receipt = rig.batcher.put(b"")
    [[(data, _, _)]] = rig.store()
    assert data.startswith(MAGIC)
    rig.batcher.add(b"alone", 4)
    assert rig.store()[0][0][0] == b"alone"
    rig.batcher.put(b"alone again")
    [batch] = rig.drain()
    assert batch.user_records == 1
    batch.finish(DROPPED)
    assert receipt.done()
    rig.settled()


def test_a_new_key_is_a_new_aggregate() -> None:
    rig = rig_of(key=KeyPlan("parts", [("topic", None)]))
    for topic in (b"a", b"a", b"b", b"b\n", b"b\n", b"a"):
        rig.batcher.offer(topic, topic * 2, 1)
    assert read(rig.store()) == [
        ("a", [b"aa", b"aa"]), ("b", [b"bb"]), ("b\n", [b"b\nb\n", b"b\nb\n"]), ("a", [b"aa"]),
    ]  # fmt: skip
    rig.batcher.offer(b"", b"1", 1)  # no topic: a UUID
    rig.batcher.offer(b"x", b"2", 1)
    rig.batcher.offer(b"", b"3", 1)
    rig.batcher.offer(b"", b"4", 1)
    entries = read(rig.store())
    assert [got for _, got in entries] == [[b"1"], [b"2"], [b"3", b"4"]]
    assert entries[0][0] != entries[2][0]
    rig.settled()


def test_an_explicit_hash_key_goes_alone() -> None:
    rig = rig_of()
    rig.batcher.add(b"1", 1)
    rig.batcher.add(b"2", 1)
    rig.batcher.add(b"3", 1, None, "77")
    rig.batcher.add(b"4", 1)
    calls = rig.store()
    assert [got for _, got in read(calls)] == [[b"1", b"2"], [b"3"], [b"4"]]
    assert calls[0][1][2] == "77"
    rig.settled()


def test_shards_of_aggregates() -> None:
    rig = rig_of(key=KeyPlan("parts", [("topic", None)]))
    rig.batcher.shards = table = ShardTable(ENDS)
    rig.batcher.offer(b"a", b"1", 1)
    rig.batcher.offer(b"a", b"2", 1)
    [batch] = rig.drain()
    assert batch.shard_load() == {table.find("a"): (1, batch.size)}
    batch.finish(DROPPED)


def test_many_tokens_and_receipts_of_one_entry() -> None:
    rig = rig_of()
    receipts = [rig.batcher.put(b"r")]
    for token in (1, 1, 2, 0, 3):
        rig.batcher.add(b"x", token)
    receipts.append(rig.batcher.put(b"s"))
    frame = rig.batcher.put_frame(encode_frame([b"f", b"g"]))
    [batch] = rig.drain()
    assert (len(batch), batch.user_records) == (1, 9 + 0)
    reply = answer([entry(number="9")])
    batch.settle(reply)
    assert [one[:3] for one in rig.told] == [(1, 2, 0), (2, 1, 0), (3, 1, 0)]
    assert {receipt.result().sequence_number for receipt in receipts} == {"9"}  # type: ignore[union-attr]
    assert frame.result() == FrameResult(2)
    rig.settled()


def test_what_failed_moves_with_all_its_tokens() -> None:
    rig = rig_of(300)
    receipts = [rig.batcher.put(b"x" * 50) for _ in range(20)]
    for token in range(1, 30):
        rig.batcher.offer(b"t", b"y" * 50, token)
    [batch] = rig.drain()
    before = rig.budget.bytes - batch.overhead
    entries = batch.entries()
    left, right = batch.halves()
    assert rig.budget.bytes == before + left.overhead + right.overhead
    [whole] = Batch.gather([left, right])
    assert whole.entries() == entries
    assert rig.budget.bytes == before + whole.overhead
    failed = whole.settle(answer([entry() if i % 2 else failure() for i in range(len(whole))]))
    assert [one.batch.entries() for one in failed] == [entries[::2]]
    assert rig.batcher.in_flight == failed[0].batch.user_records
    failed[0].batch.settle(stored(len(failed[0].batch)))
    assert rig.counts() == dict.fromkeys(range(1, 30), 1)
    assert all(receipt.done() for receipt in receipts)
    rig.settled()


def halved(batch: Batch) -> list[Batch]:
    """Until nothing more can be halved."""
    if batch.single:
        return [batch]
    return [part for half in batch.halves() for part in halved(half)]


@pytest.mark.parametrize("sizes", [[0, 0], [1, 2, 3], [50] * 7, [0, 127, 128, 129, 16_383, 16_384, 5]])
@pytest.mark.parametrize("key", [KeyPlan("uuid"), KeyPlan("parts", [("text", 'a "key"')])], ids=["drawn", "given"])
def test_an_aggregate_is_halved_by_its_records(sizes: list[int], key: KeyPlan) -> None:
    """Each half is an aggregate with the same key, one record alone is plain; bytes, waiters and budget add up."""
    rig = rig_of(1 << 20, key=key)
    records = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    for i, record in enumerate(records):
        rig.batcher.offer(b"t", record, 1 + i // 2)
    [batch] = rig.drain()
    assert (len(batch), batch.single) == (1, False)
    [(whole, key_of_all, _)] = batch.entries()
    size = batch.size
    halves = batch.halves()
    found: list[bytes] = []
    for half in halves:
        [(data, key_now, hash_key)] = half.entries()
        assert (key_now, hash_key) == (key_of_all, None)
        found += opened(data)[1]
        assert half.user_records == len(opened(data)[1])
        assert size - half.size == len(whole) - len(data), "the key is counted once in each"
    assert found == records
    assert rig.budget.records == len(records)
    parts = [part for half in halves for part in halved(half)]
    assert [data for part in parts for data, _, _ in part.entries()] == records
    gathered = Batch.gather(parts)
    assert [len(one) for one in gathered] == [len(parts)]
    assert rig.budget.bytes == gathered[0].overhead + gathered[0].nbytes - FRAME_OF_CALL + ENTRY_BYTES * len(parts)
    parts = halved(gathered[0])
    with pytest.raises(LibraryError, match="cannot be halved"):
        parts[0].halves()
    for part in parts:
        part.settle(stored(1))
    assert rig.counts() == {1 + i: len(records[2 * i : 2 * i + 2]) for i in range((len(records) + 1) // 2)}
    rig.settled()


def test_waiters_of_every_kind_go_with_their_halves() -> None:
    rig = rig_of()
    receipts = [rig.batcher.put(b"r%d" % i) for i in range(3)]
    frame = rig.batcher.put_frame(encode_frame([b"f", b"g", b"h"]))
    for token in (7, 7, 8):
        rig.batcher.add(b"x", token)
    [batch] = rig.drain()
    first, *rest = halved(batch)
    first.finish(FAILED, RecordError("bad"))
    assert isinstance(receipts[0].exception(), RecordError)
    for number, part in enumerate(rest):
        assert not all(receipt.done() for receipt in (*receipts, frame)) or number > 4
        part.settle(answer([entry(number=str(number))]))
    assert [receipt.result().sequence_number for receipt in receipts[1:]] == ["0", "1"]  # type: ignore[union-attr]
    assert frame.result() == FrameResult(3)
    assert [(token, count) for token, count, *_ in rig.told] == [(7, 1), (7, 1), (8, 1)]
    rig.settled()


def test_full_batches_of_aggregates() -> None:
    rig = rig_of(200, max_records=3, max_batch_bytes=700)
    for i in range(100):
        rig.batcher.add(b"z" * (i % 60), i + 1)
    batches = rig.drain()
    assert all(len(batch) <= 3 and batch.size <= 700 for batch in batches)
    assert sum(batch.user_records for batch in batches) == 100
    for batch in batches:
        batch.settle(stored(len(batch)))
    rig.settled()


def test_stalls() -> None:
    from fastkin._codec import Budget

    rig = rig_of(budget=Budget(400, 100))
    taken = 0
    while rig.batcher.offer(b"t", b"x" * 30, taken + 1) == 1:
        taken += 1
    assert 1 < taken < 10
    assert rig.budget.full
    assert rig.batcher.dirty
    rig.store()
    rig.settled()


def test_rejects() -> None:
    rig = rig_of(100, max_record_bytes=200)
    assert rig.batcher.offer(b"t", b"x" * 165, 1) == 1
    [reject] = rig.batcher.take_rejects()
    rig.batcher.settle_reject(reject, DEAD)
    with pytest.raises(RecordError):
        rig.batcher.put(b"x" * 165)
    rig.batcher.put(b"x" * 164)
    assert [len(got) for _, got in read(rig.store())] == [1]
    rig.settled()


def test_abandoned_and_dropped() -> None:
    rig = rig_of()
    receipt = rig.batcher.put(b"x")
    rig.batcher.add(b"y", 1)
    assert rig.batcher.abandon(ValueError("stop")) == 2
    assert str(receipt.exception()) == "stop"
    rig.settled()
    for count in (1, 2):
        rig = rig_of()
        receipts = [rig.batcher.put(b"x") for _ in range(count)]
        rig.batcher.add(b"y", 1)
        del rig.batcher
        assert all(receipt.done() for receipt in receipts)
        assert rig.told[0][:3] == (1, 1, FAILED)
        assert rig.budget.bytes == rig.budget.records == 0


def test_seal_says_what_it_did() -> None:
    rig = rig_of()
    assert rig.batcher.close_batch(DRAIN) is False
    rig.batcher.add(b"y", 1)
    assert rig.batcher.open_bytes > 0
    assert rig.batcher.close_batch(DRAIN) is True
    assert rig.batcher.close_batch(DRAIN) is True, "it was not taken yet"
    rig.store()
    assert rig.batcher.close_batch(DRAIN) is False
    rig.settled()


def test_nothing_leaks() -> None:
    def work() -> None:
        rig = rig_of(1000)
        for i in range(300):
            rig.batcher.put(b"x" * (i % 100))
            rig.batcher.add(b"x" * (i % 100), i)
        for batch in rig.drain():
            for one in batch.settle(answer([entry() if i % 2 else failure() for i in range(len(batch))])):
                one.batch.finish(DROPPED)
        rig.settled()

    work()
    before = sys.getallocatedblocks()
    work()
    assert sys.getallocatedblocks() - before < 50
