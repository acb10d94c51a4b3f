"""A part survives its process: what was synced is found, what was cut off is known."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from fastkin.files.part import NoPartError, Part

if TYPE_CHECKING:
    from pathlib import Path


def made(folder: Path, *datas: bytes) -> Part:
    part = Part.make(folder, "data/p-1.jsonl", gzip=False, began=1.5)
    for data in datas:
        part.append([data])
    return part


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    part = made(tmp_path, b"one\n", b"", b"two\n")
    part.append([b"three\n", b"four\n"])
    assert list(part.blocks()) == [b"one\n", b"", b"two\n", b"three\n", b"four\n"]
    part.leave()
    again = Part.take_over(part.path)
    assert again is not None
    assert (again.target, again.gzip, again.began, again.length) == ("data/p-1.jsonl", False, 1.5, part.length)
    assert again.spoiled  # nothing is written behind what somebody else wrote
    assert b"".join(again.blocks()) == b"one\ntwo\nthree\nfour\n"
    again.drop()
    assert list(tmp_path.iterdir()) == []


def test_nobody_takes_a_part_that_somebody_writes(tmp_path: Path) -> None:
    part = made(tmp_path, b"x")
    assert Part.take_over(part.path) is None
    part.leave()
    assert Part.take_over(part.path) is not None


def test_a_part_cut_at_each_byte_has_whole_blocks_only(tmp_path: Path) -> None:
    part = made(tmp_path, b"first\n", b"second\n")
    whole, start = part.path.read_bytes(), part.length - part.nbytes
    first = start + 8 + len(b"first\n")
    part.leave()
    for cut in range(start, len(whole)):
        part.path.write_bytes(whole[:cut])
        found = Part.take_over(part.path)
        assert found is not None
        assert list(found.blocks()) == ([b"first\n"] if cut >= first else [])
        found.leave()
    for cut in range(start):
        part.path.write_bytes(whole[:cut])
        with pytest.raises(NoPartError):
            Part.take_over(part.path)


def test_a_flipped_bit_ends_what_is_good(tmp_path: Path) -> None:
    part = made(tmp_path, b"first\n", b"second\n")
    whole = bytearray(part.path.read_bytes())
    part.leave()
    whole[-2] ^= 1
    part.path.write_bytes(whole)
    found = Part.take_over(part.path)
    assert found is not None
    assert list(found.blocks()) == [b"first\n"]


def test_a_length_that_was_never_written_takes_no_memory(tmp_path: Path) -> None:
    part = made(tmp_path, b"first\n")
    part.leave()
    with part.path.open("ab") as file:
        file.write(b"\xff\xff\xff\xff" + bytes(100))
    found = Part.take_over(part.path)
    assert found is not None
    assert list(found.blocks()) == [b"first\n"]


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"something else",
        b"fastkin part 1\n",
        b"fastkin part 1\n{}\n",
        b"fastkin part 1\nnot json\n",
        b'fastkin part 1\n{"path":"../up","gzip":false,"began":1}\n',
        b'fastkin part 1\n{"path":"/etc/passwd","gzip":false,"began":1}\n',
        b'fastkin part 1\n{"path":"a","gzip":1,"began":1}\n',
        b'fastkin part 1\n{"path":"a\\u0000","gzip":false,"began":1}\n',
        b'fastkin part 1\n{"path":"\\ud800","gzip":false,"began":1}\n',
        b'fastkin part 1\n{"path":"a","gzip":false,"began":1' + b"0" * 400 + b"}\n",
        b"fastkin part 1\n" + b"[" * 8000 + b"\n",
    ],
)
def test_what_begins_as_none_of_ours_is_left_alone(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    path.write_bytes(head)
    with pytest.raises(NoPartError):
        Part.take_over(path)
    assert path.read_bytes() == head


@pytest.mark.parametrize("failing", ["write", "fdatasync"])
def test_a_write_that_fails_leaves_nothing_and_ends_the_part(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that failed may be followed by one that says all is well, though nothing is on the disk."""
    part = made(tmp_path, b"first\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space"):
            part.append([b"second\n"])
    assert part.spoiled
    assert list(part.blocks()) == [b"first\n"]
    assert part.path.stat().st_size == part.length


def test_half_a_write_is_cut_off_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = made(tmp_path, b"first\n")
    before, real = part.path.stat().st_size, os.write
    calls = []

    def half(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(fd, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            part.append([b"second\n"])
    assert part.path.stat().st_size == before


@pytest.mark.parametrize("place", ["length", "high byte of the length", "checksum", "data"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_damaged_byte_takes_its_own_block_only(place: str, which: int, tmp_path: Path) -> None:
    datas = [b"first\n", b"second\n", b"third, and longer\n", b"fourth\n"]
    part = made(tmp_path, *datas)
    whole = bytearray(part.path.read_bytes())
    part.leave()
    at = part.length - part.nbytes + sum(8 + len(data) for data in datas[:which])
    whole[at + {"length": 0, "high byte of the length": 3, "checksum": 4, "data": 9}[place]] ^= 1
    part.path.write_bytes(whole)
    found = Part.take_over(part.path)
    assert found is not None
    assert list(found.blocks()) == datas[:which] + datas[which + 1 :]
    assert found.damaged == [(at, 8 + len(datas[which]))]


def test_what_is_cut_off_behind_a_damaged_block_is_no_damage(tmp_path: Path) -> None:
    part = made(tmp_path, b"first\n", b"second\n", b"third\n")
    whole, start = bytearray(part.path.read_bytes()), part.length - part.nbytes
    part.leave()
    whole[start + 9] ^= 1
    part.path.write_bytes(whole + struct.pack("<II", 100, 5) + b"half")
    found = Part.take_over(part.path)
    assert found is not None
    assert list(found.blocks()) == [b"second\n", b"third\n"]
    assert found.damaged == [(start, 14)]


def test_two_damaged_blocks_at_the_end_are_not_taken_for_one_that_was_cut_off(tmp_path: Path) -> None:
    part = made(tmp_path, b"first\n", b"second\n", b"third\n")
    whole, start = bytearray(part.path.read_bytes()), part.length - part.nbytes
    part.leave()
    whole[start + 14 + 9] ^= 1
    whole[-1] ^= 1
    part.path.write_bytes(whole)
    found = Part.take_over(part.path)
    assert found is not None
    assert list(found.blocks()) == [b"first\n"]
    assert found.damaged == [(start + 14, 15 + 14)]


def test_damage_behind_the_back_of_who_writes_is_told(tmp_path: Path) -> None:
    """Its end was synced: that it cannot be read is damage, and nothing that was cut off."""
    part = made(tmp_path, b"first\n", b"second\n")
    with part.path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"X")
    assert list(part.blocks()) == [b"first\n"]
    assert part.damaged == [(part.length - 15, 15)]


@pytest.mark.parametrize("began", ["NaN", "Infinity", "-Infinity", "-1", "1e300"])
def test_a_time_that_is_none_is_unknown(began: str, tmp_path: Path) -> None:
    part = made(tmp_path, b"first\n")
    part.leave()
    part.path.write_bytes(part.path.read_bytes().replace(b'"began": 1.5', b'"began": ' + began.encode()))
    found = Part.take_over(part.path)
    assert found is not None
    assert found.began == 0.0
    assert list(found.blocks()) == [b"first\n"]


def test_a_part_that_was_renamed_since_it_was_opened_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = made(tmp_path, b"first\n")
    real = os.open

    def late(path: Path, *more: int) -> int:
        fd = real(path, *more)
        if path == part.path:
            part.keep()
        return fd

    old = part.path
    monkeypatch.setattr(os, "open", late)
    assert Part.take_over(old) is None
    assert [path.name for path in tmp_path.iterdir()] == ["p-1.jsonl.damaged"]
