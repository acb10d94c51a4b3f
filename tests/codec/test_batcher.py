"""Payloads into batches: bodies, sizes, cuts, limits, rejects and room, as the oracle has them."""

from __future__ import annotations

import base64
import gc
import json
import random
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkin import encode_frame
from fastkin._codec import (
    DEAD,
    DRAIN,
    DROPPED,
    FAILED,
    FILTERED,
    FULL_BYTES,
    FULL_COUNT,
    IDLE,
    LINGER,
    STORED,
    WINDOW,
    Batcher,
    Budget,
    KeyPlan,
    record_cost,
)  # fmt: skip
from fastkin.errors import DataFormatError, LibraryError, RecordError
from support import oracle
from support.codec_rig import Rig, payloads

if TYPE_CHECKING:
    from collections.abc import Callable

UUID_BYTES = 36
WAYS: dict[str, Callable[[Rig, list[bytes]], int]] = {
    "raw": lambda rig, records: sum(rig.batcher.offer(b"t", record, 7) for record in records),
    "bulk": lambda rig, records: rig.batcher.offer(b"t", encode_frame(records), 7),
}


def fixed(key: str) -> KeyPlan:
    return KeyPlan("parts", [("text", key)])


@given(
    st.lists(st.integers(0, 400), max_size=40),
    st.integers(1, 12),
    st.integers(40, 1500),
    st.integers(40, 500),
    st.sampled_from(["raw", "bulk"]),
    st.sampled_from(["k", 'a"\\b\n\u20ac', None]),
)
def test_cuts_sizes_and_bodies(
    sizes: list[int], count: int, batch: int, record: int, way: str, key: str | None
) -> None:
    limits = oracle.Limits(count, batch, record)
    records = [random.Random(n).randbytes(n) for n in sizes]
    rig = Rig(frame=way, key=KeyPlan("none") if key is None else fixed(key), max_records=count,
              max_batch_bytes=batch, max_record_bytes=record)  # fmt: skip
    assert WAYS[way](rig, records) == len(records)
    assert rig.batcher.received == len(records)
    cuts, rejected = oracle.cut([(one, key) for one in records], limits)
    rejects = rig.batcher.take_rejects()
    assert [one.payload for one in rejects] == [records[i] for i in rejected]
    if way == "bulk":
        assert [one.index for one in rejects] == rejected
    batches = rig.drain()
    assert len(batches) == len(cuts)
    held = sum(len(one) for one in batches)
    for one, cut in zip(batches, cuts, strict=True):
        assert json.loads(bytes(one)) == oracle.body(cut.entries, {"StreamName": "s"})
        assert len(one) == one.user_records == len(cut.entries)
        assert one.size == cut.size
        assert one.nbytes == len(memoryview(one))
        assert one.entries() == [(data, text, None) for data, text in cut.entries]
        assert one.shard_load() == {-1: (len(one), one.size)}
        one.finish(DROPPED)
    assert rig.batcher.in_flight == len(rejects)
    for reject in rejects:
        rig.batcher.settle_reject(reject, DEAD)
    assert sum(count for _, count, _, _, _ in rig.told) == len(records)
    assert (rig.batcher.dropped, rig.batcher.dead_lettered) == (held, len(rejects))
    rig.settled()


def test_body_as_bytes() -> None:
    rig = Rig(key=fixed('k"'))
    rig.batcher.add(b"ab", 1)
    rig.batcher.add(b"", 1, "other", "12")
    [batch] = rig.drain()
    assert bytes(batch) == (
        b'{"Records":[{"Data":"YWI=","PartitionKey":"k\\""},'
        b'{"Data":"","PartitionKey":"other","ExplicitHashKey":"12"}],"StreamName":"s"}'
    )
    assert batch.size == 2 + 2 + 5
    batch.finish(DROPPED)
    rig.settled()


def test_every_record_has_a_uuid_of_its_own() -> None:
    rig = Rig(frame="bulk")
    records = payloads(700)
    rig.batcher.offer(b"t", encode_frame(records), 1)
    entries = [entry for call in rig.store() for entry in call]
    assert [data for data, _, _ in entries] == records
    assert len({key for _, key, _ in entries}) == 700
    assert rig.counts() == {1: 700}
    rig.settled()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_kinds_of_buffers(kind: Any) -> None:
    rig = Rig()
    assert rig.batcher.offer(b"t", kind(b"payload"), 1) == 1
    rig.batcher.add(kind(b"payload"))
    receipt = rig.batcher.put(kind(b"payload"))
    frame = rig.batcher.put_frame(kind(encode_frame([b"payload"])))
    assert [data for data, _, _ in rig.store()[0]] == [b"payload"] * 4
    assert receipt.done()
    assert frame.done()
    rig.settled()


@pytest.mark.parametrize("way", ["raw", "bulk"])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_record_limit(way: str, off: int) -> None:
    rig = Rig(frame=way, max_record_bytes=1000)
    record = b"x" * (1000 - UUID_BYTES + off)
    assert WAYS[way](rig, [b"a", record, b"b"]) == 3
    rejects = rig.batcher.take_rejects()
    assert len(rejects) == (off > 0)
    for reject in rejects:
        assert reject.reason == "the record has 1001 bytes with its partition key, the limit is 1000"
        assert reject.token == 7
        assert reject.index == (1 if way == "bulk" else None)
        assert reject.offset == (9 if way == "bulk" else 0) + (1 if way == "bulk" else 0)
        rig.batcher.settle_reject(reject, DEAD)
    assert len(rig.store()[0]) == 3 - len(rejects)
    with pytest.raises(RecordError) if off > 0 else _nothing():
        rig.batcher.add(record)
    with pytest.raises(RecordError) if off > 0 else _nothing():
        rig.batcher.put(record)
    with pytest.raises(RecordError, match="record 1 of the frame") if off > 0 else _nothing():
        rig.batcher.put_frame(encode_frame([b"a", record]))
    assert rig.batcher.received == 3 + (4 if off <= 0 else 0)
    rig.store()
    rig.settled()


class _nothing:  # noqa: N801
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_batch_limit(off: int) -> None:
    rig = Rig(max_batch_bytes=1000)
    rig.batcher.add(b"x" * (500 - UUID_BYTES))
    rig.batcher.add(b"x" * (500 - UUID_BYTES + off))
    assert rig.batcher.ready == (off > 0)
    batches = rig.drain()
    assert [len(one) for one in batches] == ([1, 1] if off > 0 else [2])
    assert [one.reason for one in batches] == ([FULL_BYTES, DRAIN] if off > 0 else [DRAIN])
    for one in batches:
        one.finish(DROPPED)
    rig.settled()


@pytest.mark.parametrize("n", [499, 500, 501])
def test_count_limit(n: int) -> None:
    rig = Rig()
    for _ in range(n):
        rig.batcher.add(b"")
    assert rig.batcher.ready == n // 500
    assert rig.batcher.open_records == n % 500
    batches = rig.drain()
    assert sum(len(one) for one in batches) == n
    assert batches[0].reason == (FULL_COUNT if n >= 500 else DRAIN)
    for one in batches:
        one.finish(DROPPED)
    rig.settled()


def test_a_record_larger_than_a_batch_is_too_large() -> None:
    rig = Rig(max_batch_bytes=100, max_record_bytes=1000)
    with pytest.raises(RecordError, match="limit is 100"):
        rig.batcher.add(b"x" * 100)
    rig.settled()


def test_flushes_and_attention() -> None:
    rig = Rig(max_records=3)
    batcher = rig.batcher
    assert batcher.dirty is False
    assert batcher.close_batch(LINGER) is False
    batcher.add(b"a")
    assert batcher.dirty is True
    batcher.dirty = False
    batcher.add(b"b")
    assert batcher.dirty is False
    assert (batcher.open_records, batcher.open_bytes) == (2, 74)
    batcher.add(b"c")
    assert batcher.dirty is True
    for reason in (LINGER, WINDOW, IDLE, DRAIN):
        batcher.add(b"d")
        assert batcher.close_batch(reason) is True
    assert batcher.flushes == (1, 0, 1, 1, 1, 1)
    batch = batcher.take()
    assert batch is not None
    assert batch.batcher is batcher
    batch.finish(DROPPED)
    for bad in (-1, 6):
        with pytest.raises(LibraryError):
            batcher.close_batch(bad)
    rig.store()
    assert batcher.take() is None
    rig.settled()


def test_a_bad_frame_is_one_reject() -> None:
    rig = Rig(frame="bulk")
    payload = encode_frame([b"a", b"b"]) + b"\xc0"
    assert rig.batcher.offer(b"plant/7", payload, 5) == 1
    assert rig.batcher.dirty is True
    assert (rig.batcher.received, rig.batcher.in_flight, rig.budget.records) == (1, 1, 1)
    assert rig.budget.bytes > len(payload)
    [reject] = rig.batcher.take_rejects()
    assert (reject.topic, reject.payload, reject.index, reject.token) == (b"plant/7", payload, None, 5)
    assert (reject.offset, reject.reason) == (10, "a record is nil 0xc0, not bytes")
    assert rig.batcher.take_rejects() == []
    rig.batcher.settle_reject(reject, DEAD)
    assert rig.told == [(5, 1, DEAD, None, -1)]
    with pytest.raises(LibraryError, match="settled already"):
        rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


def test_an_empty_frame_is_nothing() -> None:
    rig = Rig(frame="bulk")
    assert rig.batcher.offer(b"t", b"\xa31.0", 5) == 0
    assert rig.batcher.received == 0
    assert rig.batcher.dirty is False
    rig.settled()


def test_rejects_end_in_every_way() -> None:
    rig = Rig(frame="bulk")
    for _ in range(5):
        rig.batcher.offer(b"t", b"", 5)
    other = Rig()
    first, second, third, fourth, fifth = rig.batcher.take_rejects()
    with pytest.raises(LibraryError, match="another batcher"):
        other.batcher.settle_reject(first, DEAD)
    with pytest.raises(LibraryError, match="no outcome"):
        rig.batcher.settle_reject(first, 9)
    rig.batcher.settle_reject(first, FILTERED)
    rig.batcher.settle_reject(second, DROPPED)
    rig.batcher.settle_reject(third, FAILED)
    assert isinstance(rig.told[-1][3], DataFormatError)
    rig.batcher.settle_reject(fourth, STORED)
    del fifth
    assert rig.told[-1][:3] == (5, 1, FAILED)
    assert (rig.batcher.filtered, rig.batcher.dropped, rig.batcher.stored) == (1, 3, 1)
    rig.settled()


def test_mixed_frames_set_aside_only_what_is_bad() -> None:
    rig = Rig(frame="bulk", key=KeyPlan("parts", [("field", ("id",))]), max_record_bytes=200)
    records = [
        b'{"id":"a"}',
        b'{"id":""}',
        b'{"no":1}',
        b'{"id":"b","x":"' + b"x" * 300 + b'"}',
        b'{"id":"\\u00fc\\""}',
    ]
    assert rig.batcher.offer(b"t", encode_frame(records), 3) == 5
    rejects = rig.batcher.take_rejects()
    assert [(one.index, one.payload) for one in rejects] == [(1, records[1]), (3, records[3])]
    assert [one.reason.split(",")[0] for one in rejects] == [
        "the partition key is empty", "the record has 317 bytes with its partition key",
    ]  # fmt: skip
    [call] = rig.store()
    assert [data for data, _, _ in call] == [records[0], records[2], records[4]]
    assert (call[0][1], call[2][1]) == ("a", '\u00fc"')
    for one in rejects:
        rig.batcher.settle_reject(one, DEAD)
    assert rig.batcher.keys_missing == 1
    rig.settled()


def test_a_bad_topic_rejects_every_record() -> None:
    rig = Rig(frame="bulk", key=KeyPlan("parts", [("topic", None)]))
    assert rig.batcher.offer(b"\xff", encode_frame([b"a", b"b"]), 3) == 2
    rejects = rig.batcher.take_rejects()
    assert [one.index for one in rejects] == [0, 1]
    for one in rejects:
        assert "UTF-8" in one.reason
        rig.batcher.settle_reject(one, DEAD)
    rig.settled()


def test_very_many_records_leave_no_tables_behind() -> None:
    rig = Rig(frame="bulk", key=KeyPlan("parts", [("field", ("id",))]))
    frame = encode_frame([b'{"id":"' + b"k" * 200 + b'"}'] * 12_000)
    assert rig.batcher.offer(b"t", frame, 3) == 12_000
    assert sum(len(call) for call in rig.store()) == 12_000
    rig.settled()


# -- room


def cost_of(record: bytes, key: int = UUID_BYTES) -> int:
    """What a record takes from the budget: its entry, the comma, 32 bytes of struct."""
    return len(base64.b64encode(record)) + 9 + 18 + key + 2 + 1 + 32


@pytest.mark.parametrize("way", ["raw", "bulk"])
def test_charged_what_it_costs(way: str) -> None:
    rig = Rig(frame=way)
    records = payloads(20)
    WAYS[way](rig, records)
    assert rig.budget.bytes == rig.budget.peak_bytes == sum(map(cost_of, records))
    assert rig.budget.records == 20
    (batch,) = rig.drain()
    assert rig.budget.bytes == rig.budget.peak_bytes == sum(map(cost_of, records)) + batch.overhead
    assert 1024 <= batch.overhead <= 1024 + 1024 + batch.nbytes // 8 + 32 * 3
    batch.finish(DROPPED)
    rig.settled()


@pytest.mark.parametrize("way", ["raw", "bulk"])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_stalls_without_taking_anything(way: str, off: int) -> None:
    record = b"x" * 100
    budget = Budget(cost_of(b"") + cost_of(record) - off, 100)
    rig = Rig(frame=way, budget=budget)
    assert WAYS[way](rig, [b""]) == 1
    before = budget.bytes
    payload = record if way == "raw" else encode_frame([record])
    taken = rig.batcher.offer(b"t", payload, 2)
    if off > 0:
        assert taken == -1
        assert (budget.bytes, rig.batcher.received, budget.full) == (before, 1, True)
        rig.store()
        assert budget.full is False
        assert rig.batcher.offer(b"t", payload, 2) == 1
    else:
        assert taken == 1
        assert budget.full is (off == 0)
    rig.store()
    rig.settled()
    assert budget.low is True
    assert budget.full is False


def test_what_is_larger_than_the_budget_is_taken_when_nothing_is_held() -> None:
    rig = Rig(frame="bulk", budget=Budget(1000, 2))
    frame = encode_frame([b"x" * 500] * 9)
    assert rig.batcher.offer(b"t", frame, 1) == 9
    assert rig.budget.full is True
    assert rig.batcher.offer(b"t", frame, 2) == -1
    assert rig.batcher.offer(b"t", b"", 3) == -1
    rig.store()
    assert rig.batcher.offer(b"t", frame, 2) == 9
    rig.store()
    rig.settled()


def test_records_are_bounded_too() -> None:
    rig = Rig(budget=Budget(1 << 30, 3))
    for _ in range(3):
        assert rig.batcher.offer(b"t", b"", 1) == 1
    assert rig.batcher.offer(b"t", b"", 1) == -1
    rig.store()
    rig.settled()


def test_a_stalled_frame_of_mixed_records_takes_nothing() -> None:
    rig = Rig(frame="bulk", key=KeyPlan("parts", [("field", ("id",))]), budget=Budget(2000, 100))
    frame = encode_frame([b'{"id":"abc"}', b'{"id":""}'] * 4)
    assert rig.batcher.offer(b"t", frame, 1) == 8
    assert rig.batcher.offer(b"t", frame, 1) == -1
    for one in rig.batcher.take_rejects():
        rig.batcher.settle_reject(one, DEAD)
    rig.store()
    rig.settled()


def test_budget() -> None:
    for bad in ((0, 1), (1, 0)):
        with pytest.raises(LibraryError):
            Budget(*bad)
    budget = Budget(10_000, 4)
    assert (budget.max_bytes, budget.max_records, budget.bytes, budget.records) == (10_000, 4, 0, 0)
    assert budget.room(10**9) is True
    rig = Rig(budget=budget)
    rig.batcher.offer(b"t", b"x" * 30, 1)
    assert budget.room(10**9) is False
    assert budget.room(10) is True
    rig.batcher.offer(b"t", b"", 1)
    assert (budget.low, budget.full) == (True, False)
    rig.batcher.add(b"")
    assert (budget.low, budget.full) == (False, False)
    rig.batcher.add(b"")
    assert (budget.low, budget.full) == (False, True)
    assert budget.room(0) is False
    batch, *_ = rig.drain()
    half, other = batch.halves()
    half.finish(DROPPED)
    assert (budget.low, budget.full, budget.records) == (True, False, 2)
    other.finish(DROPPED)
    rig.settled()


def test_room_is_told_whoever_made_it() -> None:
    """Each time `full` ends, also when no record has ended: to close an aggregate gives back what it cost open."""
    told: list[int] = []
    rig = Rig(frame="bulk", budget=Budget(1 << 20, 20), aggregate_bytes=20_000)
    rig.budget.on_room = lambda: told.append(rig.budget.records)
    assert rig.batcher.offer(b"t", encode_frame([b"x"] * 16), 1) == 16
    assert rig.batcher.offer(b"t", encode_frame([b"x"] * 8), 2) == -1
    assert (rig.budget.full, told) == (True, [])
    rig.batcher.close_batch(DRAIN)
    assert len(told) == 1
    assert (rig.budget.full, rig.budget.records) == (False, 16)
    assert rig.batcher.offer(b"t", encode_frame([b"x"] * 8), 2) == -1
    rig.store()
    assert len(told) == 2
    assert rig.budget.on_room is not None
    rig.budget.on_room = None
    assert rig.batcher.offer(b"t", encode_frame([b"x"] * 20), 3) == 20
    rig.store()
    assert len(told) == 2
    rig.settled()


def test_a_record_in_doubt_does_not_fill_a_budget() -> None:
    told: list[int] = []
    rig = Rig(frame="bulk", budget=Budget(10_000, 20))
    rig.budget.on_room = lambda: told.append(rig.budget.records)
    rig.batcher.offer(b"t", encode_frame([b"doubted"]), 1)
    wide = encode_frame([b"x"] * 20)
    assert rig.batcher.offer(b"t", wide, 2) == -1
    assert (rig.budget.full, rig.budget.low) == (True, True)
    rig.budget.doubt(1)
    assert (rig.budget.full, told) == (False, [1])
    assert rig.batcher.offer(b"t", wide, 2) == 20
    assert rig.batcher.offer(b"t", wide, 3) == -1, "something else is held"
    rig.budget.doubt(21)  # all of it was refused, too: one more may tell, while memory is kept
    assert rig.budget.low is True
    assert rig.batcher.offer(b"t", encode_frame([b"y" * 9000]), 3) == 1
    rig.budget.doubt(22)
    assert rig.budget.bytes > rig.budget.max_bytes
    assert rig.batcher.offer(b"t", wide, 4) == -1
    rig.budget.doubt(0)
    assert (rig.budget.low, rig.budget.full) == (False, True)
    rig.store()
    rig.settled()


def test_several_batchers_share_a_budget() -> None:
    budget = Budget(1 << 20, 3)
    one, two = Rig(budget=budget), Rig(budget=budget)
    one.batcher.offer(b"t", b"", 1)
    two.batcher.offer(b"t", b"", 1)
    one.batcher.offer(b"t", b"", 1)
    assert two.batcher.offer(b"t", b"", 1) == -1
    one.store()
    assert two.batcher.offer(b"t", b"", 1) == 1
    two.store()
    one.settled()
    two.settled()


# -- arguments


def test_batcher_arguments() -> None:
    fine: dict[str, Any] = {
        "settler": None, "budget": Budget(1, 1), "frame": "raw", "key": KeyPlan("uuid"), "target": b"",
    }  # fmt: skip
    Batcher(**fine)
    for bad in (
        {"frame": "odd"}, {"max_records": 0}, {"max_records": 10_001}, {"max_batch_bytes": 0},
        {"max_batch_bytes": 1 << 31}, {"max_record_bytes": 0}, {"key": KeyPlan("none"), "aggregate_bytes": 100},
    ):  # fmt: skip
        with pytest.raises(LibraryError):
            Batcher(**(fine | bad))
    for wrong in ({"budget": None}, {"key": None}, {"target": None}, {"settler": 5}):
        with pytest.raises(TypeError):
            Batcher(**(fine | wrong))


def test_record_arguments() -> None:
    rig = Rig()
    batcher: Any = rig.batcher
    for bad in ("text", None, 5, memoryview(b"abcd")[::2]):
        with pytest.raises(LibraryError):
            batcher.put(bad)
        with pytest.raises(LibraryError):
            batcher.add(bad)
        with pytest.raises(LibraryError):
            batcher.put_frame(bad)
        with pytest.raises(LibraryError):
            batcher.offer(b"t", bad, 1)
    with pytest.raises(LibraryError, match="partition key is text"):
        batcher.put(b"x", key=b"k")
    with pytest.raises(LibraryError, match="hash key is text"):
        batcher.put(b"x", hash_key=5)
    for key, why in (("", "empty"), ("k" * 257, "more than 256"), ("\udc80", "surrogate")):
        with pytest.raises(RecordError, match=why):
            batcher.put(b"x", key)
    with pytest.raises(RecordError):
        batcher.put(b"x", "k", "\udc80")
    with pytest.raises(TypeError):
        batcher.offer(None, b"x", 1)
    with pytest.raises(DataFormatError):
        batcher.put_frame(b"")
    assert batcher.received == 0
    rig.settled()


def test_a_field_key_of_a_put() -> None:
    rig = Rig(key=KeyPlan("parts", [("field", ("id",))]))
    rig.batcher.put(b'{"id":"w\\n"}')
    rig.batcher.put(b"{}")
    with pytest.raises(RecordError, match="empty"):
        rig.batcher.put(b'{"id":""}')
    with pytest.raises(RecordError, match="record 1 of the frame"):
        rig.batcher.put_frame(encode_frame([b"", b'{"id":""}']))
    assert rig.batcher.put_frame(encode_frame([b"", b'{"id":"z"}'])).done() is False
    [call] = rig.store()
    assert [key for _, key, _ in call if len(str(key)) < 36] == ["w\n", "z"]
    assert rig.batcher.keys_missing == 2
    rig.settled()


def test_without_a_settler_tokens_mean_nothing() -> None:
    budget = Budget(1 << 20, 1000)
    batcher = Batcher(settler=None, budget=budget, frame="raw", key=KeyPlan("uuid"), target=b"")
    batcher.offer(b"t", b"x", 77)
    batcher.close_batch(DRAIN)
    batch = batcher.take()
    assert batch is not None
    batch.finish(FILTERED)
    assert (batcher.filtered, batcher.in_flight, budget.bytes) == (1, 0, 0)


def test_abandon() -> None:
    rig = Rig(max_records=2)
    receipt = rig.batcher.put(b"1")
    for i in range(4):
        rig.batcher.offer(b"t", b"x", i)
    error = RuntimeError("stop")
    assert rig.batcher.abandon(error) == 5
    assert rig.batcher.abandon(error) == 0
    assert [(token, outcome, why) for token, _, outcome, why, _ in rig.told] == [
        (1, FAILED, error), (2, FAILED, error), (3, FAILED, error),
    ]  # fmt: skip
    assert receipt.exception() is error
    assert rig.batcher.dropped == 5
    rig.settled()


def test_a_batcher_that_is_dropped_tells_its_settler() -> None:
    rig = Rig(frame="bulk")
    rig.batcher.offer(b"t", encode_frame([b"x"] * 700), 4)
    rig.batcher.offer(b"t", b"", 5)
    receipt = rig.batcher.put(b"x")
    del rig.batcher
    assert receipt.done()
    assert rig.budget.bytes == rig.budget.records == 0
    told: dict[int, int] = {}
    for token, count, outcome, _, _ in rig.told:
        assert outcome == FAILED
        told[token] = told.get(token, 0) + count
    assert told == {4: 700, 5: 1}


def test_nothing_leaks() -> None:
    def work() -> None:
        rig = Rig(frame="bulk", key=KeyPlan("parts", [("field", ("id",))]), max_record_bytes=300, budget=budget)
        for i in range(30):
            rig.batcher.offer(b"t", frame, i + 1)
            rig.batcher.offer(b"t", b"\xa31.0\xc0", i + 1)
            rig.batcher.put(b"x", f"key {i}")
            with pytest.raises(RecordError):
                rig.batcher.put(b"x", "")
        for one in rig.batcher.take_rejects():
            rig.batcher.settle_reject(one, DEAD)
        rig.store()
        rig.settled()

    budget = Budget(1 << 30, 1 << 30)
    frame = encode_frame([b'{"id":"a"}', b'{"id":""}', b'{"id":1,"' + b"x" * 400 + b'":1}', b"{}"])
    work()
    before = sys.getallocatedblocks()
    work()
    assert sys.getallocatedblocks() - before < 50


@pytest.mark.untraced
def test_a_collection_in_the_middle_of_a_frame_disturbs_nothing() -> None:
    """What is collected may end receipts, whose callbacks may put."""
    key = KeyPlan("parts", [("field", ("id",))])
    rig = Rig(frame="bulk", key=key, max_records=3, max_record_bytes=100)
    other = Rig()
    threshold = gc.get_threshold()
    frame = encode_frame([b'{"id":"k%d"}' % i if i % 3 else b'{"id":""}' for i in range(60)])
    gc.set_threshold(1)
    try:
        for _ in range(40):
            receipt = other.batcher.put(b"x")
            receipt.add_done_callback(lambda _: rig.batcher.put_frame(encode_frame([b'{"id":"nested"}'] * 4)))
            cycle: list[Any] = other.drain()
            cycle.append(cycle)
            del receipt, cycle
            assert rig.batcher.offer(b"t", frame, 1) == 60
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    rejects = rig.batcher.take_rejects()
    assert len(rejects) == 40 * 20
    for one in rejects:
        assert one.reason == "the partition key is empty"
        rig.batcher.settle_reject(one, DEAD)
    keys = [key for call in rig.store() for _, key, _ in call]
    assert [key for key in keys if key != "nested"] == [f"k{i}" for i in range(60) if i % 3] * 40
    assert keys.count("nested") == 160
    rig.settled()


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["offer", "put", "seal", "take", "store", "split"]), st.integers(0, 60)), max_size=60
    )
)
def test_the_accounts_hold_at_every_step(steps: list[tuple[str, int]]) -> None:
    rig = Rig(max_records=7, max_batch_bytes=600, max_record_bytes=80)
    batcher = rig.batcher
    taken: list[Any] = []
    aside: list[Any] = []
    for what, n in steps:
        match what:
            case "offer":
                batcher.offer(b"t", b"x" * n, n + 1)
            case "put" if n <= 44:
                batcher.put(b"x" * n)
            case "seal":
                batcher.close_batch(DRAIN)
            case "take" if (batch := batcher.take()) is not None:
                taken.append(batch)
            case "split" if taken and len(taken[0]) > 1:
                taken[0:1] = taken[0].halves()
            case "store" if taken:
                taken.pop().finish(DROPPED)
        aside += batcher.take_rejects()
        ended = batcher.stored + batcher.dead_lettered + batcher.filtered + batcher.dropped
        assert batcher.received == ended + batcher.in_flight
        assert batcher.in_flight == rig.budget.records
    for batch in taken:
        batch.finish(DROPPED)
    for one in aside:
        batcher.settle_reject(one, DEAD)
    rig.store()
    rig.settled()


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"", "empty"),
        (b"\xa41.00", "version"),
        (b"\x01", "version"),
        (b"\xa31.0\xc0", "element"),
        (b"\xa31.0\xc4\x05a", "truncated"),
        (b"\xa31.0\xc4", "truncated"),
        (b"\x91\xa31.0\x00", "trailing"),
        (b"\xa31.0\xc4\x64" + b"x" * 100, "oversize"),
    ],
)
def test_a_reject_says_what_kind_it_is(payload: bytes, kind: str) -> None:
    rig = Rig(frame="bulk", max_record_bytes=100)
    assert rig.batcher.offer(b"t", payload, 1) == 1
    (reject,) = rig.batcher.take_rejects()
    assert reject.kind == kind
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


def test_a_reject_for_its_key_says_so() -> None:
    rig = Rig(key=KeyPlan("parts", [("topic", None)]))
    rig.batcher.offer(b"x" * 300, b"a", 1)
    (reject,) = rig.batcher.take_rejects()
    assert reject.kind == "partition_key"
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


@pytest.mark.parametrize("key", ["k", "\x01" * 256, "ä" * 256, "𝄞" * 256])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_no_record_costs_more_than_is_said_beforehand(key: str, size: int) -> None:
    rig = Rig(frame="raw")
    rig.batcher.put(b"d" * size, key, str(2**128 - 1))
    assert 0 < rig.budget.bytes <= record_cost(size + len(key.encode()))
    rig.store()
    rig.settled()
