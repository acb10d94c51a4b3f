"""For end-to-end tests: `fastkin run` as a process, what publishes to it, a proxy that counts what is in flight."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from fastkin.config import Broker
from fastkin.mqtt.publisher import Publisher
from support import stalls
from support.servers import ACCESS_KEY, SECRET_KEY, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.servers import Server

ROOT = Path(__file__).resolve().parent.parent.parent


class Plant:
    """Publishes numbered messages at a steady rate, in a thread with a loop of its own."""

    def __init__(self, broker: Server, rate: float, size: int, qos: int = 1) -> None:
        self.published = 0
        self._broker = broker
        self._rate = rate
        self._size = size
        self._qos = qos
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> int:
        """How many were published; all of them are acknowledged, if their QoS asks for that."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self._failed is not None:
            raise self._failed
        return self.published

    def _work(self) -> None:
        try:
            asyncio.run(self._publish())
        except BaseException as error:  # noqa: BLE001 - shown in the test's thread
            self._failed = error

    async def _publish(self) -> None:
        publisher = Publisher(Broker(host=self._broker.host, port=self._broker.port, clean_session=True))
        await publisher.connect()
        began = time.monotonic()
        while not self._stop.is_set():
            due = int((time.monotonic() - began) * self._rate)
            while self.published < due:
                payload = b"%d-" % self.published
                await publisher.publish("plant/1", payload.ljust(self._size, b"."), self._qos)
                self.published += 1
            await asyncio.sleep(0.01)
        await publisher.drain()
        await publisher.close()


class Service:
    """One `fastkin run` with a settings file; may be killed and started again with the same file."""

    def __init__(self, directory: Path, toml: str) -> None:
        self.directory = directory
        self.log_path = directory / "fastkin.log"
        (directory / "fastkin.toml").write_text(toml)
        self.process: subprocess.Popen[bytes] | None = None
        self._before = 0  # length of the log when this process was started

    def start(self) -> None:
        self._before = len(self.log()) if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command(), "run", str(self.directory / "fastkin.toml")],
                cwd=self.directory,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def command(self) -> list[str]:
        return [sys.executable, "-m", "fastkin.commands.cli"]

    def environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FASTKIN_", "KIN_"))}
        return env | {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "PYTHONPATH": str(ROOT / "src"),
        }

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_of_process(self) -> str:
        """What the present process has said: the file has the former ones too."""
        return self.log()[self._before :]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def terminate(self, timeout: float = 40.0) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout)
        assert not stalls.told_in(self.log()), self.log()[-4000:]
        return status

    def rss(self) -> int:
        assert self.process is not None
        return int(psutil.Process(self.process.pid).memory_info().rss)


class PeakRss:
    """The most memory a service takes while the block runs, looked at twenty times a second."""

    def __init__(self, run: Service) -> None:
        self._run = run
        self._over = threading.Event()
        self.start = self.peak = run.rss()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, self._run.rss())


@contextlib.contextmanager
def service(directory: Path, toml: str) -> Iterator[Service]:
    run = Service(directory, toml)
    run.start()
    try:
        yield run
    finally:
        if run.process is not None and run.process.poll() is None:
            run.process.kill()
            run.process.wait(10)


def wait_until(condition: Any, timeout: float, what: str) -> None:
    """Poll until `condition()` is true; AssertionError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.1)


class CountingProxy:
    """Stands between fastkin and the broker and knows how many QoS 1 messages are unacknowledged.

    Runs in a thread of its own, so that a busy test does not slow it.
    """

    def __init__(self, broker_port: int) -> None:
        self._broker_port = broker_port
        self.port = free_port()
        self.delivered = 0
        self.acked = 0
        self.unacked_at_cut: list[int] = []
        self._here = 0  # unacknowledged on the connections that are open now
        self._open = 0
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def unacked(self) -> int:
        return self._here

    @property
    def closed(self) -> bool:
        return self._open == 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", self.port)
        self._started.set()
        await self._stop.wait()
        server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        pipes: list[asyncio.Task[None]] = []
        if self._open == 0:
            self._here = 0
        self._open += 1
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._broker_port)
            ends.append(up_writer)
            pipes.append(asyncio.create_task(self._pipe(up_reader, writer, self._delivered)))
            pipes.append(asyncio.create_task(self._pipe(reader, up_writer, self._acked)))
            await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when the proxy ends before its clients do
            self.unacked_at_cut.append(self._here)
            self._open -= 1
            for pipe in pipes:
                pipe.cancel()
            await asyncio.gather(*pipes, return_exceptions=True)
            for end in ends:
                end.close()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: Any) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(1)
                length, shift, size = 0, 0, b""
                while True:
                    byte = await reader.readexactly(1)
                    size += byte
                    length |= (byte[0] & 0x7F) << shift
                    shift += 7
                    if byte[0] < 0x80:
                        break
                body = await reader.readexactly(length)
                seen(head[0])
                writer.write(head + size + body)
                await writer.drain()

    def _delivered(self, head: int) -> None:
        if head >> 4 == 3 and head & 0x06:
            self.delivered += 1
            self._here += 1

    def _acked(self, head: int) -> None:
        if head >> 4 == 4:
            self.acked += 1
            self._here -= 1
