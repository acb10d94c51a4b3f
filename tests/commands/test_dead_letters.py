"""`fastkin dead-letters`: what it shows is whole and harmless, what it replays arrives once and leaves the file."""

from __future__ import annotations

import asyncio
import base64
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
from fastkin.commands import dead_letters as command
from fastkin.commands.cli import _main
from fastkin.deadletter.file import DeadLetters, numbered
from fastkin.deadletter.reader import LetterFile, LetterFileError, LetterFiles
from fastkin.emulator import Emulator
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "FASTKIN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator({"welders": 2, "others": 1}) as emulator:
        yield emulator


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dead.jsonl"


def refused(payload: bytes, key: str | None = "k", **changes: Any) -> dict[str, Any]:
    """A record that Kinesis refused."""
    made = {"pipeline": "p", "reason": "InternalFailure: no", "partition_key": key, "payload": payload}
    return made | changes


def frame(payload: bytes, **changes: Any) -> dict[str, Any]:
    """A whole payload that could not be read."""
    return {"pipeline": "p", "topic": "a/7/b", "reason": "bad", "offset": 3, "payload": payload} | changes


def write(path: Path, *letters: dict[str, Any], **options: Any) -> None:
    with DeadLetters(path, **options) as dead:
        for letter in letters:
            dead.write([letter])


def kept(path: Path) -> list[dict[str, Any]]:
    with LetterFiles([path]) as files:
        return [one.fields() for _, one in command.numbered_letters(files)]


def settings(tmp_path: Path, emulator: Emulator, path: Path, **pipeline: Any) -> str:
    values = {"id": "p", "topics": ["a/#"], "stream": "welders", "dead_letter": str(path)} | pipeline
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    config = tmp_path / "fastkin.toml"
    config.write_text(
        f'[broker]\nclient_id = "c"\n[kinesis]\nregion = "us-east-1"\nendpoint_url = "{emulator.url}"\n'
        f"[[pipeline]]\n{lines}\n"
    )
    return str(config)


async def run(*args: object) -> int:
    return await asyncio.to_thread(_main, ["dead-letters", *map(str, args)])


def stored(emulator: Emulator, stream: str = "welders") -> list[tuple[str, bytes]]:
    return sorted((record.partition_key, record.data) for record in emulator.stored(stream))


# --- list and show ---


async def test_list_prints_json_lines_when_piped(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, *(refused(b"%d" % n) for n in range(7)), max_bytes=400)
    assert numbered(path, 2).exists()
    assert await run("list", path) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["n"] for line in lines] == list(range(1, 8))
    assert [base64.b64decode(line["payload"]) for line in lines] == [b"%d" % n for n in range(7)]
    assert lines[-1]["file"] == str(path)
    assert lines[-1]["line"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [1, 2, 3]),
        (["--pipeline", "q"], [3]),
        (["--reason", "INTERNAL"], [1]),
        (["--topic", "a/+/b"], [2]),
        (["--topic", "a/#"], [2, 3]),
        (["--since", "2026-01-02T00:00:00Z"], [2, 3]),
        (["--since", "1h"], [3]),
        (["--pipeline", "p", "--topic", "#"], [2]),
    ],
)
async def test_list_filters(
    path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: list[int]
) -> None:
    early = 1_767_225_600.0  # 2026-01-01
    write(path, refused(b"1", time=early), frame(b"2", time=early + 90_000), frame(b"3", topic="a", pipeline="q"))
    assert await run("list", path, *options) == 0
    assert [json.loads(line)["n"] for line in capsys.readouterr().out.splitlines()] == expected


async def test_damaged_lines_are_told_with_their_number_and_kept(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, refused(b"1"))
    with path.open("ab") as file:
        file.write(b'torn {"time"\n[]\n{"time":"2026-01-01T00:00:00Z","pipeline":"p"}\n')
        file.write(b'{"time":' + b"[" * 200_000 + b"\n")
    write(path, refused(b"2"))
    assert await run("list", path) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert [line.split(": ")[1].rpartition(":")[2] for line in err.splitlines()] == ["2", "3", "4", "5"]
    assert "`reason` is missing" in err


@pytest.mark.parametrize("nasty", ["\x1b[31mred", "a\u202eb", "\x9b2J", "a\nb", "a\u061cb"])
async def test_what_strangers_chose_cannot_steer_the_terminal(
    path: Path, nasty: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, frame(nasty.encode(), topic=nasty, reason=nasty, pipeline="p"))
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert _main(["dead-letters", "list", str(path)]) == 0
    assert _main(["dead-letters", "show", "1", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 dead letters" in out
    for bad in "\x9b\u202e\u061c":
        assert bad not in out
    assert "\x1b[31m" not in out
    assert "\nb\n" not in out.replace("  b\n", "")


async def test_show_prints_text_or_hex_or_the_bytes(path: Path, capfdbinary: Any) -> None:
    write(path, refused(b'{"ok":1}'), refused(b"\x00\xff" * 9))
    assert await run("show", 1, path) == 0
    shown = capfdbinary.readouterr().out.decode()
    assert '  {"ok":1}\n' in shown
    assert "partition_key: k\n" in shown
    assert await run("show", 2, path) == 0
    assert "  00000010  00 ff " in capfdbinary.readouterr().out.decode()
    assert await run("show", 2, path, "--raw") == 0
    assert capfdbinary.readouterr().out == b"\x00\xff" * 9
    assert await run("show", 3, path) == 1


@pytest.mark.parametrize(
    "args",
    [
        ["list"],
        ["list", "x", "--since", "yesterday"],
        ["replay", "x", "--region", "r"],
        ["replay", "x"],
        ["show", "0", "x"],
        ["replay", "x", "--format", "csv"],
    ],
)
async def test_wrong_use_is_exit_code_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(*args) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


async def test_a_file_that_is_not_there_is_exit_code_1(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("list", path) == 1
    assert "check the path" in capsys.readouterr().err


# --- replay ---


async def test_replay_sends_each_kind_as_what_it_is_and_leaves_nothing(
    tmp_path: Path, emulator: Emulator, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        path,
        refused(b"again", "its own key"),
        frame(b"one record", index=2),
        frame(fastkin.encode_frame([b"x", b"y"])),
        max_bytes=1,
    )
    config = settings(tmp_path, emulator, path, format="bulk", partition_key="topic:1")
    assert await run("replay", "--config", config) == 0
    assert stored(emulator) == [("7", b"one record"), ("7", b"x"), ("7", b"y"), ("its own key", b"again")]
    assert "3 replayed" in capsys.readouterr().err
    assert path.read_bytes() == b""
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dead.jsonl", "fastkin.toml"]
    assert await run("replay", "--config", config) == 0
    assert len(stored(emulator)) == 4


async def test_what_is_replayed_takes_the_shape_of_its_pipeline(tmp_path: Path, emulator: Emulator, path: Path) -> None:
    write(path, refused(b'{"topic":"old"}', "k"), frame(b'{"n":1}'), frame(b'{"n":2}\n', index=0))
    config = settings(tmp_path, emulator, path, topic_field="topic", separator="\n", partition_key="topic:1")
    assert await run("replay", "--config", config) == 0
    # what was a record already goes as it lies there
    assert stored(emulator) == [("7", b'{"n":2}\n'), ("7", b'{"topic":"a/7/b","n":1}\n'), ("k", b'{"topic":"old"}')]
    assert kept(path) == []


async def test_events_are_filtered_at_a_replay_and_frames_of_the_label_are_not(
    tmp_path: Path, emulator: Emulator, path: Path
) -> None:
    start, stop = b'{"eventType":"start"}', b'{"eventType":"stop"}'
    label = "/devices/7/bulkData/x"
    write(path, frame(start), frame(stop), frame(b"no event"), frame(fastkin.encode_frame([stop]), topic=label))
    config = settings(tmp_path, emulator, path, events=["start"], bulk_label="x", partition_key="static:k")
    assert await run("replay", "--config", config) == 1
    assert stored(emulator) == [("k", start), ("k", stop)]
    (left,) = kept(path)
    assert "eventType" in left["reason"]


async def test_replay_to_another_stream(emulator: Emulator, path: Path) -> None:
    write(path, refused(b"1"), frame(b"2"))
    there = ["--stream", "others", "--endpoint-url", emulator.url]
    assert await run("replay", path, *there) == 1  # a payload that may be a frame
    assert stored(emulator, "others") == [("k", b"1")]
    (left,) = kept(path)
    assert "--format" in left["reason"]
    assert await run("replay", path, *there, "--format", "raw") == 0
    assert len(stored(emulator, "others")) == 2
    assert kept(path) == []


async def test_what_fails_again_is_kept_with_its_new_reason(tmp_path: Path, emulator: Emulator, path: Path) -> None:
    good = fastkin.encode_frame([b"a", b"poison", b"c"])
    write(path, refused(b"fine"), refused(b"poison"), frame(b"\xc0junk"), frame(good), refused(b"x" * 3000))
    before = kept(path)
    emulator.faults.record("InvalidArgumentException", "still no", contains=b"poison")
    config = settings(tmp_path, emulator, path, format="bulk", max_record_bytes=2000)
    assert await run("replay", "--config", config) == 1
    assert sorted(data for _, data in stored(emulator)) == [b"a", b"c", b"fine"]
    left = {base64.b64decode(each["payload"])[:6]: each for each in kept(path)}
    assert set(left) == {b"poison", b"\xc0junk", b"xxxxxx"}
    assert len(kept(path)) == 4
    assert all(each["reason"] not in ("bad", "InternalFailure: no") for each in left.values())
    assert left[b"\xc0junk"]["time"] == before[2]["time"]
    assert left[b"\xc0junk"]["topic"] == "a/7/b"
    # of the frame only the one record that failed goes again
    assert await run("replay", "--config", config, "--reason", "still no") == 1
    assert sorted(data for _, data in stored(emulator)) == [b"a", b"c", b"fine"]
    emulator.faults.clear()
    assert await run("replay", "--config", config, "--reason", "still no") == 0
    assert sorted(data for _, data in stored(emulator)) == [b"a", b"c", b"fine", b"poison", b"poison"]
    assert len(kept(path)) == 2


async def test_damaged_lines_stay_and_only_what_is_meant_is_sent(
    tmp_path: Path, emulator: Emulator, path: Path
) -> None:
    write(path, refused(b"1"), refused(b"2", pipeline="q"))
    with path.open("ab") as file:
        file.write(b"damaged\n")
    write(path, refused(b"3"))
    os.chmod(path, 0o640)
    config = settings(tmp_path, emulator, path)
    assert await run("replay", "--config", config) == 1
    assert [data for _, data in stored(emulator)] == [b"1", b"3"]
    lines = path.read_bytes().splitlines()
    assert len(lines) == 2
    assert lines[1] == b"damaged"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


async def test_a_run_that_was_killed_leaves_marks_and_sends_no_more_than_its_last_group_twice(
    tmp_path: Path, emulator: Emulator, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, *(refused(b"%03d" % n) for n in range(30)))
    config = settings(tmp_path, emulator, path)
    monkeypatch.setattr(command, "GROUP_LETTERS", 4)
    real, calls = LetterFile.mark, [0]

    def mark(self: LetterFile, letters: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise LetterFileError("killed")
        real(self, letters)

    with monkeypatch.context() as patch:
        patch.setattr(LetterFile, "mark", mark)
        patch.setattr(LetterFiles, "tidy", lambda self: None)
        assert await run("replay", "--config", config) == 1
    assert path.read_bytes().count(b'{"done":') == 12
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    assert len(stored(emulator)) == 16
    assert await run("replay", "--config", config) == 0
    got = [data for _, data in stored(emulator)]
    assert sorted(set(got)) == [b"%03d" % n for n in range(30)]
    assert len(got) == 34


@pytest.mark.process
async def test_a_replay_that_is_broken_off_marks_what_is_stored(
    tmp_path: Path, emulator: Emulator, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stream takes nothing for hours: what the other has stored does not go again with each attempt."""
    write(path, *(refused(b"%d" % n) for n in range(3)), refused(b"stuck", pipeline="q"))
    emulator.faults.record("ProvisionedThroughputExceededException", "Rate exceeded", contains=b"stuck")
    config = settings(tmp_path, emulator, path)
    with open(config, "a") as file:
        file.write(f'[[pipeline]]\nid = "q"\ntopics = ["b/#"]\nstream = "others"\ndead_letter = "{path}"\n')
    for said in ("3 replayed, 1 not tried", "0 replayed, 1 not tried"):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fastkin.commands.cli",
            "dead-letters",
            "replay",
            "--config",
            config,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(30):
            tried = emulator.counters.calls
            while emulator.counters.calls < tried + 8:  # the throttled one goes again and again
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert process.returncode == 130
        assert said in err.decode()
        assert stored(emulator) == [("k", b"%d" % n) for n in range(3)]
    assert [one["payload"] for one in kept(path)] == [base64.b64encode(b"stuck").decode()]


@pytest.mark.process
async def test_a_frame_whose_replay_is_broken_off_keeps_its_records_that_are_open(
    tmp_path: Path, emulator: Emulator, path: Path
) -> None:
    write(path, frame(fastkin.encode_frame([b"1", b"stuck", b"3"])))
    config = settings(tmp_path, emulator, path, format="bulk")
    stuck = emulator.faults.record("InternalFailure", "no", contains=b"stuck")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fastkin.commands.cli",
        "dead-letters",
        "replay",
        "--config",
        config,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        while emulator.stored_count("welders") < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
    process.send_signal(signal.SIGINT)
    await process.communicate()
    (one,) = kept(path)
    assert (base64.b64decode(one["payload"]), one["index"]) == (b"stuck", 1)
    assert "broken off" in one["reason"]
    stuck.remove()
    assert await run("replay", "--config", config) == 0
    assert sorted(data for _, data in stored(emulator)) == [b"1", b"3", b"stuck"]


async def test_letters_that_are_refused_by_the_call_are_kept(
    tmp_path: Path, emulator: Emulator, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve in a row, and not one stored before them: a replay believes what it is told, and ends."""
    large = b"x" * 1_500_000
    write(path, *(refused(large) for _ in range(12)), refused(b"good"))
    config = settings(tmp_path, emulator, path, max_record_bytes=2 << 20)
    assert await run("replay", "--config", config) == 1
    assert "1 replayed, 12 failed again and are kept" in capsys.readouterr().err
    assert [data for _, data in stored(emulator)] == [b"good"]
    assert len(kept(path)) == 12


async def test_a_link_is_the_file_it_names(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "dead.jsonl"
    link.parent.mkdir()
    link.symlink_to(path)
    write(link, *(refused(b"%d" % n) for n in range(7)), max_bytes=400)
    assert numbered(path, 2).exists()
    assert [each.name for each in link.parent.iterdir()] == [link.name]
    with LetterFiles([link], change=True) as files:
        with pytest.raises(LetterFileError, match="another replay"):
            LetterFiles([path], change=True)
        first = next(files.letters())
        files.files[0].mark([first])  # type: ignore[list-item]
        files.tidy()
    assert link.is_symlink()
    assert len(kept(link)) == len(kept(path)) == 6


async def test_a_live_file_may_end_with_a_number(path: Path) -> None:
    live = numbered(path, 7)
    write(live, *(refused(b"%d" % n) for n in range(7)), max_bytes=400)
    assert numbered(live, 2).exists()
    assert len(kept(live)) == 7
    with LetterFiles([live], change=True) as files:
        for file in files.files:
            file.mark(file.letters())  # type: ignore[arg-type]
        files.tidy()
    assert kept(live) == []
    assert not numbered(live, 1).exists()


@pytest.mark.parametrize("name", ["topic", "reason", "pipeline"])
async def test_half_a_surrogate_is_shown_as_an_escape(
    path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, frame(b"x"))
    line = json.loads(path.read_bytes()) | {name: "a\ud800b"}
    path.write_text(json.dumps(line, separators=(",", ":")) + "\n")
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True)
    assert _main(["dead-letters", "list", str(path)]) == 0
    assert _main(["dead-letters", "show", "1", str(path)]) == 0
    assert capsys.readouterr().out.count("a\\ud800b") == 2


async def test_two_replays_at_once_are_one(tmp_path: Path, emulator: Emulator, path: Path) -> None:
    write(path, refused(b"1"))
    config = settings(tmp_path, emulator, path)
    with LetterFiles([path], change=True):
        assert await run("replay", "--config", config) == 1
        assert stored(emulator) == []
        assert await run("list", path) == 0
    assert await run("replay", "--config", config) == 0


async def test_a_missing_stream_sends_nothing_and_keeps_everything(
    path: Path, emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, refused(b"1"))
    before = path.read_bytes()
    assert await run("replay", path, "--stream", "nowhere", "--endpoint-url", emulator.url) == 1
    assert "ResourceNotFound" in capsys.readouterr().err
    assert path.read_bytes() == before


async def test_letters_of_an_unknown_pipeline_are_kept(
    tmp_path: Path, emulator: Emulator, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, refused(b"1", pipeline="other"))
    assert await run("replay", "--config", settings(tmp_path, emulator, path)) == 1
    assert "no pipeline 'other'" in capsys.readouterr().err
    assert len(kept(path)) == 1


WRITER = """
import sys, time
from fastkin.deadletter.file import DeadLetters
dead = DeadLetters(sys.argv[1], max_bytes=20_000, keep=900)
n = 0
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    dead.write([{"pipeline": "p", "reason": "r", "partition_key": "k", "payload": b"%06d" % n}])
    n += 1
print(n)
"""


@pytest.mark.process
async def test_replay_beside_a_service_that_writes_and_rotates(tmp_path: Path, emulator: Emulator, path: Path) -> None:
    """Every letter arrives exactly once, and none is left or lost, whatever the two did to the files meanwhile."""
    config = settings(tmp_path, emulator, path)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "2.5"], stdout=subprocess.PIPE, text=True)
    async with asyncio.timeout(20):
        while not path.exists():
            await asyncio.sleep(0.01)
    while process.poll() is None:
        assert await run("replay", "--config", config) == 0
    assert process.stdout is not None
    with process.stdout:
        written = int(process.stdout.read())
    assert written > 50
    assert await run("replay", "--config", config) == 0
    assert [data for _, data in stored(emulator)] == [b"%06d" % n for n in range(written)]
    assert path.read_bytes() == b""
    assert not list(tmp_path.glob("dead.jsonl.*"))


async def test_reading_waits_for_a_rotation(path: Path) -> None:
    write(path, refused(b"1"))
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        opening = asyncio.create_task(asyncio.to_thread(lambda: len(kept(path))))
        await asyncio.sleep(0.1)
        assert not opening.done()
    assert await asyncio.wait_for(opening, 10) == 1


def test_a_letter_that_was_written_before_the_time_had_a_zone_is_damaged(path: Path) -> None:
    path.write_text('{"time":"2026-01-01T00:00:00","pipeline":"p","reason":"r","payload":""}\n')
    with LetterFiles([path]) as files:
        (one,) = files.letters()
    assert "zone" in one.problem  # type: ignore[union-attr]


def test_topics_match_as_in_mqtt() -> None:
    assert command._takes("a/#", "a")
    assert command._takes("+/b", "a/b")
    assert not command._takes("a/+", "a")
    assert not command._takes("a", "a/b")


def test_since_is_a_time_or_a_span() -> None:
    assert abs(command.parse_since("2h") - (time.time() - 7200)) < 60
    assert command.parse_since("1970-01-01T00:01:00Z") == 60.0


async def test_a_file_that_was_cut_off_meanwhile_is_not_written_into(path: Path) -> None:
    write(path, refused(b"1"), refused(b"2"))
    with LetterFiles([path], change=True) as files:
        letters = list(files.letters())
        os.truncate(path, 0)
        write(path, refused(b"another", pipeline="q"))
        files.files[0].mark(letters)  # type: ignore[arg-type]
        files.tidy()
    assert [base64.b64decode(each["payload"]) for each in kept(path)] == [b"another"]


async def test_what_was_replayed_leaves_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied when nothing stays: a replay makes room where there is none."""
    write(path, refused(b"1"), refused(b"2"), max_bytes=1)
    real = os.open

    def full(name: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_CREAT and str(name).endswith(".tidy"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(name, flags, mode, **more)

    monkeypatch.setattr(os, "open", full)
    with LetterFiles([path], change=True) as files:
        for file in files.files:
            file.mark(list(file.letters()))  # type: ignore[arg-type]
        files.tidy()
    assert path.read_bytes() == b""
    assert not numbered(path, 1).exists()
    write(path, refused(b"1"), refused(b"2"))
    with LetterFiles([path], change=True) as files:
        files.files[0].mark([next(files.letters())])  # type: ignore[list-item]
        with pytest.raises(LetterFileError, match=r"take out what was replayed.*free space"):
            files.tidy()
    assert [base64.b64decode(each["payload"]) for each in kept(path)] == [b"2"]


async def test_progress_is_shown_on_a_terminal(
    tmp_path: Path, emulator: Emulator, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, *(refused(b"%d" % n) for n in range(5)))
    monkeypatch.setattr(command, "GROUP_LETTERS", 2)
    monkeypatch.setattr(command.sys.stderr, "isatty", lambda: True)
    assert await run("replay", "--config", settings(tmp_path, emulator, path)) == 0
    assert "\r2 replayed, 0 failed again \r4 replayed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.process
async def test_a_replay_that_is_killed_for_real_is_finished_by_the_next(
    tmp_path: Path, path: Path, number: signal.Signals
) -> None:
    count = 1800
    with DeadLetters(path) as dead:
        dead.write([refused(b"%05d" % n, str(n)) for n in range(count)])
    async with Emulator({"welders": 2}, latency_ms=150) as emulator:
        config = settings(tmp_path, emulator, path)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastkin.commands.cli", "dead-letters", "replay", "--config", config],
            stderr=subprocess.DEVNULL,
        )
        async with asyncio.timeout(30):
            while emulator.stored_count("welders") < 600:
                await asyncio.sleep(0.005)
        process.send_signal(number)
        code = await asyncio.to_thread(process.wait, 30)
        assert code == (-number if number == signal.SIGKILL else 130)
        emulator.latency_s = 0.0
        assert await run("replay", "--config", config) == 0
        got = [data for _, data in stored(emulator)]
    assert set(got) == {b"%05d" % n for n in range(count)}
    assert len(got) <= count + command.GROUP_LETTERS
    assert path.read_bytes() == b""


# --- long lines ---


@pytest.mark.parametrize("at", [0, 100, 2 << 20, -3, -1])
def test_a_long_line_that_is_damaged_is_told_and_kept(path: Path, at: int, capfdbinary: Any) -> None:
    text = bytearray(base64.b64encode(bytes(range(256)) * (3 << 12) + b"x"))
    text[at] = ord("!")
    write(path, refused(b""), refused(b"good"))
    path.write_bytes(path.read_bytes().replace(b'"payload":""', b'"payload":"' + text + b'"'))
    assert _main(["dead-letters", "list", str(path)]) == 0
    out, err = capfdbinary.readouterr()
    assert len(out.splitlines()) == 1
    assert len(out) < 10_000
    assert b"dead.jsonl:1: `payload` is not base64" in err


async def test_a_large_frame_goes_record_by_record_and_leaves(emulator: Emulator, path: Path) -> None:
    emulator.set_limits(False)
    records = [b"%06d" % n + bytes(60_000) for n in range(200)]
    write(path, frame(fastkin.encode_frame(records)))
    assert await run("replay", path, "--stream", "welders", "--endpoint-url", emulator.url, "--format", "bulk") == 0
    assert sorted(record.data for record in emulator.stored("welders")) == records
    assert path.read_bytes() == b""
