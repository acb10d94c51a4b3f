"""`fastkin run` behind brokers that are not mosquitto: NATS, aedes, RabbitMQ, amqtt; defaults, restarts, SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fastkin.emulator import Emulator
from support import servers
from support.running import Service, service, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from support.servers import Server

SETTINGS = """
[broker]
url = "{url}"
client_id = "welders"
clean_session = false
protocol = "{protocol}"
reconnect_min_s = 0.1
reconnect_max_s = 1.0

[kinesis]
stream = "welders"
endpoint_url = "{endpoint}"
region = "us-east-1"

[[pipeline]]
id = "welders"
topics = [{topics}]
"""

BROKERS: dict[str, Callable[[], AbstractContextManager[Server]]] = {
    "nats": servers.nats,
    "aedes": servers.aedes,
    "rabbitmq": servers.rabbitmq,
    "amqtt": servers.amqtt,
}
ALL = pytest.mark.parametrize("name", BROKERS)


class Plant:
    """Publishes numbered messages with paho, QoS 1, whatever happens to the broker meanwhile."""

    def __init__(self, broker: Server) -> None:
        self.count = 0
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"plant-{random.randrange(10**9)}", clean_session=True,
            transport="websockets" if broker.scheme == "ws" else "tcp",
        )  # fmt: skip
        self._client.max_inflight_messages_set(100)
        self._client.reconnect_delay_set(1, 1)
        if broker.scheme == "ws":
            self._client.ws_set_options(path=path_of(broker))
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        self._told: list[paho.MQTTMessageInfo] = []

    def publish(self, count: int, topic: str = "plant/1/welder", per_s: float = 0.0) -> None:
        for _ in range(count):
            self._told.append(self._client.publish(topic, b"%d" % self.count, qos=1))
            self.count += 1
            if per_s:
                time.sleep(1 / per_s)

    def acknowledged(self) -> None:
        for told in self._told:
            told.wait_for_publish(30)
            assert told.is_published()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextlib.contextmanager
def plant(broker: Server) -> Iterator[Plant]:
    one = Plant(broker)
    try:
        yield one
    finally:
        one.close()


def path_of(broker: Server) -> str:
    return "/ws" if broker.name == "rabbitmq" else "/mqtt"


class Stand:
    """A broker, `fastkin run` and a stream; `stored()` counts each number that arrived."""

    def __init__(self, emulator: Emulator, broker: Server, run: Service) -> None:
        self.emulator = emulator
        self.broker = broker
        self.run = run

    def stored(self) -> Counter[int]:
        return Counter(int(record.data) for record in self.emulator.stored("welders"))

    def wait_for(self, count: int, timeout: float = 60.0) -> None:
        try:
            wait_until(lambda: len(self.stored()) >= count, timeout, f"{count} messages are stored")
        except AssertionError as error:
            raise AssertionError(f"{error}: {len(self.stored())} are; {self.run.log()[-3000:]}") from None

    def subscribed(self, times: int = 1) -> None:
        wait_until(lambda: self.run.log().count(" subscribed ") >= times, 30, "subscribed")


def stand(
    directory: Path, broker: Server, work: Callable[[Stand], None], *, protocol: str = "auto",
    topics: str = '"plant/#"', latency_ms: float = 5,
) -> None:  # fmt: skip
    """Run `work` in a thread while the emulator has the loop; then stop the service, which must end in order."""

    def attack(emulator: Emulator) -> None:
        url = f"{broker.scheme}://127.0.0.1:{broker.port}" + (path_of(broker) if broker.scheme == "ws" else "")
        toml = SETTINGS.format(url=url, protocol=protocol, endpoint=emulator.url, topics=topics)
        with service(directory, toml) as run:
            one = Stand(emulator, broker, run)
            one.subscribed()
            work(one)
            assert run.terminate() == 0, run.log()[-4000:]
            assert "Traceback" not in run.log(), run.log()[-6000:]

    async def main() -> None:
        async with Emulator({"welders": 2}, latency_ms=latency_ms) as emulator:
            await asyncio.to_thread(attack, emulator)

    asyncio.run(main())


@ALL
@pytest.mark.timeout(180)
def test_defaults_store_every_message_once(tmp_path: Path, name: str) -> None:
    def work(one: Stand) -> None:
        with plant(one.broker) as source:
            source.publish(500)
            source.acknowledged()
        one.wait_for(500)
        assert one.stored() == Counter(range(500))
        assert "3.1.1" in one.run.log()
        assert "ERROR" not in one.run.log(), one.run.log()[-3000:]

    with BROKERS[name]() as broker:
        stand(tmp_path, broker, work)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.timeout(120)
def test_mosquitto_speaks_both_protocols(tmp_path: Path, protocol: str) -> None:
    def work(one: Stand) -> None:
        with plant(one.broker) as source:
            source.publish(1000)
            source.acknowledged()
        one.wait_for(1000)
        assert one.stored() == Counter(range(1000))

    with servers.mosquitto() as broker:
        stand(tmp_path, broker, work, protocol=protocol)


@pytest.mark.parametrize("name", ["aedes", "rabbitmq"])
@pytest.mark.timeout(180)
def test_over_websocket(tmp_path: Path, name: str) -> None:
    def work(one: Stand) -> None:
        with plant(one.broker) as source:
            source.publish(300)
            source.acknowledged()
        one.wait_for(300)
        assert one.stored() == Counter(range(300))

    start = servers.aedes if name == "aedes" else servers.rabbitmq
    with start(websocket=True) as broker:
        stand(tmp_path, broker, work)


@pytest.mark.parametrize("name", ["nats", "aedes", "rabbitmq"])  # amqtt forgets sessions
@pytest.mark.timeout(180)
def test_sigkill_in_mid_flow_loses_nothing(tmp_path: Path, name: str) -> None:
    """The broker delivers again what was not acknowledged. What comes twice was in flight at the kill."""

    def work(one: Stand) -> None:
        with plant(one.broker) as source:
            source.publish(300, per_s=400)
            one.run.kill()
            source.publish(100, per_s=400)
            one.run.start()
            one.subscribed(2)
            source.publish(100, per_s=400)
            source.acknowledged()
        one.wait_for(500)
        assert set(one.stored()) == set(range(500))

    with BROKERS[name]() as broker:
        stand(tmp_path, broker, work, latency_ms=30)


@pytest.mark.parametrize("name", ["nats", "rabbitmq"])
@pytest.mark.timeout(240)
def test_a_broker_that_restarts_keeps_the_session(tmp_path: Path, name: str) -> None:
    def work(one: Stand) -> None:
        with plant(one.broker) as source:
            source.publish(200)
            source.acknowledged()
            one.broker.restart()
            one.subscribed(2)
        with plant(one.broker) as source:
            source.count = 200
            source.publish(200)
            source.acknowledged()
        one.wait_for(400)
        assert set(one.stored()) == set(range(400))

    with BROKERS[name]() as broker:
        stand(tmp_path, broker, work)


@pytest.mark.timeout(120)
def test_a_broker_that_forgets_sessions_goes_on_after_its_restart(tmp_path: Path) -> None:
    """aedes keeps sessions in memory: what matters is that we subscribe again, and say what was lost."""

    def work(one: Stand) -> None:
        with plant(one.broker) as source:
            source.publish(200)
            source.acknowledged()
        one.wait_for(200)
        one.broker.restart()
        one.subscribed(2)
        with plant(one.broker) as source:
            source.count = 200
            source.publish(200)
            source.acknowledged()
        one.wait_for(400)
        assert "has lost our session" in one.run.log()

    with servers.aedes() as broker:
        stand(tmp_path, broker, work)


@pytest.mark.timeout(120)
def test_nats_sends_again_on_the_same_connection_and_it_is_stored_once(tmp_path: Path) -> None:
    """NATS repeats what is not acknowledged within ack_wait. Kinesis is away for longer than that."""

    def work(one: Stand) -> None:
        away = one.emulator.faults.cut("before", operation="PutRecords")
        with plant(one.broker) as source:
            source.publish(100)
            source.acknowledged()
        time.sleep(3.5)
        away.remove()
        one.wait_for(100)
        time.sleep(1.5)  # a repetition that was under way
        assert one.stored() == Counter(range(100))

    with servers.nats('ack_wait: "1s"') as broker:
        stand(tmp_path, broker, work)


@pytest.mark.timeout(180)
def test_rabbitmq_rewrites_topics_and_nothing_is_thrown_away(tmp_path: Path) -> None:
    """It exchanges `.` and `/`: what we subscribed as plant/1.5/+ is delivered under another topic."""

    def work(one: Stand) -> None:
        with plant(one.broker) as source:
            source.publish(50, topic="plant/1.5/welder")
            source.acknowledged()
        one.wait_for(50)
        assert one.stored() == Counter(range(50))

    with servers.rabbitmq() as broker:
        stand(tmp_path, broker, work, topics='"plant/1.5/+"')
