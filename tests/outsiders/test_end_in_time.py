"""The process ends within its shutdown timeout and two seconds, or at once when asked again, whatever a disk does."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest

from fastkin.config import Broker
from fastkin.deadletter.file import DeadLetterError, DeadLetters
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from support.fake_broker import until
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.servers import Server

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "{client}"
reconnect_max_s = 0.5

[kinesis]
stream = "s"
endpoint_url = "{url}"
region = "us-east-1"
access_key = "a"
secret_key = "b"

[[pipeline]]
id = "p"
topics = ["t/#"]
format = "{format}"
linger_ms = 5
shutdown_timeout_s = {limit}
{more}
"""

# what goes before `fastkin` in a process of its own; HANG is a file: while it is there the call does not return
HANG = """
import os, sys, time
def hanging(real):
    def call(*args, **kwargs):
        while os.path.exists(HANG):
            open(HANG + ".met", "w").close()
            time.sleep(0.1)
        return real(*args, **kwargs)
    return call
"""
FSYNC = HANG + "os.fsync = hanging(os.fsync)\n"
OPEN = HANG + "from fastkin.deadletter.file import DeadLetters\nDeadLetters.open = hanging(DeadLetters.open)\n"
SPOOL = HANG + "from fastkin.delivery.spool_file import Spool\nSpool.write = hanging(Spool.write)\n"
SLOW_SPOOL = """
import time
from fastkin.delivery.spool_file import Spool
real = Spool.write
def write(*args, **kwargs):
    time.sleep(4)
    return real(*args, **kwargs)
Spool.write = write
HANG
"""
LOOP = HANG + "from fastkin.mqtt.subscriber import Subscriber\nSubscriber.stop = hanging(Subscriber.stop)\n"
LATE_S = 5.0  # beyond what is promised: a busy machine


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


class Child:
    """`fastkin run` with something broken in it."""

    def __init__(self, directory: Path, patch: str, toml: str) -> None:
        self.hang = directory / "hang"
        self._log = directory / "log"
        (directory / "f.toml").write_text(toml)
        code = patch.replace("HANG", repr(str(self.hang))) + "\nfrom fastkin.commands.cli import main\nmain()\n"
        env = {name: text for name, text in os.environ.items() if not name.startswith(("FASTKIN_", "AWS_"))}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "run", str(directory / "f.toml")], stderr=log, env=env
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait(10)

    def log(self) -> str:
        return self._log.read_text()

    async def said(self, text: str) -> None:
        await until(lambda: text in self.log() or self.process.poll() is not None, 30)
        assert text in self.log(), self.log()

    async def met(self) -> None:
        await until(self.hang.with_name("hang.met").exists, 30)

    async def ended(self, within: float) -> tuple[int, str]:
        """Exit code and last line."""
        try:
            code = await asyncio.to_thread(self.process.wait, within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {within:g} s:\n{self.log()}")
        return code, self.log().splitlines()[-1]


async def publish(server: Server, payload: bytes, count: int = 1) -> None:
    async with Publisher(Broker(host=server.host, port=server.port)) as publisher:
        for _ in range(count):
            await publisher.publish("t/1", payload, 1)
        await publisher.drain()


def settings(server: Server, emulator: Emulator, client: str, limit: float, more: str, form: str = "bulk") -> str:
    return SETTINGS.format(
        port=server.port, url=emulator.url, client=client, limit=limit, more=more, format=form
    )  # fmt: skip


@pytest.mark.parametrize("patch", [FSYNC, OPEN], ids=["fsync", "open"])
async def test_a_disk_that_hangs_does_not_keep_the_process(server: Server, tmp_path: Path, patch: str) -> None:
    async with Emulator({"s": 1}) as emulator:
        toml = settings(server, emulator, f"hang-{id(patch)}", 1.0, f'dead_letter = "{tmp_path / "dead"}"')
        with Child(tmp_path, patch, toml) as child:
            if patch is OPEN:
                child.hang.touch()
            await child.said("subscribed")
            child.hang.touch()
            await publish(server, b"no frame")
            await child.met()
            await child.said(b"no frame".hex())
            child.process.send_signal(signal.SIGTERM)
            code, last = await child.ended(1.0 + 2.0 + LATE_S)
    assert code == 0  # the broker keeps what was not acknowledged
    assert "1 records are not settled" in last


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_the_second_signal_ends_a_process_whose_disk_hangs(
    server: Server, tmp_path: Path, second: signal.Signals
) -> None:
    async with Emulator({"s": 1}) as emulator:
        toml = settings(server, emulator, f"second-{second}", 60.0, f'dead_letter = "{tmp_path / "dead"}"')
        with Child(tmp_path, FSYNC, toml) as child:
            await child.said("subscribed")
            child.hang.touch()
            await publish(server, b"no frame")
            await child.met()  # it may be at the opening of the file that the disk hangs
            await child.said(b"no frame".hex())
            child.process.send_signal(signal.SIGTERM)
            await child.said("takes no more")
            child.process.send_signal(second)
            code, last = await child.ended(1.0 + LATE_S)
    assert code == 0
    assert "1 records are not settled" in last


async def test_a_foreign_lock_on_the_dead_letters_is_named_and_does_not_keep_the_process(
    server: Server, tmp_path: Path
) -> None:
    dead = tmp_path / "dead"
    async with Emulator({"s": 1}) as emulator:
        toml = settings(server, emulator, "foreign", 1.0, f'dead_letter = "{dead}"')
        with Child(tmp_path, "HANG", toml) as child:
            await child.said("subscribed")
            with dead.open("ab") as foreign:
                fcntl.flock(foreign, fcntl.LOCK_EX)
                await publish(server, b"no frame")
                await child.said("holds its lock")
                child.process.send_signal(signal.SIGTERM)
                code, last = await child.ended(1.0 + 2.0 + LATE_S)
    errors = [line for line in child.log().splitlines() if "holds its lock" in line]
    assert len(errors) == 1
    assert f"dead letter file {dead}" in errors[0]
    assert f"another process (id {os.getpid()})" in errors[0]
    assert code == 0
    assert "1 records are not settled" in last


async def test_letters_are_written_once_a_foreign_lock_is_gone(server: Server, tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    async with Emulator({"s": 1}) as emulator:
        toml = settings(server, emulator, "for-a-while", 20.0, f'dead_letter = "{dead}"')
        with Child(tmp_path, "HANG", toml) as child:
            await child.said("subscribed")
            with dead.open("ab") as foreign:
                fcntl.flock(foreign, fcntl.LOCK_EX)
                await publish(server, b"no frame")
                await child.said(b"no frame".hex())
                child.process.send_signal(signal.SIGTERM)
                await child.said("takes no more")
            code, last = await child.ended(20.0 + LATE_S)
    assert (code, dead.read_bytes().count(b"\n")) == (0, 1)
    assert "nothing is left" in last


@pytest.mark.parametrize("patch", [SPOOL, SLOW_SPOOL], ids=["hangs", "is slow"])
async def test_a_spool_that_hangs_or_is_slow_does_not_keep_the_process(
    server: Server, tmp_path: Path, patch: str
) -> None:
    more = (
        f'dead_letter = "none"\non_full = "spool"\nspool = "{tmp_path / "spool"}"\nspool_after_s = 0.1\n'
        "max_records = 1\n"
        "budget_bytes = 100000000\nspool_max_bytes = 100000000\n"
    )
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.call("InternalFailure", operation="PutRecords")
        toml = settings(server, emulator, f"spool-{len(patch)}", 1.0, more, "raw")
        with Child(tmp_path, patch, toml) as child:
            child.hang.touch()
            await child.said("subscribed")
            await publish(server, bytes(900_000), 40)  # ten commits of 4 MiB
            await child.said("spooling to")
            child.process.send_signal(signal.SIGTERM)
            code, last = await child.ended(1.0 + 2.0 + LATE_S)
    assert code == 0
    told = re.search(r"received (\d+).* spooled (\d+).*; (\d+) records are not settled", last)
    assert told is not None, last
    received, spooled, unsettled = (int(count) for count in told.groups())
    # On a busy machine not everything that the broker has was delivered before the signal came.
    assert 0 < received <= 40
    assert spooled + unsettled == received


@pytest.mark.parametrize("again", [False, True], ids=["deadline", "second signal"])
async def test_a_loop_that_is_stuck_does_not_keep_the_process(server: Server, tmp_path: Path, again: bool) -> None:
    async with Emulator({"s": 1}) as emulator:
        limit = 60.0 if again else 1.0
        toml = settings(server, emulator, f"loop-{again}", limit, 'dead_letter = "none"')
        with Child(tmp_path, LOOP, toml) as child:
            await child.said("subscribed")
            child.hang.touch()
            child.process.send_signal(signal.SIGTERM)
            await child.met()
            if again:
                child.process.send_signal(signal.SIGTERM)
            code, last = await child.ended((1.0 if again else limit + 2.0) + LATE_S)
    assert code == 0
    assert "nothing is left" in last


PRODUCER = """
import asyncio, sys, time
from fastkin import Producer
async def main():
    producer = Producer("s", region="us-east-1", endpoint_url=sys.argv[1], access_key="a", secret_key="b",
                        on_full="spool", spool=sys.argv[2], spool_after_s=0.1)
    await producer.start()
    receipt = await producer.put(b"x")
    while not producer.stats()["spooling"]:
        await asyncio.sleep(0.05)
    began = time.monotonic()
    left = await producer.close(1.0)
    print(f"closed {left} {time.monotonic() - began < 5} {type(receipt.exception()).__name__}", flush=True)
asyncio.run(main())
"""

ENGINE = """
import asyncio, sys, time
from fastkin import Engine, load_settings
async def main():
    engine = Engine(load_settings(sys.argv[1]))
    await engine.start()
    while engine.stats()["p"]["in_flight"] == 0:
        await asyncio.sleep(0.05)
    open(HANG, "w").close()
    began = time.monotonic()
    left = await engine.stop()
    print(f"closed {left} {time.monotonic() - began < 6}", flush=True)
asyncio.run(main())
"""


async def embedded(code: str, patch: str, hang: Path, *arguments: str) -> list[str]:
    code = (patch + code).replace("HANG", repr(str(hang)))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, out.decode()
    return out.decode().splitlines()


@pytest.mark.process
async def test_an_embedded_producer_closes_and_its_process_exits_beside_a_hanging_disk(tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    hang.touch()
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.call("InternalFailure", operation="PutRecords")
        lines = await embedded(PRODUCER, SPOOL, hang, emulator.url, str(tmp_path / "spool"))
    assert "closed 1 True ClosedError" in lines


async def test_an_embedded_engine_stops_and_its_process_exits_beside_a_hanging_disk(
    server: Server, tmp_path: Path
) -> None:
    hang = tmp_path / "hang"
    async with Emulator({"s": 1}) as emulator:
        path = tmp_path / "f.toml"
        path.write_text(settings(server, emulator, "embedded", 1.0, f'dead_letter = "{tmp_path / "dead"}"'))
        hang.touch()
        running = asyncio.create_task(embedded(ENGINE, OPEN, hang, str(path)))
        until_there = asyncio.create_task(publish_until(server, running))
        lines = await running
        until_there.cancel()
    (line,) = (line for line in lines if line.startswith("closed"))
    assert re.fullmatch(r"closed [1-9]\d* True", line)


async def publish_until(server: Server, running: asyncio.Task[Any]) -> None:
    """Until its session takes them."""
    while not running.done():
        await publish(server, b"no frame")
        await asyncio.sleep(0.2)


def test_a_write_of_dead_letters_waits_for_a_lock_with_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    caught: list[BaseException] = []

    def write() -> None:
        try:
            DeadLetters(path).write([{"pipeline": "p", "topic": "t", "reason": "r", "payload": b"x"}])
        except BaseException as error:  # noqa: BLE001
            caught.append(error)

    with path.open("ab") as foreign:
        fcntl.flock(foreign, fcntl.LOCK_EX)
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(20)
        assert caught, "it still waits"
    assert isinstance(caught[0], DeadLetterError)
    assert "another process" in str(caught[0])
    assert "end that process" in str(caught[0])
