"""How far was read is kept, and reading goes on there."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from consumer.rig import FIRST, HALF, aggregate, consumer, put, take
from fastkin import CheckpointError, FileCheckpoints, LibraryError, MemoryCheckpoints
from fastkin.consumer import all_shards
from fastkin.emulator import Emulator
from support.readback import kinesis_client

if TYPE_CHECKING:
    from pathlib import Path


def values(records: list[Any]) -> list[Any]:
    return [record.data for record in records]


async def test_a_second_stream_goes_on_behind_the_last_record_that_was_used_up() -> None:
    """The record at which the reader left may not have been used: it comes again."""
    marks = MemoryCheckpoints()
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url, checkpoints=marks) as one:
        await put(emulator.url, [b"%d" % n for n in range(10)], key="k")
        assert values(await take(one, 4)) == [0, 1, 2, 3]
        assert values(await take(one, 7)) == [3, 4, 5, 6, 7, 8, 9]


async def test_a_batch_that_was_used_up_is_kept_before_the_next_one() -> None:
    marks = MemoryCheckpoints()
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url, checkpoints=marks, limit=2) as one:
        await put(emulator.url, [b"%d" % n for n in range(4)], key="k")
        stored = [record.sequence_number for record in emulator.stored("s")]
        records = one.stream("trim_horizon")
        kept = []
        for _ in range(4):
            await anext(records)
            kept.append(marks.marks.get(FIRST))
        assert kept == [None, None, stored[1], stored[1]]
        await records.aclose()
        assert marks.marks == {FIRST: stored[2]}


async def test_within_an_aggregate_nothing_is_passed_over() -> None:
    """Its records share a number: one goes on before it."""
    marks = MemoryCheckpoints()
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url, checkpoints=marks) as one:
        await put(emulator.url, [b"0", aggregate([(0, b"1"), (0, b"2")], ["a"]), b"3"], key="k")
        assert values(await take(one, 3)) == [0, 1, 2]
        assert values(await take(one, 3)) == [1, 2, 3]


async def test_a_shard_that_was_read_to_its_end_is_not_read_again_and_its_children_are() -> None:
    marks = MemoryCheckpoints()
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url, checkpoints=marks) as one:
        await put(emulator.url, [b"0"], key="k")
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey=HALF)
        await put(emulator.url, [b"1"] * 10)
        assert values(await take(one, 2)) == [0, 1]
        assert marks.marks[FIRST] == "SHARD_END"
        # though it says latest: what follows a shard that was read begins at its beginning
        again = await asyncio.wait_for(take(one, 10, "latest"), 20)
        assert values(again) == [1] * 10


async def test_a_shard_with_no_mark_begins_where_the_stream_is_asked_to() -> None:
    async with Emulator({"s": 2}) as emulator:
        await put(emulator.url, [b"%d" % n for n in range(20)])
        stored = emulator.stored("s")
        first = [int(record.data) for record in stored if record.shard_id == FIRST]
        others = [int(record.data) for record in stored if record.shard_id != FIRST]
        middle = [record.sequence_number for record in stored if record.shard_id == FIRST][2]
        one = consumer(emulator.url, checkpoints=MemoryCheckpoints({FIRST: middle}))
        records = await take(one, 17)
    assert sorted(values(records)) == sorted(first[3:] + others)


async def test_a_file_survives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "marks.json"
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b"%d" % n for n in range(6)], key="k")
        assert values(await take(consumer(emulator.url, checkpoints=FileCheckpoints(path)), 3)) == [0, 1, 2]
        again = consumer(emulator.url, checkpoints=FileCheckpoints(path))
        assert values(await take(again, 4)) == [2, 3, 4, 5]
        stored = [record.sequence_number for record in emulator.stored("s")]
    assert json.loads(path.read_text()) == {"version": 1, "stream": "s", "shards": {FIRST: stored[4]}}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["marks.json", "marks.json.lock"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no file of checkpoints"),
        ("[]", "is no file of checkpoints"),
        ("{}", "is no file of checkpoints"),
        ('{"version":1,"stream":"s","shards":{"a":5}}', "is no file of checkpoints"),
        ('{"version":2,"stream":"s","shards":{}}', "has version 2; this fastkin knows version 1"),
        ('{"version":1,"stream":"t","shards":{}}', "is of the stream 't', not 's'"),
    ],
)
async def test_a_file_that_cannot_be_used_is_named_and_left(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "marks.json"
    path.write_text(text)
    store = FileCheckpoints(path)
    with pytest.raises(CheckpointError) as refused:
        await store.load("s")
    assert problem in str(refused.value)
    assert str(path) in str(refused.value)
    assert path.read_text() == text
    path.unlink()
    assert await store.load("s") == {}  # the lock was let go
    await store.close()


async def test_a_file_has_one_consumer(tmp_path: Path) -> None:
    path = tmp_path / "marks.json"
    first, second = FileCheckpoints(path), FileCheckpoints(path)
    await first.load("s")
    with pytest.raises(CheckpointError, match="in use by another consumer; end it"):
        await second.load("s")
    with pytest.raises(CheckpointError, match="in use; give each stream"):
        await first.load("s")
    await first.close()
    assert await second.load("s") == {}
    await second.close()


async def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    store = FileCheckpoints(tmp_path / "gone" / "marks.json")
    with pytest.raises(CheckpointError, match="cannot be made"):
        await store.load("s")
    store = FileCheckpoints(tmp_path / "marks.json")
    await store.load("s")
    (tmp_path / "marks.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        await store.save(FIRST, "5")
    await store.close()


async def test_saves_at_the_same_time_leave_all_marks(tmp_path: Path) -> None:
    path = tmp_path / "marks.json"
    store = FileCheckpoints(path)
    await store.load("s")
    await asyncio.gather(*(store.save(f"shard-{n}", str(n)) for n in range(20)))
    await store.close()
    assert json.loads(path.read_text())["shards"] == {f"shard-{n}": str(n) for n in range(20)}


@pytest.mark.parametrize("path", [None, "", 5])
def test_a_file_needs_a_name(path: Any) -> None:
    with pytest.raises(LibraryError, match="give the name of a file"):
        FileCheckpoints(path)


_READER = """
import asyncio, sys
from fastkin import Consumer, FileCheckpoints

async def main(url, path):
    keys = {"region": "us-east-1", "access_key": "a", "secret_key": "b", "endpoint_url": url}
    async with Consumer("s", **keys, limit=50, poll_s=0.01, checkpoints=FileCheckpoints(path)) as one:
        async for record in one.stream("trim_horizon"):
            print(record.shard_id, record.data, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.process
async def test_a_kill_repeats_at_most_one_batch_of_a_shard_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "marks.json"
    async with Emulator({"s": 3}, limits=False) as emulator:
        await put(emulator.url, [b"%d" % n for n in range(3000)])

        async def read(until: int) -> list[tuple[str, int]]:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _READER, emulator.url, str(path), stdout=subprocess.PIPE
            )
            assert process.stdout is not None
            lines = [await process.stdout.readline() for _ in range(until)]
            process.send_signal(signal.SIGKILL)
            lines += (await process.stdout.read()).splitlines()
            await process.wait()
            found = [line.split() for line in lines if len(line.split()) == 2]
            return [(shard.decode(), int(value)) for shard, value in found]

        before = await read(1234)
        marks = json.loads(path.read_text())["shards"]
        stored: dict[str, list[int]] = {}
        numbers: dict[str, int] = {}
        for record in emulator.stored("s"):
            stored.setdefault(record.shard_id, []).append(int(record.data))
            numbers[record.sequence_number] = int(record.data)
        left = sum(len(of) - of.index(numbers[marks[shard]]) - 1 for shard, of in stored.items())
        after = await read(left)
    for shard, expected in stored.items():
        first = [value for name, value in before if name == shard]
        second = [value for name, value in after if name == shard]
        assert first == expected[: len(first)]
        assert second == expected[len(expected) - len(second) :]
        assert 0 <= len(first) + len(second) - len(expected) <= 50


async def test_a_reader_that_is_cancelled_while_the_file_is_opened_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that opens it goes on: whoever closes waits for it."""
    store = FileCheckpoints(tmp_path / "marks.json")
    entered, go_on = threading.Event(), threading.Event()
    read = FileCheckpoints._read

    def slow(self: FileCheckpoints, stream: str) -> dict[str, str]:
        entered.set()
        go_on.wait(10)
        return read(self, stream)

    monkeypatch.setattr(FileCheckpoints, "_read", slow)
    loading = asyncio.create_task(store.load("s"))
    assert await asyncio.to_thread(entered.wait, 10)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0.05)
    go_on.set()
    await closing
    assert await FileCheckpoints(tmp_path / "marks.json").load("s") == {}


async def test_the_mark_of_a_former_stream_of_the_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream made anew has the same shard ids: what was read to its end there would never be read here."""
    monkeypatch.setattr(all_shards, "CHILDREN_S", 0.0)
    path = tmp_path / "marks.json"
    path.write_text(json.dumps({"version": 1, "stream": "s", "shards": {FIRST: "SHARD_END"}}))
    own = type("Table", (MemoryCheckpoints,), {"__repr__": lambda _: "secret"})({FIRST: "SHARD_END"})
    async with Emulator({"s": 2}) as emulator:
        await put(emulator.url, [b"%d" % n for n in range(20)])
        for store, name in ((FileCheckpoints(path), f"checkpoints {str(path)!r}"), (own, "checkpoints (Table)")):
            with pytest.raises(CheckpointError) as refused:
                await asyncio.wait_for(take(consumer(emulator.url, checkpoints=store), 20), 20)
            assert str(refused.value) == (
                f"{name}: shard {FIRST} was read to its end, and is open: the mark is of a former stream of this name;"
                " delete it and the others"
            )


async def test_a_file_is_let_go_by_who_is_cancelled_while_it_waits_for_a_thread(tmp_path: Path) -> None:
    busy = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        store = FileCheckpoints(tmp_path / "marks.json")
        await store.load("s")
        pool.submit(busy.wait)
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0.05)
        closing.cancel()
        await asyncio.wait([closing])
        busy.set()
        await asyncio.to_thread(int)  # behind it
        other = FileCheckpoints(tmp_path / "marks.json")
        assert await other.load("s") == {}
        await other.close()
