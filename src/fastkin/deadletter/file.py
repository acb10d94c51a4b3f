"""What is set aside for good: one JSON line per dead letter, on disk before the message is acked.

A line is {time, pipeline, topic, reason, offset, index, partition_key, payload}: `time` is RFC 3339
in UTC with milliseconds, `offset` and `index` say where in the MQTT payload the fault lies (`index`
is null when the whole payload is set aside), `payload` is base64. Rules of the file:

- `write` returns only after fsync. The caller may acknowledge the message then, and not before: what is acknowledged is
  sent by nobody again, so a crash would lose it.
- Topic and reason come from strangers. They are written as ASCII JSON, so that a line break or a
  terminal escape in them can neither forge a line nor reach a terminal.
- A write that fails part-way (disk full) is cut off again; a line that a crash cut short is closed
  before the next one begins. Every line is therefore either whole or alone in its damage.
- A file that was moved away (logrotate) is made anew. Processes that share a file lock each other
  out.
- A file that a write would carry above `max_bytes` becomes FILE.1, what was FILE.1 becomes FILE.2, up to
  FILE.`keep`; the oldest beyond that is deleted. Only the holder of FILE's lock moves the files: two that moved them at
  once would put one file on top of another. The oldest goes first and only onto a name that is free, and FILE itself
  goes last. So a crash in between leaves a gap, which the next rotation closes.
- A payload too large for memory is collected in a file without a name (`Spill`). Once it is whole, it goes from there
  into its line piece by piece, under the lock.
- A letter of which only the beginning was kept has two fields more: `truncated`, which is true, and `payload_bytes`,
  the length of the whole. `packet` is true when the payload is an ill-formed MQTT packet, without its fixed header.
- A letter that was replayed reads `done` where it read `time`: the mark is made in place (see reader.py).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import stat
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Required, Self, TypedDict

from fastkin.errors import FastkinError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_HEAD = 4096
_PIECE = 3 << 16  # bytes of payload: base64 of a multiple of three can be put together


LOCK_S = 5.0  # for another process to write its lines; whoever holds the lock longer is told of


class DeadLetter(TypedDict, total=False):
    """One payload or record that is set aside. What is left out is null, `time` is now."""

    time: float
    pipeline: Required[str]
    topic: str | bytes | None
    reason: Required[str]
    offset: int | None
    index: int | None
    partition_key: str | None
    payload: Required[bytes | Spill]
    truncated: bool  # only when it is so
    payload_bytes: int
    packet: bool


class DeadLetterError(FastkinError):
    """The file takes nothing now. Nothing of the call was kept: hold the data and try again."""

    retriable = True

    def __init__(self, path: Path, doing: str, error: OSError) -> None:
        self.path = path
        self.errno: int | None = error.errno
        if isinstance(error, LockedError):
            super().__init__(f"dead letter file {path}: {error}")
            return
        cause = error.strerror or str(error)
        super().__init__(f"dead letter file {path}: cannot {doing}: {cause}; {_cure(path, error)}")


class LockedError(OSError):
    """Another process holds the lock of a file."""

    def __init__(self, fd: int) -> None:
        holder = _holder(fd)
        super().__init__(
            errno.EWOULDBLOCK,
            f"another process{f' (id {holder})' if holder else ''} holds its lock; end that process, or wait until"
            " it is done (fuser names who has the file open)",
        )

    def __str__(self) -> str:
        return self.strerror or ""


def lock(
    fd: int, how: int = fcntl.LOCK_EX, *, within_s: float = LOCK_S, given_up: threading.Event | None = None
) -> None:
    """flock() that neither the holder's nor a dead disk's whim can make last: LockedError when it took too long, or
    when the waiting was given up."""
    ends = time.monotonic() + within_s
    pause = 0.001
    while True:
        try:
            # Asked again and again, and never waited for: a blocking flock() cannot be given up, and would keep its
            # thread in the kernel as long as the holder likes.
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            left = ends - time.monotonic()
            if left <= 0 or (given_up is not None and given_up.is_set()):
                raise LockedError(fd) from None
            # short at first: the usual holder writes a line and is done
            time.sleep(min(pause, left))
            pause = min(0.1, pause * 2)
        else:
            return


def _holder(fd: int) -> int:
    """The process that holds a lock on the file, as far as the kernel tells us; 0: it does not."""
    try:
        told = os.fstat(fd)
        # The table of the kernel names files by device and inode. Looked up only to name the holder in an error.
        where = f"{os.major(told.st_dev):02x}:{os.minor(told.st_dev):02x}:{told.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == where:
                return int(fields[4])
    except (OSError, ValueError):
        pass
    return 0


def _cure(path: Path, error: OSError) -> str:
    folder = path.absolute().parent
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return f"make the directory {folder} (mkdir -p) or set another `dead_letter`"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"let user id {os.geteuid()} write in {folder} or set another `dead_letter`"
        case errno.ENOSPC | errno.EDQUOT:
            return f"free space on the file system of {folder}; the data is kept and retried"
        case errno.EISDIR:
            return "name a file, not a directory, in `dead_letter`"
        case errno.EFBIG:
            return "raise the limit of file sizes (ulimit -f) or lower `dead_letter_max_bytes`; the data is kept"
        case _:
            return f"look after the file system of {folder}; the data is kept and retried"


class Spill:
    """A payload while it comes, in a file without a name: gone with whoever holds it, and with the process.

    It blocks. Whoever lets it go need not wait for a thread that still writes: the thread holds it too.
    """

    def __init__(self, beside: Path) -> None:
        self._beside = beside
        self._fd = -1
        self.size: int = 0

    def __len__(self) -> int:
        return self.size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def write(self, piece: bytes) -> None:
        """DeadLetterError: nothing of the piece counts as written, and it may be tried again."""
        try:
            if self._fd < 0:
                self._fd = _nameless(self._beside)
            at, left = self.size, memoryview(piece)
            while left:
                # At a position, not at the end: a piece that failed half-way is simply written again in the same
                # place.
                done = os.pwrite(self._fd, left, at)
                at, left = at + done, left[done:]
        except OSError as error:
            raise DeadLetterError(self._beside, "collect a large payload beside it", error) from error
        self.size = at

    def pieces(self, size: int) -> Iterator[bytes]:
        at = 0
        while at < self.size:
            piece = os.pread(self._fd, min(size, self.size - at), at)
            # The file has no name, so nobody else can shorten it: a short read is a failing disk.
            if len(piece) != min(size, self.size - at):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield piece
            at += len(piece)


def _nameless(beside: Path) -> int:
    """A new file of mode 0600 in the same directory, or where temporary files go if that takes none."""
    import tempfile  # a megabyte, for a message that is larger than memory has room for

    folder: Path | str = beside.absolute().parent
    while True:
        try:
            return _nameless_in(folder)
        except OSError as error:
            # A full disk is no reason to look elsewhere: /tmp may be memory, and that is what the file is there to
            # save.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or folder == tempfile.gettempdir():
                raise
            folder = tempfile.gettempdir()


def _nameless_in(folder: Path | str) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # Some file systems know no file without a name. There it has one for the moment between these two calls.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    import tempfile

    fd, name = tempfile.mkstemp(dir=folder)
    Path(name).unlink()
    return fd


class DeadLetters:
    """An append-only file with its rotated ones. It blocks: use a thread when the loop must not wait for the disk."""

    def __init__(self, path: str | Path, *, max_bytes: int = 0, keep: int = 5) -> None:
        """max_bytes: rotate before a write that would pass it; 0: never. keep: rotated files to keep; 0: none, a
        full file is deleted."""
        # A rename would move the link and not the file, so rotation works on the file that the link leads to.
        self.path: Path = real(Path(path))
        self.max_bytes = max_bytes
        self.keep = keep
        self.written: int = 0
        self.deleted: int = 0  # letters that went with the oldest file, by the policy of max_bytes and keep
        self._given_up = threading.Event()
        self._fd = -1

    def open(self) -> Self:
        """Open the file now, so that a wrong path shows at start and not at the first bad frame."""
        if self._fd < 0:
            # Read as well, to see whether the last line is whole. O_APPEND, because other processes append to the
            # same file.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            new = not self.path.exists()
            try:
                # 0600: the payloads are somebody's data
                self._fd = os.open(self.path, flags, 0o600)
                if new:
                    self._sync_folder()
            except OSError as error:
                self.close()
                raise DeadLetterError(self.path, "open it", error) from error
        return self

    def write(self, letters: Sequence[DeadLetter] | Sequence[Mapping[str, Any]]) -> None:
        """Append all of `letters`, durably, or raise DeadLetterError and keep none of them."""
        if not letters:
            return
        lines: list[bytearray | LongLine] = []
        for letter in letters:
            if isinstance(letter["payload"], Spill):
                lines.append(LongLine(line_of({**letter, "payload": b""}), letter["payload"]))
            # Joined, so that a thousand letters are one write.
            elif lines and isinstance(lines[-1], bytearray):
                lines[-1] += line_of(letter)
            else:
                lines.append(bytearray(line_of(letter)))
        self._lock()
        try:
            if self.max_bytes:
                self._make_room(sum(map(len, lines)))
            try:
                append(self._fd, lines)
            except OSError as error:
                raise DeadLetterError(self.path, "write to it", error) from error
        except DeadLetterError:
            self.close()  # which unlocks too
            raise
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.written += len(letters)

    def give_up(self) -> None:
        """From any thread: a write that waits for the lock fails now, and so does any that comes later."""
        self._given_up.set()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Hold the lock of the file that bears the name now: it may be moved while we wait."""
        while True:
            self.open()
            try:
                lock(self._fd, given_up=self._given_up)
            except OSError as error:
                self.close()
                raise DeadLetterError(self.path, "lock it", error) from error
            # We hold the lock of a file that may have been moved while we waited: what we wrote to it would be in
            # FILE.1, or gone.
            if same(self.path, self._fd):
                return
            self.close()

    def _make_room(self, more: int) -> None:
        """Rotate when `more` bytes would make the file too large. Locked before and after."""
        while self._too_full_for(more):
            try:
                self._rotate()
                self._sync_folder()
            except OSError as error:
                raise DeadLetterError(self.path, "rotate it", error) from error
            # The lock went away with the old file. Another process may lock the new one first and fill it,
            # so the question is asked again of whatever bears the name now.
            self.close()
            self._lock()

    def _too_full_for(self, more: int) -> bool:
        told = os.fstat(self._fd)
        # a line larger than the limit has a file of its own, a device no size
        return bool(told.st_size) and told.st_size + more > self.max_bytes and stat.S_ISREG(told.st_mode)

    # From the oldest down, each onto a name that is free. A crash between two renames leaves a gap and no file twice,
    # and the next rotation stops at that gap.
    def _rotate(self) -> None:
        for extra in sorted(rotated(self.path), reverse=True):
            if extra > self.keep:  # `keep` was lowered
                self._delete(numbered(self.path, extra))
        if not self.keep:
            self._delete(self.path)
            return
        # The first gap takes the files before it. Without one the oldest makes room.
        free = 1
        while free <= self.keep and os.path.lexists(numbered(self.path, free)):
            free += 1
        if free > self.keep:
            free = self.keep
            self._delete(numbered(self.path, free))
        for number in range(free, 0, -1):
            # the target is free: deleted, never used, or moved on just now
            numbered(self.path, number - 1).rename(numbered(self.path, number))

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody tidied up
            with path.open("rb") as file:
                # Letters that were replayed are no loss: only the others count as deleted.
                lost = sum(bool(line.strip()) and not line.startswith(DONE) for line in line_heads(file))
            path.unlink()
            self.deleted += lost

    def _sync_folder(self) -> None:
        # a new file survives a power cut only when its directory entry is on the disk too
        sync_folder(self.path)


DONE = b'{"done":'  # how a letter begins that was replayed; the others begin with TIME
TIME = b'{"time":'


class Pieces(Protocol):
    """A payload that is not in memory."""

    def __len__(self) -> int: ...

    def pieces(self, size: int) -> Iterator[bytes]: ...


# The line is written as head, payload in pieces, tail: a payload of hundreds of MiB is never in memory, neither raw
# nor as base64.
class LongLine:
    """The line of a letter whose payload is not in memory, made of the same without a payload."""

    def __init__(self, empty: bytes, payload: Pieces) -> None:
        self._payload = payload
        # no other field can hold these bytes: a quotation mark in a text is escaped
        head, _, tail = empty.partition(_EMPTY)
        self._head = head + _EMPTY[:-1]
        self._tail = _EMPTY[-1:] + tail

    def __len__(self) -> int:
        return len(self._head) + -(-len(self._payload) // 3) * 4 + len(self._tail)

    def pieces(self) -> Iterator[bytes]:
        yield self._head
        for piece in self._payload.pieces(_PIECE):
            yield base64.b64encode(piece)
        yield self._tail


_EMPTY = b',"payload":""'


# All lines of a call, or none: a caller that hears of a failure writes all of it again.
def append(fd: int, lines: Iterable[bytes | bytearray | LongLine]) -> None:
    """Add whole lines to a locked file, durably. OSError: nothing was added."""
    end = os.fstat(fd).st_size
    try:
        # A crash cut the last line short. It is closed, so that it is damaged alone and does not swallow the next
        # one.
        if end and os.pread(fd, 1, end - 1) != b"\n":
            os.write(fd, b"\n")
        for line in lines:
            for piece in line.pieces() if isinstance(line, LongLine) else (line,):
                left = memoryview(piece)
                while left:
                    # A write may take a part only, when the disk fills up or a signal comes.
                    left = left[os.write(fd, left) :]
        # Before this returns the message may not be acknowledged: see the head of this file.
        os.fsync(fd)
    except OSError:
        # what got through must not stay: the caller writes all of it again
        with contextlib.suppress(OSError):
            os.ftruncate(fd, end)
        raise


def line_heads(file: BinaryIO) -> Iterator[bytes]:
    """How each line begins: one may have hundreds of MiB."""
    while head := file.readline(_HEAD):
        yield head
        while head and not head.endswith(b"\n"):
            head = file.readline(_PIECE)


def same(path: Path, fd: int) -> bool:
    """Whether `path` is the open file `fd`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False


def numbered(path: Path, number: int) -> Path:
    """The name of a rotated file; 0: the file that is written to."""
    return path.with_name(f"{path.name}.{number}") if number else path


def rotated(path: Path) -> list[int]:
    """The numbers of the rotated files that there are, newest (1) first."""
    begin = path.name + "."
    try:
        names = [entry.name for entry in path.absolute().parent.iterdir()]
    except OSError:
        return []
    numbers = [name[len(begin) :] for name in names if name.startswith(begin)]
    # FILE.007 and FILE.bak are somebody else's. Seven digits and more are no rotation, but a date perhaps.
    return sorted(int(n) for n in numbers if n.isascii() and n.isdecimal() and n[0] != "0" and len(n) < 7)


def real(path: Path) -> Path:
    """The file itself when `path` is a link: rotated files and locks are beside it, by its own name."""
    return path.resolve() if path.is_symlink() else path


def sync_folder(path: Path) -> None:
    folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def fields_of(letter: DeadLetter | Mapping[str, Any]) -> dict[str, Any]:
    """A dead letter as it is written, to a file or to a stream; the order is part of the format."""
    topic = letter.get("topic")
    if isinstance(topic, bytes):
        topic = topic.decode("utf-8", "backslashreplace")
    fields = {
        "time": rfc3339(letter.get("time", time.time())),
        "pipeline": letter["pipeline"],
        "topic": topic,
        "reason": letter["reason"],
        "offset": letter.get("offset"),
        "index": letter.get("index"),
        "partition_key": letter.get("partition_key"),
        "payload": base64.b64encode(letter["payload"]).decode("ascii"),  # type: ignore[arg-type]
    }
    # only when they say something
    return fields | {name: value for name, value in letter.items() if name in MARKS and value}


MARKS = ("truncated", "payload_bytes", "packet")


def line_of(letter: DeadLetter | Mapping[str, Any]) -> bytes:
    return as_json(fields_of(letter)) + b"\n"


def as_json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def rfc3339(seconds: float) -> str:
    stamp = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return stamp.replace("+00:00", "Z")
