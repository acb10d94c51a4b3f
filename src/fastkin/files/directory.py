"""The directory that files are made in: parts, finished files, what they take of the disk, what a former run left.

    DIR/.open/NAME.part         what is being written
    DIR/.open/NAME.damaged      a part that a disk has damaged: what could be read of it is in its finished file
    DIR/.upload/PREFIX/NAME     finished, and waits for S3
    DIR/PREFIX/NAME             finished, and stays: without S3

Nothing is ever deleted to make room. At the bound nothing more is taken, so that records wait at the broker.
Several processes may share a directory, for each part is locked by who writes it.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastkin.errors import Action, KinesisError
from fastkin.files.part import DAMAGED, NEW, SUFFIX, NoPartError, Part, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

OPEN = ".open"
UPLOAD = ".upload"

_TEMPORARY = ".tmp"
_OLD_S = 60.0  # a file that somebody just makes is younger
_LOOK_EVERY_S = 1.0  # what is finished is counted anew at the bound, for others take files away
_PIECE = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CURE = "see that it is there and that this user may write in it"
_IN_THE_WAY = "a file stands where a folder must be: move it away, or choose another directory or prefix"
_CURES = {
    errno.ENAMETOOLONG: "use shorter names of folders: in the directory, and in the prefix of the files",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
}


class Waiting(NamedTuple):
    """A finished file that waits for S3."""

    key: str
    path: Path
    nbytes: int


class Directory:
    """All of its calls may block. Those that raise KinesisError say in it what is wrong, and what helps."""

    def __init__(self, path: str | Path, *, total_bytes: int, upload: bool) -> None:
        """`total_bytes` may be taken of the disk. `upload`: finished files wait for S3."""
        self.path: Path = Path(path)
        self.upload = upload
        self.total_bytes = total_bytes
        self.left: list[Part] = []  # what others left, to be finished; whoever does takes it out
        self.strange: list[Path] = []  # what lies among the parts and is none of ours
        self.unread: dict[Path, str] = {}  # parts that cannot be read now, and why
        self._folder = self.path / OPEN
        self._finished_folder = self.path / UPLOAD if upload else self.path
        self._lock = threading.Lock()  # two threads: one writes parts, one finishes them
        self._parts_bytes = 0
        self._finished_bytes = 0
        self._looked_at = -_LOOK_EVERY_S
        self._opened = False

    def open(self) -> None:
        """Make the folders, and find the parts that nobody writes: see `left`. Again: nothing. KinesisError."""
        if self._opened:
            return
        with self._told("cannot be used"):
            for folder in (self._folder, self._finished_folder):
                self._make_folders(folder)
            sync_folder(self.path)
            self._probe()
            self._sweep()
            self._take_left()
            self._look()
            self._opened = True

    def look_for_left(self) -> None:
        """Again find the parts that nobody writes: of a process that has died since, see `left`. KinesisError."""
        with self._told("cannot be read"):
            self._take_left()

    def leave_left(self) -> None:
        """Let lie what was found and nobody took out."""
        while self.left:
            self.left.pop().leave()

    def probe(self) -> None:
        """Can files be made here? KinesisError."""
        with self._told("cannot be used"):
            self._make_folders(self._folder)
            self._probe()

    def _probe(self) -> None:
        path = self._folder / f"probe-{os.getpid()}-{threading.get_ident()}{_TEMPORARY}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"x")
            os.fsync(fd)
        finally:
            os.close(fd)
            path.unlink()

    def _sweep(self) -> None:
        for path in self._folder.iterdir():
            if path.suffix in {NEW, _TEMPORARY}:
                # Nobody was told of what is in them.
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _OLD_S:
                        path.unlink()

    def _take_left(self) -> None:
        for path in sorted(self._folder.iterdir()):
            if path.suffix != SUFFIX or path in self.strange:
                continue
            try:
                part = Part.take_over(path)
            except (NoPartError, IsADirectoryError):
                self.strange.append(path)
                continue
            except OSError as error:
                # A place that the disk cannot read keeps nobody from the others.
                self.unread[path] = error.strerror or str(error)
                continue
            if part is not None:
                with self._lock:
                    self._parts_bytes += part.length
                self.left.append(part)

    # -- parts ---------------------------------------------------------------------------------

    def room_for(self, nbytes: int) -> None:
        """KinesisError: the bound would be passed."""
        if self._taken() + 2 * nbytes <= self.total_bytes:
            return
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_EVERY_S:
            with self._told("cannot be read"):
                self._look()
            if self._taken() + 2 * nbytes <= self.total_bytes:
                return
        what = "files wait for S3" if self.upload else "finished files were not taken away"
        raise KinesisError(
            "DirectoryFull",
            f"{self.path} holds {self._taken()} of file_disk_bytes = {self.total_bytes} bytes: {what}; nothing is"
            " deleted, records wait and reading pauses until there is room",
            action=Action.OPERATOR,
        )

    def _taken(self) -> int:
        with self._lock:
            # A part lies beside the finished file for a moment, and that file may be as large.
            return 2 * self._parts_bytes + self._finished_bytes

    def make(self, target: str, *, gzip: bool, began: float) -> Part:
        """A new part. KinesisError."""
        with self._told("cannot be written"):
            part = Part.make(self._folder, target, gzip=gzip, began=began)
        with self._lock:
            self._parts_bytes += part.length
        return part

    def append(self, part: Part, datas: list[bytes]) -> None:
        """Write and sync. KinesisError: nothing of it is in the part."""
        before = part.length
        with self._told("cannot be written"):
            part.append(datas)
        with self._lock:
            self._parts_bytes += part.length - before

    def finish(self, part: Part) -> int:
        """Make the finished file of it; its bytes, 0 when the part holds nothing. Again: the same. A part with
        `damaged` is kept, and counts in the bound. KinesisError."""
        with self._told("cannot be finished"):
            # Not made twice when it is only the part that cannot be removed: the file may be in S3 already.
            if part.made is None:
                part.made = self._finish(part, self._finished_folder / part.target) if part.nbytes else 0
            kept = 0
            if part.damaged:
                kept = part.file_bytes
                part.keep()
            else:
                part.drop()
        with self._lock:
            self._parts_bytes -= part.length
            self._finished_bytes += kept
        return part.made

    def _finish(self, part: Part, target: Path) -> int:
        some = False
        temporary = self._folder / (part.path.name + _TEMPORARY)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            with os.fdopen(fd, "wb") as file:
                if part.gzip:
                    # With the part's own time: a file that is made twice is the same both times.
                    with gzip.GzipFile("", "wb", 6, file, mtime=int(part.began)) as press:
                        for block in part.blocks():
                            press.write(block)
                            some = True
                else:
                    for block in part.blocks():
                        file.write(block)
                        some = True
                file.flush()
                os.fsync(file.fileno())
                nbytes = file.tell()
            if not some:  # all is damaged
                temporary.unlink()
                return 0
            self._make_folders(target.parent)
            # Killed after this, it is made again: then it lies there and is counted.
            before = target.stat().st_size if target.exists() else 0
            temporary.replace(target)
            with self._lock:
                self._finished_bytes += nbytes - before
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(target.parent)
        return nbytes

    def _make_folders(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folders(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        sync_folder(folder.parent)

    # -- finished files ------------------------------------------------------------------------

    def waiting(self) -> list[Waiting]:
        """The files that wait for S3, oldest first. KinesisError."""
        root = self.path / UPLOAD
        with self._told("cannot be read"):
            found = [(path, size) for path, size in _files(root) if path.suffix != _TEMPORARY]
        return [Waiting(path.relative_to(root).as_posix(), path, size) for path, size in sorted(found)]

    def uploaded(self, file: Waiting) -> None:
        """S3 has it: delete it here. KinesisError."""
        with self._told("cannot be written"), contextlib.suppress(FileNotFoundError):
            file.path.unlink()
            with self._lock:
                self._finished_bytes = max(0, self._finished_bytes - file.nbytes)
            # Folders of times that are over do not stay. One that somebody fills now is not empty, or is made again.
            folder = file.path.parent
            with contextlib.suppress(OSError):
                while folder != self.path / UPLOAD:
                    folder.rmdir()
                    folder = folder.parent

    def _look(self) -> None:
        hidden = self.path / OPEN
        nbytes = sum(size for path, size in _files(self._finished_folder) if hidden not in path.parents)
        nbytes += sum(size for path, size in _files(hidden) if path.suffix == DAMAGED)
        with self._lock:
            self._finished_bytes = nbytes
        self._looked_at = time.monotonic()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in _FULL
            cure = "free space there" if full else _CURES.get(error.errno or 0, _CURE)
            raise KinesisError(
                "DiskFull" if full else "DirectoryError",
                f"directory {self.path} {what}: {error.strerror or error}; {cure}",
                action=Action.OPERATOR,
            ) from error


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file below a folder with its size; what is deleted meanwhile is left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(FileNotFoundError):
                yield path, path.lstat().st_size
