"""Disks: dead letters on a full, a read-only, a slow and a missing one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from disks import SmallDisk
from harness import Rig

if TYPE_CHECKING:
    from pathlib import Path

BAD = 40  # frames that are none


def broken_frames(rig: Rig, count: int) -> None:
    """Publish messages on the bulk topic that are no frames."""
    rig.flow_messages([("plant/bulk/1", b"\xc1" + data, which) for _, data, which in rig.plant.messages(count, 0)])


@pytest.fixture
def disk(tmp_path: Path) -> SmallDisk:
    with SmallDisk(tmp_path / "disk", 256 * 1024) as made:
        yield made


def test_broken_frames_are_set_aside(tmp_path: Path) -> None:
    with Rig(tmp_path, pipelines=("bulk",)) as rig:
        rig.flow(500)
        broken_frames(rig, BAD)
        rig.flow(500)
        rig.settle()
        books = rig.finish()
        assert (books["dead"], books["dup"]) == (BAD, 0)


@pytest.mark.faults_full
def test_sigkill_while_dead_letters_are_written(tmp_path: Path) -> None:
    with Rig(tmp_path, pipelines=("bulk",), patch={"fsync_s": 0.2}) as rig:
        rig.flow(400)
        broken_frames(rig, BAD)
        rig.until(rig.dead, "the first dead letter")
        rig.kill()
        rig.restart()
        rig.flow(400)
        rig.settle()
        assert rig.finish()["dead"] == BAD


@pytest.mark.faults_full
def test_a_slow_disk_for_dead_letters(tmp_path: Path) -> None:
    with Rig(tmp_path, pipelines=("bulk",), patch={"fsync_s": 0.3}) as rig:
        rig.flow(600)
        broken_frames(rig, BAD)
        rig.flow(600)
        rig.settle()
        books = rig.finish()
        assert (books["dead"], books["dup"]) == (BAD, 0)


@pytest.mark.faults_full
def test_the_disk_of_the_dead_letters_is_full(tmp_path: Path, disk: SmallDisk) -> None:
    with Rig(tmp_path, pipelines=("bulk",), dead_letter_path=disk.path / "dead.jsonl") as rig:
        disk.fill()
        rig.flow(400)
        broken_frames(rig, BAD)
        rig.flow(400)
        rig.logged("free space on the file system")
        rig.stored(800)
        time.sleep(0.5)
        assert rig.books()["unacked"] >= BAD, "what could not be written must not be acknowledged"
        disk.free()
        rig.settle()
        books = rig.finish()
        assert (books["dead"], books["dup"]) == (BAD, 0)


@pytest.mark.faults_full
def test_the_disk_of_the_dead_letters_is_read_only(tmp_path: Path, disk: SmallDisk) -> None:
    disk.read_only()
    with Rig(tmp_path, pipelines=("bulk",), dead_letter_path=disk.path / "dead.jsonl") as rig:
        rig.flow(400)
        broken_frames(rig, BAD)
        rig.logged("dead_letter")
        rig.stored(400)
        disk.writable()
        rig.settle()
        books = rig.finish()
        assert (books["dead"], books["dup"]) == (BAD, 0)


@pytest.mark.faults_full
def test_sigterm_while_the_disk_of_the_dead_letters_is_full(tmp_path: Path, disk: SmallDisk) -> None:
    options = {"pipeline": {"shutdown_timeout_s": 0.5}}
    with Rig(tmp_path, pipelines=("bulk",), dead_letter_path=disk.path / "dead.jsonl", **options) as rig:
        disk.fill()
        broken_frames(rig, BAD)
        rig.logged("free space on the file system")
        rig.terminate()
        disk.free()
        rig.restart()
        rig.flow(300)
        rig.settle()
        assert rig.finish()["dead"] == BAD
