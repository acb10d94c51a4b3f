"""A batch after it is closed: its body, and its entries moved to other batches."""

from __future__ import annotations

import gc
import io
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkin._codec import (
    DEAD,
    DRAIN,
    DROPPED,
    FAILED,
    STORED,
    Batch,
    Batcher,
    Budget,
    CallbackSettler,
    KeyPlan,
    Settler,
    ShardTable,
)  # fmt: skip
from fastkin.errors import LibraryError, UnexpectedResponse
from support import oracle
from support.codec_rig import Rig, answer, entry, failure, stored

if TYPE_CHECKING:
    from fastkin._codec import Failure

ENDS = [2**126 - 1, 2**127 - 1, 2**128 - 1]
Entries = list[tuple[bytes, str | None, str | None]]


def fill(rig: Rig, count: int, *, same_token: bool = False) -> Entries:
    """Entries of every shape, token 1, 2, 3, ..."""
    rig.batcher.shards = ShardTable(ENDS)
    for i in range(count):
        rig.batcher.add(b"d" * i, 1 if same_token else i + 1, f'key"{i}', str(2**127 + i) if i % 5 == 4 else None)
    return [(b"d" * i, f'key"{i}', str(2**127 + i) if i % 5 == 4 else None) for i in range(count)]


def one(rig: Rig) -> Batch:
    [batch] = rig.drain()
    return batch


def check(batch: Batch, entries: Entries) -> None:
    """The body is what its entries say."""
    assert batch.entries() == entries
    parsed = json.loads(bytes(batch))
    assert parsed["StreamName"] == "s"
    assert len(parsed["Records"]) == len(batch) == len(entries)
    assert batch.size == sum(oracle.size_of(data, key) for data, key, _ in entries)


def test_the_buffer() -> None:
    rig = Rig()
    fill(rig, 3)
    batch = one(rig)
    view = memoryview(batch)
    assert view.readonly
    assert view.nbytes == batch.nbytes
    assert batch.__buffer__(0) == view
    with pytest.raises(TypeError, match="read-write"):
        io.BytesIO(b"x").readinto(batch)
    body = bytes(view)
    batch.settle(stored(3))
    assert bytes(view) == body
    assert batch.nbytes == len(body)
    with memoryview(batch) as second:
        assert second == body
    del second
    gc.collect()
    view.release()
    assert batch.nbytes == 0
    with pytest.raises(BufferError, match="spent"):
        memoryview(batch)
    rig.settled()


def test_a_view_outlives_its_batch() -> None:
    rig = Rig()
    fill(rig, 3)
    batch = one(rig)
    view = memoryview(batch)
    body = bytes(view)
    batch.finish(DROPPED)
    del batch
    gc.collect()
    assert view == body
    rig.settled()


def test_a_fresh_batch_of_python_is_harmless() -> None:
    batch = Batch()
    assert len(batch) == 0
    for call in (batch.entries, batch.halves, batch.shard_load, lambda: batch.settle(b""), lambda: batch.split([1])):
        with pytest.raises(LibraryError, match="spent"):
            call()
    with pytest.raises(BufferError):
        memoryview(batch)


def test_spent_batches_say_so_and_keep_their_figures() -> None:
    rig = Rig()
    fill(rig, 4)
    batch = one(rig)
    size = batch.size
    batch.finish(DROPPED)
    assert (len(batch), batch.size, batch.user_records) == (4, size, 4)
    calls: list[Any] = [
        lambda: batch.finish(DROPPED), lambda: batch.settle(stored(4)), batch.halves, lambda: batch.split([0]),
        batch.entries, lambda: Batch.gather([batch]), batch.shard_load,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LibraryError, match="spent"):
            call()
    rig.settled()


@given(st.integers(1, 30), st.sets(st.integers(-1, 3)))
def test_split(count: int, shards: set[int]) -> None:
    rig = Rig()
    entries = fill(rig, count)
    batch = one(rig)
    batch.attempts, batch.uncertain, batch.taken_at, batch.flush_generation = 3, 2, 1.5, 7
    table = ShardTable(ENDS)
    mine = [table.find(str(key), hash_key) in shards for _, key, hash_key in entries]
    before = rig.budget.bytes - batch.overhead
    part, others = batch.split(shards)
    for piece, wanted in ((part, True), (others, False)):
        expected = [item for item, is_mine in zip(entries, mine, strict=True) if is_mine is wanted]
        if not expected:
            assert piece is None
            continue
        assert piece is not None
        check(piece, expected)
        assert (piece.attempts, piece.taken_at, piece.flush_generation, piece.batcher) == (3, 1.5, 7, rig.batcher)
        assert piece.uncertain == 2
        assert set(piece.shard_load()) <= ({*shards} if wanted else {0, 1, 2} - shards)
    assert rig.budget.bytes == before + sum(piece.overhead for piece in (part, others) if piece is not None)
    for piece in (part, others):
        if piece is not None:
            assert piece.settle(stored(len(piece))) == []
    assert rig.counts() == {i + 1: 1 for i in range(count)}
    rig.settled()


@given(st.integers(2, 30))
def test_halves(count: int) -> None:
    rig = Rig()
    entries = fill(rig, count)
    batch = one(rig)
    before = rig.budget.bytes - batch.overhead
    left, right = batch.halves()
    check(left, entries[: count // 2])
    check(right, entries[count // 2 :])
    assert rig.budget.bytes == before + left.overhead + right.overhead
    assert left.overhead > 1000
    left.finish(DROPPED)
    right.finish(DROPPED)
    rig.settled()


def test_one_record_has_no_halves() -> None:
    rig = Rig()
    fill(rig, 1)
    batch = one(rig)
    with pytest.raises(LibraryError, match="halved"):
        batch.halves()
    batch.finish(DROPPED)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 12), st.integers(60, 400))
def test_gather(counts: list[int], most: int, batch_bytes: int) -> None:
    rig = Rig(max_records=most, max_batch_bytes=batch_bytes)
    entries: Entries = []
    parts: list[Batch] = []
    for i, count in enumerate(counts):
        for k in range(count):
            item = (b"x" * (k * 7), f"k{i}.{k}", None)
            rig.batcher.add(item[0], len(entries) + 1, item[1])
            entries.append(item)
        parts += rig.drain()
    for i, part in enumerate(parts):
        part.attempts, part.taken_at, part.flush_generation = i + 1, 10.0 - i, 5 - i
    before = rig.budget.bytes - sum(part.overhead for part in parts)
    last = len(parts)
    gathered = Batch.gather(parts)
    cuts, _ = oracle.cut([(data, key) for data, key, _ in entries], oracle.Limits(most, batch_bytes, 1 << 20))
    if last > 1:
        assert [len(batch) for batch in gathered] == [len(cut.entries) for cut in cuts]
    assert [item for batch in gathered for item in batch.entries()] == entries
    assert rig.budget.bytes == before + sum(batch.overhead for batch in gathered)
    assert gathered[-1].attempts == last
    assert gathered[-1].taken_at == 11.0 - last
    assert gathered[-1].flush_generation == 6 - last
    for batch in gathered:
        check(batch, batch.entries())
        batch.settle(stored(len(batch)))
    assert rig.counts() == {i + 1: 1 for i in range(len(entries))}
    rig.settled()


def test_gather_arguments() -> None:
    assert Batch.gather([]) == []
    rig, other = Rig(), Rig()
    fill(rig, 2)
    fill(other, 2)
    mine, theirs = one(rig), one(other)
    assert Batch.gather([mine]) == [mine]
    with pytest.raises(LibraryError, match="different batchers"):
        Batch.gather([mine, theirs])
    with pytest.raises(LibraryError, match="twice"):
        Batch.gather([mine, mine])
    with pytest.raises(TypeError):
        Batch.gather([mine, None])  # type: ignore[list-item]
    mine.finish(DROPPED)
    theirs.finish(DROPPED)
    rig.settled()
    other.settled()


def test_settlements_go_run_by_run() -> None:
    rig = Rig()
    for token in (1, 1, 1, 2, 0, 0, 1, 3, 3):
        rig.batcher.add(b"x", token)
    reply = answer([entry(number=str(i)) for i in range(9)])
    one(rig).settle(reply)
    assert [(token, count) for token, count, _, _, _ in rig.told] == [(1, 3), (2, 1), (1, 1), (3, 2)]
    for (_, _, outcome, body, at), first in zip(rig.told, (0, 3, 6, 7), strict=True):
        assert outcome == STORED
        assert body is reply
        assert json.JSONDecoder().raw_decode(body.decode(), at)[0]["SequenceNumber"] == str(first)
    rig.settled()


@given(st.lists(st.sampled_from(["", "A", "B", "Bm", "C\u00e9"]), min_size=1, max_size=40), st.booleans())
def test_failures_are_grouped_and_the_rest_is_stored(ends: list[str], same_token: bool) -> None:
    rig = Rig()
    entries = fill(rig, len(ends), same_token=same_token)
    batch = one(rig)
    batch.attempts, batch.flush_generation = 2, 4
    failed: list[Failure] = batch.settle(
        answer([entry() if not code else failure(code[0], f"message {code}") for code in ends])
    )
    assert [(one.code, one.message) for one in failed] == list(
        dict.fromkeys((code[0], f"message {code}") for code in ends if code)
    )
    for item in failed:
        expected = [
            kept for kept, code in zip(entries, ends, strict=True) if code and f"message {code}" == item.message
        ]
        check(item.batch, expected)
        assert (item.batch.attempts, item.batch.flush_generation) == (2, 4)
        assert item.code in repr(item)
    assert sum(count for _, count, _, _, _ in rig.told) == rig.batcher.stored == ends.count("")
    assert rig.batcher.in_flight == len(ends) - ends.count("")
    for item in failed:
        assert item.batch.settle(stored(len(item.batch))) == []
    assert sum(rig.counts().values()) == len(ends)
    rig.settled()


def test_when_all_fail_alike_nothing_is_copied() -> None:
    rig = Rig()
    entries = fill(rig, 9)
    batch = one(rig)
    [failed] = batch.settle(answer([failure()] * 9))
    assert failed.batch is batch
    check(batch, entries)
    batch.settle(stored(9))
    rig.settled()


def test_an_unusable_answer_leaves_the_batch_whole() -> None:
    rig = Rig()
    entries = fill(rig, 4)
    batch = one(rig)
    before = rig.budget.bytes
    for bad in (b"", b"{}", stored(3), stored(5), answer([entry()] * 3 + [{}])):
        with pytest.raises(UnexpectedResponse):
            batch.settle(bad)
    assert rig.told == []
    assert rig.budget.bytes == before
    check(batch, entries)
    batch.settle(bytearray(stored(4)))  # type: ignore[arg-type]
    rig.settled()


@pytest.mark.parametrize("outcome", [DEAD, DROPPED, FAILED])
def test_finish(outcome: int) -> None:
    rig = Rig()
    fill(rig, 3, same_token=True)
    error = ValueError("why")
    one(rig).finish(outcome, error)
    assert rig.told == [(1, 3, outcome, error, -1)]
    rig.settled()


@pytest.mark.parametrize("outcome", [-1, 6, STORED])
def test_finish_with_what_is_no_outcome(outcome: int) -> None:
    rig = Rig()
    fill(rig, 1)
    batch = one(rig)
    with pytest.raises(LibraryError):
        batch.finish(outcome)
    batch.finish(DROPPED)
    rig.settled()


def test_a_settler_that_raises_does_not_stop_the_others() -> None:
    told = []

    def settle(token: int, *rest: Any) -> None:
        told.append(token)
        if token in (2, 4):
            raise ValueError(f"token {token}")

    budget = Budget(1 << 20, 100)
    batcher = Batcher(settler=CallbackSettler(settle), budget=budget, frame="raw", key=KeyPlan("uuid"), target=b"")
    for token in range(1, 6):
        batcher.add(b"x", token)
    batcher.close_batch(DRAIN)
    batch = batcher.take()
    assert batch is not None
    with pytest.raises(ValueError, match="token 2"):
        batch.settle(stored(5))
    assert told == [1, 2, 3, 4, 5]
    assert (budget.bytes, batcher.in_flight, batcher.stored) == (0, 0, 5)
    with pytest.raises(TypeError):
        CallbackSettler(5)  # type: ignore[arg-type]


def test_a_settler_must_say_how_it_settles() -> None:
    batcher = Batcher(settler=Settler(), budget=Budget(99999, 9), frame="raw", key=KeyPlan("uuid"), target=b"")
    batcher.add(b"x", 1)
    batcher.close_batch(DRAIN)
    batch = batcher.take()
    assert batch is not None
    with pytest.raises(NotImplementedError):
        batch.finish(DROPPED)
    assert batcher.in_flight == 0


@pytest.mark.parametrize("aggregate", [0, 1000])
def test_a_settler_that_raises_while_something_is_freed(aggregate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", caught.append)

    def settle(token: int, *rest: Any) -> None:
        raise ValueError(f"token {token}")

    budget = Budget(1 << 20, 100)
    batcher = Batcher(
        settler=CallbackSettler(settle), budget=budget, frame="bulk", key=KeyPlan("uuid"), target=b"",
        aggregate_bytes=aggregate,
    )  # fmt: skip
    batcher.add(b"x", 1)
    batcher.add(b"x", 2)
    batcher.offer(b"t", b"bad", 3)
    del batcher
    assert sorted(str(one.exc_value) for one in caught) == ["token 1", "token 3"]
    assert budget.bytes == budget.records == 0


def test_a_settler_may_call_the_batcher_again() -> None:
    budget = Budget(1 << 20, 100)

    def settle(token: int, *rest: Any) -> None:
        with pytest.raises(LibraryError, match="spent"):
            batch.finish(DROPPED)
        if token < 4:
            batcher.add(b"again", token + 10)

    batcher = Batcher(settler=CallbackSettler(settle), budget=budget, frame="raw", key=KeyPlan("uuid"), target=b"")
    for token in range(1, 6):
        batcher.add(b"x", token)
    while batcher.open_records:
        batcher.close_batch(DRAIN)
        taken = batcher.take()
        assert taken is not None
        batch = taken
        batch.settle(stored(len(batch)))
    assert (budget.bytes, batcher.in_flight, batcher.stored) == (0, 0, 8)


def test_a_batch_that_is_dropped_fails_its_records() -> None:
    rig = Rig()
    fill(rig, 3)
    receipt = rig.batcher.put(b"x")
    batch = one(rig)
    del batch
    assert [(token, outcome) for token, _, outcome, _, _ in rig.told] == [(1, FAILED), (2, FAILED), (3, FAILED)]
    assert receipt.done()
    assert "dropped before it was sent" in str(receipt.exception())
    rig.settled()


def test_failures_that_are_dropped_fail_their_records() -> None:
    rig = Rig()
    fill(rig, 4)
    batch = one(rig)
    failed = batch.settle(answer([entry(), failure("A"), failure("B"), entry()]))
    assert rig.batcher.in_flight == 2
    del failed
    rig.settled()
    assert rig.batcher.dropped == 2


def test_nothing_leaks() -> None:
    def work() -> None:
        rig = Rig()
        for _ in range(20):
            fill(rig, 12)
            batch = one(rig)
            left, right = batch.halves()
            part, others = left.split([0, 1])
            pieces = [piece for piece in (part, others, right) if piece is not None]
            for gathered in Batch.gather(pieces):
                for item in gathered.settle(answer([entry(), failure("A"), failure("B")] * 4)):
                    view = memoryview(item.batch)
                    item.batch.finish(DROPPED)
                    view.release()
        rig.settled()
        del rig.told[:]

    work()
    gc.collect()
    before = sys.getallocatedblocks()
    work()
    gc.collect()
    assert sys.getallocatedblocks() - before < 50
