"""The file itself: durable, bounded, private, one owner, and whole after a crash or a bad disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fastkin.delivery.spool_file import ENTRY_BYTES, ROW_BYTES, Put, Spool, row_size
from fastkin.errors import SpoolError
from support.running import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 2**20


def put(number: int, size: int = 1000, records: int = 10) -> Put:
    return Put((b"%d-" % number).ljust(size, b"."), b"", records, records)


def ended(spool: Spool, upto: int = 2**62) -> list[tuple[int, int, int]]:
    return [(row.id, row.records, row.size) for row in everything(spool) if row.id <= upto]


def everything(spool: Spool, after: int = 0) -> list:  # type: ignore[type-arg]
    rows = []
    while found := spool.read(after, most_bytes=MIB, at_least_one=True):
        rows += found
        after = found[-1].id
    return rows


def numbers(spool: Spool) -> list[int]:
    return [int(row.body.split(b"-")[0]) for row in everything(spool)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    with Spool(path, max_bytes=100 * MIB) as spool:
        yield spool


def test_rows_come_back_oldest_first_and_are_counted(spool: Spool, path: Path) -> None:
    ids = spool.write([put(n) for n in range(50)])
    ids += spool.write([Put(memoryview(b"50-x"), b"\x07\0\0\0", 1, 7)])
    assert ids == sorted(ids)
    assert (spool.rows, spool.records, spool.bytes) == (51, 507, 50 * (1000 + ROW_BYTES) + 8 + ROW_BYTES)
    rows = everything(spool)
    assert [row.id for row in rows] == ids
    assert numbers(spool) == list(range(51))
    assert (rows[-1].body, rows[-1].counts, rows[-1].records, rows[-1].entries) == (b"50-x", b"\x07\0\0\0", 7, 1)
    assert all(row.fault is None for row in rows)
    spool.write([], ended(spool, ids[9]))
    spool.close()
    with Spool(path, max_bytes=1) as again:
        assert (again.rows, again.records) == (41, 407)
        assert numbers(again) == list(range(10, 51))


def test_what_is_read_fits_in_the_room_given(spool: Spool) -> None:
    spool.write([put(n, size=1000) for n in range(10)])
    cost = row_size(put(0)) + 10 * ENTRY_BYTES
    assert len(spool.read(0, most_bytes=3 * cost)) == 3
    assert len(spool.read(0, most_bytes=3 * cost - 1)) == 2
    assert len(spool.read(0, most_bytes=99 * cost, most_rows=4)) == 4
    assert spool.read(0, most_bytes=cost - 1) == []
    assert len(spool.read(0, most_bytes=0, at_least_one=True)) == 1


def test_the_bound_in_bytes(path: Path) -> None:
    with Spool(path, max_bytes=3 * row_size(put(0))) as spool:
        assert spool.fits([put(0), put(1), put(2)])
        assert not spool.fits([put(0), put(1), put(2), put(3)])
        spool.write([put(0), put(1)])
        assert spool.fits([put(2)])
        assert not spool.fits([put(2), put(3)])


def test_the_file_is_ours_alone(path: Path, spool: Spool) -> None:
    spool.write([put(n) for n in range(100)])
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    spool.close()
    path.chmod(0o644)
    spool.open()
    spool.write([put(0)])
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


@pytest.mark.process
def test_one_owner(path: Path, spool: Spool) -> None:
    """Another process is told path and cure; the lock goes with the process that had it."""
    spool.write([put(0)])
    script = f"from fastkin.delivery.spool_file import Spool; Spool({str(path)!r}, max_bytes=1).open()"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    other = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert str(path) in other.stderr
    assert "another process or pipeline has it open; stop that one, or give each a `spool` of its own" in other.stderr
    with pytest.raises(SpoolError, match="another process or pipeline"):
        Spool(path, max_bytes=1).open()
    spool.close()
    with Spool(path, max_bytes=1) as next_one:
        assert next_one.rows == 1


def test_space_is_given_back_when_it_is_empty(path: Path, spool: Spool) -> None:
    for n in range(40):
        spool.write([put(n, size=200_000)])
    assert path.stat().st_size + path.with_name("spool.db-wal").stat().st_size > 8_000_000
    wal = path.with_name("spool.db-wal").stat().st_size
    assert wal < 12 * MIB
    spool.write([], ended(spool))
    assert (spool.rows, spool.bytes) == (0, 0)
    assert path.stat().st_size < MIB
    assert path.with_name("spool.db-wal").stat().st_size == 0
    ids = spool.write([put(1)])
    assert numbers(spool) == [1]
    assert ids[0] > 40, "an id is never used twice"


@pytest.mark.process
def test_memory_stays_small(tmp_path: Path) -> None:
    """64 MiB through the file in rows of 1 MiB: a few MiB at most."""
    script = f"""
import os, psutil
from fastkin.delivery.spool_file import Put, Spool
spool = Spool({str(tmp_path / "big.db")!r}, max_bytes=1 << 30)
spool.open()
body = os.urandom(1 << 20)
spool.write([Put(body, b"", 1, 1)])
rss = psutil.Process().memory_info().rss
peak = rss
for _ in range(64):
    spool.write([Put(body, b"", 1, 1)])
    peak = max(peak, psutil.Process().memory_info().rss)
after = 0
while rows := spool.read(after, most_bytes=1 << 20, at_least_one=True):
    after = rows[-1].id
    peak = max(peak, psutil.Process().memory_info().rss)
print(peak - rss)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 6 * MIB


# -- crashes -------------------------------------------------------------------------------------------

KILLED = """
import sys
from fastkin.delivery.spool_file import Put, Spool
spool = Spool(sys.argv[1], max_bytes=1 << 30)
spool.open()
n = 0
while True:
    spool.write([Put((b"%d-" % m).ljust(5000, b"."), b"", 1, 1) for m in range(n, n + 3)])
    n += 3
    print(n, flush=True)
"""


@pytest.mark.process
def test_sigkill_in_a_write_loses_nothing_that_was_told(path: Path) -> None:
    for round_ in range(3):
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=env, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(30 + 17 * round_):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        told = [int(line) for line in child.stdout.read().split()]
        child.wait()
        child.stdout.close()
        last = told[-1] if told else 3 * (30 + 17 * round_)
        with Spool(path, max_bytes=1) as spool:
            found = numbers(spool)
            assert found[:last] == list(range(last))
            assert len(found) in (last, last + 3)
            spool.write([], ended(spool))


def crashed(path: Path, tmp_path: Path) -> Path:
    """A copy as a crash leaves it: the log holds commits that the file has not."""
    with Spool(path, max_bytes=MIB) as spool:
        for n in range(20):
            spool.write([put(n)])
        copy = tmp_path / "crashed"
        copy.mkdir()
        for file in path.parent.glob("spool.db*"):
            shutil.copy(file, copy)
    return copy / "spool.db"


def test_a_torn_log_keeps_every_whole_commit(path: Path, tmp_path: Path) -> None:
    """The log cut at many places: what is before the cut is there, in order, and the file works on."""
    crash = crashed(path, tmp_path)
    log = crash.with_name("spool.db-wal").read_bytes()
    seen = set()
    for cut in [*range(len(log), 0, -len(log) // 40), 0]:
        work = tmp_path / "work"
        work.mkdir()
        shutil.copy(crash, work)
        (work / "spool.db-wal").write_bytes(log[:cut])
        with Spool(work / "spool.db", max_bytes=MIB) as spool:
            found = numbers(spool)
            assert found == list(range(len(found)))
            seen.add(len(found))
            spool.write([put(99)])
            assert numbers(spool)[-1] == 99
        shutil.rmtree(work)
    assert 20 in seen
    assert 0 in seen
    assert len(seen) > 10


def test_garbage_behind_the_log_is_not_read(path: Path, tmp_path: Path) -> None:
    crash = crashed(path, tmp_path)
    with crash.with_name("spool.db-wal").open("ab") as log:
        log.write(os.urandom(50_000))
    with Spool(crash, max_bytes=MIB) as spool:
        assert numbers(spool) == list(range(20))
        assert not Spool(crash, max_bytes=1).rows


def test_whether_it_was_closed_in_order(path: Path) -> None:
    with Spool(path, max_bytes=MIB) as spool:
        spool.write([put(n) for n in range(4)])
    spool = Spool(path, max_bytes=MIB)
    assert spool.open().clean
    assert spool.first_records(within=1) == 10
    assert spool.first_records(within=2 * (row_size(put(0)) + 10 * ENTRY_BYTES)) == 20
    assert spool.first_records(within=MIB) == 40
    spool.close(clean=False)
    found = spool.open()
    assert (found.clean, found.rows, found.records) == (False, 4, 40)
    spool.close()
    spool.close()


# -- bad disks ------------------------------------------------------------------------------------------


def spoil(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE bodies SET body = zeroblob(1000) WHERE id = 2",
        "UPDATE bodies SET body = zeroblob(5000000) WHERE id = 2",
        "DELETE FROM bodies WHERE id = 2",
        "UPDATE rows SET entries = 9 WHERE id = 2",
        "UPDATE rows SET crc = crc + 1 WHERE id = 2",
        "UPDATE rows SET counts = x'01' WHERE id = 2",
    ],
)
def test_a_row_that_rotted_is_set_aside_alone(path: Path, statement: str) -> None:
    with Spool(path, max_bytes=MIB) as spool:
        spool.write([put(n) for n in range(3)])
    spoil(path, statement)
    with Spool(path, max_bytes=MIB) as spool:
        one, two, three = everything(spool)
        assert one.fault is three.fault is None
        assert two.fault
        assert two.body == b""
        spool.quarantine(two)
        assert (spool.rows, spool.records) == (2, 20)
        assert [row.id for row in everything(spool)] == [1, 3]
    with Spool(path, max_bytes=MIB) as spool:
        assert (spool.rows, spool.records) == (2, 20)
        assert spool.open().damaged == 1


def test_a_file_that_is_no_spool_is_left_alone(path: Path) -> None:
    path.write_bytes(b"my thesis " * 100)
    with pytest.raises(SpoolError, match=r"spool\.db: cannot open it: it is no SQLite file; name another file"):
        Spool(path, max_bytes=1).open()
    assert path.read_bytes() == b"my thesis " * 100
    path.unlink()
    spoil(path, "CREATE TABLE mine (x)")
    with pytest.raises(SpoolError, match="no spool of fastkin; name another file"):
        Spool(path, max_bytes=1).open()
    path.unlink()
    with Spool(path, max_bytes=1):
        pass
    spoil(path, "PRAGMA user_version = 7")
    with pytest.raises(SpoolError, match="layout is version 7, this fastkin knows 1; drain it with"):
        Spool(path, max_bytes=1).open()


def test_a_file_whose_pages_are_broken_is_named(path: Path) -> None:
    with Spool(path, max_bytes=100 * MIB) as spool:
        spool.write([put(n, size=20_000) for n in range(200)])
    with path.open("r+b") as file:
        for at in range(8192, path.stat().st_size, 8192):
            file.seek(at)
            file.write(b"\xff" * 512)
    with pytest.raises(SpoolError, match=r"spool\.db.*damaged.*\.recover"):
        Spool(path, max_bytes=MIB).open()


def test_places_that_cannot_be(tmp_path: Path) -> None:
    for place, cure in (
        (tmp_path / "no" / "spool.db", "mkdir -p"),
        (tmp_path, "name a file, not a directory|cannot be written"),
    ):
        with pytest.raises(SpoolError, match=cure) as caught:
            Spool(place, max_bytes=1).open()
        assert str(place) in str(caught.value)
        assert caught.value.retriable


FULL = """
import resource, signal, sys
from fastkin.delivery.spool_file import Put, Spool
from fastkin.errors import SpoolError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Spool(sys.argv[1], max_bytes=1 << 30)
spool.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
kept = 0
try:
    while kept < 1000:
        spool.write([Put((b"%d-" % kept).ljust(50_000, b"."), b"", 1, 1)])
        kept += 1
except SpoolError as error:
    print(error)
before = spool.rows, spool.bytes
assert before[0] == kept
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.open()
assert (spool.rows, spool.bytes) == before, (spool.rows, spool.bytes, before)
spool.write([Put((b"%d-" % kept).ljust(50_000, b"."), b"", 1, 1)])
print(kept)
"""


@pytest.mark.parametrize("limit", [MIB, 3 * MIB, 5 * MIB])
@pytest.mark.process
def test_a_disk_without_room(path: Path, limit: int) -> None:
    """A file that may not grow: the error names path and cure, what was kept is there, it works again with room."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(limit)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, kept = done.stdout.splitlines()
    assert f"spool {path}: cannot write to it: the disk" in said
    assert "free space" in said
    assert int(kept) < 999
    with Spool(path, max_bytes=1) as spool:
        assert numbers(spool) == list(range(int(kept) + 1))


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """2 MiB of file system, or as many as asked for; a skip where a test may not mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', 2)}m", "tmpfs", str(mount)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}; RLIMIT_FSIZE stands in for it above")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.process
def test_a_full_file_system(small_disk: Path) -> None:
    with Spool(small_disk / "spool.db", max_bytes=MIB * 100) as spool:
        kept, said = 0, ""
        while not said:
            try:
                spool.write([put(kept, size=50_000)])
                kept += 1
            except SpoolError as error:
                said = str(error)
        assert "free space" in said
        assert spool.rows == kept
        assert numbers(spool) == list(range(kept))
        spool.open()
        assert spool.rows == kept


@pytest.mark.parametrize("small_disk", [24], indirect=True)
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.process
def test_a_full_file_system_gives_back_what_it_holds(small_disk: Path, restart: bool) -> None:
    """Deleting takes room as well: some was kept for that. Nothing is written until there is room again."""
    path, ballast = small_disk / "spool.db", small_disk / "ballast"
    spool = Spool(path, max_bytes=32 * MIB)
    spool.open()

    def fill(kept: int) -> int:
        while not spool.disk_full:
            try:
                spool.write([put(kept, size=200_000)])
                kept += 1
            except SpoolError as error:
                assert "free space" in str(error)  # noqa: PT017
        return kept

    kept = fill(0)
    assert kept > 20
    assert not spool.regain()
    if restart:
        # Somebody else takes what the reserve had held, but for one as a crash leaves it.
        spool.close(clean=False)
        (small_disk / "spool.db-reserve").write_bytes(bytes(2 * MIB))
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while file.write(bytes(65_536)):
                pass
        spool = Spool(path, max_bytes=32 * MIB)
        assert spool.open().rows == kept
        kept = fill(kept)
        assert not spool.regain()
    with pytest.raises(SpoolError, match="the disk is full; free space"):
        spool.write([put(kept)])
    found: list[int] = []
    while rows := spool.read(0, most_bytes=MIB, at_least_one=True):
        found += [int(row.body.split(b"-")[0]) for row in rows]
        spool.write((), [(row.id, row.records, row.size) for row in rows])
    assert found == list(range(kept))
    assert spool.rows == 0
    ballast.unlink(missing_ok=True)
    assert spool.regain()
    spool.write([put(kept)])
    assert numbers(spool) == [kept]
    spool.close()
    assert not (small_disk / "spool.db-reserve").exists() or spool.rows


@pytest.mark.process
def test_a_read_only_directory(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    folder.chmod(0o500)
    script = """
import os, sys
from fastkin.delivery.spool_file import Spool
os.setuid(65534)
Spool(sys.argv[1], max_bytes=1).open()
"""
    if os.geteuid() == 0:
        tmp_path.chmod(0o755)
    else:
        script = script.replace("os.setuid(65534)", "")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    args = [sys.executable, "-c", script, str(folder / "spool.db")]
    done = subprocess.run(args, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SpoolError" in done.stderr
    assert "let user id" in done.stderr or "Permission" in done.stderr


def test_what_another_one_wrote_meanwhile_is_not_deleted(path: Path) -> None:
    """The lock is free while a file is opened again after trouble. Who had it then has acknowledged what it wrote."""
    mine = Spool(path, max_bytes=MIB)
    mine.open()
    mine.write([put(0)])
    mine.let_go()  # as when the disk fails in open()
    with Spool(path, max_bytes=MIB) as other:
        other.write([put(1), put(2)])
    for _ in range(2):
        with pytest.raises(SpoolError, match=r"another process had it meanwhile.*restart"):
            mine.open()
    with Spool(path, max_bytes=MIB) as again:
        assert numbers(again) == [0, 1, 2]


def test_another_file_in_its_place_is_not_taken_for_ours(path: Path) -> None:
    """Its rows are numbered from 1: they would be written, acknowledged and never read."""
    mine = Spool(path, max_bytes=MIB)
    mine.open()
    mine.write([put(0), put(1)])
    mine.let_go()
    for name in (path, path.with_name(path.name + "-wal")):
        name.unlink(missing_ok=True)
    with pytest.raises(SpoolError, match="another file is in its place"):
        mine.open()


def test_opened_again_after_trouble_it_goes_on(path: Path) -> None:
    spool = Spool(path, max_bytes=MIB)
    assert spool.open().clean
    spool.write([put(0)])
    for _ in range(2):
        found = spool.open()
        assert (found.rows, found.clean) == (1, False)
    spool.write([put(1)])
    spool.close()
    with Spool(path, max_bytes=MIB) as again:
        assert numbers(again) == [0, 1]


class _Flaky:
    """A connection whose blobs cannot be read."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.failing = True

    def blobopen(self, *args: object, **options: object) -> sqlite3.Blob:
        if self.failing:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error
        return self._db.blobopen(*args, **options)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)


def test_a_disk_that_fails_for_a_moment_damages_nothing(spool: Spool) -> None:
    spool.write([put(0), put(1)])
    assert spool._db is not None
    flaky = _Flaky(spool._db)
    spool._db = flaky  # type: ignore[assignment]
    for _ in range(2):
        with pytest.raises(SpoolError, match="the disk failed"):
            spool.read(0, most_bytes=MIB)
    flaky.failing = False
    assert [row.fault for row in spool.read(0, most_bytes=MIB)] == [None, None]
    flaky.failing = True
    faults = []
    for _ in range(20):
        with contextlib.suppress(SpoolError):
            faults += [row.fault for row in spool.read(0, most_bytes=MIB, most_rows=1)]
            break
    assert faults == ["disk I/O error"], "a sector that is gone must not hold up what is behind it"
