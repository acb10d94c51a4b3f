"""A pipeline's records in files: acknowledged when synced, finished by interval and size, found again after a crash."""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest

from fastkin._codec import KeyPlan
from fastkin.config import Kinesis, Pipeline
from fastkin.delivery.delivery import Delivery, Options
from fastkin.errors import Action, KinesisError
from fastkin.files import file_client
from fastkin.files.client import FileClient
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
        client = file_client(made)
        assert client is not None
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


async def test_sixty_seconds_or_a_megabyte_whichever_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IC-09: the buffering hints of the template, on a clock that the test turns."""
    loop, turned = asyncio.get_running_loop(), 0.0
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + turned)
    async with Rig(pipeline(tmp_path, file_interval_s=60.0, file_max_bytes=MIB)) as rig:
        counters = rig.client.file_counters
        await rig.put(b"a\n")
        turned += 50
        await rig.put(b"b\n")
        await asyncio.sleep(0.1)
        assert counters.finished == 0
        turned += 10  # sixty since the first record
        await until(lambda: counters.finished == 1)
        assert list(finished(tmp_path).values()) == [b"a\nb\n"]

        await rig.put(b"c" * (MIB - KIB))
        await asyncio.sleep(0.1)
        assert counters.finished == 1  # a KiB is missing
        turned += 50
        await rig.put(b"c" * KIB)
        await until(lambda: counters.finished == 2)
        await rig.put(b"d\n")
        turned += 50  # a hundred since the file before began, fifty since this one did
        await asyncio.sleep(0.1)
        assert counters.finished == 2
        turned += 10
        await until(lambda: counters.finished == 3)
    assert sorted(len(data) for data in finished(tmp_path).values()) == [2, 4, MIB]


async def test_the_key_of_a_file_has_the_time_at_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IC-10: strftime keys, in UTC, of the first record and not of the end."""
    clock = SimpleNamespace(time=lambda: 1_772_600_767.0)  # 2026-03-04 05:06:07 UTC
    monkeypatch.setattr("fastkin.files.files.time", clock)
    named = {"file_prefix": "prod/data/%Y/%m/%d/%H/", "file_extension": ".csv.gz", "file_compression": "gzip"}
    async with Rig(pipeline(tmp_path, **named)) as rig:
        await rig.put(b"a\n")
        clock.time = lambda: 1_772_604_367.0  # an hour later
        await rig.put(b"b\n")
        await rig.client.finish()
    ((name, data),) = finished(tmp_path).items()
    assert re.fullmatch(r"prod/data/2026/03/04/05/p-20260304T050607-[0-9a-f]{32}\.csv\.gz", name)
    assert data == b"a\nb\n"


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


async def test_what_a_process_leaves_that_dies_beside_us_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.files.files._LOOK_S", (0.05, 0.05))
    async with Rig(pipeline(tmp_path)) as one:
        await one.put(b"one\n")
        async with Rig(pipeline(tmp_path)) as other:
            await other.put(b"other\n")
        await until(lambda: finished(tmp_path))
        assert list(finished(tmp_path).values()) == [b"other\n"]
        await until(lambda: len(parts(tmp_path)) == 1)  # the part goes when its file is there
        await one.client.finish()
    assert sorted(finished(tmp_path).values()) == [b"one\n", b"other\n"]
    assert caplog.text.count("a process that has ended left 1 unfinished files") == 1


async def test_a_damaged_part_gives_what_is_good_and_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Rig(pipeline(tmp_path)) as first:
        for record in (b"first\n", b"second\n", b"third\n"):
            await first.put(record)
    (part,) = parts(tmp_path)
    whole = part.read_bytes()
    part.write_bytes(whole.replace(b"second", b"Second"))
    async with Rig(pipeline(tmp_path)) as rig:
        await rig.client.start()
        await rig.client.finish()
    assert list(finished(tmp_path).values()) == [b"first\nthird\n"]
    (kept,) = parts(tmp_path)
    assert (kept.suffix, kept.stat().st_size) == (".damaged", len(whole))
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    at = whole.index(b"second") - 8
    assert f"{kept} is damaged at offset {at}: 15 bytes in 1 places cannot be read" in line
    assert "look after the disk" in line
    again = Directory(tmp_path, total_bytes=10 * MIB, upload=False)
    again.open()
    assert again.left == []
    assert again._taken() == len(whole) + len(b"first\nthird\n")


def test_a_part_without_anything_good_becomes_no_file(tmp_path: Path) -> None:
    directory = Directory(tmp_path, total_bytes=10 * MIB, upload=False)
    directory.open()
    part = directory.make("p.gz", gzip=True, began=1.0)
    directory.append(part, [b"all\n"])
    with part.path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"X")
    nbytes = part.path.stat().st_size
    assert directory.finish(part) == 0
    assert [path.name for path in parts(tmp_path)] == ["p.gz.damaged"]
    assert finished(tmp_path) == {}
    assert directory._taken() == nbytes


def test_a_part_that_cannot_be_read_keeps_nobody_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Directory(tmp_path, total_bytes=10 * MIB, upload=False)
    first.open()
    for name in ("a", "b"):
        part = first.make(name, gzip=False, began=1.0)
        first.append(part, [b"x"])
        part.leave()
    real = os.open

    def broken(path: Any, *more: Any, **by_name: Any) -> int:
        if str(path).endswith("a.part"):
            raise OSError(5, "Input/output error")
        return real(path, *more, **by_name)

    monkeypatch.setattr(os, "open", broken)
    again = Directory(tmp_path, total_bytes=10 * MIB, upload=False)
    again.open()
    assert [part.target for part in again.left] == ["b"]
    assert again.unread == {tmp_path / OPEN / "a.part": "Input/output error"}


def test_a_new_directory_is_synced_into_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def sync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    place = tmp_path / "new" / "out"
    Directory(place, total_bytes=10 * MIB, upload=True).open()
    assert {path.stat().st_ino for path in (tmp_path, place.parent, place)} <= set(synced)


def test_a_part_that_cannot_be_removed_is_counted_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(tmp_path, total_bytes=10 * MIB, upload=False)
    directory.open()
    part = directory.make("p.jsonl", gzip=False, began=1.0)
    directory.append(part, [b"x" * 1000])

    def denied(self: Path, *, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", denied)
        for _ in range(3):
            with pytest.raises(KinesisError, match="cannot be finished: Operation not permitted"):
                directory.finish(part)
            assert directory._taken() == 2 * part.length + 1000
    made = (tmp_path / "p.jsonl").stat().st_ino
    assert directory.finish(part) == 1000
    assert (tmp_path / "p.jsonl").stat().st_ino == made
    assert directory._taken() == 1000
    assert parts(tmp_path) == []


# -- the end


async def test_who_waits_when_the_client_is_closed_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = FileClient(pipeline(tmp_path))
    await client.start()
    held, begun = threading.Event(), threading.Event()
    real = os.fdatasync

    def hang(fd: int) -> None:
        begun.set()
        held.wait(100)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", hang)
    body = b'{"Records":[{"Data":"YQ=="}],"Directory":"d"}'
    first = asyncio.create_task(client.call("PutObject", body))
    await until(begun.is_set)
    second = asyncio.create_task(client.call("PutObject", body))
    await asyncio.sleep(0)
    await client.close()
    done, _ = await asyncio.wait([first, second], timeout=50)
    held.set()
    assert done == {first, second}
    assert first.cancelled()
    assert second.cancelled()
    with pytest.raises(KinesisError, match=r"are closed: nothing is written any more; make a new client"):
        await client.call("PutObject", body)


# -- disks in trouble


async def test_a_part_that_cannot_be_finished_keeps_nobody_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.files.files._AGAIN_S", 0.05)
    made = pipeline(tmp_path, file_max_bytes=1024, file_prefix="data/", file_error_prefix="error/x/")
    async with Rig(made) as rig:
        (tmp_path / "error").write_bytes(b"somebody's file")
        assert rig.client.letters is not None
        await rig.client.letters.put(b"x" * 2000, lambda body: (1, bytes(body)))
        for n in range(3):
            await rig.put(b"%d" % n * 2000)
        await until(lambda: rig.client.file_counters.finished == 3)
        assert "Not a directory; a file stands where a folder must be" in str(rig.client.trouble)
        (tmp_path / "error").unlink()
        await until(lambda: rig.client.file_counters.finished == 4 and rig.client.trouble is None)
    assert len(finished(tmp_path)) == 4


async def test_a_name_that_is_too_long_is_told_with_its_cure(tmp_path: Path) -> None:
    client = FileClient(pipeline(tmp_path / ("x" * 256)))
    with pytest.raises(KinesisError, match="File name too long; use shorter names of folders"):
        await client.start()
    await client.close()


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
