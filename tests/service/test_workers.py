"""`fastkin run --workers N` as processes at a real broker: shared, killed, reloaded, stopped, and what is left over."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

import psutil
import pytest

from fastkin.config import Broker
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from fastkin.mqtt.visit import has_session, knows_shared
from support.running import Service
from support.servers import aedes, free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from support.servers import Server

pytestmark = pytest.mark.timeout(400)

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "{client}"
reconnect_max_s = 0.5

[kinesis]
stream = "s"
endpoint_url = "{url}"
region = "us-east-1"

[status]
port = {status}

[workers]
{workers}

[[pipeline]]
id = "a"
topics = ["{client}/#"]
dead_letter = "none"
linger_ms = 5
shutdown_timeout_s = {limit}
{more}
"""


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\n") as running:
        yield running


class Run:
    """One service of several processes, the emulator it writes to, and a publisher."""

    def __init__(self, directory: Path, server: Server, emulator: Emulator, client: str) -> None:
        self.emulator = emulator
        self.client = client
        self.service = Service(directory, "")
        self._path = directory / "fastkin.toml"
        self._server = server
        self._status = free_port()
        self.published = 0

    @property
    def at(self) -> Broker:
        return Broker(host=self._server.host, port=self._server.port)

    def write(self, workers: str, *, limit: float = 20, more: str = "") -> None:
        self._path.write_text(
            SETTINGS.format(
                port=self._server.port, client=self.client, url=self.emulator.url, status=self._status,
                workers=workers, limit=limit, more=more,
            )
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        self.service.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self.service.process is not None
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.service.process.pid).children(recursive=True):
                child.kill()
        if self.service.process.poll() is None:
            self.service.kill()

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        try:
            async with asyncio.timeout(200):
                while not condition():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"never: {what}\n{self.service.log()}") from None

    async def said(self, *words: str, times: int = 1) -> None:
        """Since this process was started."""

        def found() -> bool:
            lines = self.service.log_of_process().splitlines()
            return sum(all(word in line for word in words) for line in lines) >= times

        await self.until(found, f"said {words} {times} times")

    async def publish(self, count: int) -> None:
        async with Publisher(self.at) as publisher:
            for _ in range(count):
                await publisher.publish(f"{self.client}/m", b"%d" % self.published, 1)
                self.published += 1
            await publisher.drain()

    @property
    def stored(self) -> list[int]:
        return [int(record.data) for record in self.emulator.stored("s")]

    async def all_stored(self) -> None:
        await self.until(lambda: set(self.stored) == set(range(self.published)), "all is stored")

    async def get(self, path: str) -> tuple[int, str]:
        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._status}{path}", timeout=20) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(ask)

    async def workers(self) -> dict[str, Any]:
        return json.loads((await self.get("/healthz"))[1])["workers"]  # type: ignore[no-any-return]

    def send(self, number: signal.Signals) -> None:
        assert self.service.process is not None
        self.service.process.send_signal(number)

    async def ended(self) -> int:
        assert self.service.process is not None
        return await asyncio.to_thread(self.service.process.wait, 200)

    @property
    def last(self) -> str:
        return self.service.log().splitlines()[-1]


@asynccontextmanager
async def rig(directory: Path, server: Server, client: str, workers: str, **more: Any) -> AsyncIterator[Run]:
    async with Emulator({"s": 2}) as emulator:
        run = Run(directory, server, emulator, client)
        run.write(workers, **more)
        async with run:
            yield run


async def test_workers_share_and_a_killed_one_loses_nothing(server: Server, tmp_path: Path) -> None:
    async with rig(tmp_path, server, "kill", "count = 2") as run:
        await run.said(" subscribed ", times=2)
        await run.said("running: ")
        await run.publish(100)
        await run.all_stored()
        assert (await run.get("/readyz"))[0] == 200
        page = (await run.get("/metrics"))[1]
        name = r'fastkin_records_stored_total\{pipeline="a",worker="(\d)"\} (\d+)'
        fed = {worker: int(count) for worker, count in re.findall(name, page)}
        assert set(fed) == {"0", "1"}
        assert all(fed.values()), "one was given nothing"
        assert sum(fed.values()) == 100
        assert 'fastkin_worker_restarts_total{worker="1"} 0.0' in page
        assert re.search(r'^process_resident_memory_bytes\{worker="1"\} \d', page, re.MULTILINE)

        former = await run.workers()
        run.emulator.faults.call("InternalFailureException", operation="PutRecords", times=4)
        await run.publish(100)
        os.kill(former["1"]["pid"], signal.SIGKILL)
        await run.publish(100)
        await run.said("ERROR", "worker 1 was ended by SIGKILL", "starts again in 1.0 s")
        await run.said("worker=1", " subscribed ", times=2)
        await run.publish(100)
        await run.all_stored()
        again = await run.workers()
        assert again["0"] == former["0"], "the other one does not notice"
        assert again["1"]["pid"] != former["1"]["pid"]
        assert 'fastkin_worker_restarts_total{worker="1"} 1.0' in (await run.get("/metrics"))[1]

        run.send(signal.SIGTERM)
        assert await run.ended() == 0
        assert "nothing is left" in run.last
        assert "worker=" not in run.last
        assert not psutil.pid_exists(again["0"]["pid"])


async def test_a_stop_drains_all_and_a_second_signal_waits_for_none(server: Server, tmp_path: Path) -> None:
    async with rig(tmp_path, server, "stop", "count = 2", limit=600) as run:
        await run.said(" subscribed ", times=2)
        await run.said("running: ")
        run.emulator.faults.call("InternalFailureException", operation="PutRecords")
        await run.publish(20)
        await run.said("worker=0", "call failed")
        await run.said("worker=1", "call failed")
        pids = [each["pid"] for each in (await run.workers()).values()]
        run.send(signal.SIGTERM)
        await run.said("SIGTERM: takes no more")
        # whoever ends all processes of a service ends the workers too: for them it is the same wish
        os.kill(pids[0], signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert psutil.pid_exists(pids[0])
        run.send(signal.SIGTERM)
        assert await run.ended() == 0
        assert "SIGTERM: stops at once" in run.service.log()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert len(re.findall(r"worker=\d stopped: received 10, .* 10 records are not settled", run.service.log())) == 2


async def test_workers_end_with_the_process_that_has_them(server: Server, tmp_path: Path) -> None:
    async with rig(tmp_path, server, "orphan", "count = 2") as run:
        await run.said(" subscribed ", times=2)
        await run.said("running: ")
        await run.publish(10)
        pids = [each["pid"] for each in (await run.workers()).values()]
        run.service.kill()
        await run.until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the workers end")
        await run.all_stored()
        assert run.service.log().count("nothing is left") == 2


async def test_fewer_workers_leave_nothing_behind(server: Server, tmp_path: Path) -> None:
    """The sessions of the others hold messages, and would go on collecting their share."""
    async with rig(tmp_path, server, "fewer", "count = 3") as run:
        await run.said(" subscribed ", times=3)
        await run.said("running: ")
        run.emulator.faults.call("InternalFailureException", operation="PutRecords")
        await run.publish(60)
        await run.said("worker=2", "call failed")
        run.send(signal.SIGTERM)
        await run.said("SIGTERM: takes no more")
        run.send(signal.SIGTERM)
        await run.ended()
        assert not run.stored
        run.emulator.faults.clear()

        run.write("count = 1")
        run.service.start()
        await run.said("worker 2 of an earlier start", "is stored")
        await run.said("worker 1 of an earlier start", "is stored")
        await run.all_stored()
        for number in (1, 2):
            assert not await has_session(replaced(run.at, f"fewer-w{number}"))
        await run.publish(20)
        await run.all_stored()
        run.send(signal.SIGTERM)
        assert await run.ended() == 0
        assert await has_session(replaced(run.at, "fewer-w0"))


async def test_back_to_one_process_while_it_runs(server: Server, tmp_path: Path) -> None:
    async with rig(tmp_path, server, "back", "count = 2") as run:
        await run.said(" subscribed ", times=2)
        await run.said("running: ")
        await run.publish(20)
        run.write("count = 0")
        run.send(signal.SIGHUP)
        await run.said("worker=all", "subscribed 'back/#'")
        await run.publish(20)
        await run.said("worker 0 of an earlier start", "is stored")
        await run.all_stored()
        assert not await has_session(replaced(run.at, "back-w1"))
        # and to workers again: now the session of the one process is nobody's
        run.write("count = 1")
        run.send(signal.SIGHUP)
        await run.said("worker all of an earlier start", "is stored")
        await run.publish(20)
        await run.all_stored()
        assert not await has_session(replaced(run.at, "back"))
        assert sorted(run.stored) == sorted(set(run.stored)), (
            "each once: nothing was published while both were subscribed"
        )
        run.send(signal.SIGTERM)
        assert await run.ended() == 0


async def test_the_spool_of_a_worker_that_is_no_more_is_emptied(server: Server, tmp_path: Path) -> None:
    spool = tmp_path / "spool.db"
    more = f'on_full = "spool"\nspool = "{spool}"\nspool_after_s = 0.2'
    async with rig(tmp_path, server, "disk", "count = 2", more=more) as run:
        await run.said(" subscribed ", times=2)
        await run.said("running: ")
        run.emulator.faults.call("InternalFailureException", operation="PutRecords")
        await run.publish(40)
        await run.until(lambda: (tmp_path / "spool-w1.db").exists(), "a worker has its own spool")
        await run.said("worker=1", "spooling")
        await run.said("worker=0", "spooling")
        run.send(signal.SIGTERM)
        assert await run.ended() == 0
        run.emulator.faults.clear()

        run.write("count = 1", more=more)
        run.service.start()
        await run.said("worker 1 of an earlier start", "is stored")
        await run.all_stored()
        assert not list(tmp_path.glob("spool-w1.db*"))
        run.send(signal.SIGTERM)
        assert await run.ended() == 0


async def test_a_broker_without_shared_subscriptions_is_refused_in_one_line(tmp_path: Path, process: None) -> None:
    with aedes() as broker:
        async with rig(tmp_path, broker, "plain", "count = 2") as run:
            assert await run.ended() == 2
            lines = [line for line in run.service.log().splitlines() if " INFO " not in line]
            assert len(lines) == 1, lines
            assert lines[0].startswith("fastkin: workers: the broker mqtt://127.0.0.1:")
            assert "has no shared subscriptions" in lines[0]
            assert "--workers 0" in lines[0]


async def test_which_brokers_know_shared_subscriptions(server: Server) -> None:
    for protocol in ("5", "3.1.1"):
        broker = Broker(host=server.host, port=server.port, protocol=protocol)  # type: ignore[arg-type]
        assert await knows_shared(broker) is True


async def test_a_worker_that_cannot_start_ends_the_service(server: Server, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"  # looks like one, and only who loads it sees that it is none
    bundle.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    more = f'endpoint_url = "https://127.0.0.1:1"\nca_bundle = "{bundle}"'
    async with rig(tmp_path, server, "wrong", "count = 2", more=more) as run:
        assert await run.ended() == 2
        told = [line for line in run.service.log().splitlines() if line.startswith("fastkin: ")]
        assert len(told) == 1, "once, though two could say it"
        assert str(bundle) in told[0]


def replaced(broker: Broker, client_id: str) -> Broker:
    return Broker(host=broker.host, port=broker.port, client_id=client_id)
