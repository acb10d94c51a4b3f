"""A file that is being written. It survives its process: what was synced is found again, and what was cut off is known.

A part is a line that says what it is, a line of JSON that says what it becomes, and blocks: length, checksum, data. A
record is acknowledged when its block is synced, so a crash can cut off only what nobody was told of, and that block
comes again. Without the blocks half a record would stand at the end of a file.

A block that is wrong in the middle was acknowledged, and a disk has damaged it. What stands behind it is good all the
same, so reading goes on there; `damaged` tells what could not be read.

Who has a part has locked it. So a part that nobody has locked was left by a process that ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import struct
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAGIC = b"fastkin part 1\n"
SUFFIX = ".part"
NEW = ".new"  # of one that is not locked yet
DAMAGED = ".damaged"  # of one that could not be read in all its places; kept for who wants to look

_BLOCK = struct.Struct("<II")  # bytes of data, their CRC-32
_MOST_HEAD = 8192
_PIECE = 1 << 20
_MOST_SEARCH = 64 << 20  # memory that a search behind a damaged length may take
_MOST_TRIES = 16  # times the bytes that are searched: what a stranger made to be tried would take for ever else
_MOST_TIME = 1 << 32  # seconds that gzip can tell


class NoPartError(Exception):
    """It begins as none of ours."""


class Part:
    """One part, open and locked. All of its calls may block, and raise OSError."""

    def __init__(self, path: Path, fd: int, told: dict[str, Any], start: int, length: int) -> None:
        """`start`: where the blocks begin. `length`: all that is good."""
        self.path: Path = path
        self.target: str = told["path"]  # what it becomes, below the directory
        self.gzip: bool = told["gzip"]
        self.began: float = told["began"]
        self.length: int = length
        self.spoiled: bool = False  # nothing more can be written behind what is good
        self.damaged: list[tuple[int, int]] = []  # offset and bytes of what the last blocks() could not read
        self.made: int | None = None  # bytes of the finished file, once there is one
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
            # Its owner may have finished it since it was opened, and deleted or renamed it.
            if not os.path.samestat(os.fstat(fd), path.stat()):
                os.close(fd)
                return None
            told, start = _head(fd)
            part = cls(path, fd, told, start, start)
            for at, nbytes, _ in part._walk(os.fstat(fd).st_size, torn=True):
                part.length = at + nbytes
        except (BlockingIOError, FileNotFoundError):
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

    def blocks(self) -> Iterator[bytes]:
        """The data, block by block; afterwards `damaged` tells what could not be read."""
        self.damaged = []
        for at, nbytes, data in self._walk(self.length, torn=False):
            if data is None:
                self.damaged.append((at, nbytes))
            else:
                yield data

    def _walk(self, end: int, *, torn: bool) -> Iterator[tuple[int, int, bytes | None]]:
        """Offset, bytes and data of each block; without data what is damaged. `torn`: the end may have been cut off."""
        at = self._start
        while at < end:
            data = self._block(at, end)
            if data is not None:
                nbytes = _BLOCK.size + len(data)
            else:
                behind = self._behind(at, end)
                if behind is None and torn:
                    return
                nbytes = (end if behind is None else behind) - at
            yield at, nbytes, data
            at += nbytes

    def _block(self, at: int, end: int) -> bytes | None:
        """The data of the block there, or None: it is none, or a wrong one."""
        head = os.pread(self._fd, _BLOCK.size, at)
        if len(head) < _BLOCK.size:
            return None
        nbytes, checksum = _BLOCK.unpack(head)
        # A length that was cut off or never written may be anything: it is not believed before memory is taken.
        if nbytes > end - at - _BLOCK.size:
            return None
        data = b"".join(_pieces(self._fd, at + _BLOCK.size, nbytes))
        return data if len(data) == nbytes and zlib.crc32(data) == checksum else None

    def _behind(self, at: int, end: int) -> int | None:
        """Where reading goes on behind a wrong block. None: it may be one that was cut off, with nothing behind it."""
        head = os.pread(self._fd, _BLOCK.size, at)
        if len(head) < _BLOCK.size:
            return None
        following: int = at + _BLOCK.size + _BLOCK.unpack(head)[0]
        if following == end:
            return None
        if following < end and self._block(following, end) is not None:
            return following
        # The length itself may be what is damaged: then it leads nowhere, and what is behind looks cut off.
        found = self._search(at + 1, end)
        if found is None and following < end:
            return end
        return found

    def _search(self, at: int, end: int) -> int | None:
        """Where the next block with data stands whose checksum is right."""
        text = b"".join(_pieces(self._fd, at, min(end - at, _MOST_SEARCH)))
        view = memoryview(text)
        tries = _MOST_TRIES * len(text)
        # Of a length that fits the highest byte is small: in text there is hardly one.
        for high in re.finditer(b"[\\x00-\\x%02x]" % min(255, len(text) >> 24), text):
            first = high.start() - 3
            if not 0 <= first <= len(text) - _BLOCK.size:
                continue
            nbytes, checksum = _BLOCK.unpack_from(text, first)
            start = first + _BLOCK.size
            if not 0 < nbytes <= len(text) - start:
                continue  # zeros are an empty block, wherever they stand
            tries -= nbytes
            if tries < 0:
                return None
            if zlib.crc32(view[start : start + nbytes]) == checksum:
                return at + first
        return None

    @property
    def file_bytes(self) -> int:
        """Bytes of the file as it lies there, with what could not be read."""
        return os.fstat(self._fd).st_size

    def keep(self) -> None:
        """Leave it where it is under the name of a damaged one."""
        kept = self.path.with_suffix(DAMAGED)
        self.path.rename(kept)
        self.path = kept
        sync_folder(kept.parent)
        self.leave()

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
        began = float(told["began"])
        told["path"].encode()  # a name that no disk takes would fail for ever
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise NoPartError from None
    # A time that gzip cannot tell is unknown: the data is good all the same.
    told["began"] = began if math.isfinite(began) and 0 <= began < _MOST_TIME else 0.0
    # Whoever wrote it: a path leads to a place below the directory.
    if "\0" in told["path"] or any(each in {"", ".", ".."} for each in told["path"].split("/")):
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
