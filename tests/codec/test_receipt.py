"""Receipts: awaited before and after, from callbacks, by several, and dropped."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from typing import TYPE_CHECKING, Any, Self, get_args, get_origin

import pytest

from fastkin import encode_frame
from fastkin._codec import DEAD, DROPPED, FAILED, FILTERED, Budget, Receipt
from fastkin.errors import RecordError, RecordFailed
from fastkin.results import EncryptionType, FrameResult, PutResult
from support.codec_rig import SHARD, Rig, answer, entry, failure, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def test_stored() -> None:
    rig = Rig()
    receipts = [rig.batcher.put(b"x") for _ in range(3)]
    [batch] = rig.drain()
    assert not any(receipt.done() for receipt in receipts)
    for ask in (receipts[0].result, receipts[0].exception):
        with pytest.raises(asyncio.InvalidStateError):
            ask()
    batch.settle(answer([entry(number=str(i)) for i in range(3)], EncryptionType="KMS"))
    assert [receipt.result() for receipt in receipts] == [PutResult(SHARD, str(i), "KMS") for i in range(3)]
    assert receipts[1].result() is receipts[1].result()
    assert receipts[1].exception() is None
    rig.settled()


def test_the_place_is_read_whatever_stands_around_it() -> None:
    rig = Rig()
    receipt = rig.batcher.put(b"x")
    [batch] = rig.drain()
    batch.settle(
        b'{"Records":[ { "x":[{"ShardId":"no"}], "SequenceNumber" : "7\\u0031" ,"ErrorCode":null,"ShardId":"a\\"b"} ],'
        b'"FailedRecordCount":0}'
    )
    assert receipt.result() == PutResult('a"b', "71", EncryptionType.NONE)
    rig.settled()


def test_failed() -> None:
    rig = Rig()
    first, second, third = (rig.batcher.put(b"x") for _ in range(3))
    [batch] = rig.drain()
    [failed] = batch.settle(answer([entry(), failure("Odd", "m"), entry()]))
    assert (first.done(), second.done(), third.done()) == (True, False, True)
    error = RecordFailed("Odd", "m")
    failed.batch.finish(FAILED, error)
    assert second.exception() is error
    for _ in range(2):
        with pytest.raises(RecordFailed, match="Odd: m") as caught:
            second.result()
        # a copy: one error serves many receipts, and a raised one collects tracebacks
        assert caught.value is not error
        assert caught.value.code == "Odd"
        assert caught.value.__cause__ is error
    assert error.__traceback__ is None
    rig.settled()


def test_an_error_that_cannot_be_copied_is_raised_itself() -> None:
    class OddError(Exception):
        def __new__(cls, *args: Any) -> Self:
            if args:
                raise TypeError("only without arguments")
            return super().__new__(cls)

    error = OddError()
    error.args = (1,)
    rig = Rig()
    receipt = rig.batcher.put(b"x")
    rig.drain()[0].finish(FAILED, error)
    with pytest.raises(OddError) as caught:
        receipt.result()
    assert caught.value is error


@pytest.mark.parametrize(
    ("outcome", "word"), [(DEAD, "dead-lettered"), (FILTERED, "filtered"), (DROPPED, "dropped"), (FAILED, "failed")]
)
def test_ended_without_an_error(outcome: int, word: str) -> None:
    rig = Rig()
    receipt = rig.batcher.put(b"x")
    rig.drain()[0].finish(outcome)
    with pytest.raises(RecordError, match=word):
        receipt.result()
    rig.settled()


async def test_awaited_by_several() -> None:
    rig = Rig()
    receipt = rig.batcher.put(b"x")

    async def wait() -> object:
        return await receipt

    tasks = [asyncio.create_task(wait()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.sleep(0)
    [batch] = rig.drain()
    batch.settle(stored(1))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[0] == results[1] == PutResult(SHARD, "0", EncryptionType.NONE)
    assert isinstance(results[2], asyncio.CancelledError)
    assert await receipt == results[0]
    assert await asyncio.wait_for(receipt, 1) == results[0]
    rig.settled()


async def test_awaited_and_failed() -> None:
    rig = Rig()
    receipt = rig.batcher.put(b"x")

    async def wait() -> object:
        return await receipt

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    rig.drain()[0].finish(FAILED, RecordFailed("A", "m"))
    with pytest.raises(RecordFailed):
        await task
    with pytest.raises(RecordFailed):
        await receipt
    rig.settled()


def test_callbacks() -> None:
    rig = Rig()
    receipt = rig.batcher.put(b"x")
    seen: list[object] = []
    receipt.add_done_callback(seen.append)
    receipt.add_done_callback(lambda one: seen.append(one.result()))
    with pytest.raises(TypeError):
        receipt.add_done_callback(None)  # type: ignore[arg-type]
    assert seen == []
    rig.drain()[0].settle(stored(1))
    assert seen == [receipt, PutResult(SHARD, "0", EncryptionType.NONE)]
    receipt.add_done_callback(seen.append)
    assert seen[-1] is receipt
    assert len(seen) == 3


def test_a_callback_that_raises_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", caught.append)
    rig = Rig()
    first, second = rig.batcher.put(b"x"), rig.batcher.put(b"y")
    seen: list[object] = []

    def bad(receipt: Receipt) -> None:
        raise ValueError("no")

    first.add_done_callback(bad)
    first.add_done_callback(seen.append)
    second.add_done_callback(seen.append)
    rig.drain()[0].settle(stored(2))
    assert seen == [first, second]
    assert [str(one.exc_value) for one in caught] == ["no"]
    rig.settled()


def test_a_loop_that_is_closed_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", caught.append)
    rig = Rig()
    receipt = rig.batcher.put(b"x")
    loop = asyncio.new_event_loop()

    async def wait() -> object:
        return await receipt

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    rig.drain()[0].settle(stored(1))
    assert receipt.done()
    assert caught == [], "nobody is there to be woken, and asyncio itself tells of the task"
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task
    rig.settled()


def test_a_callback_may_put_again() -> None:
    rig = Rig(max_records=3)
    seen: list[Receipt] = []

    def again(receipt: Receipt) -> None:
        seen.append(receipt)
        if len(seen) < 10:
            rig.batcher.put(b"more").add_done_callback(again)

    rig.batcher.put(b"x").add_done_callback(again)
    while rig.batcher.in_flight:
        for batch in rig.drain():
            batch.settle(stored(len(batch)))
    assert len(seen) == 10
    rig.settled()


# -- frames


def test_frames() -> None:
    rig = Rig(frame="bulk", max_records=4)
    receipt = rig.batcher.put_frame(encode_frame([b"x"] * 10))
    empty = rig.batcher.put_frame(encode_frame([]))
    assert empty.done()
    assert empty.result() == FrameResult(0)
    batches = rig.drain()
    assert [len(batch) for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert not receipt.done()
        batch.settle(stored(len(batch)))
    assert receipt.result() == FrameResult(10)
    rig.settled()


def test_a_frame_of_which_a_record_fails() -> None:
    rig = Rig()
    receipt = rig.batcher.put_frame(encode_frame([b"x"] * 4))
    [batch] = rig.drain()
    failed = batch.settle(answer([entry(), failure("A", "m"), failure("B", "m"), entry()]))
    failed[0].batch.finish(FAILED, RecordFailed("A", "m"))
    assert not receipt.done()
    failed[1].batch.finish(FAILED, RecordFailed("B", "m"))
    with pytest.raises(RecordFailed, match="A: m"):
        receipt.result()
    rig.settled()


async def test_a_frame_is_awaited() -> None:
    rig = Rig()
    receipt = rig.batcher.put_frame(encode_frame([b"x"] * 4))

    async def wait() -> object:
        return await receipt

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    rig.store()
    assert await task == FrameResult(4)


# -- life


def test_a_receipt_of_python_is_harmless() -> None:
    receipt = Receipt()
    assert receipt.done()
    assert receipt.result() is None


@pytest.mark.parametrize("end", ["settle", "finish", "drop"])
def test_references(end: str) -> None:
    rig = Rig()
    endings: dict[str, Callable[[Any], object]] = {
        "settle": lambda batch: batch.settle(stored(len(batch))),
        "finish": lambda batch: batch.finish(DROPPED),
        "drop": lambda batch: None,
    }
    receipt = rig.batcher.put(b"x")
    frame = rig.batcher.put_frame(encode_frame([b"x"] * 3))
    assert sys.getrefcount(receipt) == sys.getrefcount(frame) == 3
    batches = rig.drain()
    endings[end](batches.pop())
    assert sys.getrefcount(receipt) == sys.getrefcount(frame) == 2
    rig.settled()


def test_dropped_receipts_leave_nothing() -> None:
    rig = Rig()

    def work() -> None:
        for _ in range(2000):
            rig.batcher.put(b"x")
            rig.batcher.put_frame(encode_frame([b"x", b"y"]))
        for batch in rig.drain():
            left, right = batch.halves()
            left.settle(stored(len(left)))
            for one in right.settle(answer([failure()] + [entry()] * (len(right) - 1))):
                one.batch.finish(FAILED, ValueError())

    work()
    gc.collect()
    before = sys.getallocatedblocks()
    work()
    gc.collect()
    assert sys.getallocatedblocks() - before < 50
    rig.settled()


def test_put_if_room_asks_for_attention_and_takes_nothing_without_room() -> None:
    rig = Rig(budget=Budget(1 << 20, 3), max_records=2)
    calls: list[bool] = []

    def attend() -> None:
        calls.append(rig.batcher.dirty)
        rig.batcher.dirty = False

    assert rig.batcher.put_if_room(b"0", None, None) is None, "it belongs to nobody yet"
    rig.batcher.belong(lambda: True, attend)
    first = rig.batcher.put_if_room(b"a", None, None)
    assert first is not None
    assert calls == [True], "a batch was opened"
    assert rig.batcher.put_if_room(b"b", "key", "7") is not None
    assert calls == [True, True], "it was closed"
    assert rig.batcher.put_if_room(b"c", None, None) is not None
    assert rig.budget.full
    before = len(calls)
    assert rig.batcher.put_if_room(b"d", None, None) is None
    assert (len(calls), rig.batcher.received) == (before, 3)
    other = Rig()
    other.batcher.belong(lambda: True, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        other.batcher.put_if_room(b"e", None, None)
    entries = [one for call in rig.store() for one in call]
    assert [(data, hash_key) for data, _, hash_key in entries] == [(b"a", None), (b"b", "7"), (b"c", None)]
    assert first.result().sequence_number
    rig.budget.waiting = 1
    assert rig.batcher.put_if_room(b"f", None, None) is None, "somebody waits for room, and comes first"
    rig.budget.waiting = 0
    rig.batcher.leave()
    assert rig.batcher.put_if_room(b"g", None, None) is None, "it is nobody's any more"
    rig.settled()


def test_put_while_room_gives_back_what_it_does_not_take() -> None:
    rig = Rig(budget=Budget(1 << 20, 4), max_records=2)
    receipts: list[Receipt[PutResult]] = []
    end = object()
    assert rig.batcher.put_while_room(iter([b"0"]), receipts, end) == b"0", "it belongs to nobody yet"
    rig.batcher.belong(lambda: True, lambda: None)
    assert rig.batcher.put_while_room(iter(()), receipts, end) is end
    other = bytearray(b"not bytes")
    rest = iter([b"a", b"b", other, b"c", None, b"d", b"e", b"f"])
    assert rig.batcher.put_while_room(rest, receipts, end) is other
    assert rig.batcher.put_while_room(rest, receipts, end) is None, "an element, not the end"
    assert len(receipts) == 3
    assert rig.batcher.put_while_room(rest, receipts, end) == b"e", "one fitted"
    assert rig.budget.full
    assert [data for call in rig.store() for data, _, _ in call] == [b"a", b"b", b"c", b"d"]
    assert rig.batcher.put_while_room(rest, receipts, end) is end, "f, and nothing is left"
    assert [receipt.done() for receipt in receipts] == [True] * 4 + [False]
    rig.store()
    rig.settled()


def test_put_while_room_stops_at_what_is_too_large_and_when_it_is_left() -> None:
    rig = Rig(max_record_bytes=100)
    rig.batcher.belong(lambda: True, lambda: None)
    receipts: list[Receipt[PutResult]] = []
    with pytest.raises(RecordError, match="137 bytes"):
        rig.batcher.put_while_room(iter([b"a", b"x" * 101, b"b"]), receipts, None)
    assert len(receipts) == 1

    def leaving() -> Iterator[bytes]:
        yield b"c"
        rig.batcher.leave()
        yield b"d"

    assert rig.batcher.put_while_room(leaving(), receipts, None) == b"d"
    assert len(receipts) == 2
    rig.store()
    rig.settled()


def test_put_while_room_asks_for_attention_and_keeps_the_receipt_when_that_raises() -> None:
    rig = Rig(max_records=2)
    calls: list[bool] = []

    def attend() -> None:
        calls.append(rig.batcher.dirty)
        rig.batcher.dirty = False

    rig.batcher.belong(lambda: True, attend)
    receipts: list[Receipt[PutResult]] = []
    assert rig.batcher.put_while_room(iter([b"a", b"b"]), receipts, None) is None
    assert calls == [True, True], "a batch was opened and closed"
    rig.batcher.belong(lambda: True, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        rig.batcher.put_while_room(iter([b"c", b"d"]), receipts, None)
    assert len(receipts) == 3
    rig.store()
    assert all(receipt.done() for receipt in receipts)
    rig.settled()


def test_put_while_room_gives_way_to_who_waits_and_to_another_thread() -> None:
    rig = Rig()
    rig.batcher.belong(lambda: True, lambda: None)
    receipts: list[Receipt[PutResult]] = []
    rig.budget.waiting = 1
    assert rig.batcher.put_while_room(iter([b"a"]), receipts, None) == b"a"
    rig.budget.waiting = 0
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(rig.batcher.put_while_room(iter([b"b"]), receipts, None)))
    thread.start()
    thread.join()
    assert found == [b"b"]
    assert receipts == []
    rig.settled()


# -- with the tools of asyncio ---------------------------------------------------------------------


def test_a_receipt_is_generic_and_says_what_it_knows() -> None:
    assert get_args(Receipt[PutResult]) == (PutResult,)
    assert get_origin(Receipt[PutResult]) is Receipt
    rig = Rig()
    good, bad, frame = rig.batcher.put(b"x"), rig.batcher.put(b"y"), rig.batcher.put_frame(encode_frame([b"a", b"b"]))
    assert (repr(good), repr(frame)) == ("<Receipt pending>", "<Receipt pending: 2 of 2 records>")
    [batch] = rig.drain()
    [failed] = batch.settle(answer([entry(number="5"), failure("Odd", "m"), entry(), entry()]))
    failed.batch.finish(FAILED, RecordFailed("Odd", "m"))
    assert repr(good) == f"<Receipt {good.result()!r}>"
    assert "sequence_number='5'" in repr(good)
    assert repr(bad) == "<Receipt failed: RecordFailed: Odd: m>"
    assert repr(frame) == "<Receipt FrameResult(records=2, spooled=False)>"


def settled_soon(rig: Rig) -> None:
    """The first record is stored, the second one refused, in the next turn of the loop."""

    def settle() -> None:
        [batch] = rig.drain()
        [failed] = batch.settle(answer([entry(number="1"), failure("Odd", "m")]))
        failed.batch.finish(FAILED, RecordFailed("Odd", "m"))

    asyncio.get_running_loop().call_soon(settle)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_wait_takes_receipts(when: str) -> None:
    rig = Rig()
    good, bad = rig.batcher.put(b"x"), rig.batcher.put(b"y")
    settled_soon(rig)
    if when == "after":
        await asyncio.sleep(0)
        assert good.done()
    done, pending = await asyncio.wait({good, bad})  # type: ignore[type-var]  # typeshed wants a Future
    assert (done, pending) == ({good, bad}, set())
    assert [good.cancelled(), good.result().sequence_number] == [False, "1"]
    assert isinstance(bad.exception(), RecordFailed)


async def test_wait_with_a_timeout_leaves_no_callback() -> None:
    rig = Rig()
    one = rig.batcher.put(b"x")
    assert await asyncio.wait({one}, timeout=0) == (set(), {one})  # type: ignore[type-var]
    done: list[Any] = []
    one.add_done_callback(done.append)
    one.add_done_callback(done.append)
    assert one.remove_done_callback(done.append) == 2
    assert one.remove_done_callback(done.append) == 0
    rig.store()
    assert done == []
    assert one.remove_done_callback(done.append) == 0


async def test_wait_for_gives_up_and_asks_again() -> None:
    rig = Rig()
    good, bad = rig.batcher.put(b"x"), rig.batcher.put(b"y")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(good, 0)
    settled_soon(rig)
    assert (await asyncio.wait_for(good, 60)).sequence_number == "1"
    with pytest.raises(RecordFailed):
        await asyncio.wait_for(bad, 60)


async def test_gather_and_as_completed_take_receipts() -> None:
    rig = Rig()
    good, bad = rig.batcher.put(b"x"), rig.batcher.put(b"y")
    settled_soon(rig)
    first, second = await asyncio.gather(good, bad, return_exceptions=True)
    assert first == good.result()
    assert isinstance(second, RecordFailed)
    assert [await each for each in asyncio.as_completed([good])] == [first]


async def test_a_task_group_takes_the_wait_of_a_receipt() -> None:
    rig = Rig()
    good, bad = rig.batcher.put(b"x"), rig.batcher.put(b"y")
    settled_soon(rig)
    tasks = []
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(good.wait()), group.create_task(bad.wait())]
    assert tasks[0].result() == good.result()
    assert [type(each) for each in caught.value.exceptions] == [RecordFailed]


async def test_who_is_cancelled_leaves_nothing_behind() -> None:
    rig = Rig()
    one = rig.batcher.put(b"x")
    for _ in range(100):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one, 0)
        task = asyncio.ensure_future(one.wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    gc.collect()
    assert sum(isinstance(each, asyncio.Future) for each in gc.get_objects()) < 50
    rig.store()
    assert one.done()
