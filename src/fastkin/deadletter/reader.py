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
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from fastkin.deadletter.file import (
    DONE,
    MARKS,
    TIME,
    LockedError,
    LongLine,
    append,
    as_json,
    line_heads,
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
_LONG = 1 << 20  # a longer line is not held: what it says is, and where its payload lies
_TAIL = 1024  # more than can stand behind a payload
_BASE64 = bytes(range(0x30, 0x3A)) + bytes(range(0x41, 0x5B)) + bytes(range(0x61, 0x7B)) + b"+/"
_MARK = DONE[2:6]
_SURE = 40  # bytes of a line that are looked at before it is marked: the time, and the pipeline's first letters
_NUMBERED = re.compile(r"(.+)\.([1-9][0-9]{0,5})")


class LetterFileError(FastkinError):
    """A file of dead letters cannot be read or changed; the message names it and the cure."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The payload of a long line, where it lies."""

    file: LetterFile
    at: int  # of its base64
    length: int  # of that
    size: int

    def __len__(self) -> int:
        return self.size

    def pieces(self, size: int = _PIECE) -> Iterator[bytes]:
        # Base64 can be decoded in pieces of four characters: no piece may end within one.
        step = size // 3 * 4
        try:
            for at in range(0, self.length, step):
                piece = os.pread(self.file.fd, min(step, self.length - at), self.at + at)
                yield base64.b64decode(piece, validate=True)
        except ValueError:
            raise LetterFileError(f"dead letter file {self.file.path}: it was changed while it was read") from None
        except OSError as error:
            raise _failed(self.file.path, "read it", error) from error

    def read(self) -> bytes:
        whole = bytearray()
        for piece in self.pieces():
            whole += piece
        return bytes(whole)


@dataclass(frozen=True, slots=True)
class Letter:
    """One line of a file that has not been replayed."""

    file: LetterFile
    line: int  # from 1
    at: int  # byte of the file where the line begins
    raw: bytes  # without its line break; of a long one only the beginning

    time: str
    pipeline: str
    topic: str | None
    reason: str
    offset: int | None
    index: int | None
    partition_key: str | None
    payload: bytes | Stored
    truncated: bool = False  # the payload is the beginning of one of `payload_bytes`
    payload_bytes: int | None = None
    packet: bool = False  # the payload is an ill-formed MQTT packet

    def content(self) -> bytes:
        """The payload, in memory."""
        return self.payload.read() if isinstance(self.payload, Stored) else self.payload

    def fields(self) -> dict[str, Any]:
        """What its line says; a payload that is not in memory is left out, and its length is said."""
        stored = isinstance(self.payload, Stored)
        fields = {
            "time": self.time,
            "pipeline": self.pipeline,
            "topic": self.topic,
            "reason": self.reason,
            "offset": self.offset,
            "index": self.index,
            "partition_key": self.partition_key,
            "payload": None if isinstance(self.payload, Stored) else base64.b64encode(self.payload).decode("ascii"),
        }
        if stored:
            fields["payload_bytes"] = len(self.payload)
        return fields | {name: value for name in MARKS if (value := getattr(self, name))}

    def written(self) -> bytes | LongLine:
        """Its line."""
        if isinstance(self.payload, Stored):
            return LongLine(as_json(replace(self, payload=b"").fields()) + b"\n", self.payload)
        return as_json(self.fields()) + b"\n"

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
            self.fd: int = os.open(path, flags)
            self.size: int = os.fstat(self.fd).st_size  # what comes later is for the next time
        except OSError as error:
            raise _failed(path, "open it", error) from error

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def letters(self) -> Iterator[Letter | Damaged]:
        """What the file held when it was opened, but for what was replayed."""
        for number, (at, raw, length) in enumerate(self._lines(), 1):
            if not raw.strip() or raw.startswith(DONE):
                continue
            try:
                if length > _LONG:
                    yield Letter(self, number, at, raw[:_SURE], **self._parse_long(at, raw, length))
                else:
                    yield Letter(self, number, at, raw, **_parse(raw))
            except ValueError as error:
                yield Damaged(self, number, str(error))

    def mark(self, letters: Iterable[Letter]) -> None:
        """These are replayed: durable when this returns."""
        try:
            for letter in letters:
                # somebody may have cut the file off meanwhile (copytruncate): never write into what is not the line
                if os.pread(self.fd, _SURE, letter.at) == letter.raw[:_SURE]:
                    # Four bytes in place. Nothing moves, so the service may append and rotate meanwhile, and no
                    # offset changes.
                    os.pwrite(self.fd, _MARK, letter.at + 2)
            os.fdatasync(self.fd)
        except OSError as error:
            raise _failed(self.path, "mark what was replayed", error) from error

    def add(self, letters: Iterable[Letter]) -> None:
        """Append what takes the place of others, durably, before those are marked."""
        try:
            # our descriptor is not O_APPEND, for the marks' sake
            with _locked(self.fd):
                os.lseek(self.fd, 0, os.SEEK_END)
                append(self.fd, [letter.written() for letter in letters])
        except OSError as error:
            raise _failed(self.path, "write to it", error) from error

    def _parse_long(self, at: int, head: bytes, length: int) -> dict[str, Any]:
        """As _parse(), of a line that is not held: its payload is looked through where it lies."""
        # The fields before the payload are short, and so are those behind it: the payload is what is between, however
        # long.
        begin = head.find(_PAYLOAD)
        if begin < 0:
            raise ValueError("not a whole JSON line")
        begin += len(_PAYLOAD)
        behind = min(_TAIL, length - begin)
        tail = os.pread(self.fd, behind, at + length - behind)
        if (end := tail.find(b'"')) < 0:
            raise ValueError("not a whole JSON line")
        # The line without its payload is a letter like any other, and is judged by the same rules.
        told = _parse(head[:begin] + tail[end:])
        size = length - len(tail) + end - begin
        last = b""
        for done in range(0, size, _PIECE):
            piece = os.pread(self.fd, min(_PIECE, size - done), at + begin + done)
            last = (last + piece)[-4:]
            # What is left are bytes that base64 does not have. Only padding may be among them, and only at the very
            # end.
            strange = piece.translate(None, _BASE64)
            if strange and (done + len(piece) < size or not last.endswith(strange) or strange.strip(b"=")):
                raise ValueError("`payload` is not base64")
        padding = last.count(b"=")
        if size % 4 or padding > 2:
            raise ValueError("`payload` is not base64")
        return told | {"payload": Stored(self, at + begin, size, size // 4 * 3 - padding)}

    # Lines are found by their ends, piece by piece: only short ones are joined, a long one is measured and let go.
    def _lines(self) -> Iterator[tuple[int, bytes, int]]:
        """Where each begins, what it says (of a long one the beginning), how long it is."""
        begin = at = length = 0
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
                if length <= _LONG:
                    rest.append(line)
                length += len(line)
                yield begin, b"".join(rest), length
                begin += length + 1
                length = 0
                rest.clear()
            if length <= _LONG:
                rest.append(last)
            length += len(last)
        if length:
            yield begin, b"".join(rest), length


# Opened together under the lock, so that no rotation moves a file between two opens: a letter is then seen once.
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
            # Who names FILE.2 means that one alone; who names FILE means all of it, oldest first.
            names = [path] if path != base else [*(numbered(base, n) for n in reversed(rotated(base))), base]
            there = [name for name in names if name.exists()]
            if not there:
                raise _failed(path, "open it", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
            for name in there:
                file = LetterFile(name, change=change)
                # Two names may lead to one file: to send its letters twice would be worse than to read it once.
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


# The new file takes the old one's place by a rename. Who has the old one open goes on writing to nothing: so the live
# file is rewritten under its lock, and writers look whose name their file bears before each write
# (DeadLetters._lock).
def _rewrite(path: Path, fd: int, *, live: bool) -> None:
    """A file without its marked lines, in its place in one step. Its lock, or that of the live file, is held."""
    done = kept = False
    with path.open("rb") as old:
        for line in line_heads(old):
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
    # Beside it: only within one directory is a rename one step, and a crash leaves either the old file or the new
    # one.
    new = path.with_name(path.name + ".tidy")
    try:
        out_fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with path.open("rb") as old, os.fdopen(out_fd, "wb") as out:
            with contextlib.suppress(PermissionError):  # the service must be able to go on writing
                os.fchown(out_fd, told.st_uid, told.st_gid)
            os.fchmod(out_fd, told.st_mode & 0o777)
            _copy_kept(old, out)
            out.flush()
            os.fsync(out_fd)
        new.rename(path)
        sync_folder(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def _copy_kept(old: BinaryIO, new: BinaryIO) -> None:
    while piece := old.readline(_PIECE):
        keep = not piece.startswith(DONE)
        while piece:
            if keep:
                new.write(piece)
            piece = b"" if piece.endswith(b"\n") else old.readline(_PIECE)


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


# Strict, because what passes is sent to a stream: a letter that was damaged on the disk must not become a record.
def _parse(raw: bytes) -> dict[str, Any]:
    """The fields of one line; ValueError says what is wrong with it."""
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("not a whole JSON line") from None
    if not isinstance(told, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - of the text, not of our types
    # The mark is written over the first key, so a letter must begin with it, whatever JSON says about the order of
    # keys.
    if not raw.startswith(TIME):
        raise ValueError('does not begin with {"time":')
    for name, kinds in _KINDS.items():
        # In Python True is a number too.
        if not isinstance(told.get(name), kinds) or isinstance(told.get(name), bool):
            raise ValueError(f"`{name}` is missing or not what it should be")  # noqa: TRY004
    try:
        payload = base64.b64decode(told["payload"], validate=True)
    except ValueError:
        raise ValueError("`payload` is not base64") from None
    since(told["time"])
    for name, kind in (("truncated", bool), ("payload_bytes", int), ("packet", bool)):
        if type(told.get(name, kind())) is not kind:
            raise ValueError(f"`{name}` is not what it should be")
    marks = {name: told[name] for name in MARKS if name in told}
    return {name: told.get(name) for name in _KINDS} | marks | {"payload": payload}


_PAYLOAD = b',"payload":"'
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
