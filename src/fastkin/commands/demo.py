"""`fastkin demo`: the main job on this machine alone, with trouble on purpose and a ledger at the end.

    plant -> broker (mosquitto) -> `fastkin run`, a process of its own -> emulated stream of 4 shards

Every record is numbered. At the end what the stream holds is compared with what the plant published,
payload by payload: the ledger counts what is there, what is there twice, and what is missing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import click

from fastkin._codec import encode_frame
from fastkin.bench.children import find_mosquitto, free_port
from fastkin.bench.plant import Plant, welder_payload
from fastkin.config import Broker
from fastkin.emulator import Emulator
from fastkin.errors import FastkinError
from fastkin.mqtt.publisher import Publisher
from fastkin.runtime.loops import loop_factory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HOST = "127.0.0.1"
STREAM = "welders"
SHARDS = 4
AMQTT_RATE = 300.0  # records per second that the Python broker keeps up with
START_S = 20.0  # for a process to be ready
STALL_S = 15.0  # without any progress at the end: give up

SETTINGS = """\
[broker]
url = "mqtt://{host}:{port}"
client_id = "demo"
protocol = "{protocol}"

[kinesis]
stream = "{stream}"
region = "us-east-1"
endpoint_url = "{url}"
access_key = "demo"
secret_key = "demo"

[[pipeline]]
id = "machines"
topics = ["plant/+/welder"]
dead_letter = "{dead_letters}"

[[pipeline]]
id = "frames"
bulk_label = "telemetry"
dead_letter = "{dead_letters}"
"""

MOSQUITTO = """\
listener {port} {host}
allow_anonymous true
persistence false
# what waits for fastkin is kept: the default of 1000 messages is dropped beyond silently
max_queued_messages 0
"""


class DemoError(FastkinError):
    """The demo cannot be shown; the message ends with the cure."""


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


# --- processes ---


@dataclass
class Process:
    """A child with its log; ended with the demo, whatever happens."""

    name: str
    command: list[str]
    log_path: Path
    env: dict[str, str] | None = None
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> Self:
        with self.log_path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                # Ctrl-C is for the demo, which then ends its children in order
                start_new_session=True,
            )
        return self

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    async def until(self, ready: Callable[[], bool] | None = None, port: int | None = None) -> None:
        """Until it is ready; DemoError when it ends or takes too long."""
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while not (ready() if ready else await _accepts(port or 0)):
            if self.process.returncode is not None or time.monotonic() > deadline:
                ended = self.process.returncode
                how = "was not ready in time" if ended is None else f"ended with {ended}"
                raise DemoError(f"{self.name} {how}; it said:\n{_tail(self.log())}")
            await asyncio.sleep(0.05)

    async def end(self, number: signal.Signals, timeout_s: float) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            try:
                await asyncio.wait_for(self.process.wait(), timeout_s)
            except TimeoutError:
                # It has had its time. A child that outlives the demo would hold its port, and the next demo would
                # talk to it.
                self.process.kill()
                await self.process.wait()
        return int(self.process.returncode or 0)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        if self.process is not None:
            await self.end(signal.SIGTERM, 3.0)

    def cost(self) -> tuple[float, float]:
        """Memory in MB and CPU seconds so far; zeros where there is no /proc."""
        if self.process is None or self.process.returncode is not None:
            return 0.0, 0.0
        proc = Path(f"/proc/{self.process.pid}")
        try:
            ticks = (proc / "stat").read_text().rpartition(")")[2].split()
            pages = int((proc / "statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0, 0.0
        cpu = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, cpu


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:]) or "  | nothing"


@contextlib.asynccontextmanager
async def broker(folder: Path) -> AsyncIterator[tuple[str, int]]:
    """(name, port) of a broker: mosquitto, else amqtt in this process."""
    port = free_port()
    program = find_mosquitto()
    if program is not None:
        settings = folder / "mosquitto.conf"
        settings.write_text(MOSQUITTO.format(port=port, host=HOST))
        command = [program, "-c", str(settings)]
        async with Process("mosquitto", command, folder / "mosquitto.log") as process:
            await process.until(port=port)
            yield "mosquitto", port
        return
    try:
        make = importlib.import_module("amqtt.broker").Broker
    except ImportError:
        raise DemoError(
            "there is no MQTT broker; install one: apt-get install mosquitto, or pip install amqtt"
        ) from None
    amqtt = make(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await amqtt.start()
    try:
        yield "amqtt", port
    finally:
        await amqtt.shutdown()


# --- what is shown ---


@dataclass(slots=True)
class Now:
    """The numbers of one moment."""

    seconds: float
    published: int
    stored: int
    throttled: int
    memory_mb: float
    cpu_percent: float


class Show(Protocol):
    def say(self, text: str) -> None: ...
    def now(self, now: Now) -> None: ...
    def close(self) -> None: ...


class Plain:
    """Lines, for pipes and logs."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._next = 0.0

    def say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text)

    def now(self, now: Now) -> None:
        if now.seconds >= self._next:
            self._next = now.seconds + 1
            self.say(
                f"{now.seconds:5.1f} s  published {now.published:>9,}  stored {now.stored:>9,}"
                f"  throttled {now.throttled:>7,}  fastkin {now.memory_mb:.0f} MB,"
                f" {now.cpu_percent:.0f} % CPU"
            )

    def close(self) -> None:
        pass


class Live:
    """A table that is written over, for terminals."""

    def __init__(self, seconds: float) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._seconds = seconds
        self._console = Console()
        self._live = RichLive(console=self._console, refresh_per_second=10, transient=True)
        self._live.start()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def now(self, now: Now) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(width=12)
        table.add_column(justify="right", width=10)
        table.add_column(width=40)
        whole = max(now.published, now.stored, 1)
        table.add_row("published", f"{now.published:,}", ProgressBar(whole, now.published, 40))
        table.add_row("stored", f"{now.stored:,}", ProgressBar(whole, now.stored, 40))
        table.add_row("throttled", f"{now.throttled:,}", "refused by a shard, sent again")
        table.add_row("fastkin", f"{now.memory_mb:.0f} MB", f"{now.cpu_percent:.0f} % of one core")
        table.add_row("time", f"{now.seconds:.1f} s", f"of {self._seconds:g} s, then the rest is stored")
        self._live.update(table)

    def close(self) -> None:
        self._live.stop()


# --- the ledger ---


@dataclass(slots=True)
class Ledger:
    published: int
    malformed: int
    received: int | None
    stored: int
    duplicates: int
    dead_lettered: int
    lost: int
    foreign: int

    @property
    def good(self) -> bool:
        return self.lost == 0 and self.foreign == 0

    def rows(self) -> list[tuple[str, str, str]]:
        rows = [
            ("published", f"{self.published:,}", "records of the plant"),
            ("malformed", f"{self.malformed:,}", "frames spoilt on purpose"),
            (
                "received",
                "?" if self.received is None else f"{self.received:,}",
                "by fastkin, a bad frame as one",
            ),
            ("stored", f"{self.stored:,}", "in the stream"),
            ("duplicates", f"{self.duplicates:,}", "stored, but the answer was cut off: sent again"),
            ("dead-lettered", f"{self.dead_lettered:,}", "set aside in a file"),
            ("lost", f"{self.lost:,}", "published, and neither stored nor set aside"),
        ]
        if self.foreign:
            rows.append(("corrupt", f"{self.foreign:,}", "stored, but never published"))
        return rows


def balance(
    published: int, spoilt: list[bytes], stored: list[bytes], set_aside: list[bytes],
    received: int | None,
) -> Ledger:  # fmt: skip
    """Every published record must be in the stream, every spoilt frame among the dead letters."""
    there = Counter(stored)
    missing = there_is = 0
    for n in range(published):
        # Payloads never repeat, so each record is looked up by its bytes: no count of fastkin's is believed here.
        times = there.pop(welder_payload(n), 0)
        missing += times == 0
        there_is += times > 0
    lost_frames = len(spoilt) - sum((Counter(spoilt) & Counter(set_aside)).values())
    # What is left was stored and never published: bytes that were changed on the way.
    foreign = sum(there.values())
    return Ledger(
        published=published,
        malformed=len(spoilt),
        received=received,
        stored=len(stored),
        duplicates=len(stored) - there_is - foreign,
        dead_lettered=len(set_aside),
        lost=missing + lost_frames,
        foreign=foreign,
    )


# --- the demo ---


@dataclass
class Demo:
    seconds: float
    rate: float
    kill: bool
    folder: Path
    show: Show
    verbose: bool = False
    spoilt: list[bytes] = field(default_factory=list)

    async def run(self) -> Ledger:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        myself = asyncio.current_task()
        assert myself is not None

        def asked() -> None:
            # once: no more is published, and the ledger is made; again: enough
            if stop.is_set():
                myself.cancel()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked)
        async with AsyncExitStack() as stack:
            name, port = await stack.enter_async_context(broker(self.folder))
            if name == "amqtt":
                if self.kill:
                    # it forgets what was in flight when a client dies: what is missing then, it has lost, not fastkin
                    raise DemoError("--kill needs mosquitto, which delivers again: apt-get install mosquitto")
                rate, self.rate = self.rate, min(self.rate, AMQTT_RATE)
                at = f", at {self.rate:g} records/s" if self.rate < rate else ""
                self.show.say(f"mosquitto is not installed: amqtt{at}")
            emulator = await stack.enter_async_context(Emulator({STREAM: SHARDS}))
            # A process of its own, as in production. So that what it says about memory and CPU is about fastkin
            # alone, the plant and the stream are in this one.
            service = await stack.enter_async_context(self._service(name, port, emulator.url))
            await service.until(lambda: service.log().count("subscribed") >= 2)
            self.show.say(
                f"{self.rate:,.0f} records/s of simulated welders, half in frames -> {name} on port"
                f" {port} -> fastkin run -> stream {STREAM!r}, {SHARDS} shards"
                f" ({SHARDS * 1000:,} records/s), emulated at {emulator.url}"
            )
            publisher = Publisher(Broker(host=HOST, port=port, client_id="plant", clean_session=True))
            await publisher.connect()
            stack.push_async_callback(publisher.close)
            plant = Plant(rate=self.rate, frame_records=max(1, min(50, int(self.rate / 20))))
            async with asyncio.TaskGroup() as group:
                begin = time.monotonic()
                watch = group.create_task(self._watch(begin, plant, emulator, service))
                trouble = group.create_task(self._trouble(emulator, publisher, service))
                await plant.run(publisher, self.seconds, stop)
                trouble.cancel()
                emulator.scale_limits(STREAM, 1.0)
                await publisher.drain()
                await self._stored(emulator, plant.published)
                watch.cancel()
            code = await service.end(signal.SIGTERM, 35.0)
            if code != 0:
                self.show.say(f"fastkin run ended with {code}; it said:\n{_tail(service.log())}")
            stored = [record.data for record in emulator.stored(STREAM)]
        ledger = balance(plant.published, self.spoilt, stored, self._set_aside(), self._received(service.log()))
        if self.verbose or not ledger.good:
            self.show.say(f"the log of fastkin run:\n{_tail(service.log(), 40)}")
        return ledger

    def _service(self, broker_name: str, port: int, url: str) -> Process:
        path = self.folder / "demo.toml"
        dead_letters = self.folder / "dead-letters.jsonl"
        # amqtt leaves a client that speaks 5.0 without an answer: the service would wait 10 s before it asks again
        protocol = "3.1.1" if broker_name == "amqtt" else "auto"
        path.write_text(
            SETTINGS.format(host=HOST, port=port, protocol=protocol, stream=STREAM, url=url, dead_letters=dead_letters)
        )
        # The demo must not reach a real stream because of what happens to be set in this shell.
        away = ("AWS_", "FASTKIN_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        env = {name: value for name, value in os.environ.items() if not name.startswith(away)}
        command = [sys.executable, "-m", "fastkin", "run", str(path)]
        return Process("fastkin run", command, self.folder / "fastkin.log", env)

    async def _watch(self, begin: float, plant: Plant, emulator: Emulator, service: Process) -> None:
        before, cpu_before = begin, service.cost()[1]
        percent = 0.0
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            memory, cpu = service.cost()
            if now - before >= 1:
                percent = max(0.0, 100 * (cpu - cpu_before) / (now - before))
                before, cpu_before = now, cpu
            stored, throttled = emulator.stored_count(STREAM), emulator.counters.throttled
            self.show.now(Now(now - begin, plant.published, stored, throttled, memory, percent))

    async def _trouble(self, emulator: Emulator, publisher: Publisher, service: Process) -> None:
        part = self.seconds / 10
        await asyncio.sleep(3 * part)
        self.show.say(f"-- the stream is throttled to a fifth for {2 * part:.1f} s: nothing is dropped")
        emulator.scale_limits(STREAM, 0.2)
        await asyncio.sleep(2 * part)
        emulator.scale_limits(STREAM, 1.0)
        self.show.say("-- the throttle ends")
        await asyncio.sleep(part)
        self.show.say("-- two calls are stored, but cut before the answer: expect duplicates, no loss")
        emulator.faults.cut("after", times=2)
        await asyncio.sleep(part)
        self.show.say("-- a malformed frame: it becomes a dead letter")
        frame = encode_frame([welder_payload(0), welder_payload(1)])[:-7]
        self.spoilt.append(frame)
        await publisher.publish("/devices/broken/bulkData/telemetry", frame, 1)
        await asyncio.sleep(part)
        if self.kill:
            self.show.say("-- fastkin run is killed (SIGKILL) and started again")
            await service.end(signal.SIGKILL, 5.0)
            await service.start()

    async def _stored(self, emulator: Emulator, published: int) -> None:
        """Until everything is there, or nothing has moved for a while."""
        moved = time.monotonic()
        before: tuple[int, int] | None = None
        while time.monotonic() - moved < STALL_S:
            aside = len(self._set_aside())
            state = (emulator.stored_count(STREAM), aside)
            if state != before:
                before, moved = state, time.monotonic()
            if aside >= len(self.spoilt) and state[0] >= published:
                # duplicates may stand in for records that are still under way: look closely
                there = {record.data for record in emulator.stored(STREAM)}
                if len(there) >= published:
                    return
            await asyncio.sleep(0.1)

    def _set_aside(self) -> list[bytes]:
        path = self.folder / "dead-letters.jsonl"
        if not path.exists():
            return []
        lines = path.read_text("ascii").splitlines()
        return [base64.b64decode(json.loads(line)["payload"]) for line in lines if line]

    def _received(self, log: str) -> int | None:
        counts = re.findall(r"stopped: received=(\d+)", log)
        return None if self.kill or len(counts) != 2 else sum(int(count) for count in counts)


def demo(*, seconds: float, rate: float, kill: bool, keep: bool, verbose: bool, quiet: bool) -> int:
    live = sys.stdout.isatty() and not quiet
    show: Show = Live(seconds) if live else Plain(quiet=quiet)
    folder = Path(tempfile.mkdtemp(prefix="fastkin-demo-"))
    good = False
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            ledger = runner.run(Demo(seconds, rate, kill, folder, show, verbose).run())
        good = ledger.good
    except BaseExceptionGroup as group:
        # The demo's one task group has one error to tell; the group around it would only hide its text.
        raise group.exceptions[0] from None
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        show.close()
        # When something was lost the logs are the only witness.
        if keep or (not good and any(folder.iterdir())):
            click.echo(f"settings, logs and dead letters are in {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    _print(ledger, rich=live)
    return 0 if good else 1


def _print(ledger: Ledger, *, rich: bool) -> None:
    if not rich:
        click.echo("\nledger")
        for name, count, what in ledger.rows():
            click.echo(f"  {name:<14}{count:>12}   {what}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ledger", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, count, what in ledger.rows():
        style = None
        if name in {"lost", "corrupt"}:
            style = "bold green" if count == "0" else "bold red"
        table.add_row(name, count, what, style=style)
    Console().print(table)
