"""Dead letters of many MiB: listed without printing them, read without holding them, replayed or kept."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.commands.cli import _main
from fastkin.emulator import Emulator
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MIB = 1 << 20
LARGE = bytes(range(256)) * (24 * MIB // 256) + b"x"  # no multiple of three


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "FASTKIN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator({"welders": 2}) as emulator:
        emulator.set_limits(False)
        yield emulator


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dead.jsonl"


def line(payload: bytes, **more: Any) -> bytes:
    """As the service writes it."""
    fields = {
        "time": "2026-11-27T10:00:00.000Z", "pipeline": "p", "topic": "a/7/b", "reason": "too large", "offset": 0,
        "index": None, "partition_key": None, "payload": base64.b64encode(payload).decode(),
    }  # fmt: skip
    return json.dumps(fields | more, separators=(",", ":")).encode() + b"\n"


async def run(*args: object) -> int:
    return await asyncio.to_thread(_main, ["dead-letters", *map(str, args)])


async def replay(emulator: Emulator, path: Path, form: str) -> int:
    there = ["--stream", "welders", "--endpoint-url", emulator.url, "--format", form]
    return await run("replay", path, *there)


def test_a_long_letter_is_listed_and_shown_in_little(path: Path, capfdbinary: Any) -> None:
    path.write_bytes(line(b"before") + line(LARGE, topic='a/\U0001f600"') + line(b"behind"))
    assert _main(["dead-letters", "list", str(path)]) == 0
    out = capfdbinary.readouterr().out
    assert len(out) < 10_000
    told = [json.loads(each) for each in out.splitlines()]
    assert [each["n"] for each in told] == [1, 2, 3]
    assert told[1]["topic"] == 'a/\U0001f600"'
    assert (told[1]["payload"], told[1]["payload_bytes"]) == (None, len(LARGE))
    assert base64.b64decode(told[2]["payload"]) == b"behind"
    assert _main(["dead-letters", "show", "2", str(path)]) == 0
    out = capfdbinary.readouterr().out
    assert len(out) < MIB
    assert b"25,165,825 bytes" in out
    assert b"--raw" in out
    assert _main(["dead-letters", "show", "2", str(path), "--raw"]) == 0
    assert capfdbinary.readouterr().out == LARGE


def test_a_long_line_is_looked_through_and_not_held(path: Path, capfdbinary: Any) -> None:
    path.write_bytes(line(LARGE) * 2)
    tracemalloc.start()
    try:
        assert _main(["dead-letters", "list", str(path), "--topic", "a/#"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB
    assert len(capfdbinary.readouterr().out.splitlines()) == 2


async def test_a_letter_that_is_only_a_beginning_is_never_replayed(
    emulator: Emulator, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = line(b"beginning", truncated=True, payload_bytes=9_437_184)
    packet = line(b"\0\x01#\0\x01", packet=True)
    path.write_bytes(cut + line(b"whole") + packet)
    assert await replay(emulator, path, "raw") == 1
    assert [record.data for record in emulator.stored("welders")] == [b"whole"]
    assert path.read_bytes() == cut + packet
    err = capsys.readouterr().err
    assert "dead.jsonl:1: its payload is only the beginning of 9437184 bytes" in err
    assert "dead.jsonl:3: its payload is an ill-formed MQTT packet" in err


async def test_a_record_beyond_the_limit_is_told_and_the_others_go(
    emulator: Emulator, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = line(LARGE)
    path.write_bytes(line(b"1") + long + line(b"2"))
    assert await replay(emulator, path, "raw") == 1
    assert sorted(record.data for record in emulator.stored("welders")) == [b"1", b"2"]
    assert path.read_bytes() == long
    err = capsys.readouterr().err
    assert f"dead.jsonl:2: a record of {len(LARGE)} bytes" in err
