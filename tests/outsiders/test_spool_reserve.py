"""What a crash or somebody else left as the spool's reserve is looked at before it counts as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fastkin.delivery.spool_file import Put, Spool

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def put(size: int = 1000) -> Put:
    return Put(bytes(size), b"\1", 1, 1)


def room(path: Path) -> int:
    """Bytes that the reserve holds on the disk."""
    return path.stat().st_blocks * 512


def left_by_a_crash(path: Path) -> Path:
    spool = Spool(path, max_bytes=32 * MIB)
    spool.open()
    spool.write([put()])
    spool.close(clean=False)
    reserve = path.with_name(path.name + "-reserve")
    assert room(reserve) >= 4 * MIB
    return reserve


def empty(reserve: Path) -> None:
    reserve.write_bytes(b"")


def hole(reserve: Path) -> None:
    reserve.write_bytes(b"")
    with reserve.open("r+b") as file:
        file.truncate(4 * MIB)


def short(reserve: Path) -> None:
    reserve.write_bytes(bytes(8192))


@pytest.mark.parametrize("leave", [empty, hole, short])
def test_a_reserve_that_holds_too_little_is_made_again(tmp_path: Path, leave: object) -> None:
    path = tmp_path / "spool.db"
    reserve = left_by_a_crash(path)
    leave(reserve)  # type: ignore[operator]
    with Spool(path, max_bytes=32 * MIB) as spool:
        assert spool.rows == 1
        assert room(reserve) >= 4 * MIB
        spool.write([put()])
        assert room(reserve) >= 4 * MIB


def test_an_empty_reserve_beside_an_empty_spool_is_made_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path, max_bytes=32 * MIB):
        pass
    reserve = tmp_path / "spool.db-reserve"
    reserve.touch()
    with Spool(path, max_bytes=32 * MIB) as spool:
        spool.write([put()])
        assert room(reserve) >= 4 * MIB
