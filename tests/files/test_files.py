"""A pipeline's records in files: acknowledged when synced, finished by interval and size, found again after a crash."""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from fastkin._codec import KeyPlan
from fastkin.config import Kinesis, Pipeline
from fastkin.delivery.delivery import Delivery, Options
from fastkin.errors import Action, KinesisError
from fastkin.files.client import FileClient, client_of
from fastkin.files.directory import OPEN, UPLOAD, Directory
from fastkin.limits import KIB, MIB
from fastkin.runtime.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable


def pipeline(folder: Path, **more: Any) -> Pipeline:
    given = {"file_compression": "none", "file_interval_s": 3600.0} | more
    return Pipeline(id="p", kinesis=Kinesis(), file=str(folder), **given)


def finished(folder: Path) -> dict[str, bytes]:
    """Path below the directory -> content, of every finished file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(OPEN):
            data = path.read_bytes()
            found[name] = gzip.decompress(data) if name.endswith(".gz") else data
    return found


def parts(folder: Path) -> list[Path]:
    return sorted((folder / OPEN).iterdir())


class Rig:
    """A delivery into files."""

    def __init__(self, made: Pipeline) -> None:
        client = client_of(made)
        assert isinstance(client, FileClient)
        self.client = client

    async def __aenter__(self) -> Self:
        self.delivery = Delivery(
            self.client, Options(budget_bytes=64 * MIB, budget_records=100_000),
            name="p", stream="p", key=KeyPlan("uuid"),
        )  # fmt: skip
        self.delivery.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.delivery.close(Deadline(5.0, "p"), spool_limit=Deadline(5.0, "p"))
        await self.client.close()

    async def put(self, *records: bytes) -> None:
        """Return when all are stored, as a PUBACK would leave."""
        receipts = [self.delivery.batcher.put(record) for record in records]
        await self.delivery.flush()
        for receipt in receipts:
            await receipt


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.01)


async def test_records_are_on_the_disk_when_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (real(fd), synced.append(os.fstat(fd).st_size))[0])
    async with Rig(pipeline(tmp_path)) as rig:
        await rig.put(b"one\n", b"two\n")
        (part,) = parts(tmp_path)
        assert synced == [part.stat().st_size]
        assert b"one\ntwo\n" in part.read_bytes()
        assert finished(tmp_path) == {}
        await rig.client.finish()
        assert list(finished(tmp_path).values()) == [b"one\ntwo\n"]
        assert parts(tmp_path) == []
        assert rig.client.file_counters.finished == 1


async def test_a_file_is_finished_when_it_is_large_enough(tmp_path: Path) -> None:
    """IC-09: interval and size, whichever comes first; here the size."""
    async with Rig(pipeline(tmp_path, file_max_bytes=4 * KIB)) as rig:
        for n in range(10):
            await rig.put(*[b"%02d-%02d %s\n" % (n, i, b"x" * 90) for i in range(10)])
        await until(lambda: rig.client.file_counters.finished == 2)
        assert [len(data) // 1000 for data in finished(tmp_path).values()] == [4, 4]
        await rig.client.finish()
    assert sum(len(data.splitlines()) for data in finished(tmp_path).values()) == 100


async def test_a_file_is_finished_when_its_time_has_come(tmp_path: Path) -> None:
    """IC-09: interval and size, whichever comes first; here the interval. It begins with the first record."""
    async with Rig(pipeline(tmp_path, file_interval_s=0.2)) as rig:
        await rig.client.start()
        await asyncio.sleep(0.3)  # without a record there is no file
        assert finished(tmp_path) == {}
        await rig.put(b"a\n")
        await until(lambda: len(finished(tmp_path)) == 1 and not parts(tmp_path))
        await rig.put(b"b\n")
        await until(lambda: len(finished(tmp_path)) == 2 and not parts(tmp_path))
    assert sorted(finished(tmp_path).values()) == [b"a\n", b"b\n"]


async def test_prefix_extension_and_gzip(tmp_path: Path) -> None:
    """IC-10: GZIP, Prefix <env>/data/, FileExtension .csv.gz."""
    made = pipeline(tmp_path, file_compression="gzip", file_prefix="prod/data/%Y/", file_extension=".csv.gz")
    async with Rig(made) as rig:
        await rig.put(b"a;b\n", b"c;d\n")
        await rig.client.finish()
    ((name, data),) = finished(tmp_path).items()
    assert name.startswith("prod/data/20")
    assert name.endswith(".csv.gz")
    assert not name.endswith(".gz.gz")
    assert data == b"a;b\nc;d\n"


async def test_calls_side_by_side_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (real(fd), synced.append(fd))[0])
    client = FileClient(pipeline(tmp_path))
    bodies = [b'{"Records":[{"Data":"%s"}],"Directory":"d"}' % each for each in (b"YQ==", b"Yg==", b"Yw==", b"ZA==")]
    answers = await asyncio.gather(*(client.call("PutObject", body) for body in bodies))
    assert answers == [b'{"FailedPutCount":0,"RequestResponses":[{"RecordId":"file"}]}'] * 4
    assert len(synced) == 1
    await client.finish()
    await client.close()
    assert list(finished(tmp_path).values()) == [b"abcd"]


# -- what a former run left


async def test_what_a_killed_run_left_is_finished_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Rig(pipeline(tmp_path))
    async with first:
        await first.put(b"a\n", b"b\n")
    # Closed without finish(), as a process that is killed: and half a block of what nobody was told of.
    (part,) = parts(tmp_path)
    with part.open("ab") as file:
        file.write(b"\x05\x00\x00\x00\x00\x00")
    async with Rig(pipeline(tmp_path)) as second:
        await second.client.start()
        await until(lambda: finished(tmp_path) and not parts(tmp_path))
        assert list(finished(tmp_path).values()) == [b"a\nb\n"]
        await second.put(b"c\n")
        await second.client.finish()
    assert sorted(finished(tmp_path).values()) == [b"a\nb\n", b"c\n"]
    assert "a former run left 1 unfinished files" in caplog.text


async def test_two_runs_in_one_directory_leave_each_others_files_alone(tmp_path: Path) -> None:
    async with Rig(pipeline(tmp_path)) as one:
        await one.put(b"one\n")
        async with Rig(pipeline(tmp_path)) as other:
            await other.put(b"other\n")
            assert len(parts(tmp_path)) == 2
            await other.client.finish()
        await one.put(b"more\n")
        await one.client.finish()
    assert sorted(finished(tmp_path).values()) == [b"one\nmore\n", b"other\n"]


def test_a_file_that_is_finished_twice_is_the_same_file(tmp_path: Path) -> None:
    """Killed between the finished file and the end of its part."""
    directory = Directory(tmp_path, total_bytes=10 * MIB, upload=False)
    directory.open()
    part = directory.make("data/p.gz", gzip=True, began=1_700_000_000.5)
    directory.append(part, [b"a\n", b"b\n"])
    copy = part.path.read_bytes()
    directory.finish(part)
    before = (tmp_path / "data" / "p.gz").read_bytes()
    part.path.write_bytes(copy)
    again = Directory(tmp_path, total_bytes=10 * MIB, upload=False)
    again.open()
    again.finish(again.left.pop())
    assert (tmp_path / "data" / "p.gz").read_bytes() == before
    assert gzip.decompress(before) == b"a\nb\n"
    assert parts(tmp_path) == []


async def test_what_is_no_part_is_told_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / OPEN).mkdir()
    strange = tmp_path / OPEN / "x.part"
    strange.write_bytes(b"what is this")
    async with Rig(pipeline(tmp_path)) as rig:
        await rig.put(b"a\n")
        await rig.client.finish()
    assert strange.read_bytes() == b"what is this"
    assert f"{strange} is no part of a file that fastkin can read" in caplog.text


async def test_files_that_nobody_uploads_any_more_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / UPLOAD / "data").mkdir(parents=True)
    (tmp_path / UPLOAD / "data" / "old.gz").write_bytes(b"x")
    async with Rig(pipeline(tmp_path)) as rig:
        await rig.client.start()
    assert "1 finished files wait in" in caplog.text
    assert "nobody takes them to S3" in caplog.text


# -- disks in trouble


async def test_a_full_disk_keeps_the_records_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.1)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.1)
    real, full = os.fdatasync, True

    def sync(fd: int) -> None:
        if full:
            raise OSError(28, "No space left on device")
        real(fd)

    async with Rig(pipeline(tmp_path)) as rig:
        await rig.put(b"before\n")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", sync)
            receipt = rig.delivery.batcher.put(b"kept\n")
            flushed = asyncio.create_task(rig.delivery.flush())
            await until(lambda: rig.delivery.sender.operator_error)
            assert "No space left on device; free space there" in str(rig.delivery.sender.operator_error)
            assert rig.delivery.batcher.in_flight == 1
            full = False
            await flushed
            await receipt
        await rig.client.finish()
        assert rig.delivery.stats()["duplicates_possible"] == 0
    assert sorted(finished(tmp_path).values()) == [b"before\n", b"kept\n"]
    assert any("the data is kept" in record.getMessage() for record in caplog.records)


async def test_a_file_that_cannot_be_finished_is_kept_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.files.files._AGAIN_S", 0.05)
    real, full = os.fsync, True

    def sync(fd: int) -> None:
        if full:
            raise OSError(28, "No space left on device")
        real(fd)

    async with Rig(pipeline(tmp_path, file_max_bytes=1024)) as rig:
        await rig.client.start()
        await rig.put(b"a" * 100)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", sync)
            await rig.put(b"b" * 1024)
            await until(lambda: rig.client.trouble)
            assert "cannot be finished: No space left on device" in str(rig.client.trouble)
            assert len(parts(tmp_path)) == 1
            full = False
            await until(lambda: finished(tmp_path) and not parts(tmp_path))
        await until(lambda: rig.client.trouble is None)
    assert list(finished(tmp_path).values()) == [b"a" * 100 + b"b" * 1024]
    assert "1 unfinished files are kept and tried again" in caplog.text


async def test_at_the_bound_nothing_more_is_taken_and_nothing_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.1)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.1)
    monkeypatch.setattr("fastkin.files.directory._LOOK_EVERY_S", 0.0)
    async with Rig(pipeline(tmp_path, file_max_bytes=64 * KIB, file_disk_bytes=MIB)) as rig:
        for n in range(8):
            await rig.put(b"%d" % n * 100 * KIB)
        await until(lambda: rig.client.file_counters.finished == 8)
        more = [rig.delivery.batcher.put(bytes([97 + n]) * 100 * KIB) for n in range(3)]
        flushed = asyncio.create_task(rig.delivery.flush())
        await until(lambda: rig.delivery.sender.operator_error)
        assert "finished files were not taken away; nothing is deleted" in str(rig.delivery.sender.operator_error)
        assert sum(map(len, finished(tmp_path).values())) <= MIB
        for name in finished(tmp_path):
            (tmp_path / name).unlink()
        await flushed
        for receipt in more:
            await receipt
        await rig.client.finish()
    assert sum(map(len, finished(tmp_path).values())) == 300 * KIB


async def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def denied(path: Any, flags: int, *more: Any, **by_name: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied")  # to root nothing is
        return real(path, flags, *more, **by_name)

    monkeypatch.setattr(os, "open", denied)
    client = FileClient(pipeline(tmp_path))
    with pytest.raises(KinesisError, match=r"cannot be used: Permission denied; see that .* may write in it") as caught:
        await client.start()
    assert caught.value.action is Action.OPERATOR
    await client.close()


async def test_a_directory_that_is_a_file_or_has_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place, why in ((tmp_path / "file", "Not a directory"), (Path("/proc/nowhere"), "No such file")):
        client = FileClient(pipeline(place))
        with pytest.raises(KinesisError, match=f"cannot be used: {why}") as caught:
            await client.start()
        assert caught.value.action is Action.OPERATOR
        await client.close()


async def test_a_directory_that_is_mended_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    place = tmp_path / "out"
    place.write_bytes(b"")
    async with Rig(pipeline(place)) as rig:
        with pytest.raises(KinesisError):
            await rig.client.start()
        place.unlink()
        await rig.put(b"a\n")
        await rig.client.finish()
    assert list(finished(place).values()) == [b"a\n"]


async def test_what_describe_tells(tmp_path: Path) -> None:
    client = FileClient(pipeline(tmp_path))
    told = await client.describe()
    assert (told.name, told.status, told.mode) == (str(tmp_path), "ACTIVE", "files")
    await client.close()
