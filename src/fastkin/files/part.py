"""A file that is being written. It survives its process: what was synced is found again, and what was cut off is known.

A part is a line that says what it is, a line of JSON that says what it becomes, and blocks: length, checksum, data. A
record is acknowledged when its block is synced, so a crash can cut off only what nobody was told of, and that block
comes again. Without the blocks half a record would stand at the end of a file.

Who has a part has locked it. So a part that nobody has locked was left by a process that ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAGIC = b"fastkin part 1\n"
SUFFIX = ".part"
NEW = ".new"  # of one that is not locked yet

_BLOCK = struct.Struct("<II")  # bytes of data, their CRC-32
_MOST_HEAD = 8192
_PIECE = 1 << 20


class NoPartError(Exception):
    """It begins as none of ours."""


class Part:
    """One part, open and locked. All of its calls may block, and raise OSError."""

    def __init__(self, path: Path, fd: int, told: dict[str, Any], start: int, length: int) -> None:
        """`start`: where the blocks begin. `length`: all that is good."""
        self.path = path
        self.target: str = told["path"]  # what it becomes, below the directory
        self.gzip: bool = told["gzip"]
        self.began: float = told["began"]
        self.length = length
        self.spoiled = False  # nothing more can be written behind what is good
        self._start = start
        self._fd = fd

    @classmethod
    def make(cls, folder: Path, target: str, *, gzip: bool, began: float) -> Part:
        """A new one in the folder."""
        path = folder / (target.rpartition("/")[2] + SUFFIX)
        new = path.with_name(path.name + NEW)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            told = {"path": target, "gzip": gzip, "began": began}
            head = MAGIC + json.dumps(told).encode() + b"\n"
            # Locked before it has its name: else who looks for parts that were left would take it.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(fd, head)
            os.fsync(fd)
            new.rename(path)
            sync_folder(folder)
        except BaseException:
            os.close(fd)
            for each in (new, path):
                with contextlib.suppress(OSError):
                    each.unlink()
            raise
        return cls(path, fd, told, len(head), len(head))

    @classmethod
    def take_over(cls, path: Path) -> Part | None:
        """One that was left. None: somebody has it, or had. NoPartError: it is none of ours, and stays as it is."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have finished and deleted it since it was opened.
            if os.fstat(fd).st_nlink == 0:
                os.close(fd)
                return None
            told, start = _head(fd)
            part = cls(path, fd, told, start, start)
            for block in part.blocks(whole=True):
                part.length += _BLOCK.size + len(block)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        # Behind the last good block may be half of one, and what nobody has acknowledged.
        part.spoiled = True
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of data, with some bytes for each block."""
        return self.length - self._start

    def append(self, datas: Sequence[bytes]) -> None:
        """Write blocks and sync them. OSError: nothing of it is in the part."""
        text = b"".join(piece for data in datas for piece in (_BLOCK.pack(len(data), zlib.crc32(data)), data))
        try:
            _write(self._fd, text)
            os.fdatasync(self._fd)
        except OSError:
            self._cut()
            raise
        self.length += len(text)

    def _cut(self) -> None:
        # After a sync that failed nobody knows what of it is on the disk, and a later one may say that all is well. So
        # nothing is written behind it.
        self.spoiled = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self.length)

    def blocks(self, *, whole: bool = False) -> Iterator[bytes]:
        """The data, block by block. `whole`: as far as the file goes; else as far as it is known to be good."""
        at = self._start
        while whole or at < self.length:
            head = os.pread(self._fd, _BLOCK.size, at)
            if len(head) < _BLOCK.size:
                return
            nbytes, checksum = _BLOCK.unpack(head)
            # A length that was cut off or never written may be anything: it is not believed before memory is taken.
            if nbytes > os.fstat(self._fd).st_size - at:
                return
            data = b"".join(_pieces(self._fd, at + _BLOCK.size, nbytes))
            if len(data) < nbytes or zlib.crc32(data) != checksum:
                return
            yield data
            at += _BLOCK.size + nbytes

    def drop(self) -> None:
        """Delete it: it has become what it was to become."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.leave()

    def leave(self) -> None:
        """Close it and let it lie."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _head(fd: int) -> tuple[dict[str, Any], int]:
    text = os.pread(fd, _MOST_HEAD, 0)
    line, found, _ = text.removeprefix(MAGIC).partition(b"\n")
    try:
        if not text.startswith(MAGIC) or not found:
            raise ValueError
        told = json.loads(line)
        if not (isinstance(told["path"], str) and isinstance(told["gzip"], bool)):
            raise TypeError
        told["began"] = float(told["began"])
    except (ValueError, KeyError, TypeError):
        raise NoPartError from None
    # Whoever wrote it: a path leads to a place below the directory.
    if any(each in {"", ".", ".."} for each in told["path"].split("/")):
        raise NoPartError
    return told, len(MAGIC) + len(line) + 1


def _pieces(fd: int, at: int, nbytes: int) -> Iterator[bytes]:
    while nbytes:
        piece = os.pread(fd, min(nbytes, _PIECE), at)
        if not piece:
            return
        yield piece
        at += len(piece)
        nbytes -= len(piece)


def _write(fd: int, text: bytes) -> None:
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Names in it survive a crash of the machine from here on."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
