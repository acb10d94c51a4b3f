"""Dead letter files as they are read and replayed: whole lines, oldest file first, beside a service that writes.

A letter that was replayed is marked in place, durably: its first key, `time`, is overwritten with `done`. That
moves nothing, so that the service may append to the file and rotate it meanwhile. `tidy` takes the marked ones
out of the files in the end.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from fastkin.deadletter import (
    DONE,
    TIME,
    LockedError,
    append,
    as_json,
    lock,
    numbered,
    real,
    rotated,
    same,
    sync_folder,
)
from fastkin.errors import FastkinError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_PIECE = 1 << 20
_MARK = DONE[2:6]
_SURE = 40  # bytes of a line that are looked at before it is marked: the time, and the pipeline's first letters
_NUMBERED = re.compile(r"(.+)\.([1-9][0-9]{0,5})")


class LetterFileError(FastkinError):
    """A file of dead letters cannot be read or changed; the message names it and the cure."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One line of a file that has not been replayed."""

    file: LetterFile
    line: int  # from 1
    at: int  # byte of the file where the line begins
    raw: bytes  # without its line break

    time: str
    pipeline: str
    topic: str | None
    reason: str
    offset: int | None
    index: int | None
    partition_key: str | None
    payload: bytes

    def fields(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "pipeline": self.pipeline,
            "topic": self.topic,
            "reason": self.reason,
            "offset": self.offset,
            "index": self.index,
            "partition_key": self.partition_key,
            "payload": base64.b64encode(self.payload).decode("ascii"),
        }

    def again(self, reason: str, **changes: Any) -> Self:
        """The same letter after it failed once more."""
        return replace(self, reason=reason, **changes)


@dataclass(frozen=True, slots=True)
class Damaged:
    """A line that is no dead letter; it stays where it is."""

    file: LetterFile
    line: int
    problem: str


class LetterFile:
    """One file, held open: it may get another name meanwhile, and stays the same file."""

    def __init__(self, path: Path, *, change: bool = False) -> None:
        self.path = path
        flags = (os.O_RDWR if change else os.O_RDONLY) | os.O_CLOEXEC
        try:
            self.fd = os.open(path, flags)
            self.size = os.fstat(self.fd).st_size  # what comes later is for the next time
        except OSError as error:
            raise _failed(path, "open it", error) from error

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def letters(self) -> Iterator[Letter | Damaged]:
        """What the file held when it was opened, but for what was replayed."""
        for number, (at, raw) in enumerate(self._lines(), 1):
            if not raw.strip() or raw.startswith(DONE):
                continue
            try:
                yield Letter(self, number, at, raw, **_parse(raw))
            except ValueError as error:
                yield Damaged(self, number, str(error))

    def mark(self, letters: Iterable[Letter]) -> None:
        """These are replayed: durable when this returns."""
        try:
            for letter in letters:
                # somebody may have cut the file off meanwhile (copytruncate): never write into what is not the line
                if os.pread(self.fd, _SURE, letter.at) == letter.raw[:_SURE]:
                    os.pwrite(self.fd, _MARK, letter.at + 2)
            os.fdatasync(self.fd)
        except OSError as error:
            raise _failed(self.path, "mark what was replayed", error) from error

    def add(self, letters: Iterable[Letter]) -> None:
        """Append what takes the place of others, durably, before those are marked."""
        data = b"".join(as_json(letter.fields()) + b"\n" for letter in letters)
        try:
            # our descriptor is not O_APPEND, for the marks' sake
            with _locked(self.fd):
                os.lseek(self.fd, 0, os.SEEK_END)
                append(self.fd, (data,))
        except OSError as error:
            raise _failed(self.path, "write to it", error) from error

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        begin = at = 0
        rest: list[bytes] = []
        while at < self.size:
            try:
                piece = os.pread(self.fd, min(_PIECE, self.size - at), at)
            except OSError as error:
                raise _failed(self.path, "read it", error) from error
            if not piece:
                break
            at += len(piece)
            *whole, last = piece.split(b"\n")
            for line in whole:
                rest.append(line)
                raw = b"".join(rest)
                yield begin, raw
                begin += len(raw) + 1
                rest.clear()
            rest.append(last)
        if raw := b"".join(rest):
            yield begin, raw


class LetterFiles:
    """Files and their rotated ones, oldest first, as they were at one moment."""

    def __init__(self, paths: Iterable[Path], *, change: bool = False) -> None:
        """A path stands for itself and for PATH.1, PATH.2, ... LetterFileError: none of them is there."""
        self.files: list[LetterFile] = []
        self._bases: dict[Path, None] = {}
        self._locks: list[tuple[Path, int]] = []
        try:
            for path in paths:
                self._open(real(path), change)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, change: bool) -> None:
        base = _base(path)
        if change and base not in self._bases:
            self._exclude(base)
        self._bases[base] = None
        with _lock_of(base, change=change):  # no rotation while we look
            names = [path] if path != base else [*(numbered(base, n) for n in reversed(rotated(base))), base]
            there = [name for name in names if name.exists()]
            if not there:
                raise _failed(path, "open it", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
            for name in there:
                file = LetterFile(name, change=change)
                if any(os.path.sameopenfile(file.fd, other.fd) for other in self.files):
                    file.close()
                else:
                    self.files.append(file)

    def _exclude(self, base: Path) -> None:
        """One replay at a time: two would send everything twice."""
        path = base.with_name(base.name + ".replay")
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise _failed(path, "make it", error) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                raise LetterFileError(f"{base}: another replay is at work; wait for its end") from error
            if same(path, fd):
                self._locks.append((path, fd))
                return
            os.close(fd)  # the one before us has just ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files:
            file.close()
        self.files.clear()
        for path, fd in self._locks:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(fd)
        self._locks.clear()

    def letters(self) -> Iterator[Letter | Damaged]:
        for file in self.files:
            yield from file.letters()

    def tidy(self) -> None:
        """Take out of the files what was replayed. What is not, and every damaged line, stays."""
        for base in self._bases:
            with _lock_of(base, change=True):
                for name in [base, *(numbered(base, n) for n in rotated(base))]:
                    for file in self.files:
                        if same(name, file.fd):
                            _tidy(name, file.fd, live=name == base)


def _tidy(path: Path, fd: int, *, live: bool) -> None:
    try:
        if live:
            _rewrite(path, fd, live=True)
            return
        # somebody may write to a file whose name only looks like that of a rotated one
        with _locked(fd):
            if same(path, fd):
                _rewrite(path, fd, live=False)
    except OSError as error:
        raise _failed(path, "take out what was replayed", error) from error


def _rewrite(path: Path, fd: int, *, live: bool) -> None:
    """A file without its marked lines, in its place in one step. Its lock, or that of the live file, is held."""
    done = kept = False
    with path.open("rb") as old:
        for line in old:
            if line.startswith(DONE):
                done = True
            elif line.strip():
                kept = True
    if not done:
        return
    if not kept:
        # without a copy: it works on a full disk too, and makes room there
        if live:
            os.truncate(path, 0)
        else:
            path.unlink()
            sync_folder(path)
        return
    told = os.fstat(fd)
    new = path.with_name(path.name + ".tidy")
    try:
        out_fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with path.open("rb") as old, os.fdopen(out_fd, "wb") as out:
            with contextlib.suppress(PermissionError):  # the service must be able to go on writing
                os.fchown(out_fd, told.st_uid, told.st_gid)
            os.fchmod(out_fd, told.st_mode & 0o777)
            for line in old:
                if not line.startswith(DONE):
                    out.write(line)
            out.flush()
            os.fsync(out_fd)
        new.rename(path)
        sync_folder(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


@contextlib.contextmanager
def _locked(fd: int, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    lock(fd, how)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


@contextlib.contextmanager
def _lock_of(base: Path, *, change: bool) -> Iterator[None]:
    """Keep writers and rotation out; when there is no live file, nobody writes."""
    while True:
        try:
            fd = os.open(base, (os.O_RDWR if change else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            yield
            return
        except OSError as error:
            raise _failed(base, "open it", error) from error
        try:
            with _locked(fd, fcntl.LOCK_EX if change else fcntl.LOCK_SH):
                if same(base, fd):
                    yield
                    return
        except LockedError as error:
            raise _failed(base, "lock it", error) from error
        finally:
            os.close(fd)


def _base(path: Path) -> Path:
    """The live file of a rotated one, if it is one: FILE.7 may be live itself, and has rotated ones of its own then."""
    match = _NUMBERED.fullmatch(path.name)
    return path if match is None or rotated(path) else path.with_name(match[1])


def _parse(raw: bytes) -> dict[str, Any]:
    """The fields of one line; ValueError says what is wrong with it."""
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("not a whole JSON line") from None
    if not isinstance(told, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - of the text, not of our types
    if not raw.startswith(TIME):
        raise ValueError('does not begin with {"time":')
    for name, kinds in _KINDS.items():
        if not isinstance(told.get(name), kinds) or isinstance(told.get(name), bool):
            raise ValueError(f"`{name}` is missing or not what it should be")  # noqa: TRY004
    try:
        payload = base64.b64decode(told["payload"], validate=True)
    except ValueError:
        raise ValueError("`payload` is not base64") from None
    since(told["time"])
    return {name: told.get(name) for name in _KINDS} | {"payload": payload}


_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "time": (str,),
    "pipeline": (str,),
    "topic": (str, _NONE),
    "reason": (str,),
    "offset": (int, _NONE),
    "index": (int, _NONE),
    "partition_key": (str, _NONE),
    "payload": (str,),
}


def since(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time. ValueError when it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("`time` is not a time such as 2026-11-21T04:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError("`time` has no zone: end it with Z")
    return moment.timestamp()


def _failed(path: Path, doing: str, error: OSError) -> LetterFileError:
    if isinstance(error, LockedError):
        return LetterFileError(f"dead letter file {path}: {error}")
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            cure = "check the path"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            cure = f"run as the user of the service, or let user id {os.geteuid()} read and write it and its directory"
        case errno.ENOSPC | errno.EDQUOT:
            cure = "free space"
        case _:
            cure = "look after the file system"
    return LetterFileError(f"dead letter file {path}: cannot {doing}: {error.strerror or error}; {cure}")
