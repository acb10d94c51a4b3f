"""What went wrong with the spool's file, in words: the thing, and what helps. Pure.

Whoever reads such a line has a disk in trouble and records that wait for it. So each error names the path and the
cure, and says that the data is kept where that is so.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from typing import TYPE_CHECKING

from fastkin.errors import SpoolError

if TYPE_CHECKING:
    from pathlib import Path

# They say something about the moment, and nothing about the row. A row that counts as damaged does so for ever.
_TRANSIENT = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN})


def spool_error(path: Path, doing: str, error: OSError | sqlite3.Error) -> SpoolError:
    """`doing` is what failed: "open it", "read it", "write to it"."""
    problem, cure = _explain(path, error)
    return SpoolError(path, f"cannot {doing}: {problem}", cure)


def transient(error: sqlite3.Error) -> bool:
    """May the same read succeed later?"""
    return code_of(error) in _TRANSIENT


def code_of(error: sqlite3.Error) -> int:
    """SQLite's code without its details: which SQLITE_IOERR it was does not matter here."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


def no_room(path: Path) -> SpoolError:
    """The disk is full, and nothing is tried before there is room."""
    return SpoolError(path, "cannot write to it: the disk is full", _room(path))


def _room(path: Path) -> str:
    return f"free space on the file system of {path.absolute().parent}; the data is kept and tried again"


def _explain(path: Path, error: OSError | sqlite3.Error) -> tuple[str, str]:
    """(what is wrong, what helps)."""
    # A relative path says nothing in a log.
    folder = path.absolute().parent
    kept = "the data is kept and tried again"
    access = f"let user id {os.geteuid()} write in {folder}, or set another `spool`"
    if isinstance(error, OSError):
        problem = error.strerror or str(error)
        match error.errno:
            case errno.ENOENT | errno.ENOTDIR:
                return problem, f"make the directory {folder} (mkdir -p), or set another `spool`"
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return problem, access
            case errno.ENOSPC | errno.EDQUOT:
                return problem, _room(path)
            case errno.EISDIR:
                return problem, "name a file, not a directory, in `spool`"
            case _:
                return problem, f"look after the file system of {folder}; {kept}"
    # SQLite says nothing of errno here, so its own codes are told apart.
    match code_of(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "another process or pipeline has it open", "stop that one, or give each a `spool` of its own"
        case sqlite3.SQLITE_FULL:
            return "the disk is full", _room(path)
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
            return f"it cannot be written ({error})", access
        case sqlite3.SQLITE_NOTADB:
            return "it is no SQLite file", "name another file in `spool`, or move this one away"
        case sqlite3.SQLITE_CORRUPT:
            return (
                f"it is damaged ({error})",
                f"stop fastkin, rescue with `sqlite3 {path} .recover`, move the file away",
            )
        case sqlite3.SQLITE_IOERR:
            return f"the disk failed ({error})", f"free space, or look after the file system of {folder}; {kept}"
        case _:
            return str(error), f"look after the file system of {folder}; {kept}"
