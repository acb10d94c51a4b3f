"""Batches on disk: a SQLite file, one row per batch, durable before `write` returns.

What is in it has been acknowledged, so the rules are those of a ledger:

- WAL with synchronous=FULL: a commit is on the disk before anybody is told. A write that a crash cut short is
  not there at the next open, and was never acknowledged.
- Each row carries a CRC over all of it. One that the disk gives back changed is set aside and stays in the file;
  the rows behind it are read all the same.
- One process has the file open, by SQLite's own exclusive lock; the lock ends with the process.
- Bodies are written and read in place (incremental I/O) through a small page cache, so that a row costs one copy
  of its bytes and no more.
- The file keeps its largest size while it is in use, free pages are used again; it shrinks once it is empty.
- Deleting rows takes room too, in the log. So while rows are kept a second file, `NAME-reserve`, holds some: it is
  given up when the disk is full, and nothing is written until there is twice as much again. Reading and deleting go on.

It blocks: use it from one thread that is not the loop's.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from fastkin.delivery import spool_schema
from fastkin.delivery.spool_errors import code_of, no_room, spool_error, transient
from fastkin.delivery.spool_reserve import Reserve
from fastkin.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

ROW_BYTES = 128  # what a row costs besides its body and counts
ENTRY_BYTES = 48  # what an entry of a restored batch costs in memory besides its bytes
_RESERVE_BYTES = 8 << 20  # the log and what it may add to the file
_READ_ATTEMPTS = 5  # at a row that the disk fails to give, before it counts as damaged
_RECORDS_MOST = 2**32 - 1


class Put(NamedTuple):
    """One batch to keep: its finished body, `Batch.counts`, entries, user records."""

    body: Buffer
    counts: bytes
    entries: int
    records: int


class Row(NamedTuple):
    """One batch read back; `fault` says why its bytes cannot be used (then `body` is empty)."""

    id: int
    entries: int
    records: int
    size: int  # of the row, as it counts towards max_bytes
    body: bytes
    counts: bytes
    fault: str | None = None


class Found(NamedTuple):
    """What a file held when it was opened."""

    rows: int
    records: int
    bytes: int
    clean: bool  # closed in order: no row was on its way
    damaged: int  # rows that were set aside earlier


class Spool:
    """A bounded queue of batches in one file, oldest first."""

    def __init__(self, path: str | Path, *, max_bytes: int) -> None:
        self.path: Path = Path(path)
        self.max_bytes = max_bytes
        self.rows: int = 0
        self.records: int = 0
        self.bytes: int = 0  # of live rows; the file itself is some percent larger, its log up to a few MiB
        self._db: sqlite3.Connection | None = None
        self.disk_full: bool = False  # the disk is full: rows are read and deleted, none is written
        self._last: int | None = None  # the newest row that was told of
        self._reserve = Reserve(Path(f"{self.path}-reserve"), min(_RESERVE_BYTES, max_bytes // 8))
        self._mark = -1 - secrets.randbits(62)  # in the file while it is ours: `clean` is 1, or who had it last
        self._failed_reads = (0, 0)  # (row, how often)

    # -- life ------------------------------------------------------------------------------------

    def open(self) -> Found:
        """Open or make the file, mode 0600, and lock it. SpoolError names path and cure.

        Opened again after trouble, it forgets what a failed commit may have left: the caller still has that.
        """
        self.let_go()
        try:
            spool_schema.make(self.path)
            try:
                found = self._connect()
            except sqlite3.Error as error:
                self.let_go()
                # To open it may take room in the log: a full disk has some once the reserve is given up.
                if not self._give_up_reserve(error):
                    raise
                found = self._connect()
        except BaseException as error:
            self.let_go()
            if isinstance(error, OSError | sqlite3.Error):
                raise spool_error(self.path, "open it", error) from error
            raise
        self.rows, self.records, self.bytes = found.rows, found.records, found.bytes
        self._reserve.find(needed=found.rows > 0)
        return found

    def _connect(self) -> Found:
        db = self._db = spool_schema.connect(self.path)
        spool_schema.prepare(db, self.path)
        clean = self._take_over(db)
        spool_schema.mark_insane(db)
        rows, records, size = db.execute(
            "SELECT count(*), coalesce(sum(records), 0), coalesce(sum(size), 0) FROM rows WHERE NOT damaged"
        ).fetchone()
        damaged = db.execute("SELECT count(*) FROM rows WHERE damaged").fetchone()[0]
        return Found(rows, records, size, clean or rows == 0, damaged)

    def _take_over(self, db: sqlite3.Connection) -> bool:
        """Lock the file for good, and put our mark into it. True: who had it last closed it in order."""
        mark = db.execute("SELECT clean FROM state").fetchone()[0]
        if self._last is not None and mark != self._mark:
            # The file was closed in some trouble, and is opened again. Between the two nobody held the lock. So another
            # process may have written rows and acknowledged their messages, or the file was exchanged. The rows behind
            # our last one would be deleted below: then records would be lost that nobody sends again.
            raise SpoolError(
                self.path, "another process had it meanwhile, or another file is in its place",
                "one pipeline per `spool`; restart fastkin to take up what is in it",
            )  # fmt: skip
        # A write, and not only a read: it takes the lock for good.
        db.execute("UPDATE state SET clean = ?", (self._mark,))
        if self._last is None:
            self._last = int(db.execute("SELECT coalesce(max(id), 0) FROM rows").fetchone()[0])
        else:
            # Nobody was told of these rows: the commit failed, and the caller still has the batches. To keep them
            # would send them twice.
            db.execute("DELETE FROM rows WHERE id > ?", (self._last,))
            db.execute("DELETE FROM bodies WHERE id > ?", (self._last,))
        return bool(mark == 1)

    def close(self, *, clean: bool = True) -> None:
        """`clean`: nothing that is in the file is on its way to Kinesis."""
        db = self._db
        # It was never opened, or trouble closed it. What is in it says that it was not closed in order.
        if db is None:
            return
        with contextlib.suppress(sqlite3.Error):
            if clean:
                # The next one to open it need not count these rows as sent perhaps.
                db.execute("UPDATE state SET clean = 1")
            if self.rows == 0:
                self._reserve.drop()
                spool_schema.shrink(db)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._last = None
        self.let_go()

    def let_go(self) -> None:
        """Close the connection and no more, as a process does that is killed: open() takes the file up again."""
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- a full disk -----------------------------------------------------------------------------

    def regain(self) -> bool:
        """Is there room on the disk again, for the reserve and as much besides?"""
        # With room for the reserve alone the next write would fail again, and so on in turns.
        if self.disk_full and self._reserve.take(2):
            self.disk_full = False
        return not self.disk_full

    def no_room(self) -> SpoolError:
        return no_room(self.path)

    def _give_up_reserve(self, error: sqlite3.Error) -> bool:
        """The disk is full, and has some room after this."""
        if code_of(error) != sqlite3.SQLITE_FULL or not self._reserve.drop():
            return False
        self.disk_full = True
        return True

    # -- work ------------------------------------------------------------------------------------

    def fits(self, puts: Sequence[Put]) -> bool:
        """Is there room for these, within max_bytes?"""
        return self.bytes + sum(row_size(put) for put in puts) <= self.max_bytes

    def write(self, puts: Sequence[Put], ended: Sequence[tuple[int, int, int]] = ()) -> list[int]:
        """Keep `puts` and forget the rows in `ended` (id, records, size), all in one commit.

        Durable when it returns: the ids of the new rows. SpoolError: nothing of it happened.
        """
        db = self._opened()
        # A write that fails would take a part of what the reserve gave back for deleting.
        if puts and self.disk_full:
            raise self.no_room()
        if puts and not self._reserve.held:
            # A disk that is too small for it does without.
            self._reserve.take()
        ids: list[int] = []
        gone: list[tuple[int, int, int]] = []
        try:
            db.execute("BEGIN IMMEDIATE")
            for one in ended:
                # a failed commit may have deleted it all the same
                if db.execute("DELETE FROM rows WHERE id = ?", one[:1]).rowcount:
                    gone.append(one)
                db.execute("DELETE FROM bodies WHERE id = ?", one[:1])
            ids.extend(self._put(db, put) for put in puts)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                # SQLite may have rolled back by itself.
                if db.in_transaction:
                    db.execute("ROLLBACK")
            # Now, and not with the next write: rows that have ended can be deleted from here on.
            self._give_up_reserve(error)
            raise spool_error(self.path, "write to it", error) from error
        # From here on they count: whoever opens the file again keeps rows up to this one.
        self._last = max([self._last or 0, *ids])
        self.rows += len(puts) - len(gone)
        self.records += sum(put.records for put in puts) - sum(one[1] for one in gone)
        self.bytes += sum(row_size(put) for put in puts) - sum(one[2] for one in gone)
        if ended and self.rows == 0:
            self._reserve.drop()
            # The rows are written. Room that is not given back now is given back another time.
            with contextlib.suppress(sqlite3.Error):
                spool_schema.shrink(db)
        return ids

    def _put(self, db: sqlite3.Connection, put: Put) -> int:
        with memoryview(put.body) as body:
            size = row_size(put)
            cursor = db.execute(
                "INSERT INTO rows (entries, records, size, crc, counts) VALUES (?, ?, ?, ?, ?)",
                (put.entries, put.records, size, _crc(body, put.counts, put.entries, put.records), put.counts),
            )
            id_ = cursor.lastrowid
            assert id_ is not None
            # Room first, then bytes into it. A body that is bound as a parameter would be copied twice.
            db.execute("INSERT INTO bodies VALUES (?, zeroblob(?))", (id_, len(body)))
            with db.blobopen("bodies", "body", id_) as blob:
                blob.write(body)
        return id_

    def read(
        self, after: int, *, most_bytes: int, most_records: int = _RECORDS_MOST, most_rows: int = 32,
        at_least_one: bool = False,
    ) -> list[Row]:  # fmt: skip
        """The oldest rows behind row `after` whose batches take at most `most_bytes` of memory together."""
        db = self._opened()
        rows: list[Row] = []
        try:
            heads = db.execute(
                "SELECT id, entries, records, size, crc, counts FROM rows WHERE id > ? AND NOT damaged"
                " ORDER BY id LIMIT ?", (after, most_rows),
            ).fetchall()  # fmt: skip
        except sqlite3.Error as error:
            raise spool_error(self.path, "read it", error) from error
        for id_, entries, records, size, crc, counts in heads:
            cost = size + entries * ENTRY_BYTES
            # In order or not at all: a later row that fits must not be read before this one.
            if (cost > most_bytes or records > most_records) and not (at_least_one and not rows):
                break
            most_bytes -= cost
            most_records -= records
            rows.append(self._read(db, id_, entries, records, size, crc, counts))
        return rows

    def _read(self, db: sqlite3.Connection, id_: int, entries: int, records: int, size: int, crc: int,
              counts: bytes) -> Row:  # fmt: skip
        try:
            with db.blobopen("bodies", "body", id_, readonly=True) as blob:
                # The checksum is looked at only afterwards. A rotten length could ask for gigabytes.
                body = blob.read() if len(blob) <= size else b""
        except sqlite3.Error as error:
            if transient(error) or (code_of(error) == sqlite3.SQLITE_IOERR and self._read_again(id_)):
                raise spool_error(self.path, "read it", error) from error
            return Row(id_, entries, records, size, b"", b"", str(error))
        if _crc(body, counts, entries, records) != crc:
            return Row(id_, entries, records, size, b"", b"", "its checksum does not match")
        return Row(id_, entries, records, size, body, counts)

    def _read_again(self, id_: int) -> bool:
        """A disk may fail for a while: is this row worth another attempt?"""
        # Only in a row: a disk that failed for a while long ago says nothing about this one.
        row, times = self._failed_reads
        self._failed_reads = (id_, times + 1 if row == id_ else 1)
        return self._failed_reads[1] < _READ_ATTEMPTS

    def quarantine(self, row: Row) -> None:
        """Keep a damaged row out of the way; it stays in the file, durably marked."""
        db = self._opened()
        try:
            db.execute("UPDATE rows SET damaged = 1 WHERE id = ?", (row.id,))
        except sqlite3.Error as error:
            raise spool_error(self.path, "write to it", error) from error
        # It counts towards nothing any more. A limit that damaged rows fill would stop the spool for good.
        self.rows -= 1
        self.records -= row.records
        self.bytes -= row.size

    def first_records(self, within: int) -> int:
        """Records of the oldest rows that fit in `within` bytes: what may have been on its way at a crash."""
        total = 0
        try:
            for entries, records, size in self._opened().execute(
                "SELECT entries, records, size FROM rows WHERE NOT damaged ORDER BY id"
            ):
                total += records
                within -= size + entries * ENTRY_BYTES
                if within <= 0:
                    break
        except sqlite3.Error as error:
            raise spool_error(self.path, "read it", error) from error
        return total

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            self.open()
        assert self._db is not None
        return self._db


def row_size(put: Put) -> int:
    """What a batch counts towards max_bytes."""
    with memoryview(put.body) as body:
        return body.nbytes + len(put.counts) + ROW_BYTES


def _crc(body: Buffer, counts: bytes, entries: int, records: int) -> int:
    return zlib.crc32(b"%d %d" % (entries, records), zlib.crc32(counts, zlib.crc32(body)))
