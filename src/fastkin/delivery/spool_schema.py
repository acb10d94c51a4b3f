"""The spool's file before there are rows in it: how it is made, opened, and known to be ours.

Whoever opens a spool may be another release of fastkin, a user who named the wrong file, or a second process. So a file
is taken for a spool only when it says that it is one, in a layout that this release knows. Nothing here changes a file
that is not.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from fastkin.errors import SpoolError

APPLICATION = 0x666B7370  # "fksp"
VERSION = 1
_PAGE_BYTES = 8192
_CACHE_KIB = 1024
_CHECKPOINT_PAGES = 512  # the log goes into the file each 4 MiB
_SHRINK_BYTES = 1 << 20  # an empty file larger than this is made small again

# A row's body is in a table of its own, so that the rows can be walked without reading the bodies.
# AUTOINCREMENT: an id is never used again. A row is known by its id in memory also after it was deleted.
_SCHEMA = """
CREATE TABLE rows (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    entries INTEGER NOT NULL,
    records INTEGER NOT NULL,
    size INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    damaged INTEGER NOT NULL DEFAULT 0,
    counts BLOB NOT NULL
) STRICT;
CREATE TABLE bodies (id INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
CREATE TABLE state (clean INTEGER NOT NULL) STRICT;
INSERT INTO state VALUES (1);
"""
# A row's numbers as they cannot be: they are used before its checksum is looked at.
_MARK_INSANE = """
UPDATE rows SET damaged = 1 WHERE NOT damaged AND NOT (
    entries BETWEEN 1 AND 10000 AND records BETWEEN 1 AND 4294967295 AND size BETWEEN 1 AND 4294967295
)
"""
_PRAGMAS = (
    # The lock: held by the connection to its end, and no file is shared for the log's index.
    "locking_mode = EXCLUSIVE",
    f"page_size = {_PAGE_BYTES}",
    # Bodies are written and read in place, so a small cache is enough, whatever the rows hold.
    f"cache_size = -{_CACHE_KIB}",
    "mmap_size = 0",
    "temp_store = FILE",
    # A commit is on the disk before anybody is told: what was told is acknowledged.
    "synchronous = FULL",
    "trusted_schema = OFF",
    "secure_delete = OFF",  # some builds have it on: each page of a deleted row would be written once more
    f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
    f"journal_size_limit = {_CHECKPOINT_PAGES * _PAGE_BYTES}",
)


def make(path: Path) -> None:
    """Make the file if it is not there, so that nobody else can ever read it, and its directory entry. OSError."""
    # SQLite would make it with the process's own umask, and narrow it only afterwards.
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        for suffix in ("", "-wal"):
            part = Path(f"{path}{suffix}")
            with contextlib.suppress(FileNotFoundError):
                if part.is_file() and part.stat().st_mode & 0o077:
                    part.chmod(0o600)
        return
    os.close(fd)
    # Without this a crash may leave acknowledged rows in a file that no directory names.
    folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def connect(path: Path) -> sqlite3.Connection:
    """sqlite3.Error."""
    # mode=rw: a file that somebody has taken away meanwhile must not be made anew with another mode.
    return sqlite3.connect(
        f"file:{_quoted(path)}?mode=rw", uri=True, isolation_level=None, timeout=0.0,
        check_same_thread=False, cached_statements=16,
    )  # fmt: skip


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Set the connection up, and give an empty file its tables. SpoolError: the file is none of ours."""
    for setting in _PRAGMAS:
        db.execute(f"PRAGMA {setting}")
    if pragma(db, "application_id") == 0 and db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION};"
                         f"PRAGMA user_version = {VERSION}; {_SCHEMA} COMMIT;")  # fmt: skip
    if pragma(db, "application_id") != APPLICATION:
        raise SpoolError(path, "it is no spool of fastkin", "name another file in `spool`, or move this one away")
    version = pragma(db, "user_version")
    if version != VERSION:
        raise SpoolError(
            path, f"its layout is version {version}, this fastkin knows {VERSION}",
            "drain it with the fastkin that wrote it, or move it away",
        )  # fmt: skip
    db.execute("PRAGMA journal_mode = WAL")


def mark_insane(db: sqlite3.Connection) -> None:
    """Set apart rows whose numbers cannot be: a rotten `size` would else be believed before the checksum is."""
    db.execute(_MARK_INSANE)


def shrink(db: sqlite3.Connection) -> None:
    """Give the room of an empty file back. sqlite3.Error."""
    # VACUUM of an empty file is cheap. In a full one it would move every page, so free pages are only used again.
    if pragma(db, "page_count") * _PAGE_BYTES > _SHRINK_BYTES:
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
