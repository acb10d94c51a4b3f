"""Bodies that come back from the disk: the same batch again, or a clear error, whatever the disk gave back."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import random
from typing import Any

import pytest

from fastkin._codec import (
    DEAD,
    DROPPED,
    FAILED,
    SPOOLED,
    STORED,
    Batch,
    Batcher,
    Budget,
    CallbackSettler,
    KeyPlan,
    ShardTable,
    encode_frame,
)
from fastkin.errors import DataFormatError, LibraryError
from fastkin.results import FrameResult, PutResult
from support.codec_rig import Rig, answer, entry, failure, payloads, stored

BODY = b'{"Records":[{"Data":"AAAA","PartitionKey":"k"},{"Data":"","PartitionKey":"l"}],"StreamName":"s"}'


class Disk(Rig):
    """A rig whose batcher has a spool."""

    def __init__(self, **options: Any) -> None:
        self.back = Budget(1 << 30, 1 << 30)
        self.rows: list[tuple[int, int, int]] = []
        super().__init__(
            rows=CallbackSettler(lambda row, count, outcome, *_: self.rows.append((row, count, outcome))),
            replay=self.back,
            **options,
        )

    def spool(self) -> list[tuple[bytes, bytes]]:
        """Everything that waits goes to the disk: (body, counts)."""
        out = []
        for batch in self.drain():
            out.append((bytes(batch), batch.counts))
            batch.finish(SPOOLED)
        self.books()
        return out

    def books(self) -> None:
        batcher = self.batcher
        ended = batcher.stored + batcher.dead_lettered + batcher.filtered + batcher.dropped
        assert batcher.received == ended + batcher.in_flight + batcher.spooled
        assert self.budget.records + self.back.records == batcher.in_flight

    def empty(self) -> None:
        self.settled()
        assert self.back.bytes == self.back.records == self.batcher.spooled == 0


def restored(body: bytes, counts: bytes = b"", records: int = 1 << 20) -> Batch:
    rig = Disk()
    rig.batcher.adopt_spooled(records)
    return rig.batcher.restore(body, counts, 1)


@pytest.mark.parametrize(
    "plan",
    [
        KeyPlan("uuid"),
        KeyPlan("none"),
        KeyPlan("parts", [("topic", None)]),
        KeyPlan("parts", [("text", 'a"\\\n\x01\u00fc\U0001f600')]),
    ],
)
def test_a_batch_comes_back_as_it_was(plan: KeyPlan) -> None:
    rig = Disk(key=plan)
    for number, payload in enumerate(payloads(300)):
        assert rig.batcher.offer(b"plant/\xc3\xbc", payload, number + 1) == 1
    (batch,) = rig.drain()
    before, size, body, counts = batch.entries(), batch.size, bytes(batch), batch.counts
    assert counts == b""
    assert not batch.restored
    assert batch.rows() == {}
    batch.finish(SPOOLED)
    assert {one[2] for one in rig.told} == {SPOOLED}
    assert len(rig.told) == 300
    assert (rig.batcher.spooled, rig.batcher.in_flight, rig.budget.bytes) == (300, 0, 0)
    again = rig.batcher.restore(memoryview(body), counts, 7)
    assert (bytes(again), again.entries(), again.size, again.batcher) == (body, before, size, rig.batcher)
    assert (again.restored, again.rows(), again.user_records) == (True, {7: 300}, 300)
    assert (rig.batcher.spooled, rig.batcher.in_flight) == (0, 300)
    assert rig.back.bytes > len(body) - 100
    rig.books()
    assert again.settle(stored(300)) == []
    assert rig.rows == [(7, 300, STORED)]
    assert len(rig.told) == 300, "the messages were told once"
    rig.empty()


def test_explicit_hash_keys_and_shards_are_found_again() -> None:
    rig = Disk()
    rig.batcher.shards = ShardTable([2**126, 2**127, 2**128 - 1])
    rig.batcher.add(b"1", 1, "k", str(2**127))
    rig.batcher.add(b"2", 1, "welder-7")
    rig.batcher.add(b"3", 1, "clé")
    rig.batcher.add(b"4", 1)
    ((body, counts),) = rig.spool()
    batch = rig.batcher.restore(body, counts, 1)
    assert rig.batcher.shards is not None
    table = rig.batcher.shards
    expected = {table.find("k", str(2**127)), table.find("welder-7"), table.find("clé"), -1}
    assert set(batch.shard_load()) == expected, "a key that was drawn has no shard"
    assert batch.entries()[0][1:] == ("k", str(2**127))
    batch.finish(DROPPED)
    fixed = Disk(key=KeyPlan("parts", [("text", "0b6b5a0e-0000-4000-8000-000000000000")]))
    fixed.batcher.shards = table
    fixed.batcher.add(b"x", 1)
    ((body, counts),) = fixed.spool()
    batch = fixed.batcher.restore(body, counts, 1)
    assert -1 not in batch.shard_load(), "a key that was given has one, also when it looks drawn"
    batch.finish(DROPPED)
    fixed.empty()


def test_aggregates_bring_their_user_records() -> None:
    rig = Disk(aggregate_bytes=400, frame="bulk")
    for token in range(1, 31):
        rig.batcher.offer(b"t", encode_frame([b"x" * 50] * 7), token)
    rig.batcher.add(b"alone", 99, "key", "1")
    batches = rig.spool()
    total = 0
    for row, (body, counts) in enumerate(batches, 1):
        assert len(counts) == 4 * len(json.loads(body)["Records"])
        batch = rig.batcher.restore(body, counts, row)
        assert batch.counts == counts
        total += batch.user_records
        batch.settle(stored(len(batch)))
    assert total == 211
    assert sum(count for _, count, _ in rig.rows) == 211
    rig.empty()


def test_failures_splits_and_gathers_keep_rows_apart() -> None:
    """Half fails, is split and gathered with another row's: each row hears of its own records."""
    rig = Disk(max_records=10)
    for token in range(20):
        rig.batcher.add(b"%d" % token, token + 1)
    one, two = (rig.batcher.restore(body, counts, row) for row, (body, counts) in enumerate(rig.spool(), 1))
    entries = [entry() if n % 2 else failure() for n in range(10)]
    (failed,) = one.settle(answer(entries))
    assert rig.rows == [(1, 1, STORED)] * 5
    assert failed.batch.restored
    left, right = two.halves()
    assert (left.rows(), right.rows()) == ({2: 5}, {2: 5})
    (mixed,) = Batch.gather([failed.batch, left])
    assert mixed.rows() == {1: 5, 2: 5}
    mixed.finish(SPOOLED)
    assert rig.batcher.spooled == 10
    rig.books()
    right.finish(DEAD)
    assert sorted(rig.rows[5:]) == [(1, 5, SPOOLED), (2, 5, DEAD), (2, 5, SPOOLED)]
    rig.batcher.settle_spooled(10, DEAD)
    assert rig.batcher.dead_lettered == 15
    rig.empty()


def test_an_aggregate_from_the_disk_is_halved_too() -> None:
    rig = Disk(aggregate_bytes=1000)
    for token in range(5):
        rig.batcher.add(b"%d" % token, token + 1)
    [(body, counts)] = rig.spool()
    batch = rig.batcher.restore(body, counts, 9)
    left, right = batch.halves()
    assert (left.rows(), right.rows(), left.restored) == ({9: 2}, {9: 3}, True)
    one, other = left.halves()
    assert [data for part in (one, other) for data, _, _ in part.entries()] == [b"0", b"1"]
    assert one.single
    one.finish(DEAD)
    other.finish(SPOOLED)
    right.finish(SPOOLED)
    assert rig.rows == [(9, 1, DEAD), (9, 1, SPOOLED), (9, 3, SPOOLED)]
    rig.books()


@pytest.mark.parametrize("spoil", [
    lambda data: data[:-17] + data[-16:],  # the last record ends too early
    lambda data: data[:7] + b"\x1b" + data[8:],
    lambda data: b"\xf4" + data[1:],
    lambda data: data[:5] + b"\xff\xff\xff\xff\xff\xff" + data[11:],
    lambda data: data[:12],
    lambda data: b"",
    lambda data: data[:5] + bytes([data[5] + 1]) + data[6:],
    lambda data: data.replace(b"\x08\x00\x1a", b"\x08\x01\x1a", 1),
], ids=range(8))  # fmt: skip
def test_what_says_it_is_several_records_and_is_no_aggregate_stays_whole(spoil: Any) -> None:
    """A disk may hand back anything: it goes as it is."""
    rig = Disk(aggregate_bytes=1000, key=KeyPlan("parts", [("text", "k")]))
    for token in range(5):
        rig.batcher.add(b"%d" % token, token + 1)
    [(body, counts)] = rig.spool()
    before = json.loads(body)
    data = base64.b64decode(before["Records"][0]["Data"])
    assert data != spoil(data)
    before["Records"][0]["Data"] = base64.b64encode(spoil(data)).decode()
    batch = rig.batcher.restore(json.dumps(before, separators=(",", ":")).encode(), counts, 9)
    assert batch.user_records == 5
    assert batch.single
    with pytest.raises(LibraryError, match="cannot be halved"):
        batch.halves()
    batch.finish(SPOOLED)
    assert rig.rows == [(9, 5, SPOOLED)]


def test_fresh_and_restored_in_one_call_are_paid_by_their_own_budget() -> None:
    rig = Disk()
    rig.batcher.add(b"old", 1)
    ((body, counts),) = rig.spool()
    old = rig.batcher.restore(body, counts, 5)
    rig.batcher.add(b"new", 2)
    (new,) = rig.drain()
    held, back = rig.budget.bytes - new.overhead, rig.back.bytes - old.overhead
    (both,) = Batch.gather([old, new])
    assert (rig.budget.bytes, rig.back.bytes) == (held, back + both.overhead)
    both.settle(stored(2))
    assert rig.rows == [(5, 1, STORED)]
    assert rig.told[-1][:3] == (2, 1, STORED)
    rig.empty()


def test_receipts_learn_that_they_are_spooled() -> None:
    rig = Disk()
    receipt = rig.batcher.put(b"1")
    frame = rig.batcher.put_frame(encode_frame([b"2", b"3"]))
    rig.spool()
    assert receipt.result() == PutResult(None, None, None, spooled=True)
    assert frame.result() == FrameResult(2, spooled=True)
    assert rig.batcher.spooled == 3


def test_without_anybody_to_tell() -> None:
    rig = Rig()
    rig.batcher.add(b"1", 1)
    (batch,) = rig.drain()
    body = bytes(batch)
    batch.finish(SPOOLED)
    again = rig.batcher.restore(body, b"", 3)
    assert rig.budget.records == 1, "without a budget of their own the batcher's pays"
    again.finish(DROPPED)
    rig.settled()


def test_a_callback_that_raises_leaves_the_books_whole() -> None:
    def boom(*_: object) -> None:
        raise ZeroDivisionError

    batcher = Batcher(
        settler=None,
        budget=Budget(1 << 20, 99),
        frame="raw",
        key=KeyPlan("uuid"),
        target=b"",
        rows=CallbackSettler(boom),
    )
    batcher.adopt_spooled(2)
    batch = batcher.restore(BODY, b"", 1)
    with pytest.raises(ZeroDivisionError):
        batch.settle(stored(2))
    assert (batcher.stored, batcher.in_flight) == (2, 0)


def test_a_restored_batch_that_is_freed_ends_as_failed() -> None:
    rig = Disk()
    rig.batcher.adopt_spooled(2)
    batch = rig.batcher.restore(BODY, b"", 4)
    del batch
    gc.collect()
    assert rig.rows == [(4, 2, FAILED)]
    rig.empty()


def test_books_refuse_what_was_never_spooled() -> None:
    rig = Disk()
    with pytest.raises(LibraryError, match="more than the 0"):
        rig.batcher.restore(BODY, b"", 1)
    with pytest.raises(LibraryError, match="more than the 0"):
        rig.batcher.settle_spooled(1, DEAD)
    for outcome in (STORED, SPOOLED, 9):
        with pytest.raises(LibraryError):
            rig.batcher.settle_spooled(0, outcome)
    rig.batcher.offer(b"t", b"", 1)
    bulk = Disk(frame="bulk")
    bulk.batcher.offer(b"t", b"\x00", 1)
    (reject,) = bulk.batcher.take_rejects()
    with pytest.raises(LibraryError, match="cannot be spooled"):
        bulk.batcher.settle_reject(reject, SPOOLED)
    bulk.batcher.settle_reject(reject, DEAD)
    bulk.empty()


def test_the_target_is_that_of_now() -> None:
    assert bytes(restored(BODY.replace(b'"s"', b'"other"'))).endswith(b'],"StreamName":"s"}')


def test_counts_must_belong_to_the_body() -> None:
    two = (3).to_bytes(4, "little") + (1).to_bytes(4, "little")
    batch = restored(BODY, two)
    assert batch.user_records == 4
    assert batch.counts == two
    for bad in (two[:-1], two[:4], two + two[:4], bytes(8), b"\xff" * 8):
        with pytest.raises(DataFormatError, match="counts"):
            restored(BODY, bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"", "does not begin"),
        (b'{"Records":[]}', "not as it was written"),
        (BODY.replace(b"AAAA", b"AA A"), "no base64"),
        (BODY.replace(b"AAAA", b"AAA"), "no base64"),
        (BODY.replace(b"AAAA", b"A==="), "no base64"),
        (BODY.replace(b"AAAA", b"===="), "no base64"),
        (BODY.replace(b"AAAA", b"AA=A"), "no base64"),
        (BODY.replace(b'"k"', b'""'), "key cannot"),
        (BODY.replace(b'"k"', b'"\\ud800"'), "key cannot"),
        (BODY.replace(b'"k"', b'"\xff"'), "key cannot"),
        (BODY.replace(b'"k"', b'"\n"'), "key cannot"),
        (BODY.replace(b'"k"', b'"' + b"k" * 257 + b'"'), "key cannot"),
        (BODY.replace(b'"k"', b'"' + b"k" * 2000 + b'"'), "key cannot"),
        (BODY.replace(b'"k"', b'"k","ExplicitHashKey":"x"'), "hash key"),
        (BODY.replace(b'"k"', b'"k","ExplicitHashKey":"1'), "hash key"),
        (BODY.replace(b'"k"', b'"k","ExplicitHashKey":"' + str(2**128).encode() + b'"'), "hash key"),
        (BODY.replace(b'"k"}', b'"k","More":1}'), "not as it was written"),
        (BODY.replace(b"],", b"]"), "does not end"),
        (BODY[:-1], "does not end"),
        (BODY[: BODY.index(b"]") + 2], "does not end"),
    ],
)
def test_what_is_no_body(bad: bytes, says: str) -> None:
    with pytest.raises(DataFormatError, match=says) as caught:
        restored(bad)
    assert 0 <= caught.value.offset <= len(bad)


def test_more_entries_than_any_batch() -> None:
    body = b'{"Records":[' + b",".join([b'{"Data":"","PartitionKey":"k"}'] * 10_001) + b'],"StreamName":"s"}'
    with pytest.raises(DataFormatError, match="more than 10000"):
        restored(body)
    with pytest.raises(LibraryError):
        Disk().batcher.restore("text", b"", 1)  # type: ignore[arg-type]


def corpus() -> list[bytes]:
    rig = Disk()
    rig.batcher.add(b"", 1)
    rig.batcher.add(b"x" * 40, 1, 'a"\\\u00fc', "0")
    rig.batcher.add(b"y", 1)
    plain = Disk(key=KeyPlan("none"))
    plain.batcher.add(b"1234", 1)
    return [BODY, rig.spool()[0][0], plain.spool()[0][0]]


def test_cut_at_every_byte() -> None:
    for body in corpus():
        for end in range(len(body)):
            rig = Disk()
            rig.batcher.adopt_spooled(100)
            cut = memoryview(body)[:end]
            # exactly as long as its memory, so that a sanitizer notices one byte too far
            with pytest.raises(DataFormatError):
                rig.batcher.restore(bytearray(cut), b"", 1)
            assert (rig.batcher.spooled, rig.back.records) == (100, 0)


def test_random_mutations() -> None:
    """Restored or refused, and what is restored is a body that Kinesis would read."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    bodies = corpus()
    for _ in range(4000):
        body = bytearray(draw.choice(bodies))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(body))
            body[at] = draw.choice(b'{}[]",:\\AZ=u0\xff\x00') if draw.random() < 0.7 else draw.randrange(256)
        rig = Disk()
        rig.batcher.adopt_spooled(100)
        with contextlib.suppress(DataFormatError):
            batch = rig.batcher.restore(body, b"", 1)
            records = json.loads(bytes(batch))["Records"]
            assert len(records) == len(batch), seed
            assert batch.size == sum(len(data) + len((key or "").encode()) for data, key, _ in batch.entries()), seed
            batch.finish(DROPPED)
        rig.books()
