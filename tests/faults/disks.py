"""A file system of a few hundred kilobytes that can be full or read-only. Mounting needs CAP_SYS_ADMIN, as root has."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Self

import pytest

_SYS_ADMIN = 21  # the bit of CAP_SYS_ADMIN


def mountable() -> bool:
    """Root of a container may be without it."""
    told = Path("/proc/self/status").read_text().partition("CapEff:")[2]
    return bool(int(told.split()[0], 16) >> _SYS_ADMIN & 1)


class SmallDisk:
    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size

    def __enter__(self) -> Self:
        if not mountable():
            pytest.skip("mounting a small file system needs CAP_SYS_ADMIN, as root has it")
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
        (self.path / "filler").unlink(missing_ok=True)

    def read_only(self) -> None:
        """Only while nobody has a file open there for writing."""
        _run("mount", "-o", "remount,ro", str(self.path))

    def writable(self) -> None:
        _run("mount", "-o", "remount,rw", str(self.path))

    def mend(self) -> None:
        """Whatever was done to it; in this order, for nothing can be removed from a read-only disk."""
        self.writable()
        self.free()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
