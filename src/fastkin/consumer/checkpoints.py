"""How far each shard was read: kept in memory, in a file, or wherever the caller keeps it.

A place is kept after the records before it were handed out and the next were asked for. So after a crash some come
again, and none is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Protocol

from fastkin.errors import CheckpointError, LibraryError

SHARD_END = "SHARD_END"  # in the place of a sequence number: the shard was split or merged, and read to its end
_VERSION = 1


class Checkpoints(Protocol):
    """What `Consumer(checkpoints=...)` needs: three calls, so that a table of your own will do."""

    async def load(self, stream: str) -> dict[str, str]:
        """Shard id to sequence number of the last record that was handed out, or SHARD_END."""
        ...

    async def save(self, shard_id: str, sequence_number: str) -> None:
        """Keep it: when this returns, it must survive what is to be survived."""

    async def close(self) -> None:
        """Reading has ended."""


def place(store: Checkpoints | None) -> str:
    """Where marks are kept, for error texts. Of a class that is not ours its name alone: it may show secrets."""
    return str(store) if isinstance(store, FileCheckpoints) else f"checkpoints ({type(store).__name__})"


class MemoryCheckpoints:
    """For one process: a second `stream()` goes on where the first one ended. `marks` may be looked at and given."""

    def __init__(self, marks: dict[str, str] | None = None) -> None:
        self.marks: dict[str, str] = dict(marks or {})

    async def load(self, stream: str) -> dict[str, str]:  # noqa: ARG002
        return dict(self.marks)

    async def save(self, shard_id: str, sequence_number: str) -> None:
        self.marks[shard_id] = sequence_number

    async def close(self) -> None:
        """Nothing to let go."""


class FileCheckpoints:
    """A JSON file, written anew and synced at each save, so that a kill at any moment leaves the old or the new one.

    One consumer a file: another one gets CheckpointError while the first reads. So does who gives the file of
    another stream, or one that cannot be read, or a disk that takes nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise LibraryError("path: give the name of a file")
        self._path = Path(path)
        self._stream = ""
        self._marks: dict[str, str] = {}
        self._lock: int | None = None
        self._writing = threading.Lock()  # held by whoever is at the files

    async def load(self, stream: str) -> dict[str, str]:
        self._marks = await asyncio.to_thread(self._open, stream)
        self._stream = stream
        return dict(self._marks)

    async def save(self, shard_id: str, sequence_number: str) -> None:
        self._marks[shard_id] = sequence_number
        await asyncio.to_thread(self._write)

    async def close(self) -> None:
        """Let another consumer have the file."""
        # A call to a thread that has not begun is not made when who awaits it is cancelled; this one must be made.
        await asyncio.shield(asyncio.to_thread(self._close))

    def _open(self, stream: str) -> dict[str, str]:
        # A caller that is cancelled does not end this thread: close() waits for it, and finds what it has opened.
        with self._writing:
            return self._take(stream)

    def _take(self, stream: str) -> dict[str, str]:
        if self._lock is not None:
            raise self._problem("is in use", "give each stream() a file of its own")
        try:
            # Beside the file, which is replaced at each save.
            lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._problem(
                f"cannot be made: {error.strerror}", "check the directory and its permissions"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            marks = self._read(stream)
        except BlockingIOError:
            os.close(lock)
            raise self._problem("is in use by another consumer", "end it, or give this one its own file") from None
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return marks

    def _read(self, stream: str) -> dict[str, str]:
        try:
            told = json.loads(self._path.read_text("utf-8"))
            if told["version"] != _VERSION:
                raise self._problem(f"has version {told['version']!r}", f"this fastkin knows version {_VERSION}")
            kept, marks = told["stream"], told["shards"]
            if not all(isinstance(text, str) for pair in marks.items() for text in pair):
                raise TypeError("shards")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._problem(f"cannot be read: {error.strerror}", "check its permissions") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._problem(f"is no file of checkpoints ({error})", "name another file, or delete it") from None
        if kept != stream:
            raise self._problem(f"is of the stream {kept!r}, not {stream!r}", "give each stream a file of its own")
        return dict(marks)

    def _close(self) -> None:
        with self._writing:  # a save whose caller was cancelled may still be at work
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _write(self) -> None:
        # One at a time, for all use the same temporary file; each writes what is known by then, so none goes back.
        with self._writing:
            self._replace()

    def _replace(self) -> None:
        text = json.dumps({"version": _VERSION, "stream": self._stream, "shards": dict(self._marks)}, indent=1)
        new = self._path.with_name(self._path.name + ".new")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
            # the name is safe only when the directory is
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # not every file system syncs directories
                    os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise self._problem(f"cannot be written: {error.strerror}", "make room, or check its permissions") from None

    def _problem(self, what: str, cure: str) -> CheckpointError:
        return CheckpointError(f"{self}: {what}; {cure}")

    def __str__(self) -> str:
        return f"checkpoints {str(self._path)!r}"
