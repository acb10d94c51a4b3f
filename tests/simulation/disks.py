"""Disks: the spool's and the dead letters', with everything that disks do.

Most seeds keep the spool in memory behind the same contract, for speed; a share of them uses SQLite's own file on a
RAM disk. Dead letters are always the real file.
"""

from __future__ import annotations

import base64
import os
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from fastkin.deadletter import file as deadletter
from fastkin.delivery import spool_file as spool
from fastkin.errors import SpoolError
from fastkin.lambdas import deaggregate
from simulation.loop import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulation.world import World


KPL = b"\xf3\x89\x9a\xc2"


class Disk:
    """One place with its moods."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.failing = False
        self.lags: Sequence[float] = (0.0,)
        self.hangs = False
        self._waiting: list[Any] = []

    def lag(self) -> tuple[float, float]:
        lags = self.lags
        rng = self.world.rng
        done = rng.random() * lags[int(rng.random() * len(lags))]
        if self.hangs:
            self.world.mark("a disk hangs")
            done += 20.0 + 40.0 * rng.random()
        return done, rng.random() * lags[int(rng.random() * len(lags))]

    def heal(self) -> None:
        self.failing = self.hangs = False
        self.lags = (0.0,)


def records_in(body: bytes) -> list[bytes]:
    """Data of the records of a PutRecords body."""
    return [base64.b64decode(record["Data"]) for record in orjson.loads(body)["Records"]]


class SpoolBooks:
    """What is durable in one spool, told by data; of an aggregate, by what is in it."""

    def __init__(self, users: Any) -> None:
        self.rows: dict[int, list[bytes]] = {}
        self.held: Counter[bytes] = Counter()
        self._users = users

    def put(self, row: int, body: bytes) -> None:
        found = [user for data in records_in(body) for user in self._users(data)]
        self.rows[row] = found
        self.held.update(found)

    def drop(self, row: int) -> None:
        for user in self.rows.pop(row, ()):
            self.held[user] -= 1

    def has(self, record: bytes) -> bool:
        return self.held.get(record, 0) > 0


class MemoryFile:
    """What a spool in memory has on its disk."""

    def __init__(self) -> None:
        self.rows: dict[int, spool.Row] = {}  # but not those that were set aside
        self.records = self.bytes = 0
        self.last = 0
        self.clean = True
        self.damaged: dict[int, spool.Row] = {}

    def drop(self, row: int) -> spool.Row | None:
        gone = self.rows.pop(row, None)
        if gone is not None:
            self.records -= gone.records
            self.bytes -= gone.size
        return gone


class MemorySpool:
    """The contract of `fastkin.delivery.spool_file.Spool`, over a dict that outlives the process."""

    def __init__(self, path: str | Path, *, max_bytes: int) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.disk_full = False
        self._disk: Disk = DISKS[str(path)]
        self._books: SpoolBooks = BOOKS[str(path)]
        self._file: MemoryFile | None = None

    @property
    def rows(self) -> int:
        return 0 if self._file is None else len(self._file.rows)

    @property
    def records(self) -> int:
        return 0 if self._file is None else self._file.records

    @property
    def bytes(self) -> int:
        return 0 if self._file is None else self._file.bytes

    def _live(self) -> list[spool.Row]:
        return [] if self._file is None else list(self._file.rows.values())

    def _fail(self, doing: str) -> None:
        if self._disk.failing:
            self._disk.world.mark("the spool's disk fails")
            raise SpoolError(self.path, f"cannot {doing}: the disk failed", "mend it")

    def open(self) -> spool.Found:
        self._fail("open it")
        first = self._file is None
        file = self._file = FILES.setdefault(str(self.path), MemoryFile())
        live = self._live()
        found = spool.Found(
            len(live), sum(row.records for row in live), sum(row.size for row in live), file.clean or not live,
            len(file.damaged),
        )  # fmt: skip
        if first:
            file.clean = False
        return found

    def close(self, *, clean: bool = True) -> None:
        if self._file is not None and clean:
            self._file.clean = True
        self._file = None

    def regain(self) -> bool:
        return True

    def no_room(self) -> SpoolError:
        return SpoolError(self.path, "cannot write to it: the disk is full", "free space")

    def fits(self, puts: Sequence[spool.Put]) -> bool:
        return self.bytes + sum(spool.row_size(put) for put in puts) <= self.max_bytes

    def write(self, puts: Sequence[spool.Put], ended: Sequence[tuple[int, int, int]] = ()) -> list[int]:
        self._fail("write to it")
        file = self._file
        if file is None:
            raise SpoolError(self.path, "it is not open", "open it")
        for one in ended:
            file.drop(one[0])
            self._books.drop(one[0])
        ids = []
        for put in puts:
            file.last += 1
            with memoryview(put.body) as view:
                body = bytes(view)
            file.rows[file.last] = spool.Row(
                file.last, put.entries, put.records, spool.row_size(put), body, bytes(put.counts)
            )
            file.records += put.records
            file.bytes += spool.row_size(put)
            self._books.put(file.last, body)
            ids.append(file.last)
        self._disk.world.note(f"spool {len(puts)} in {len(ended)} out")
        return ids

    def read(
        self, after: int, *, most_bytes: int, most_records: int = 1 << 32, most_rows: int = 32,
        at_least_one: bool = False,
    ) -> list[spool.Row]:  # fmt: skip
        self._fail("read it")
        rows: list[spool.Row] = []
        assert self._file is not None
        for row in self._file.rows.values():
            if row.id <= after:
                continue
            cost = row.size + row.entries * spool.ENTRY_BYTES
            if (cost > most_bytes or row.records > most_records) and not (at_least_one and not rows):
                break
            if len(rows) == most_rows:
                break
            most_bytes -= cost
            most_records -= row.records
            rows.append(row)
        return rows

    def quarantine(self, row: spool.Row) -> None:
        self._fail("write to it")
        assert self._file is not None
        if (gone := self._file.drop(row.id)) is not None:
            self._file.damaged[row.id] = gone

    def first_records(self, within: int) -> int:
        self._fail("read it")
        total = 0
        for row in self._live():
            total += row.records
            within -= row.size + row.entries * spool.ENTRY_BYTES
            if within <= 0:
                break
        return total


class RealSpool(spool.Spool):
    """SQLite's file, with books of what it said is durable."""

    def __init__(self, path: str | Path, *, max_bytes: int) -> None:
        super().__init__(path, max_bytes=max_bytes)
        self._sim_disk: Disk = DISKS[str(path)]
        self._sim_books: SpoolBooks = BOOKS[str(path)]
        OPEN.setdefault(str(path), []).append(self)

    def _sim_fail(self, doing: str) -> None:
        if self._sim_disk.failing:
            self._sim_disk.world.mark("the spool's disk fails")
            raise SpoolError(self.path, f"cannot {doing}: the disk failed", "mend it")

    def open(self) -> spool.Found:
        self._sim_fail("open it")
        return super().open()

    def write(self, puts: Sequence[spool.Put], ended: Sequence[tuple[int, int, int]] = ()) -> list[int]:
        self._sim_fail("write to it")
        bodies = []
        for put in puts:
            with memoryview(put.body) as view:
                bodies.append(bytes(view))
        ids = super().write(puts, ended)
        for one in ended:
            self._sim_books.drop(one[0])
        for row, body in zip(ids, bodies, strict=True):
            self._sim_books.put(row, body)
        self._sim_disk.world.note(f"spool {len(puts)} in {len(ended)} out")
        return ids

    def read(self, after: int, **limits: Any) -> list[spool.Row]:
        self._sim_fail("read it")
        return super().read(after, **limits)

    def quarantine(self, row: spool.Row) -> None:
        self._sim_fail("write to it")
        super().quarantine(row)


# by path, of the seed at work
DISKS: dict[str, Disk] = {}
BOOKS: dict[str, SpoolBooks] = {}
FILES: dict[str, MemoryFile] = {}
OPEN: dict[str, list[RealSpool]] = {}
LETTERS: dict[str, list[SimLetters]] = {}


def forget() -> None:
    for spools in OPEN.values():
        for each in spools:
            each.let_go()
    for letters in LETTERS.values():
        for letter_file in letters:
            letter_file.close()
    for one in (DISKS, BOOKS, FILES, OPEN, LETTERS):
        one.clear()


def kill_spool(path: str, world: World) -> None:
    """What a SIGKILL leaves: the file and its log as they are, nothing checkpointed, perhaps a torn tail."""
    spools = OPEN.pop(path, [])
    if not spools:
        return
    kept = {}
    for suffix in ("", "-wal"):
        name = path + suffix
        if os.path.exists(name):
            kept[name] = Path(name).read_bytes()
    for each in spools:
        each.let_go()
    for suffix in ("", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    for name, data in kept.items():
        if name.endswith("-wal") and world.chance("a commit that nobody was told of is torn", 0.3):
            data += bytes(world.rng.getrandbits(8) for _ in range(100))
            world.mark("a spool's log with a torn tail")
        Path(name).write_bytes(data)


class Letters:
    """The dead letters of one file, read as somebody would who looks at the disk."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.payloads: Counter[bytes] = Counter()
        self.packets: list[bytes] = []  # whole PUBLISH packets that were ill-formed
        self._at = 0

    def look(self) -> None:
        try:
            if os.stat(self.path).st_size == self._at:
                return
            with open(self.path, "rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        self._at += whole
        for line in data[:whole].split(b"\n"):
            if not line:
                continue
            try:
                letter = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue  # cut short by a kill: alone in its damage
            payload = base64.b64decode(letter["payload"])
            self.payloads[payload] += 1
            if letter.get("packet"):
                self.packets.append(payload)
            if payload[:4] == KPL:
                raise Finding(f"an aggregate of {len(deaggregate(payload))} records is a dead letter: one was at fault")

    def has(self, payload: bytes) -> bool:
        if payload in self.payloads:
            return True
        self.look()
        return payload in self.payloads or any(each.endswith(payload) for each in self.packets)


class SimLetters(deadletter.DeadLetters):
    """The real file on a disk with moods."""

    def __init__(self, path: str | Path, **limits: Any) -> None:
        super().__init__(path, **limits)
        LETTERS.setdefault(str(path), []).append(self)

    def write(self, letters: Sequence[Any]) -> None:
        disk = DISKS.get(str(self.path))
        if disk is not None and disk.failing:
            disk.world.mark("the dead letters' disk fails")
            raise deadletter.DeadLetterError(self.path, "write to it", OSError(28, os.strerror(28)))
        super().write(letters)
        if disk is not None:
            disk.world.note(f"{len(letters)} dead letters")


def tidy(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def spool_rows(path: str) -> list[bytes]:
    """Of a spool's file that nobody has open: the bodies in it."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        return [bytes(row[0]) for row in db.execute("SELECT body FROM bodies ORDER BY id")]


def kill_letters(path: str, world: World) -> None:
    """A line that the kill cut short, now and then."""
    for each in LETTERS.pop(path, []):
        each.close()
    if os.path.exists(path) and world.chance("a letter is cut short by the kill", 0.2):
        world.mark("a torn dead letter")
        with open(path, "ab") as file:
            file.write(b'{"time":"2026-01-01T00:00:00.000Z","pipeline":"p","pay')
