"""`SyncProducer`: from many threads, from callbacks, under fork, at the end of the interpreter."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import sys
import threading
from typing import Any, get_type_hints

import pytest

from fastkin import ClosedError, LibraryError, Producer, Record, RecordsLost, SyncProducer
from fastkin.emulator import Emulator
from fastkin.errors import RecordError
from fastkin.sync_producer import ProducerOptions
from support.servers import ACCESS_KEY, SECRET_KEY, free_port


def options(url: str, **more: Any) -> dict[str, Any]:
    given = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "shard_map": False, "linger_ms": 1.0}
    return {"region": "us-east-1", "endpoint_url": url} | given | more


def producer(url: str, **more: Any) -> SyncProducer:
    return SyncProducer("welders", **options(url, **more))


def nowhere() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_its_arguments_are_those_of_the_producer() -> None:
    theirs = [name for name in inspect.signature(Producer).parameters if name != "stream"]
    assert list(ProducerOptions.__annotations__) == theirs
    with pytest.raises(LibraryError, match="max_records: 5000"):
        SyncProducer("s", max_records=5000)


async def test_a_put_has_its_outcome() -> None:
    async with Emulator({"welders": 1}) as emulator:

        def work() -> Any:
            data = bytearray(b"before")
            with producer(emulator.url) as one:
                first = one.put(data, "k", "0")
                data[:] = b"after!"
                second = one.put_and_wait(b"second", timeout_s=60)
                third = one.put_record(Record("third", "k"))
                fourth = one.put_records([Record("fourth", "k")]).results[0]
                one.flush(60)
                assert one.stats()["stored"] == 2
                return [first.result(60), second, third, fourth]

        results = await asyncio.to_thread(work)
        places = {record.sequence_number: record.data for record in emulator.stored("welders")}
    assert [places[each.sequence_number] for each in results] == [b"before", b"second", b'"third"', b'"fourth"']


@pytest.mark.parametrize("budget", [{}, {"budget_records": 300}])
async def test_sixteen_threads_lose_nothing(budget: dict[str, int]) -> None:
    """Every record of every thread is stored once, and each future tells the place of its own record."""
    async with Emulator({"welders": 4}) as emulator:

        def thread(one: SyncProducer, name: int) -> list[tuple[bytes, Any]]:
            datas = [b"%d-%d" % (name, n) for n in range(500)]
            return [(data, one.put(data)) for data in datas]

        def work() -> list[tuple[bytes, Any]]:
            with producer(emulator.url, **budget) as one, concurrent.futures.ThreadPoolExecutor(16) as threads:
                told = list(threads.map(lambda name: thread(one, name), range(16)))
                one.flush()
            return [(data, future.result(0).sequence_number) for each in told for data, future in each]

        told = await asyncio.to_thread(work)
        places = {record.sequence_number: record.data for record in emulator.stored("welders")}
    assert len(places) == 16 * 500
    assert {number: data for data, number in told} == places


async def test_a_full_queue_makes_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.sync_producer._QUEUE_RECORDS", 3)
    async with Emulator({"welders": 1}) as emulator:

        def work() -> None:
            with producer(emulator.url, budget_records=10) as one, concurrent.futures.ThreadPoolExecutor(4) as threads:
                futures = list(threads.map(one.put, [b"%d" % n for n in range(400)]))
                assert len(concurrent.futures.wait(futures).done) == 400

        await asyncio.to_thread(work)
        assert emulator.stored_count("welders") == 400


async def test_a_callback_may_put_and_must_not_wait() -> None:
    async with Emulator({"welders": 1}) as emulator:

        def work() -> None:
            problems: list[BaseException] = []
            again = threading.Event()

            def called(_: Any) -> None:
                for wait in (
                    one.flush,
                    one.close,
                    lambda: one.put_and_wait(b""),
                    lambda: one.put_record(Record(1, "k")),
                ):
                    try:
                        wait()
                    except LibraryError as error:
                        problems.append(error)
                one.put(b"second")
                again.set()

            with producer(emulator.url) as one:
                one.put(b"first").add_done_callback(called)
                assert again.wait(60)
            assert len(problems) == 4
            with pytest.raises(LibraryError, match="flush waits for the producer's own thread"):
                raise problems[0]

        await asyncio.to_thread(work)
        assert sorted(record.data for record in emulator.stored("welders")) == [b"first", b"second"]


def test_what_is_wrong_with_a_record_is_its_outcome() -> None:
    one = producer(nowhere(), max_record_bytes=1000, close_timeout_s=0)
    one.start()
    assert isinstance(one.put(b"x" * 1001).exception(60), RecordError)
    for wrong in ("text", 5, None):
        with pytest.raises(TypeError):
            one.put(wrong)  # type: ignore[arg-type]
    assert one.put(b"x").cancel() is False
    assert one.close() == 1


def test_before_the_start_and_after_the_end() -> None:
    one = producer(nowhere(), close_timeout_s=0)
    for call in (lambda: one.put(b"x"), one.flush, lambda: one.put_record(Record(1, "k"))):
        with pytest.raises(ClosedError, match="not started"):
            call()
    one.start()
    one.start()
    assert [one.close(), one.close()] == [0, 0]
    assert one.stats()["received"] == 0
    for call in (lambda: one.put(b"x"), one.start):
        with pytest.raises(ClosedError, match="is closed: make a new one"):
            call()
    never = producer(nowhere())
    assert [never.close(), never.close()] == [0, 0]


def test_a_start_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_: Producer) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Producer, "start", fails)
    one = producer(nowhere())
    with pytest.raises(ZeroDivisionError):
        one.start()
    assert one.close() == 0


def test_leaving_with_records_unsettled_raises(caplog: pytest.LogCaptureFixture) -> None:
    futures: list[Any] = []

    def work() -> None:
        with producer(nowhere(), close_timeout_s=0.3, budget_bytes=1, max_record_bytes=1000) as one:
            futures.extend(one.put(b"%d" % n) for n in range(5))

    with pytest.raises(RecordsLost) as caught:
        work()
    assert caught.value.records == 5
    assert (caught.value.last_error or "").startswith("ConnectFailed")
    assert all(isinstance(future.exception(0), ClosedError) for future in futures)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("closed with 4 records that found no room in the budget and are lost" in line for line in lines)


async def test_a_put_that_waits_is_told_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.sync_producer._QUEUE_RECORDS", 1)
    one = producer(nowhere(), close_timeout_s=0, budget_bytes=1, max_record_bytes=1000)
    await asyncio.to_thread(one.start)
    ended: list[type[BaseException] | None] = []

    def work() -> None:
        while True:
            try:
                one.put(b"x")
            except ClosedError as error:
                ended.append(type(error))
                return

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not one._is_full():
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(one.close) >= 1
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert ended == [ClosedError] * 3


async def test_close_leaves_a_thread_behind_in_which_a_callback_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Exit closes as well: without a bound the interpreter would stay."""
    monkeypatch.setattr("fastkin.sync_producer._LEAVE_S", 0.2)
    async with Emulator({"welders": 1}) as emulator:

        def work() -> None:
            waits, free = threading.Event(), threading.Event()
            rescue = threading.Timer(20, free.set)  # of a close that waits for ever
            rescue.start()
            one = producer(emulator.url)
            one.start()
            told = one.put(b"x")
            told.add_done_callback(lambda _: (waits.set(), free.wait()))
            assert waits.wait(60)
            futures = [one.put(b"%d" % n) for n in range(3)]
            assert [one.close(0), one.close(0)] == [3, 3]
            assert not free.is_set()
            for future in futures:
                with pytest.raises(ClosedError, match="a callback may be waiting"):
                    future.result(60)
            assert told.result(0).sequence_number
            rescue.cancel()
            free.set()  # it goes on, and finds that all is told
            assert one._thread is not None
            one._thread.join(60)
            assert not one._thread.is_alive()

        await asyncio.to_thread(work)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len([line for line in lines if "closed with 3 records whose outcome is not known" in line]) == 1


def test_close_waits_for_no_start_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    rescue = threading.Timer(20, free.set)
    rescue.start()

    async def stands(_: Producer) -> None:
        free.wait()

    monkeypatch.setattr("fastkin.sync_producer._LEAVE_S", 0.2)
    monkeypatch.setattr(Producer, "start", stands)
    one = producer(nowhere())
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        starting = threads.submit(one.start)
        while one._loop is None:
            threading.Event().wait(0.01)
        assert one.close(0) == 0
        assert not free.is_set()
        assert isinstance(starting.exception(60), ClosedError)
    rescue.cancel()
    free.set()
    assert one._thread is not None
    one._thread.join(60)


async def child(code: str, url: str) -> str:
    head = f"import os, sys, fastkin\noptions = {options(url)!r}\n"
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-c", head + code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await running.communicate()
    assert running.returncode == 0, out.decode()
    return out.decode()


@pytest.mark.process
async def test_what_was_put_is_drained_at_the_end_of_the_interpreter() -> None:
    code = """
one = fastkin.SyncProducer("welders", **(options | {"linger_ms": 60_000.0}))
one.start()
for n in range(900):
    one.put(b"%d" % n)
"""
    async with Emulator({"welders": 1}) as emulator:
        assert await child(code, emulator.url) == ""
        assert emulator.stored_count("welders") == 900


@pytest.mark.process
async def test_under_fork_the_parent_goes_on_and_the_child_makes_its_own() -> None:
    """The child is refused with the cure, drains nothing of its parent's, and a producer of its own works."""
    code = """
one = fastkin.SyncProducer("welders", **options)
one.start()
one.put(b"before").result(60)
one.put(b"under way")
pid = os.fork()
if pid == 0:
    try:
        one.put(b"never")
    except fastkin.ClosedError as error:
        print(error, flush=True)
    print(one.close(), flush=True)
    own = fastkin.SyncProducer("welders", **options)
    own.start()
    own.put(b"child")
    sys.exit(0)
os.waitpid(pid, 0)
one.put(b"after")
"""
    async with Emulator({"welders": 1}) as emulator:
        told = await child(code, emulator.url)
        stored = sorted(record.data for record in emulator.stored("welders"))
    assert told == "this producer was made before the fork and belongs to the parent process: make a new one here\n0\n"
    assert stored == [b"after", b"before", b"child", b"under way"]


def test_its_hints_can_be_read() -> None:
    assert "budget_bytes" in get_type_hints(ProducerOptions, localns={"Policy": str, "Path": str})


async def test_a_question_that_meets_the_end_of_the_loop_is_refused() -> None:
    """It had looked whether the producer is open, and another thread closed it then."""
    async with Emulator({"welders": 1}) as emulator:

        def work() -> None:
            one = SyncProducer("welders", **options(emulator.url))
            one.start()
            one.close()
            one._state = "open"
            with pytest.raises(ClosedError):  # the loop is closed
                one.stats()
            one._loop = asyncio.new_event_loop()
            with pytest.raises(ClosedError):  # the loop took it, and never came to it
                one.stats()
            one._loop.run_until_complete(asyncio.sleep(0))
            one._loop.close()

        await asyncio.to_thread(work)
