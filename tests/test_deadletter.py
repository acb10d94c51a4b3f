"""Dead letters: durable, whole lines, unforgeable, and clear when the disk says no."""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.deadletter import DeadLetter, DeadLetterError, DeadLetters
from fastkin.errors import FastkinError

if TYPE_CHECKING:
    from pathlib import Path


def letter(payload: bytes = b"\xc1", **changes: Any) -> DeadLetter:
    made: DeadLetter = {
        "pipeline": "welders",
        "topic": b"/devices/7/bulkData/telemetry",
        "reason": "nil where bin was expected",
        "offset": 4,
        "index": None,
        "partition_key": None,
        "payload": payload,
        "time": 1_764_000_000.5,
    }
    made.update(changes)  # type: ignore[typeddict-item]
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def payloads(path: Path) -> list[bytes]:
    return [base64.b64decode(line["payload"]) for line in lines(path)]


def test_a_line_has_every_field(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path) as dead:
        dead.write([letter(b"\x00\xff", index=3, partition_key="k"), letter(b"")])
        assert dead.written == 2
    first, second = lines(path)
    assert first == {
        "time": "2025-11-24T16:00:00.500Z",
        "pipeline": "welders",
        "topic": "/devices/7/bulkData/telemetry",
        "reason": "nil where bin was expected",
        "offset": 4,
        "index": 3,
        "partition_key": "k",
        "payload": base64.b64encode(b"\x00\xff").decode(),
    }
    assert second["payload"] == ""
    assert second["index"] is None


def test_what_is_left_out_is_null_and_the_time_is_now(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path) as dead:
        dead.write([{"pipeline": "welders", "reason": "refused", "payload": b"x"}])
    (line,) = lines(path)
    assert line["time"].endswith("Z")
    nothing = ("topic", "offset", "index", "partition_key")
    assert [line[name] for name in nothing] == [None] * 4


def test_the_file_is_private_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    old = os.umask(0)
    try:
        for n in range(3):
            with DeadLetters(path) as dead:
                dead.write([letter(b"%d" % n)])
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert payloads(path) == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    "nasty",
    [
        'a"}\n{"pipeline":"forged',
        "a\r\nb",
        "\x1b[31mred",
        "\u2028line\u2029",
        "\x85nel",
        "\x7f",
        "ü",
    ],
)
def test_topics_and_reasons_cannot_forge_lines(tmp_path: Path, nasty: str) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path) as dead:
        dead.write([letter(topic=nasty, reason=nasty), letter(topic=nasty.encode())])
    raw = path.read_bytes()
    assert raw.count(b"\n") == 2
    assert all(0x20 <= byte < 0x7F or byte == 0x0A for byte in raw.replace(b"\x7f", b""))
    assert [line["topic"] for line in lines(path)] == [nasty, nasty]
    assert lines(path)[0]["reason"] == nasty


def test_a_topic_that_is_not_utf8_is_kept_readable(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path) as dead:
        dead.write([letter(topic=b"a\xff")])
    assert lines(path)[0]["topic"] == "a\\xff"


def test_written_is_synced_before_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dead.jsonl"
    sizes: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        sizes.append(os.fstat(fd).st_size)
        real(fd)

    with DeadLetters(path) as dead:
        monkeypatch.setattr(os, "fsync", fsync)
        dead.write([letter(b"x" * 1000)])
    assert sizes == [path.stat().st_size]


def test_a_line_cut_by_a_crash_stays_alone_in_its_damage(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    path.write_bytes(b'{"time":"2026')
    with DeadLetters(path) as dead:
        dead.write([letter(b"whole")])
    torn, whole = path.read_text().splitlines()
    assert torn == '{"time":"2026'
    assert base64.b64decode(json.loads(whole)["payload"]) == b"whole"


def test_a_full_disk_keeps_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dead.jsonl"
    real = os.write
    room = [40]

    def write(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(fd, data[: room[0]])
        room[0] -= done
        return done

    with DeadLetters(path) as dead:
        dead.write([letter(b"before")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(DeadLetterError, match=r"No space left.*free space") as caught:
                dead.write([letter(b"one"), letter(b"two")])
        assert caught.value.retriable
        assert str(path) in str(caught.value)
        assert len(lines(path)) == 1
        dead.write([letter(b"one"), letter(b"two")])
        assert dead.written == 3
    assert [base64.b64decode(line["payload"]) for line in lines(path)] == [
        b"before",
        b"one",
        b"two",
    ]


def test_a_real_full_device(tmp_path: Path) -> None:
    with pytest.raises(DeadLetterError, match="free space"), DeadLetters("/dev/full") as dead:
        dead.write([letter()])


def test_a_missing_directory_names_path_and_cure(tmp_path: Path) -> None:
    path = tmp_path / "no" / "dead.jsonl"
    with pytest.raises(DeadLetterError, match="mkdir -p") as caught:
        DeadLetters(path).open()
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, FastkinError)
    assert caught.value.errno == errno.ENOENT


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DeadLetterError, match="name a file"):
        DeadLetters(tmp_path).write([letter()])


def test_a_file_moved_away_is_made_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "dead.jsonl", tmp_path / "dead.jsonl.1"
    with DeadLetters(path) as dead:
        dead.write([letter(b"1")])
        path.rename(old)
        dead.write([letter(b"2")])
        path.unlink()
        dead.write([letter(b"3")])
    assert base64.b64decode(lines(old)[0]["payload"]) == b"1"
    assert base64.b64decode(lines(path)[0]["payload"]) == b"3"


def test_nothing_to_write_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    DeadLetters(path).write([])
    assert not path.exists()
