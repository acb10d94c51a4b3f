"""One run: the processes of a plan, watched until every record is accounted for."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from fastkin.bench import certificates, meter, peers, service, times
from fastkin.bench.children import HOST, START_S, BenchError, Child, accepts, find_mosquitto, free_port, ours
from fastkin.bench.ledger import Balance
from fastkin.bench.plan import EMULATOR, MOSQUITTO, SOURCE, Sample
from fastkin.bench.readback import read_back
from fastkin.bench.result import Result

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan

STALL_S = 30.0  # without any progress: what is missing then is lost
_LOOK_S = 0.1
_SETTLE_S = 0.3  # before the clocks start: what a start leaves to be done

_MOSQUITTO = """\
listener {port} {host}
allow_anonymous true
persistence false
# beyond its default of 1000 messages it throws away what waits for a subscriber, and tells nobody
max_queued_messages 0
"""


class Show(Protocol):
    """Where a run tells how it goes."""

    def say(self, text: str) -> None: ...
    def now(self, sample: Sample) -> None: ...


async def run(plan: Plan, folder: Path, show: Show) -> Result:
    """Make the run of a plan in a folder that is there. BenchError: it could not be made.

    SettingsError: `--set` is wrong.
    """
    async with AsyncExitStack() as stack:
        return await _Run(dataclasses.replace(plan, folder=str(folder)), stack, show).go()


class _Run:
    """The processes and what they tell."""

    def __init__(self, plan: Plan, stack: AsyncExitStack, show: Show) -> None:
        self.plan = plan
        self._stack = stack
        self._show = show
        self._folder = Path(plan.folder)
        self._endpoint: Child | None = None
        self._load: Child | None = None  # who publishes
        self._subject: Child | None = None  # what is measured
        self._samples: list[Sample] = []
        self._began_wall = 0.0

    async def go(self) -> Result:
        await self._start()
        load, subject = self._load, self._subject
        assert load is not None
        assert subject is not None
        await asyncio.sleep(_SETTLE_S)
        before, begin = meter.cost(subject.pid), time.monotonic()
        self._began_wall = time.time()
        await load.ask("go")
        told = await self._watch(begin, before)
        after, end = meter.cost(subject.pid), time.monotonic()
        code = None if subject is load else await subject.end()
        balance = await self._balance(told)
        result = Result(
            plan=self.plan,
            measured=subject.name,
            seconds=max(0.0, (told["last"] or end) - (told["began"] or begin)),
            watched_s=end - begin,
            messages=told["published"],
            records=told["stored"],
            cpu_s=after.cpu_s - before.cpu_s,
            wakeups=after.wakeups - before.wakeups,
            rss_mb=max([after.rss_mb, *(each.rss_mb for each in self._samples)]),
            calls=told["calls"],
            throttled=told["throttled"],
            repeated=told["repeated"],
            order_errors=told["order_errors"],
            balance=balance,
            samples=self._samples,
        )
        if self.plan.command == "mqtt" or (self.plan.endpoint != EMULATOR and balance.latency_ms):
            result.latency_of = "published to acknowledged"
        if code and balance.good and self.plan.peer == "fastkin":
            self._show.say(f"{subject.name} ended with {code}: {subject.log()[-300:]}")
        return result

    # -- starting ------------------------------------------------------------------------------------

    async def _enter(self, child: Child) -> Child:
        return await self._stack.enter_async_context(child)

    async def _start(self) -> None:
        plan = self.plan
        times.make(plan, plan.forms().block)
        if plan.tls_broker or plan.tls_kinesis:
            await asyncio.to_thread(certificates.make, plan)
            cert = str(plan.path("cert.pem"))
            self._know(
                broker_ca=cert if plan.tls_broker else plan.broker_ca,
                endpoint_ca=cert if plan.tls_kinesis else plan.endpoint_ca,
            )
        if plan.command != "mqtt":
            await self._start_endpoint()
        if plan.command == "producer":
            self._load = self._subject = await self._enter(ours("producer", "produce", self.plan, self._folder))
            await self._load.hello()
            return
        await self._start_broker()
        await self._start_subject()

    def _know(self, **what: Any) -> None:
        self.plan = dataclasses.replace(self.plan, **what)

    async def _start_endpoint(self) -> None:
        if self.plan.endpoint != EMULATOR:
            self._know(endpoint_url=self.plan.endpoint)
            return
        self._endpoint = await self._enter(ours("emulator", "endpoint", self.plan, self._folder))
        self._know(endpoint_url=(await self._endpoint.hello())["url"])

    async def _start_broker(self) -> None:
        plan = self.plan
        listens = plan.peer != "fastkin" and peers.find("bridge", plan.peer).listens
        if listens:
            self._know(broker_url=f"mqtt://{HOST}:{free_port()}")
        elif plan.broker == SOURCE:
            self._load = await self._enter(ours("source", "load", plan, self._folder))
            port = (await self._load.hello())["port"]
            self._know(broker_url=f"{'mqtts' if plan.tls_broker else 'mqtt'}://{HOST}:{port}")
        elif plan.broker == MOSQUITTO:
            self._know(broker_url=await self._start_mosquitto())
        else:
            self._know(broker_url=plan.broker)

    async def _start_mosquitto(self) -> str:
        program = find_mosquitto()
        if program is None:
            raise BenchError("mosquitto is not installed: apt-get install mosquitto, or give --broker URL")
        port = free_port()
        text = _MOSQUITTO.format(port=port, host=HOST)
        if self.plan.tls_broker:
            text += f"certfile {self.plan.path('cert.pem')}\nkeyfile {self.plan.path('key.pem')}\n"
        self.plan.path("mosquitto.conf").write_text(text)
        command = [program, "-c", str(self.plan.path("mosquitto.conf"))]
        child = await self._enter(Child("mosquitto", command, self._folder, plan=self.plan, talks=False))
        await child.until(lambda: "running" in child.log())
        return f"{'mqtts' if self.plan.tls_broker else 'mqtt'}://localhost:{port}"

    async def _start_subject(self) -> None:
        plan = self.plan
        plan.path("bench.toml").write_text(service.settings_text(plan))
        if plan.peer == "fastkin":
            await asyncio.to_thread(service.check, plan)
        if plan.command == "mqtt":
            subject = ours("intake", "intake", plan, self._folder)
        elif plan.peer == "fastkin":
            subject = service.fastkin_run(plan, self._folder)
        else:
            subject = peers.bridge(plan, self._folder)
        self._subject = subject = await self._enter(subject)
        if plan.command == "mqtt":
            await subject.hello()
        if self._load is None:
            await self._subscribed(subject)
            self._load = await self._enter(ours("machines", "load", plan, self._folder))
            await self._load.hello()
            return
        waited = asyncio.create_task(self._load.ask("subscribed"))
        try:
            await subject.until(waited.done)
        except BaseException:
            waited.cancel()
            raise

    async def _subscribed(self, subject: Child) -> None:
        """Until what is published at the broker will reach it."""
        plan = self.plan
        if plan.command == "mqtt":
            await subject.ask("subscribed", START_S)
        elif plan.peer == "fastkin":
            await subject.until(lambda: subject.log().count("subscribed") >= plan.pipelines)
        else:
            await subject.until(lambda: accepts(urlsplit(plan.broker_url).port or 0))

    # -- watching ------------------------------------------------------------------------------------

    async def _look(self) -> tuple[dict[str, Any], int]:
        """What was published, and how many records are stored."""
        assert self._load is not None
        assert self._subject is not None
        told = await self._load.ask("report")
        if told.get("error"):
            raise BenchError(f"publishing broke off: {told['error']}")
        if self._endpoint is not None:
            return told, (await self._endpoint.ask("stored"))["stored"]
        if self.plan.command == "mqtt":
            return told, (await self._subject.ask("report"))["received"] * self._per_message
        return told, told["acked"] * self._per_message

    @property
    def _per_message(self) -> int:
        return self.plan.records // max(1, self.plan.messages)

    async def _watch(self, begin: float, first: meter.Cost) -> dict[str, Any]:
        """Until everything is there, or nothing moves any more; the last reports, as one."""
        assert self._subject is not None
        state: tuple[int, int] | None = None
        moved = sampled = begin
        before = first
        told_before: dict[str, Any] = {"stored": 0, "calls": 0}
        while True:
            await asyncio.sleep(_LOOK_S)
            told, stored = await self._look()
            now = time.monotonic()
            if state != (state := (told["published"], stored)):
                moved = now
            over = told["done"] and (stored >= self.plan.records or self._cannot_tell)
            stuck = now - moved > STALL_S or self._subject.ended
            if now - sampled >= self.plan.interval_s or over or stuck:
                report: dict[str, Any] = {
                    "stored": stored, "calls": 0, "throttled": 0, "latency_ms": {}, "last": 0.0
                }  # fmt: skip
                if self._endpoint is not None:
                    report |= await self._endpoint.ask("report")
                cost = meter.cost(self._subject.pid)
                if now - sampled >= min(self.plan.interval_s, _LOOK_S):
                    self._sample(now - begin, now - sampled, told, report, told_before, cost, before)
                sampled, before, told_before = now, cost, report
                if over or stuck:
                    return told | report | {"stalled": stuck and not over}

    @property
    def _cannot_tell(self) -> bool:
        """With QoS 0 nobody acknowledges, and a foreign endpoint tells nothing before it is read back."""
        return self._endpoint is None and self.plan.command != "mqtt"

    def _sample(
        self,
        seconds: float,
        passed: float,
        told: dict[str, Any],
        report: dict[str, Any],
        former: dict[str, Any],
        cost: meter.Cost,
        before: meter.Cost,
    ) -> None:
        published = told["published"] * self._per_message
        sample = Sample(
            seconds=round(seconds, 3),
            published=published,
            stored=report["stored"],
            per_s=(report["stored"] - former["stored"]) / passed,
            in_flight=max(0, published - report["stored"]),
            throttled=report["throttled"],
            rss_mb=cost.rss_mb,
            cpu_percent=max(0.0, 100 * (cost.cpu_s - before.cpu_s) / passed),
            wakeups_per_s=max(0.0, (cost.wakeups - before.wakeups) / passed),
            calls_per_s=(report["calls"] - former["calls"]) / passed,
            latency_ms=report["latency_ms"] or told["latency_ms"],
        )
        self._samples.append(sample)
        self._show.now(sample)

    # -- the ledger ----------------------------------------------------------------------------------

    async def _balance(self, told: dict[str, Any]) -> Balance:
        plan = self.plan
        if plan.command == "mqtt":
            published = told["published"] * self._per_message
            return Balance(
                published=published,
                stored=told["stored"],
                duplicates=max(0, told["stored"] - published),
                lost=max(0, published - told["stored"]),
                latency_ms=told["latency_ms"],
            )
        if self._endpoint is not None:
            return Balance(**await self._endpoint.ask("balance"))
        self._show.say(f"reading stream {plan.stream} back from {urlsplit(plan.endpoint).hostname}")
        balance = await read_back(plan, self._began_wall)
        balance.latency_ms = told["latency_ms"]
        told["stored"] = balance.stored
        return balance
