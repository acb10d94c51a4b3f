"""What is set aside for good: one JSON line per dead letter, on disk before the message is acked.

A line is {time, pipeline, topic, reason, offset, index, partition_key, payload}: `time` is RFC 3339
in UTC with milliseconds, `offset` and `index` say where in the MQTT payload the fault lies (`index`
is null when the whole payload is set aside), `payload` is base64. Rules of the file:

- `write` returns only after fsync: the caller may acknowledge the message then, and not before.
- Topic and reason come from strangers. They are written as ASCII JSON, so that a line break or a
  terminal escape in them can neither forge a line nor reach a terminal.
- A write that fails part-way (disk full) is cut off again; a line that a crash cut short is closed
  before the next one begins. Every line is therefore either whole or alone in its damage.
- A file that was moved away (logrotate) is made anew. Processes that share a file lock each other
  out.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict

from fastkin.errors import FastkinError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class DeadLetter(TypedDict, total=False):
    """One payload or record that is set aside. What is left out is null, `time` is now."""

    time: float
    pipeline: str
    topic: str | bytes | None
    reason: str
    offset: int | None
    index: int | None
    partition_key: str | None
    payload: bytes


class DeadLetterError(FastkinError):
    """The file takes nothing now. Nothing of the call was kept: hold the data and try again."""

    retriable = True

    def __init__(self, path: Path, doing: str, error: OSError) -> None:
        self.path = path
        self.errno = error.errno
        cause = error.strerror or str(error)
        super().__init__(f"dead letter file {path}: cannot {doing}: {cause}; {_cure(path, error)}")


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
        case _:
            return f"look after the file system of {folder}; the data is kept and retried"


class DeadLetters:
    """An append-only file. It blocks: use a thread when the loop must not wait for the disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.written = 0
        self._fd = -1

    def open(self) -> Self:
        """Open the file now, so that a wrong path shows at start and not at the first bad frame."""
        if self._fd < 0:
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
        data = b"".join(_line(letter) for letter in letters)
        if self._moved():
            self.close()
        self.open()
        try:
            self._append(data)
        except OSError as error:
            self.close()
            raise DeadLetterError(self.path, "write to it", error) from error
        self.written += len(letters)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        fd = self._fd
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            end = os.fstat(fd).st_size
            if end and os.pread(fd, 1, end - 1) != b"\n":
                data = b"\n" + data
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(fd, left) :]
                os.fsync(fd)
            except OSError:
                # what got through must not stay: the caller writes all of it again
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, end)
                raise
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def _moved(self) -> bool:
        if self._fd < 0:
            return False
        try:
            there = self.path.stat()
        except OSError:
            return True
        return not os.path.samestat(there, os.fstat(self._fd))

    def _sync_folder(self) -> None:
        # a new file survives a power cut only when its directory entry is on the disk too
        folder = os.open(self.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _line(letter: DeadLetter | Mapping[str, Any]) -> bytes:
    topic = letter.get("topic")
    if isinstance(topic, bytes):
        topic = topic.decode("utf-8", "backslashreplace")
    line = {
        "time": rfc3339(letter.get("time", time.time())),
        "pipeline": letter["pipeline"],
        "topic": topic,
        "reason": letter["reason"],
        "offset": letter.get("offset"),
        "index": letter.get("index"),
        "partition_key": letter.get("partition_key"),
        "payload": base64.b64encode(letter["payload"]).decode("ascii"),
    }
    return json.dumps(line, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"


def rfc3339(seconds: float) -> str:
    stamp = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return stamp.replace("+00:00", "Z")
