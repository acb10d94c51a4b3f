"""Keeps room on the disk for the day when it is full: a second file, `NAME-reserve`, beside the spool.

To delete rows takes room too, in SQLite's log. So on a full disk the spool could neither be written nor emptied, and
the records in it would never get out. The reserve is deleted then, and its room lets rows be deleted. The file holds
real blocks and not only a length: a file with holes would give nothing back.

Nothing of value is in the reserve. So trouble with it is no error: a disk that is too small for it does without.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Reserve:
    """One file of `nbytes`."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes
        self.held: bool = False

    def take(self, times: int = 1) -> bool:
        """Make it. `times`: only when the disk has room for so many of it. False: it has not."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Blocks for all of it are asked for, and the rest is given back at once. So it is known that the disk
                # has room besides the reserve.
                os.posix_fallocate(fd, 0, max(1, self._nbytes * times))
                os.ftruncate(fd, self._nbytes)
            finally:
                os.close(fd)
        except OSError:
            # A half of it would be counted as the whole.
            self.drop()
            return False
        self.held = True
        return True

    def find(self, *, needed: bool) -> None:
        """See whether a crash or a full disk left one. One that holds nothing is none: it is made again when rows are
        kept that it is for (`needed`), at the latest by the next write. One that holds less is filled up if that goes.
        """
        self.held = self._found(needed=needed)

    def _found(self, *, needed: bool) -> bool:
        try:
            told = self._path.lstat()
        except OSError:
            return False
        # what it holds on the disk, not its length: a file may be nothing but holes
        held = told.st_blocks * 512 if stat.S_ISREG(told.st_mode) else 0
        if not held:
            self.drop()
            return needed and self.take()
        if held < self._nbytes:
            with contextlib.suppress(OSError):
                # Never through a link: its target would be filled up, whosever it is.
                fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    os.posix_fallocate(fd, 0, max(1, self._nbytes))
                finally:
                    os.close(fd)
        return True

    def drop(self) -> bool:
        """Give it up. False: there was none, so the disk has no more room than before."""
        self.held = False
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
