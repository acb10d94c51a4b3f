"""A file system of a few hundred kilobytes that can be full or read-only. Mounting needs root, as containers have."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from pathlib import Path


class SmallDisk:
    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size

    def __enter__(self) -> Self:
        if os.geteuid():
            pytest.skip("mounting a small file system needs root")
        self.path.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self.path))
        return self

    def __exit__(self, *exc: object) -> None:
        _run("umount", "--lazy", str(self.path))

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as filler:
            while filler.write(b"\0" * 4096):
                pass

    def free(self) -> None:
        (self.path / "filler").unlink()

    def read_only(self) -> None:
        """Only while nobody has a file open there for writing."""
        _run("mount", "-o", "remount,ro", str(self.path))

    def writable(self) -> None:
        _run("mount", "-o", "remount,rw", str(self.path))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
