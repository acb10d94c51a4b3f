"""What commands print: secrets that cannot be read back, aggregates taken apart, nothing that a terminal obeys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import pty
from typing import TYPE_CHECKING, Any

import pytest
from aws_kinesis_agg.aggregator import RecordAggregator

from fastkin.commands import cli
from fastkin.commands.printing import Printer
from fastkin.deadletter.file import DeadLetters
from fastkin.emulator import Emulator
from support.readback import kinesis_client

if TYPE_CHECKING:
    from pathlib import Path

ODD = "a\u202eb\u2066c\u200bd\x1b[31me\x9bf\u2028g\U000e0041h\ufeffi"


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(path)])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_what_check_prints_is_not_taken_for_the_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.toml"
    path.write_text(
        '[broker]\nhost = "h"\nuser = "u"\npassword = "hush1"\n'
        '[[pipeline]]\nid = "p"\nstream = "s"\nregion = "us-east-1"\ntopics = ["t"]\ndead_letter = "none"\n'
        'access_key = "AKIAX"\nsecret_key = "hush2"\nsession_token = "hush3"\n'
    )
    code, out, _ = check(path, capsys)
    assert code == 0
    assert "hush" not in out
    new = tmp_path / "new.toml"
    new.write_text(out)
    code, _, err = check(new, capsys)
    assert code == 2
    for key in ("password", "access_key", "secret_key", "session_token"):
        (line,) = (line for line in err.splitlines() if f"{key!r}" in line)
        assert "fastkin check" in line
        assert "write the secret itself" in line
        assert "new.toml:" in line


def test_three_stars_are_no_secret_in_the_environment_either(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name, text in {"BROKER": "h", "TOPIC": "t", "KIN_STREAM_NAME": "s", "AWS_REGION": "r-1", "PASS": "***"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check"])
    assert ended.value.code == 2
    assert "PASS" in capsys.readouterr().err


# --- tail ---


def aggregate(*records: tuple[str, bytes]) -> bytes:
    """As the KPL's reference writers make it."""
    maker = RecordAggregator()
    for key, data in records:
        assert maker.add_user_record(key, data) is None
    made: bytes = maker.clear_and_get().get_contents()[2]
    return made


async def tailed(capfdbinary: pytest.CaptureFixture[bytes], data: list[bytes], *options: str) -> list[bytes]:
    async with Emulator({"s": 1}) as emulator:
        async with kinesis_client(emulator.url) as client:
            for one in data:
                await client.put_record(StreamName="s", Data=one, PartitionKey="outer")
        arguments = ["tail", "s", "--from", "trim_horizon", "--endpoint-url", emulator.url, "--region", "us-east-1"]
        capfdbinary.readouterr()
        await asyncio.to_thread(cli._main, [*arguments, *options])
    return capfdbinary.readouterr().out.splitlines()


async def test_tail_takes_aggregates_apart(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    packed = aggregate(("k1", b"one"), ("k2", b"two"), ("k1", b"three"))
    lines = await tailed(capfdbinary, [b"before", packed, b"after", b"", b""], "--json", "--limit", "5")
    told = [json.loads(line) for line in lines]
    assert [one["data"] for one in told] == ["before", "one", "two", "three", "after"]
    assert [one["partition_key"] for one in told] == ["outer", "k1", "k2", "k1", "outer"]
    assert [one.get("subsequence_number") for one in told] == [None, 0, 1, 2, None]
    assert len({one["sequence_number"] for one in told}) == 3


async def test_a_limit_counts_the_records_of_an_aggregate(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    packed = aggregate(("k", b"one"), ("k", b"two"), ("k", b"three"))
    assert await tailed(capfdbinary, [packed, b""], "--raw", "--limit", "2") == [b"one", b"two"]


async def test_what_is_no_aggregate_is_shown_as_it_is(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    packed = aggregate(("k", b"one"), ("k", b"two"))
    torn = packed[:-1] + bytes([packed[-1] ^ 1])  # its MD5 does not fit
    short = packed[:12]
    empty_message = b"\xf3\x89\x9a\xc2" + hashlib.md5(b"").digest()
    data = [torn, short, empty_message, b"\xf3\x89\x9a\xc2"]
    lines = await tailed(capfdbinary, [*data, aggregate(("k", b"last"))], "--json", "--limit", "5")
    told = [json.loads(line) for line in lines]
    assert [base64.b64decode(one["data_base64"]) for one in told[:4]] == data
    assert told[4]["data"] == "last"


@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_tail_prints_nothing_that_a_terminal_obeys(
    capfdbinary: pytest.CaptureFixture[bytes], options: tuple[str, ...]
) -> None:
    (line,) = await tailed(capfdbinary, [ODD.encode()], *options, "--limit", "1")
    assert line.decode().isprintable()
    assert b"202e" in line


def on_terminal(write: Any) -> bytes:
    """What reaches a terminal from a child that writes to it."""
    pid, fd = pty.fork()
    if pid == 0:
        try:
            write()
        finally:
            os._exit(0)
    found = b""
    try:
        while piece := os.read(fd, 4096):
            found += piece
    except OSError:
        pass  # the child has gone
    os.waitpid(pid, 0)
    os.close(fd)
    return found


@pytest.mark.process
def test_stdout_true_writes_for_a_terminal_what_prints_and_for_a_pipe_what_came() -> None:
    def write() -> None:
        with open(1, "wb", closefd=False) as out:
            printer = Printer(out)
            printer.GATHER_BYTES = 0
            printer(ODD.encode(), ODD.encode() + b"\xff")

    lines = on_terminal(write).decode().splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    pipe = io.BytesIO()
    printer = Printer(pipe)
    printer.GATHER_BYTES = 0
    printer(ODD.encode(), b"\xff")
    assert pipe.getvalue() == b"key: %b\nvalue: \xff\n" % ODD.encode()


# --- dead letters ---


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("#", ["a/b", "a"]),
        ("+/b", ["a/b"]),
        ("$SYS/#", ["$SYS/x"]),
        ("$share/group/a/#", ["a/b", "a"]),
        ("+/x", []),
        ("$SYS/x", ["$SYS/x"]),
    ],
)
def test_dead_letters_are_chosen_by_the_rules_of_mqtt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: str, found: list[str]
) -> None:
    path = tmp_path / "dead.ndjson"
    with DeadLetters(path) as letters:
        letters.write(
            [{"pipeline": "p", "topic": topic, "reason": "r", "payload": b"x"} for topic in ("a/b", "$SYS/x", "a")]
        )
    assert cli._main(["dead-letters", "list", str(path), "--topic", wanted]) == 0
    assert [json.loads(line)["topic"] for line in capsys.readouterr().out.splitlines()] == found


def test_a_filter_of_dead_letters_that_is_none_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dead.ndjson"
    with DeadLetters(path) as letters:
        letters.write([{"pipeline": "p", "topic": "a", "reason": "r", "payload": b"x"}])
    assert cli._main(["dead-letters", "list", str(path), "--topic", "a/#/b"]) == 2
    assert "--topic" in capsys.readouterr().err
