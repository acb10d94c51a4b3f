"""The rig of the ledger suite: a plant, a broker, `fastkin run` as a process, a stream, a proxy on every way.

    plant -> [plant_way] -> mosquitto -> [broker_way] -> fastkin -> [kinesis_way] -> emulator

    with Rig(tmp_path) as rig:
        rig.flow(2000)                       # numbered records, raw and bulk mixed, in the background
        rig.stored(500)
        rig.kinesis.faults.cut("after", times=3)
        rig.settle()                         # all is stored and acknowledged, or the case fails
        rig.finish()                         # SIGTERM; the books are closed, the report line is printed

Everything but fastkin itself runs on one loop in a thread of its own; what a test says from its own thread is
handed over. Two pipelines, `raw` and `bulk`, share the broker, the stream and the budget of time.

The bound on duplicates. A record may be stored twice for two reasons only:
  - Kinesis stored it and the caller cannot know: the answer was cut, late, damaged on the way, or not an answer.
    The emulator keeps every call that stored something and whether its true answer left whole; the proxy knows
    which connections lost bytes on the way back.
  - the broker handed it out more than once, because its acknowledgement was open when a connection or a process
    ended. The proxy reads every PUBLISH that passes.
`bound` is the sum of both, in records. `finish()` asserts it, and that the broker did not hand out again more
than was open at the cuts that were seen.

With `partition_key = "content"` a Consumer with `dedupe` reads the stream at the end, and must see each record once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import psutil

from fastkin import Consumer, encode_frame
from fastkin.config import Broker
from fastkin.emulator import Emulator, StreamSpec
from fastkin.errors import FastkinError
from fastkin.mqtt.publisher import Publisher
from ledger import Ledger, MqttWatch, dead_letters, numbers, record, spooled, user_records
from proxy import FaultProxy
from support import stalls
from support.running import Service
from support.servers import ACCESS_KEY, SECRET_KEY, free_port, mosquitto
from websocket_bridge import WebSocketBridge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from scripted import ScriptedBroker
    from support.servers import Server

T = TypeVar("T")
Message = tuple[str, bytes, list[int]]  # topic, payload, the numbers in it
STREAM = "welders"
CHILD = Path(__file__).resolve().parent / "child.py"
REPORT = os.environ.get("LEDGER_REPORT")  # a file that gets every report line too
PATIENCE_S = float(os.environ.get("LEDGER_PATIENCE_S", "30"))  # for anything that must happen at all
SCRAPE_EVERY_S = 0.1
FRAME_RECORDS = 10
# What a process takes once, whatever its budget: TLS, the first calls and lookups, the threads' stacks and arenas.
_FIRST_CALLS_BYTES = 8 * 2**20
_USUAL = re.compile("PUBLISH|PUBACK|PINGREQ|PINGRESP")

# What a test cannot wait for, made short. The values are the code's own, only smaller.
QUICK = {
    "fastkin.delivery.gate:_OPERATOR_BASE_S": 0.1,
    "fastkin.delivery.gate:_OPERATOR_CAP_S": 0.5,
    "fastkin.delivery.gate:_CREDENTIALS_BASE_S": 0.1,
    "fastkin.delivery.gate:_CREDENTIALS_CAP_S": 0.5,
    "fastkin.delivery.gate:_CALL_CAP_S": 0.5,
    "fastkin.delivery.answers:_ENTRY_CAP_S": 0.5,
    "fastkin.service.preflight:_RETRY_S": 0.2,
    "fastkin.deadletter.insist:_RETRY_S": 0.2,
}


class Child(Service):
    """`fastkin run` through child.py, so that a case can bend clocks, disks and constants."""

    def __init__(self, directory: Path, toml: str, patch: dict[str, Any], env: dict[str, str]) -> None:
        super().__init__(directory, toml)
        self._patch = patch
        self._env = env

    def command(self) -> list[str]:
        return [sys.executable, str(CHILD)]

    def environment(self) -> dict[str, str]:
        env = super().environment() | {"LEDGER_PATCH": json.dumps(self._patch)} | self._env
        return {name: value for name, value in env.items() if value != ""}

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Scraper(threading.Thread):
    """Looks at /metrics all the time, and holds the accounting identity against every look."""

    _LINE = re.compile(r"^fastkin_([a-z_]+)\{([^}]*)\} (\S+)$", re.MULTILINE)
    _PIPELINE = re.compile(r'pipeline="([^"]+)"')
    RIGHT = (
        "records_stored_total", "records_dead_lettered_total", "records_filtered_total", "records_dropped_total",
        "records_in_flight", "spool_records",
    )  # fmt: skip

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._over = threading.Event()
        self.scrapes = 0
        self.grown = 0  # bytes of resident memory, at most, over all processes of the case
        self.pid: Callable[[], int | None] = lambda: None  # of the service
        self._base_rss: dict[int, int] = {}
        self.broken: list[str] = []
        self.last: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        while not self._over.wait(SCRAPE_EVERY_S):
            self.look()

    def stop(self) -> None:
        self._over.set()
        self.join(10)

    def weigh(self, pid: int) -> None:
        """The resident memory of the service, beside what this process had at the first look."""
        with contextlib.suppress(psutil.Error):
            rss = psutil.Process(pid).memory_info().rss
            self._base_rss.setdefault(pid, rss)
            self.grown = max(self.grown, rss - self._base_rss[pid])

    def look(self) -> None:
        try:
            with urllib.request.urlopen(self._url, timeout=5) as answer:
                text = answer.read().decode()
        except (OSError, urllib.error.URLError, ValueError):
            return  # it is down, or going down: the cases know when it must be up
        except Exception:  # noqa: BLE001 - http.client's, when the process dies in the middle
            return
        if (pid := self.pid()) is not None:
            self.weigh(pid)
        self.judge(text)

    def judge(self, text: str) -> None:
        found: dict[str, dict[str, float]] = {}
        for name, labels, value in self._LINE.findall(text):
            pipeline = self._PIPELINE.search(labels)
            if pipeline is not None:
                values = found.setdefault(pipeline[1], {})
                values[name] = values.get(name, 0.0) + float(value)
        if not found:
            self.broken.append(f"no pipeline in the scrape: {text[:300]!r}")
            return
        self.scrapes += 1
        self.last = found
        for pipeline_id, values in found.items():
            left = values["records_received_total"]
            parts = {name: values.get(name, 0.0) for name in self.RIGHT}
            if left != sum(parts.values()):
                self.broken.append(f"{pipeline_id}: received {left:.0f} != {parts}")


class Plant:
    """Publishes numbered records with QoS 1, raw and bulk in turn; says again what a broken broker did not take."""

    def __init__(self, port: int, ledger: Ledger, *, qos: int = 1, raw: bool = True, bulk: bool = True) -> None:
        self.port = port
        self._ledger = ledger
        self._qos = qos
        self._raw = raw
        self._bulk = bulk
        self._next = 0

    def messages(self, count: int, size: int) -> list[Message]:
        """Topic, payload, and the numbers in it, for the next `count` records."""
        made: list[Message] = []
        at, end = self._next, self._next + count
        self._next = end
        while at < end:
            if self._bulk and (not self._raw or at % (2 * FRAME_RECORDS) >= FRAME_RECORDS):
                which = list(range(at, min(at + FRAME_RECORDS, end)))
                made.append(("plant/bulk/1", encode_frame([record(n, size) for n in which]), which))
            else:
                which = [at]
                made.append(("plant/raw/1", record(at, size), which))
            at += len(which)
        return made

    async def flow(self, messages: list[Message], rate: float) -> None:
        """`rate` in records a second; returns when the broker has all of them."""
        done = 0  # messages that the broker took over
        began = time.monotonic()
        due = 0.0
        while done < len(messages):
            publisher = Publisher(
                Broker(host="127.0.0.1", port=self.port, clean_session=True, connect_timeout_s=2.0, keep_alive_s=2)
            )
            base = done
            try:
                await publisher.connect()
                for topic, payload, which in messages[base:]:
                    await publisher.publish(topic, payload, self._qos)
                    due += len(which) / rate
                    if (wait := began + due - time.monotonic()) > 0.002:
                        await asyncio.sleep(wait)
                await publisher.drain()
                done = len(messages)
            except FastkinError:
                done = base + (publisher.acked if self._qos else publisher.published)
                self._ledger.repeated += sum(len(each[2]) for each in messages[done : base + publisher.published])
                await asyncio.sleep(0.1)
            finally:
                for _, _, which in messages[base:done]:
                    self._ledger.published.update(which)
                with contextlib.suppress(FastkinError, OSError):
                    await publisher.close()


class Rig:
    """All parties of one case, up and connected when the block begins."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "",
        shards: int = 4,
        emulator: dict[str, Any] | None = None,
        broker: dict[str, Any] | None = None,
        kinesis: dict[str, Any] | None = None,
        pipeline: dict[str, Any] | None = None,
        pipelines: Iterable[str] = ("raw", "bulk"),
        conf: str = "",
        persistence: bool = False,
        scripted: ScriptedBroker | None = None,
        tls: Any = None,  # a server-side ssl context: the broker is reached through TLS
        patch: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        qos: int = 1,
        start: bool = True,
        ready: bool = True,
        host: str = "127.0.0.1",
        dead_letter_path: Path | None = None,
        lossy_broker: bool = False,
        spool: bool = False,
        websocket: bool = False,
    ) -> None:
        """`websocket`: fastkin reaches the broker through one. QoS 2: the broker raises what is published to that.

        `lossy_broker`: the broker forgets; then what must not be lost is what it handed out.
        `spool`: what is acknowledged may lie on the disk and is looked for at the end only."""
        self.directory = directory
        self.name = name or os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[2].partition(" ")[0]
        self.ledger = Ledger(unsafe=None if spool or qos == 0 else self._unsafe)
        self.dead_letter = dead_letter_path or directory / "dead.jsonl"
        self._host = host
        self._lossy_broker = lossy_broker or qos == 0
        self._spool = spool
        self._damaged_puts: set[int] = set()
        self._spool_known: Counter[int] = Counter()  # acknowledged and in the file at a kill, stored already
        self._qos = qos
        self._conf = conf
        self._persistence = persistence
        self._scripted = scripted
        self._tls = tls
        self._websocket = websocket
        self._pipelines = tuple(pipelines)
        self._emulator_options = {"limits": False} | (emulator or {})
        self._shards = shards
        self._settings = {
            "broker": {
                # nobody else's: a port may be given to another rig while somebody still knocks at it
                "client_id": f"ledger-{os.urandom(4).hex()}",
                "clean_session": False, "receive_maximum": 500, "keep_alive_s": 2,
                "reconnect_min_s": 0.05, "reconnect_max_s": 0.3, "connect_timeout_s": 1.0,
            } | (broker or {}),
            "kinesis": {
                "stream": STREAM, "region": "us-east-1", "max_connections": 4, "connect_timeout_s": 1.0,
                "request_timeout_s": 2.0,
            } | (kinesis or {}),
            "pipeline": {
                "budget_bytes": 16 * 2**20, "shutdown_timeout_s": 10, "qos": qos,
                "dead_letter": str(self.dead_letter),
            } | (pipeline or {}),
        }  # fmt: skip
        self._patch = {"set": QUICK | (patch or {}).get("set", {})} | {
            k: v for k, v in (patch or {}).items() if k != "set"
        }
        if websocket:  # the first WebSocket loads it, which alone takes 9.7 MiB and is no growth by traffic
            self._patch["load"] = ["aiohttp"]
        self._env = env or {}
        self._start = start
        self._ready = ready
        self._exit = contextlib.ExitStack()
        self._flows: list[Any] = []
        self._seen: dict[int, tuple[Any, int]] = {}
        self._stored_now: Counter[int] = Counter()
        self._gone: list[bytes] = []  # of streams that were deleted
        self._dead_size = -1
        self._dead_now: set[int] = set()
        self.total = 0
        self.broker_restarts = 0
        self.status_port = free_port()
        self.scraper = Scraper(self.status_port)

    # -- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._loop_thread()
        try:
            self._build()
        except BaseException:
            if hasattr(self, "service"):
                print(self.service.log()[-3000:])
            self._exit.close()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is not None:
                self._tell()
        finally:
            self._exit.close()

    def _tell(self) -> None:
        """What is needed to understand why a case failed."""
        print(f"--- {self.name}: the end of fastkin's log\n{self.service.log()[-3000:]}")
        if hasattr(self, "broker"):
            told = [line for line in self.broker.log().splitlines() if not _USUAL.search(line)]
            print("--- the end of the broker's log, without its usual packets", *told[-40:], sep="\n")
        print(f"--- {self.books()}")

    def _loop_thread(self) -> None:
        ready = threading.Event()

        def work() -> None:
            async def main() -> None:
                self.loop = asyncio.get_running_loop()
                self._over = asyncio.Event()
                ready.set()
                await self._over.wait()
                tasks = asyncio.all_tasks() - {asyncio.current_task()}
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

            asyncio.run(main())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert ready.wait(10)
        self._exit.callback(thread.join, 10)
        self._exit.callback(lambda: self.loop.call_soon_threadsafe(self._over.set))

    def _build(self) -> None:
        self.emulator: Emulator = self.call(lambda: Emulator({STREAM: self._shards}, **self._emulator_options))
        self._note_stores(self.emulator)
        self.wait(self.emulator.start())
        self._exit.callback(lambda: self.wait(self.emulator.close()))
        self.kinesis = self.emulator
        self.kinesis_way = self._proxy(self.emulator.port)
        self.kinesis_way.on_damage = self._damaged
        if self._spool:
            self.kinesis_way.hasty_s = 0.5  # calls are cut short for the spool, now and then as their answer comes
        if self._scripted is None:
            self.broker: Server = self._exit.enter_context(
                mosquitto(
                    "max_queued_messages 0\n" + ("upgrade_outgoing_qos true\n" if self._qos == 2 else "") + self._conf,
                    persistence=self._persistence,
                )
            )
            port = self.broker.port
        else:
            port = self.wait(self._scripted.start())
            self._exit.callback(lambda: self.wait(self._scripted.close()))  # type: ignore[union-attr]
            self.ledger.published |= self._scripted.numbers
            self.total = len(self._scripted.numbers)
        self.watched = self._proxy(port, watch=lambda: MqttWatch(self.ledger), ssl_context=self._tls)
        self.broker_way = self.watched if self._tls is None else self._proxy(self.watched.port)
        if self._websocket:
            bridge = WebSocketBridge(self.watched.port)
            self.wait(bridge.start())
            self._exit.callback(lambda: self.wait(bridge.close()))
            self.broker_way = self._proxy(bridge.port)
        if self._scripted is None:
            self.plant_way = self._proxy(port)
            self.plant = Plant(
                self.plant_way.port, self.ledger, qos=min(self._qos, 1),
                raw="raw" in self._pipelines, bulk="bulk" in self._pipelines,
            )  # fmt: skip
        self.service = Child(self.directory, self.toml(), self._patch, self._env)
        self._exit.callback(self._end_service)
        self.scraper.pid = lambda: self.service.process.pid if self.service.running and self.service.process else None
        self.scraper.start()
        self._exit.callback(self.scraper.stop)
        if self._start:
            self.service.start()
            if self._ready:
                self.subscribed()

    def _note_stores(self, emulator: Emulator) -> None:
        """Every call that stored something goes to the history, by the numbers it stored. An aggregate is one record to
        Kinesis and many to the books: what a call stored counts in the latter."""
        note = emulator._note

        def noted(request: Any, stored: int) -> None:
            before = self._stored_now.copy() if stored else Counter()
            note(request, stored)
            if stored and request.put is not None:
                more = self._look() - before
                request.put.stored = more.total()
                self.ledger.history.add("STORED", 0, 0, more)

        emulator._note = noted  # type: ignore[method-assign]

    def _proxy(self, port: int, **options: Any) -> FaultProxy:
        proxy = self.call(lambda: FaultProxy(port, **options))
        self.wait(proxy.start())
        self._exit.callback(lambda: self.wait(proxy.close()))
        return proxy

    def _end_service(self) -> None:
        if self.service.running:
            assert self.service.process is not None
            self.service.process.kill()
            self.service.process.wait(10)

    def toml(self) -> str:
        settings = self._settings
        way = "ws" if self._websocket else "mqtt" if self._tls is None else "mqtts"
        broker = {"url": f"{way}://{self._host}:{self.broker_way.port}" + ("/mqtt" if self._websocket else "")}
        scheme = "https" if self._emulator_options.get("ssl_context") else "http"
        kinesis = {"endpoint_url": f"{scheme}://{self._host}:{self.kinesis_way.port}"}
        tables = [
            ("[broker]", broker | settings["broker"]),
            ("[kinesis]", kinesis | settings["kinesis"]),
            ("[status]", {"port": self.status_port}),
        ]
        for each in self._pipelines:
            own = {"id": each, "topics": [f"plant/{each}/#"], "format": each} | settings["pipeline"]
            if "spool" in own:
                own["spool"] = f"{own['spool']}.{each}"
            tables.append(("[[pipeline]]", own))
        lines = []
        for title, table in tables:
            plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
            lines += [title, *(f"{key} = {_toml(value)}" for key, value in plain.items())]
            for key, value in table.items():
                if isinstance(value, dict):
                    lines += [f"[{title.strip('[]')}.{key}]", *(f"{k} = {_toml(v)}" for k, v in value.items())]
        return "\n".join(lines) + "\n"

    # -- from the test's thread to the loop's ------------------------------------------------------

    def wait(self, coroutine: Any, timeout: float = 30.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        result: T = self.wait(run())
        return result

    # -- what a case does --------------------------------------------------------------------------

    def flow(self, count: int, *, rate: float = 1500.0, size: int = 0, wait: bool = False) -> None:
        """Publish the next `count` records, in the background unless `wait`."""
        self.flow_messages(self.plant.messages(count, size), rate=rate, wait=wait)

    def flow_messages(self, messages: list[Message], *, rate: float = 1500.0, wait: bool = False) -> None:
        count = sum(len(which) for _, _, which in messages)
        self.total += count
        future = asyncio.run_coroutine_threadsafe(self.plant.flow(messages, rate), self.loop)
        self._flows.append(future)
        if wait:
            future.result(PATIENCE_S + count / rate)

    def subscribed(self, times: int = 1) -> None:
        """Every pipeline has subscribed, `times` times over all."""
        want = times * len(self._pipelines)
        self.until(lambda: self.service.log().count(" subscribed") >= want, f"{want} subscriptions")

    def stored(self, count: int, timeout: float = 0.0) -> None:
        """At least `count` different records are in the stream."""
        self.until(lambda: len(self.call(self._look)) >= count, f"{count} records are stored", timeout)

    def until(self, condition: Callable[[], Any], what: str, timeout: float = 0.0) -> None:
        deadline = time.monotonic() + (timeout or PATIENCE_S)
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout or PATIENCE_S:g} s: {what}"
            process = self.service.process
            assert process is None or process.poll() in (None, 0, -9), f"fastkin ended before: {what}"
            time.sleep(0.03)

    def logged(self, text: str, timeout: float = 0.0) -> None:
        self.until(lambda: text in self.service.log(), f"{text!r} in the log", timeout)

    def kill(self) -> None:
        """SIGKILL; returns when its connections are gone."""
        self.service.kill()
        self.until(lambda: not self.broker_way.links, "the connections are gone")
        self.look_at_spool()

    def look_at_spool(self) -> None:
        """At a kill: what is acknowledged must be in the stream, in the dead letters, or on the disk.

        A row is forgotten after its records are stored: those that are in both places may come twice.
        """
        if not self._spool:
            return
        kept = self.spooled()
        stored = self.call(lambda: Counter(self._look()))
        nowhere = self.ledger.acked - set(kept) - set(stored) - self.dead()
        assert not nowhere, f"{len(nowhere)} acknowledged records are nowhere: {sorted(nowhere)[:10]}"
        self._spool_known.update({number: count for number, count in kept.items() if number in stored})

    def spooled(self) -> Counter[int]:
        """What is in the spools now; exact only while the service is down."""
        base = self._settings["pipeline"].get("spool")
        found: Counter[int] = Counter()
        if base is not None:
            for each in self._pipelines:
                found.update(spooled(Path(f"{base}.{each}")))
        return found

    def restart(self) -> None:
        before = self.service.log().count(" subscribed")
        self.service.start()
        want = before + len(self._pipelines)
        self.until(lambda: self.service.log().count(" subscribed") >= want, "subscribed again")

    def reload(self, **pipeline: Any) -> None:
        """New settings of the pipelines, and SIGHUP; returns when they are taken up."""
        told = "settings taken up"
        before = self.service.log().count(told)
        self._settings["pipeline"] |= pipeline
        (self.directory / "fastkin.toml").write_text(self.toml())
        assert self.service.process is not None
        self.service.process.send_signal(signal.SIGHUP)
        self.until(lambda: self.service.log().count(told) > before, "the settings are taken up")

    def stop_broker(self, *, kill: bool = False) -> None:
        self.broker_restarts += 1
        self.broker.kill() if kill else self.broker.stop()

    def terminate(self) -> None:
        """SIGTERM in the middle; the exit status must be 0."""
        got = self._end()
        assert got == 0, f"exit status {got}"
        self.until(lambda: not self.broker_way.links, "the connections are gone")
        self.look_at_spool()

    def _end(self) -> int:
        """SIGTERM: the exit status. The process is gone within its shutdown_timeout_s and two seconds, in any case."""
        self.scraper.look()
        limit = self._settings["pipeline"]["shutdown_timeout_s"] + 2.0
        try:
            return self.service.terminate(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there {limit:g} s after SIGTERM: {self.service.log()[-4000:]}") from None

    def _damaged(self, port: int) -> None:
        """The last answer on this connection may not have arrived, or not as it was sent."""
        put = next((put for put in reversed(self.emulator.puts) if put.port == port), None)
        if put is not None:
            self._damaged_puts.add(id(put))

    def delete_stream(self) -> None:
        """What it held stays in the books."""

        def delete() -> None:
            self._look()
            stream = self.emulator.service.streams.pop(STREAM)
            self._gone += [entry.data for entry in stream.stored()]

        self.call(delete)

    def create_stream(self, shards: int) -> None:
        self.call(lambda: self.emulator.service.add_stream(STREAM, StreamSpec(shards=shards)))

    def split_shard(self, index: int) -> None:
        def split() -> None:
            stream = self.emulator.service.streams[STREAM]
            shard = stream.shards[index]
            stream.split(shard, (shard.start + shard.end) // 2, time.time(), time.monotonic())

        self.call(split)

    def merge_shards(self, one: int, two: int) -> None:
        def merge() -> None:
            stream = self.emulator.service.streams[STREAM]
            stream.merge(stream.shards[one], stream.shards[two], time.time(), time.monotonic())

        self.call(merge)

    # -- the books -----------------------------------------------------------------------------------

    def _look(self) -> Counter[int]:
        """Every number in the stream so far, with how often. On the loop; reads only what is new."""
        stream = self.emulator.service.streams.get(STREAM)
        for shard in stream.shards if stream is not None else ():
            _, at = self._seen.get(id(shard), (shard, 0))
            for entry in shard.log[at:]:
                self._stored_now.update(numbers(entry[2]))
            self._seen[id(shard)] = (shard, len(shard.log))
        return self._stored_now

    def _unsafe(self, which: Iterable[int]) -> list[int]:
        """Acknowledged, and at this moment neither stored nor in the dead letters."""
        missing = [number for number in which if number not in self._look()]
        if missing:
            missing = [number for number in missing if number not in self.dead()]
        return missing

    def dead(self) -> set[int]:
        size = sum(path.stat().st_size for path in self.dead_letter.parent.glob("dead.jsonl*"))
        if size != self._dead_size:
            self._dead_size = size
            self._dead_now = {n for payload in dead_letters(self.dead_letter) for n in numbers(payload)}
        return self._dead_now

    @property
    def bound(self) -> int:
        """Records that may have come twice; see the head of this module."""
        unknown = sum(put.stored for put in self.emulator.puts if not put.answered or id(put) in self._damaged_puts)
        return unknown + self.ledger.redelivered + self._spool_known.total()

    @property
    def duplicates_told(self) -> int:
        """What fastkin itself says may have come twice, at the last look before it stopped."""
        return int(sum(each.get("duplicates_possible_total", 0.0) for each in self.scraper.last.values()))

    def books(self) -> dict[str, int]:
        stored = self.call(lambda: Counter(self._look()))
        dead = self.call(self.dead)
        ledger = self.ledger
        expected = set(ledger.handed) if self._lossy_broker else ledger.published
        return {
            "published": len(expected),
            "stored": len(stored),
            "dup": stored.total() - len(stored),
            "bound": self.bound,
            "dead": len(dead - set(stored)),
            "lost": len(expected - set(stored) - dead),
            "redelivered": ledger.redelivered,
            "open_at_cuts": ledger.unacked_at_cut,
            "unacked": sum(link.watch.unacked for link in self.watched.links if link.watch is not None),  # type: ignore[attr-defined]
            "scrapes": self.scraper.scrapes,
        }

    def told(self, name: str) -> int:
        """The sum over the pipelines of one of fastkin's own figures."""
        self.scraper.look()
        return int(sum(each.get(name, 0.0) for each in self.scraper.last.values()))

    def contents(self) -> list[bytes]:
        """The data in the stream, in order of arrival within each shard."""
        return self.call(lambda: [entry[2] for s in self.emulator.service.streams[STREAM].shards for entry in s.log])

    def published(self) -> None:
        """Wait until the broker has all of it."""
        for flow in self._flows:
            flow.result(PATIENCE_S)
        self._flows.clear()

    def missing(self) -> set[int]:
        """What was handed out and is neither stored nor set aside."""
        return self.call(lambda: set(self.ledger.handed) - set(self._look()) - self.dead())

    def settle(self, timeout: float = 0.0, *, lost: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Every record has ended and every message is acknowledged; `lost`: of those the case knows it."""
        self.published()

        def ended() -> bool:
            done = set(self._look()) | self.dead() | lost
            return not set(self.ledger.handed) - done and (self._lossy_broker or len(done) >= self.total)

        self.until(lambda: self.call(ended), "every record is stored or set aside", timeout)
        if self._qos:
            self.until(lambda: self.books()["unacked"] == 0, "every message is acknowledged", timeout)

    def finish(
        self,
        *,
        code: int = 0,
        least_redelivered: int = 0,
        lost: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> dict[str, int]:
        """Close the books: stop the service, check everything, print the report line."""
        if self.service.running:
            got = self._end()
            assert got == code, f"exit status {got}, not {code}"
        self.until(lambda: not self.watched.links, "the broker's connections are gone")
        self.until(lambda: not self.kinesis_way.links, "Kinesis's connections are gone")
        books = self.books()
        line = (
            "{name}: published {published} stored {stored} dup {dup}<={bound} dead {dead} lost {lost} "
            "redelivered {redelivered} scrapes {scrapes}"
        ).format(name=self.name, **books)
        print(line)
        if REPORT:
            with open(REPORT, "a") as report:
                report.write(line + "\n")
        log = self.service.log()
        assert "Traceback" not in log, log[-4000:]
        assert not stalls.told_in(log), log[-4000:]
        ledger = self.ledger
        assert not self.scraper.broken, f"the accounting identity is broken: {self.scraper.broken[:3]}"
        assert self.scraper.scrapes > 0, "nothing was scraped: the identity was not looked at"
        assert self.scraper.grown <= self._memory(), f"RSS grew by {self.scraper.grown / 2**20:.1f} MiB"
        assert not ledger.too_early, f"acknowledged before they were safe: {ledger.too_early[:10]}"
        if not self.broker_way.flipped:  # else what came was not what the broker sent
            faults = ledger.history.faults(self.call(self.dead), whole=not self._spool and self._qos > 0)
            assert not faults, f"{len(faults)} faults in the history: {faults[:5]}"
        gone = self.missing() if self._lossy_broker else ledger.published - set(self._look()) - self.dead()
        assert gone <= lost, f"{len(gone - lost)} records are lost: {sorted(gone - lost)[:10]} {books}"
        self._contents()
        self._seen_once()
        assert books["dup"] <= books["bound"], f"more duplicates than can be explained: {books}"
        if not self.broker_restarts and self._scripted is None:
            # else the broker may have lost acknowledgements that it had not read or not written down
            most = ledger.unacked_at_cut + ledger.late_acks + ledger.repeated
            assert books["redelivered"] <= most, f"the broker says again what was acknowledged: {most} {books}"
        assert books["redelivered"] >= least_redelivered, f"the fault did not bite: {books}"
        return books

    def _memory(self) -> float:
        """How much resident memory may grow: budgets and a tenth, and what a process takes once."""
        pipeline = self._settings["pipeline"]
        record = pipeline.get("max_record_bytes", 2**20)
        budget = pipeline["budget_bytes"]
        return len(self._pipelines) * max(1.1 * budget, budget + 2**20 + 4 * record) + _FIRST_CALLS_BYTES

    def _seen_once(self) -> None:
        """With keys made from content, who reads with `dedupe` sees each record once, however often it is stored."""
        if self._settings["pipeline"].get("partition_key") != "content" or self._gone:
            return
        if self._emulator_options.get("ssl_context"):  # a Consumer takes no authorities of its own
            return
        self.call(self.emulator.faults.clear)
        seen = self.wait(self._read_with_dedupe(), PATIENCE_S + 10)
        stored = self.call(lambda: Counter(self._look()))
        assert set(seen) == set(stored), f"never seen: {sorted(set(stored) - set(seen))[:10]}"
        twice = [number for number, times in seen.items() if times > 1]
        assert not twice, f"{len(twice)} records are seen twice: {twice[:10]}"

    async def _read_with_dedupe(self) -> Counter[int]:
        stream = self.emulator.service.streams[STREAM]
        total = sum(len(user_records(entry.data)) for entry in stream.stored())
        seen: Counter[int] = Counter()
        consumer = Consumer(
            STREAM, region="us-east-1", endpoint_url=self.emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY,
            raw=True, dedupe=100_000, partition_key="content", poll_s=0.05,
        )  # fmt: skip

        async def read() -> None:
            async for each in consumer.stream("trim_horizon"):
                seen.update(numbers(each.raw))

        async with consumer, asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read())
            while (stats := consumer.stats())["records"] + stats["duplicates"] < total:
                await asyncio.sleep(0.02)
            reading.cancel()
        return seen

    def _contents(self) -> None:
        """What is stored is, byte for byte, what was published."""
        stream = self.emulator.service.streams.get(STREAM)
        stored = [entry.data for entry in stream.stored()] if stream is not None else []
        stored += self._gone
        if self._settings["pipeline"].get("aggregation") == "kpl":
            stored = [data for each in stored for data in user_records(each)]
        wrong = [data for data in stored if not _whole(data)]
        assert not wrong, f"{len(wrong)} stored records are not what was published: {wrong[0][:80]!r}"


def _whole(data: bytes) -> bool:
    which = numbers(data)
    return len(which) == 1 and data == record(which[0], len(data))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value)
