"""A producer that cannot lose quietly: timeouts, leaving the block, the wrong loop, thread or process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fastkin import BudgetFull, ClosedError, DeliveryTimeout, LibraryError, Producer, PutResult, Record, RecordsLost
from fastkin.delivery.expiry import Expiry
from fastkin.emulator import Emulator
from fastkin.errors import RecordError
from support.fake_http import FakeServer, Link, Request
from support.servers import ACCESS_KEY, SECRET_KEY, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def producer(url: str, **options: Any) -> Producer:
    keys: dict[str, Any] = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "shard_map": False, "linger_ms": 1.0}
    return Producer("welders", region="us-east-1", endpoint_url=url, **(keys | options))


def nowhere() -> str:
    return f"http://127.0.0.1:{free_port()}"


# -- ways to put -------------------------------------------------------------------------------------


async def test_put_and_wait_is_put_and_its_outcome() -> None:
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        result = await one.put_and_wait(b"x", "k", "0")
        [stored] = emulator.stored("welders")
    assert (stored.data, stored.partition_key, stored.sequence_number) == (b"x", "k", result.sequence_number)


async def test_put_many_takes_bytes_and_records_in_order() -> None:
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        receipts = await one.put_many([b"first", Record({"n": 2}, "k", 7), bytearray(b"third")])
        results = await asyncio.gather(*receipts)
        places = {record.sequence_number: (record.data, record.partition_key) for record in emulator.stored("welders")}
    told = [places[result.sequence_number or ""] for result in results]
    assert [data for data, _ in told] == [b"first", b'{"n":2}', b"third"]
    assert told[1][1] == "k"


async def test_put_many_says_which_one_is_wrong_and_what_was_taken() -> None:
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url, max_record_bytes=1000) as one:
        with pytest.raises(RecordError, match=r"records\[2\]: ") as caught:
            await one.put_many([b"a", b"b", b"x" * 1001, b"c"])
        assert len(caught.value.receipts) == 2
        await asyncio.gather(*caught.value.receipts)
        assert sorted(record.data for record in emulator.stored("welders")) == [b"a", b"b"]


async def test_put_many_waits_for_room_and_keeps_the_order() -> None:
    """Far more than the budget holds; two who put at once share the room."""
    async with (
        Emulator({"welders": 1}) as emulator,
        producer(emulator.url, budget_records=40, max_records=10, max_connections=1) as one,
    ):
        kinds: list[Callable[[bytes], bytes | bytearray | Record]] = [bytes, bytearray, lambda data: Record(data, "k")]
        mine = one.put_many(kinds[n % 3](b"a%04d" % n) for n in range(300))
        yours = one.put_many([b"b%04d" % n for n in range(300)])
        for receipts in await asyncio.gather(mine, yours):
            assert len(receipts) == 300
            await asyncio.gather(*receipts)
        data = [record.data for record in emulator.stored("welders")]
    for who in (b"a", b"b"):
        assert [each for each in data if each.startswith(who)] == [who + b"%04d" % n for n in range(300)]


async def test_put_many_says_at_which_one_the_producer_was_closed() -> None:
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:

        def closing() -> Iterator[bytes]:
            yield b"first"
            closed.append(asyncio.ensure_future(one.close()))
            yield b"second"
            yield b"third"

        closed: list[asyncio.Future[int]] = []
        receipts = await one.put_many(closing())  # close() has not run yet
        assert (len(receipts), await closed[0]) == (3, 0)
        with pytest.raises(ClosedError, match=r"records\[0\]: ") as caught:
            await one.put_many([b"fourth"])
        assert caught.value.receipts == ()


async def test_put_many_says_what_was_taken_before_something_that_is_no_record() -> None:
    """Nobody could await these, and they are stored all the same."""
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        with pytest.raises(LibraryError, match=r"records\[1\]: ") as caught:
            await one.put_many([b"a", "text"])  # type: ignore[list-item]
        (receipt,) = caught.value.receipts
        assert (await receipt).shard_id
        assert [record.data for record in emulator.stored("welders")] == [b"a"]


async def test_put_nowait_tells_a_callback_how_it_ended() -> None:
    """EI-02: callback(error, result)."""
    told: list[tuple[BaseException | None, PutResult | None]] = []
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        receipt = one.put_nowait(b"x", callback=lambda error, result: told.append((error, result)))
        one.put_nowait(b"nobody asks")
        await one.flush()
    assert told == [(None, receipt.result())]
    late = producer(nowhere(), close_timeout_s=0)
    await late.start()
    late.put_nowait(b"x", callback=lambda error, result: told.append((error, result)))
    await late.close()
    assert isinstance(told[1][0], ClosedError)
    assert told[1][1] is None


async def test_put_nowait_refuses_when_there_is_no_room() -> None:
    one = producer(nowhere(), budget_bytes=1, max_record_bytes=1000, close_timeout_s=0)
    await one.start()
    one.put_nowait(b"x")
    with pytest.raises(BudgetFull, match="await put"):
        one.put_nowait(b"y")
    assert one.stats()["received"] == 1
    assert await one.close() == 1


# -- delivery_timeout_s ------------------------------------------------------------------------------


async def test_what_was_never_sent_times_out_as_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Expiry._look

    def look_between_calls(self: Expiry) -> None:
        # A call that is open, be it only to connect, may still store its records; on a busy machine that takes long.
        if self._sender.in_flight:
            self._timer = self._loop.call_soon(self._look)
        else:
            look(self)

    monkeypatch.setattr(Expiry, "_look", look_between_calls)
    async with producer(nowhere(), delivery_timeout_s=0.2) as one:
        receipts = [await one.put(b"%d" % n) for n in range(3)]
        for receipt in receipts:
            with pytest.raises(DeliveryTimeout, match="is not stored; last error: ConnectFailed") as caught:
                await receipt
            assert caught.value.may_be_stored is False
            assert caught.value.timeout_s == 0.2
        stats = one.stats()
    assert (stats["received"], stats["dropped"], stats["in_flight"], stats["buffered_bytes"]) == (3, 3, 0, 0)


async def test_what_is_in_an_open_call_times_out_as_perhaps_stored() -> None:
    release = asyncio.Event()

    async def answer(link: Link, _: Request) -> None:
        await release.wait()
        link.reply(200, b'{"FailedRecordCount":0,"Records":[{"ShardId":"s","SequenceNumber":"1"}]}')

    async with FakeServer(answer) as server, producer(server.url, delivery_timeout_s=0.2) as one:
        receipt = await one.put(b"x")
        with pytest.raises(DeliveryTimeout, match="may have been stored") as caught:
            await receipt
        assert caught.value.may_be_stored is True
        assert one.stats()["in_flight"] == 1
        release.set()
        await one.flush()
        # it was stored after all: the books say so, and the receipt keeps its word
        assert (one.stats()["stored"], one.stats()["in_flight"]) == (1, 0)
        assert isinstance(receipt.exception(), DeliveryTimeout)


async def test_what_was_cut_off_times_out_as_perhaps_stored() -> None:
    async def answer(link: Link, _: Request) -> None:
        link.cut()

    async with FakeServer(answer) as server, producer(server.url, delivery_timeout_s=0.3) as one:
        with pytest.raises(DeliveryTimeout) as caught:
            await one.put_and_wait(b"x")
        assert caught.value.may_be_stored is True
        await one.flush()
        assert one.stats()["in_flight"] == 0


async def test_without_trouble_nothing_times_out() -> None:
    async with Emulator({"welders": 2}) as emulator, producer(emulator.url, delivery_timeout_s=30) as one:
        receipts = await one.put_many([b"%d" % n for n in range(3000)])
        results = await asyncio.gather(*receipts)
    assert len({result.sequence_number for result in results}) == 3000


async def test_a_frame_and_an_aggregate_time_out_too() -> None:
    from fastkin import encode_frame

    async with producer(nowhere(), delivery_timeout_s=0.2) as one:
        frame = await one.put_frame(encode_frame([b"a", b"b"]))
        with pytest.raises(DeliveryTimeout):
            await frame
        assert one.stats()["in_flight"] == 0


def test_a_delivery_timeout_and_a_spool_exclude_each_other() -> None:
    with pytest.raises(LibraryError, match="delivery_timeout_s: a spool"):
        Producer("s", delivery_timeout_s=5, on_full="spool", spool="s.db")


# -- leaving the block -------------------------------------------------------------------------------


async def test_leaving_with_records_unsettled_says_so_and_raises(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RecordsLost, match=r"2 records had no outcome .*ConnectFailed") as caught:
        async with producer(nowhere(), close_timeout_s=0.2) as one:
            receipts = await one.put_many([b"a", b"b"])
    assert caught.value.records == 2
    assert (caught.value.last_error or "").startswith("ConnectFailed")
    [line] = [record.getMessage() for record in caplog.records if "without an outcome" in record.getMessage()]
    assert "closed with 2 records without an outcome" in line
    assert "last error: ConnectFailed" in line
    for receipt in receipts:
        assert isinstance(receipt.exception(), ClosedError)


async def test_another_exception_is_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with producer(nowhere(), close_timeout_s=0) as one:
            await one.put(b"a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert sum("without an outcome" in record.getMessage() for record in caplog.records) == 1


async def test_leaving_with_all_settled_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        await one.put(b"a")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# -- whose it is -------------------------------------------------------------------------------------

CURE = "belongs to another event loop or thread.*SyncProducer"


def calls(one: Producer) -> list[Callable[[], Any]]:
    return [
        lambda: one.put(b"x"),
        lambda: one.put_frame(b"x"),
        lambda: one.put_and_wait(b"x"),
        lambda: one.put_many([b"x"]),
        lambda: one.put_record(Record(1, "k")),
        lambda: one.put_records([Record(1, "k")]),
        one.flush,
        one.close,
    ]


async def test_another_loop_in_another_thread_is_refused_with_the_cure() -> None:
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        problems: list[BaseException] = []

        def work() -> None:
            for call in calls(one):
                try:
                    asyncio.run(call())
                except LibraryError as error:
                    problems.append(error)
            try:
                one.put_nowait(b"x")
            except LibraryError as error:
                problems.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert len(problems) == 9
        assert one.stats()["received"] == 0
        for problem in problems:
            with pytest.raises(LibraryError, match=CURE):
                raise problem
        await one.put_and_wait(b"ours")


def test_another_loop_in_the_same_thread_is_refused_with_the_cure() -> None:
    first = asyncio.new_event_loop()
    one = producer(nowhere(), close_timeout_s=0)
    first.run_until_complete(one.start())
    second = asyncio.new_event_loop()
    for call in calls(one):
        with pytest.raises(LibraryError, match=CURE):
            second.run_until_complete(call())
    second.close()
    with pytest.raises(LibraryError, match=CURE):
        one.put_nowait(b"x")
    assert first.run_until_complete(one.close()) == 0
    first.close()


@pytest.mark.process
async def test_a_forked_process_is_refused_with_the_cure() -> None:
    """The child says so, and sends nothing on the connections of its parent."""
    async with Emulator({"welders": 1}) as emulator, producer(emulator.url) as one:
        await one.put_and_wait(b"before")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                try:
                    one.put_nowait(b"child")
                except ClosedError as error:
                    os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        told = os.read(read, 1000).decode()
        os.close(read)
        os.waitpid(child, 0)
        await one.put_and_wait(b"after")
        assert "made before the fork and belongs to the parent process: make a new one here" in told
        assert sorted(record.data for record in emulator.stored("welders")) == [b"after", b"before"]
