"""Dead letters: durable, whole lines, unforgeable, and clear when the disk says no."""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.deadletter.file import DeadLetter, DeadLetterError, DeadLetters, line_of, numbered, rotated
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


# --- rotation ---


def numbers(path: Path) -> list[int]:
    """Every letter's number over all files, oldest first."""
    found: list[int] = []
    for number in [*reversed(rotated(path)), 0]:
        file = numbered(path, number)
        found += [int(text) for text in payloads(file)] if file.exists() else []
    return found


LINE = len(line_of(letter(b"%06d" % 0)))


def test_a_full_file_is_rotated_and_nothing_is_gone_within_keep(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path, max_bytes=10 * LINE, keep=5) as dead:
        for n in range(55):
            dead.write([letter(b"%06d" % n)])
        assert dead.deleted == 0
    assert rotated(path) == [1, 2, 3, 4, 5]
    assert numbers(path) == list(range(55))
    for number in range(6):
        file = numbered(path, number)
        assert file.stat().st_size <= 10 * LINE
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_oldest_file_is_deleted_and_its_letters_counted(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path, max_bytes=10 * LINE, keep=2) as dead:
        for n in range(100):
            dead.write([letter(b"%06d" % n)])
        assert rotated(path) == [1, 2]
        assert numbers(path) == list(range(70, 100))
        assert dead.deleted == 70


def test_keep_0_deletes_a_full_file(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path, max_bytes=10 * LINE, keep=0) as dead:
        for n in range(25):
            dead.write([letter(b"%06d" % n)])
        assert numbers(path) == [20, 21, 22, 23, 24]
        assert dead.deleted == 20
    assert rotated(path) == []


def test_replayed_letters_do_not_count_as_lost(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path, max_bytes=2 * LINE, keep=0) as dead:
        dead.write([letter(b"%06d" % 0), letter(b"%06d" % 1)])
        path.write_bytes(path.read_bytes().replace(b'{"time"', b'{"done"', 1))
        dead.write([letter(b"%06d" % 2)])
        assert dead.deleted == 1


def test_max_bytes_0_never_rotates_and_a_letter_larger_than_max_bytes_is_written(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path, max_bytes=0, keep=1) as dead:
        for n in range(50):
            dead.write([letter(b"%06d" % n)])
    assert rotated(path) == []
    large = tmp_path / "large.jsonl"
    with DeadLetters(large, max_bytes=10, keep=1) as dead:
        dead.write([letter(b"1")])
        dead.write([letter(b"2")])
    assert numbers(large) == [1, 2]


def test_a_lower_keep_deletes_what_is_beyond_it_but_no_name_of_others(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path, max_bytes=LINE, keep=5) as dead:
        for n in range(6):
            dead.write([letter(b"%06d" % n)])
    others = [tmp_path / f"dead.jsonl{end}" for end in (".gz", ".1.gz", ".20261121", ".01", ".replay", "2")]
    for other in others:
        other.write_text("mine")
    with DeadLetters(path, max_bytes=LINE, keep=2) as dead:
        dead.write([letter(b"%06d" % 6)])
        assert dead.deleted == 4
    assert numbers(path) == [4, 5, 6]
    assert [other.read_text() for other in others] == ["mine"] * len(others)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("at", range(12))
def test_a_crash_anywhere_in_a_rotation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The process ends at the n-th change of a name; the next one finds every letter but those of the policy."""
    path = tmp_path / "dead.jsonl"
    with DeadLetters(path, max_bytes=LINE, keep=3) as dead:
        for n in range(3):
            dead.write([letter(b"%06d" % n)])
    left = [at]
    with monkeypatch.context() as patch:
        for name in ("rename", "unlink"):
            real = getattr(type(path), name)

            def change(self: Path, *args: Any, real: Any = real, **more: Any) -> Any:
                if not left[0]:
                    raise Crash
                left[0] -= 1
                return real(self, *args, **more)

            patch.setattr(type(path), name, change)
        dead = DeadLetters(path, max_bytes=LINE, keep=3)
        written = 3
        try:
            while written < 6:
                dead.write([letter(b"%06d" % written)])
                written += 1
        except Crash:
            pass
        finally:
            dead.close()
    with DeadLetters(path, max_bytes=LINE, keep=3) as dead:
        dead.write([letter(b"%06d" % 99)])
    found = numbers(path)
    # a gap may cost a place, never one that was within keep when the policy last spoke
    assert found == sorted(found)
    assert found[-1] == 99
    assert set(range(written - 2, written)) <= set(found)
    assert len(rotated(path)) <= 3


@pytest.mark.process
def test_processes_that_share_a_file_rotate_it_together(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    code = (
        "import sys; from fastkin.deadletter.file import DeadLetters\n"
        "dead = DeadLetters(sys.argv[1], max_bytes=4096, keep=900)\n"
        "for n in range(int(sys.argv[2]), int(sys.argv[2]) + 300):\n"
        "    dead.write([{'pipeline': 'p', 'reason': 'r', 'payload': b'%06d' % n}])\n"
        "assert dead.deleted == 0\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(1000 * k)]) for k in range(3)]
    for process in running:
        assert process.wait(60) == 0
    assert sorted(numbers(path)) == sorted(1000 * k + n for k in range(3) for n in range(300))
    assert all(numbered(path, n).stat().st_size <= 4096 for n in [0, *rotated(path)])


def test_a_file_that_another_process_fills_between_the_rotation_and_the_lock_is_rotated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dead.jsonl"
    other = DeadLetters(path, max_bytes=2 * LINE, keep=9)
    with DeadLetters(path, max_bytes=2 * LINE, keep=9) as dead:
        locks = 0

        def locked_late() -> None:
            nonlocal locks
            locks += 1
            if locks == 2:  # the old file is moved, the new one not yet ours
                other.write([letter(b"%06d" % 2), letter(b"%06d" % 3)])
            DeadLetters._lock(dead)

        dead.write([letter(b"%06d" % 0), letter(b"%06d" % 1)])
        monkeypatch.setattr(dead, "_lock", locked_late)
        dead.write([letter(b"%06d" % 4)])
    other.close()
    assert locks == 3
    assert numbers(path) == [0, 1, 2, 3, 4]
    assert [numbered(path, n).stat().st_size for n in (0, 1, 2)] == [LINE, 2 * LINE, 2 * LINE]


def test_a_folder_that_forbids_renaming_is_an_error_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dead.jsonl"

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with DeadLetters(path, max_bytes=LINE, keep=1) as dead:
        dead.write([letter(b"%06d" % 0)])
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "rename", refuse)
            with pytest.raises(DeadLetterError, match=r"cannot rotate it.*let user id"):
                dead.write([letter(b"%06d" % 1)])
        assert numbers(path) == [0]
        dead.write([letter(b"%06d" % 1)])
    assert numbers(path) == [0, 1]


@pytest.mark.process
def test_a_real_limit_of_the_file_size_keeps_nothing_and_names_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    code = (
        "import resource, signal, sys; from fastkin.deadletter.file import DeadLetters, DeadLetterError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "dead = DeadLetters(sys.argv[1])\n"
        "dead.write([{'pipeline': 'p', 'reason': 'r', 'payload': b'1'}])\n"
        "try:\n"
        "    dead.write([{'pipeline': 'p', 'reason': 'r', 'payload': b'x' * 2000}])\n"
        "except DeadLetterError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "ulimit -f" in done.stdout
    assert str(path) in done.stdout
    assert payloads(path) == [b"1"]
