"""The intake against a scripted broker and the load source: faults, versions, windows, read coalescing."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import pytest
import uvloop

from fastkin.bench.source import Source
from fastkin.config import Broker
from fastkin.mqtt._core import publish
from fastkin.mqtt.attempts import Attempts
from fastkin.mqtt.publisher import Publisher
from fastkin.mqtt.window import Window
from support.fake_broker import FakeBroker, Peer, Rig, lines, until

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


async def forever(peer: Peer) -> None:
    """Accepts, grants, answers pings."""
    await peer.connect()
    while True:
        first, body = await peer.packet()
        if first == 0x82:
            head = body[:2] + (b"\0" if peer.version == 5 else b"")
            peer.send(bytes((0x90, len(head) + 1)), head, b"\1")
        elif first == 0xC0:
            peer.send(b"\xd0\0")
        elif first == 0xE0:
            return


# -- nonsense ---------------------------------------------------------------------------------------

MALFORMED = {
    "reserved type": (b"\x00\x00", ""),
    "QoS 3": (b"\x36\x07\x00\x01a\x00\x01hi", "QoS 3"),
    "remaining length of five bytes": (b"\x30\xff\xff\xff\xff\x01", "remaining length"),
    "topic longer than the packet": (b"\x30\x05\x00\xffab\x00", ""),
    "no topic": (b"\x30\x01\x00", ""),
    "wildcard in a topic": (b"\x30\x05\x00\x01#hi", ""),
    "packet identifier 0": (b"\x32\x07\x00\x01a\x00\x00\x00h", "identifier 0"),
    "topic is no UTF-8": (b"\x30\x06\x00\x02\xc3\x28\x00h", ""),
    "PINGRESP with a body": (b"\xd0\x01\x00", "PINGRESP"),
    "second CONNACK": (b"\x20\x03\x00\x00\x00", "CONNACK"),
    "CONNECT from a broker": (b"\x10\x00", ""),
    "SUBACK for nothing": (b"\x90\x04\x12\x34\x00\x00", "SUBACK"),
    "PUBACK for nothing": (b"\x40\x02\x00\x01", "nothing we sent"),
    "random bytes": (bytes(random.Random(5).randrange(256) for _ in range(64)), ""),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_packet_ends_the_connection_and_no_more(run: Any, name: str, caplog: Any) -> None:
    packet, reason = MALFORMED[name]
    rest = b""

    async def script(peer: Peer) -> None:
        nonlocal rest
        if peer.number == 1:
            await peer.connect()
            await peer.subscribe()
            peer.send(publish("plant/1", b"before", version=5))
            peer.send(packet)
            rest = await peer.until_closed()
            return
        await forever(peer)

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, protocol="5") as rig:
            await until(lambda: rig.subscriber.traffic.connects == 2 and rig.subscriber.connected.is_set())
            (lost,) = [line for line in caplog.messages if "connection lost" in line]
            assert "malformed MQTT" in lost
            assert reason in lost
            assert rig.subscriber.last_error is None  # it is over
            assert rig.payloads == [b"before"]  # what came before it is not lost
            assert rig.reads >= 1

    run(main())
    assert rest[-3:-1] == b"\xe0\x01"  # DISCONNECT with a reason
    assert rest[-1] >= 0x80


def test_nonsense_instead_of_connack(run: Any, caplog: Any) -> None:
    async def script(peer: Peer) -> None:
        if peer.number <= 2:
            await peer.packet()
            peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await peer.until_closed()
            return
        await forever(peer)

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker):
            refused = [line for line in caplog.messages if "cannot connect" in line]
            assert len(refused) == 2
            assert all("malformed MQTT" in line for line in refused)

    run(main())


# -- opening -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
def test_what_a_resumed_session_replays_before_subscribe_is_taken(run: Any, version: int) -> None:
    async def script(peer: Peer) -> None:
        connack = b"\x20\x03\x01\x00\x00" if version == 5 else b"\x20\x02\x01\x00"
        early = [publish("plant/1", b"%d" % n, qos=1, packet_id=n, version=version, dup=True) for n in (1, 2, 3)]
        await peer.connect(connack + b"".join(early))
        await peer.subscribe()
        await peer.until_closed()

    async def main() -> None:
        protocol = "5" if version == 5 else "3.1.1"
        async with FakeBroker(script) as broker, Rig(broker, protocol=protocol) as rig:
            assert rig.payloads == [b"1", b"2", b"3"]
            assert rig.acks.unacked == 3

    run(main())


@pytest.mark.parametrize(
    ("refusal", "attempts"),
    [(b"\x20\x02\x00\x01", [5, 4, 4]), (b"\x20\x03\x00\x84\x00", [5, 4, 4]), (b"", [5, 4, 5, 4, 5, 4])],
    ids=["3.1.1's own code", "5.0's code", "closed at once"],
)
def test_auto_falls_back_to_3_1_1_and_remembers(run: Any, refusal: bytes, attempts: list[int]) -> None:
    seen: list[int] = []

    async def script(peer: Peer) -> None:
        body = (await peer.packet())[1]
        seen.append(body[6])
        if body[6] == 5:
            peer.send(refusal)
            return
        peer.version = 4
        peer.send(b"\x20\x02\x00\x00")
        await peer.subscribe()
        if len(seen) < len(attempts):
            return  # close: it comes again
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            async with Rig(broker) as rig:
                await until(lambda: len(seen) == len(attempts) and rig.subscriber.connected.is_set())
                assert rig.subscriber.version == 4
                assert rig.subscriber.granted_window == 20
            assert seen == attempts
            seen.clear()
            strict = Rig(broker, protocol="5")
            strict.start()
            await until(lambda: len(seen) >= 2)
            await strict.subscriber.close()
            assert set(seen) == {5}

    run(main())


def test_no_answer_in_time_is_said() -> None:
    async def script(peer: Peer) -> None:
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, connect_timeout_s=0.2)
            rig.start()
            await until(lambda: rig.subscriber.last_error)
            assert rig.subscriber.last_error == "no answer within 0.2 s"
            await rig.subscriber.close()

    asyncio.run(main())


def test_an_unknown_host_is_said() -> None:
    async def main() -> None:
        rig = Rig(type("Nowhere", (), {"host": "no-such-host.invalid", "port": 1883})())
        rig.start()
        await until(lambda: rig.subscriber.last_error, 15)
        assert "cannot be resolved" in (rig.subscriber.last_error or "")
        await rig.subscriber.close()

    asyncio.run(main())


@pytest.mark.parametrize("version", [4, 5])
def test_a_refused_filter_is_said_and_asked_for_again(caplog: Any, version: int) -> None:
    caplog.set_level(logging.INFO)
    asked: list[list[str]] = []

    async def script(peer: Peer) -> None:
        await peer.connect()
        asked.append(await peer.subscribe(0, 0x87 if version == 5 else 0x80))
        asked.append(await peer.subscribe())
        await peer.until_closed()

    async def main() -> None:
        filters = [("plant/#", 1), ("secret/#", 1)]
        protocol = "5" if version == 5 else "3.1.1"
        async with FakeBroker(script) as broker:
            rig = Rig(broker, filters, protocol=protocol)
            rig.start()
            await until(lambda: rig.subscriber.state == "refused")
            assert not rig.subscriber.connected.is_set()
            assert "secret/#" in (rig.subscriber.last_error or "")
            await until(lambda: rig.subscriber.state == "connected")
            await rig.subscriber.close()

    asyncio.run(main())
    assert asked == [["plant/#", "secret/#"], ["secret/#"]]
    errors = lines(caplog, logging.ERROR)
    assert len(errors) == 1
    assert "secret/#" in errors[0]
    assert ("not authorised" if version == 5 else "unspecified") in errors[0]
    assert any("QoS 1 was asked for and 0 granted: messages may be lost" in line for line in lines(caplog))


def test_no_suback_ends_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, connect_timeout_s=0.3)
            rig.start()
            await until(lambda: rig.subscriber.traffic.disconnects)
            assert "no SUBACK" in (rig.subscriber.last_error or "")
            await rig.subscriber.close()

    asyncio.run(main())


def test_disconnects_right_after_subscribe_are_explained_once(caplog: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, reconnect_min_s=0.02, reconnect_max_s=0.4)
            rig.start()
            await asyncio.sleep(1.5)
            await rig.subscriber.close()
            assert 4 <= broker.connections <= 40  # no hot loop

    asyncio.run(main())
    errors = lines(caplog, logging.ERROR)
    assert len(errors) == 1
    assert "policy" in errors[0]
    assert "same client id" in errors[0]


def test_delays_double_up_to_the_most_and_are_drawn() -> None:
    """IC-02: no hot loop, and clients that a broker has lost at once do not come back at once."""
    broker = Broker(reconnect_min_s=1.0, reconnect_max_s=60.0)
    drawn: list[list[float]] = [[] for _ in range(10)]
    for _ in range(300):
        attempts = Attempts(broker, 0.0)
        for each in drawn:
            each.append(attempts.backoff())
    for each, most in zip(drawn, (1, 2, 4, 8, 16, 32, 60, 60, 60, 60), strict=True):
        assert 0.5 <= min(each) < 0.5 + most / 4
        assert most * 3 / 4 < max(each) <= most
    attempts.lost(1.0, 0, 0.0, early=True)
    assert max(attempts.backoff() for _ in range(50)) > 30  # what died young has not worked
    attempts.lost(60.0, 0, 0.0, early=False)
    assert attempts.backoff() <= 1


def test_the_brokers_own_reason_is_shown() -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        told = b"bye\nfoo"
        properties = b"\x1f" + len(told).to_bytes(2, "big") + told
        peer.send(bytes((0xE0, 2 + len(properties), 0x8E, len(properties))) + properties)
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, protocol="5") as rig:
            await until(lambda: rig.subscriber.traffic.disconnects)
            assert "another client uses the same client id" in rig.subscriber.last_error
            assert r"'bye\nfoo'" in rig.subscriber.last_error

    asyncio.run(main())


# -- keep-alive --------------------------------------------------------------------------------------------


def test_a_silent_broker_is_taken_for_dead() -> None:
    pings = 0

    async def script(peer: Peer) -> None:
        nonlocal pings
        await peer.connect()
        await peer.subscribe()
        while (await peer.packet())[0] == 0xC0:
            pings += 1

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, keep_alive_s=1) as rig:
            await until(lambda: rig.subscriber.traffic.disconnects, 6)
            assert "silent" in (rig.subscriber.last_error or "")

    asyncio.run(main())
    assert pings >= 2


def test_the_brokers_keep_alive_counts() -> None:
    pings: list[float] = []

    async def script(peer: Peer) -> None:
        await peer.connect(b"\x20\x06\x00\x00\x03\x13\x00\x01")  # Server Keep Alive 1 s
        await peer.subscribe()
        while (await peer.packet())[0] == 0xC0:
            pings.append(asyncio.get_running_loop().time())
            peer.send(b"\xd0\0")

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, protocol="5", keep_alive_s=600) as rig:
            await until(lambda: len(pings) >= 4, 6)
            assert rig.subscriber.traffic.disconnects == 0

    asyncio.run(main())
    assert pings[3] - pings[0] == pytest.approx(1.5, abs=0.4)


# -- bugs of ours ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_an_exception_in_on_read_ends_run(run: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        peer.send(publish("plant/1", b"x", version=peer.version))
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker)

            def on_read() -> None:
                raise ZeroDivisionError("a bug")

            rig.subscriber.on_read = on_read
            rig.start()
            assert rig.task is not None
            with pytest.raises(ZeroDivisionError, match="a bug"):
                await asyncio.wait_for(rig.task, 5)
            assert rig.subscriber.state == "closed"

    run(main())


def test_a_record_that_failed_for_good_makes_the_broker_send_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        peer.send(publish("plant/1", b"x", qos=1, packet_id=7, version=peer.version))
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker) as rig:
            await until(lambda: rig.got)
            rig.acks.settled(rig.got[0][2], 1, 4)  # FAILED
            rig.subscriber.flush_acks()
            await until(lambda: len(rig.got) == 2)
            assert rig.subscriber.traffic.connects == 2

    asyncio.run(main())


# -- at speed, from the load source -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_settled_in_any_order_acknowledged_in_order(run: Any, protocol: Any) -> None:
    async def main() -> None:
        shuffle = random.Random(7)
        async with Source(70_000, window=3000) as source, Rig(source, protocol=protocol, receive_maximum=5000) as rig:
            pending: list[tuple[bytes, bytes, int]] = []
            while not source.done.is_set():
                pending += rig.got
                rig.got.clear()
                shuffle.shuffle(pending)
                rig.settle(*pending[len(pending) // 4 :])
                del pending[len(pending) // 4 :]
                rig.subscriber.flush_acks()
                await asyncio.sleep(0)
            report = source.report()
            assert report["acked"] == report["sent"] == rig.subscriber.traffic.messages == 70_000
            assert report["order_errors"] == 0

    run(main())


def test_a_cut_connection_is_taken_up_again(run: Any) -> None:
    async def main() -> None:
        async with Source(30_000, window=500, rate=60_000) as source, Rig(source) as rig:
            cuts = 0
            seen = 0
            while not source.done.is_set():
                rig.subscriber.flush_acks()
                if rig.subscriber.traffic.messages > seen + 4000 and cuts < 4:
                    seen = rig.subscriber.traffic.messages
                    cuts += 1
                    source.drop()
                if len(rig.got) > 100:
                    rig.settle(*rig.got[:-50])
                    del rig.got[:-50]
                else:
                    rig.settle_all()
                await asyncio.sleep(0.001)
            report = source.report()
            assert report["acked"] == 30_000
            assert report["order_errors"] == 0
            assert rig.subscriber.traffic.connects == source.connects == cuts + 1 == 5

    run(main())


def test_stop_in_mid_flow_acknowledges_exactly_what_was_taken(run: Any) -> None:
    async def main() -> None:
        async with Source(1_000_000, window=20_000) as source:
            rig = Rig(source, receive_maximum=20_000)
            rig.start()
            await rig.connected()
            while rig.subscriber.traffic.messages < 50_000:
                rig.settle_all()
                rig.subscriber.flush_acks()
                await asyncio.sleep(0)
            await rig.subscriber.stop()
            await asyncio.sleep(0.05)
            taken = rig.subscriber.traffic.messages
            await asyncio.sleep(0.05)
            assert rig.subscriber.traffic.messages == taken
            rig.settle_all()
            await rig.subscriber.close()  # writes the last acknowledgements
            assert rig.task is not None
            await rig.task
            await until(source.left.is_set)
            assert source.acked == taken
            assert source.order_errors == 0

    run(main())


@pytest.mark.parametrize(("protocol", "asked"), [("3.1.1", 20), ("3.1.1", 300), ("5", 10_000)])
def test_the_window_is_learned_from_what_the_broker_does(protocol: Any, asked: int) -> None:
    async def main() -> None:
        source = Source(1000, window=50)
        async with source, Rig(source, protocol=protocol, inflight=asked, receive_maximum=10_000) as rig:
            for _ in range(8):
                await until(lambda: len(rig.got) == 50)
                await asyncio.sleep(0.02)
                rig.settle(*rig.got[:30])  # a batch of the window, as Kinesis answers
                del rig.got[:30]
                rig.subscriber.flush_acks()
            assert rig.subscriber.granted_window == 50
            rig.settle_all()

    asyncio.run(main())


def test_a_window_that_proves_larger_is_learned_anew() -> None:
    window = Window(20)

    def stall(count: int, at: float) -> None:
        window.acknowledging(count, at, at - 0.02)
        window.received(count - 1, at + 0.001)

    assert window.granted == 20
    window.received(21, 0.0)
    assert window.granted == 42
    for n in range(3):
        stall(32, 1.0 + n)
    assert window.granted == 32
    for n in range(3):  # a slow source: what comes does not come because of the acknowledgements
        window.acknowledging(5, 10.0 + n, 9.9 + n)
        window.received(1, 10.1 + n)
    assert window.granted == 32
    for n in range(6):  # never twice the same
        stall(5 + n, 20.0 + n)
    assert window.granted == 32
    for _ in range(5):  # not quiet: nothing to learn
        window.acknowledging(7, 30.0, 29.999)
        window.received(7, 30.001)
    assert window.granted == 32
    window.received(100, 40.0)
    assert window.granted == 200
    assert Window(100_000, 65_535).granted == 65_535
    small = Window(10, 12)
    small.received(11, 0.0)
    assert small.granted == 12


async def flow(rate: float, seconds: float, **broker: Any) -> tuple[Rig, float, int]:
    """A paced source that writes message by message: the rig, messages a read, how often it was found coalescing."""
    on = 0
    source = Source(int(rate * seconds), rate=rate, batch=1, qos=0)
    async with source, Rig(source, [("plant/#", 0)], **broker) as rig:
        while not source.done.is_set():
            on += rig.subscriber.coalescing
            await asyncio.sleep(0.01)
        await until(lambda: rig.subscriber.traffic.messages == source.sent)
        return rig, rig.subscriber.traffic.messages / rig.subscriber.traffic.reads, on


@pytest.mark.timing
def test_reads_are_coalesced_at_high_rates_only(run: Any) -> None:
    """A busy machine makes reads of many messages by itself: one quiet attempt out of some is enough."""

    async def slow() -> bool:
        _, per_read, on = await flow(500.0, 1.0)
        return on == 0 and per_read < 4

    async def fast() -> bool:
        _, with_pauses, on = await flow(30_000.0, 1.0, coalesce_ms=5.0)
        _, without, off = await flow(30_000.0, 1.0, coalesce_ms=0.0)
        assert off == 0
        return on > 10 and with_pauses > 1.5 * without

    async def one_of(attempt: Any) -> bool:
        for _ in range(12):
            if await attempt():
                return True
        return False

    async def main() -> None:
        assert await one_of(slow)
        assert await one_of(fast)

    run(main())


# -- the publisher and the source themselves ------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1])
async def test_the_source_plays_each_message_once(qos: int) -> None:
    payloads = [b"%d" % n for n in range(100)]
    topics = ["plant/a", "plant/b", "plant/c"]
    source = Source(250, payloads=payloads, topics=topics, qos=qos, window=7, latency=True)
    async with source, Rig(source, [("plant/#", qos)]) as rig:
        settled = 0
        while not source.done.is_set() or len(rig.got) < 250:
            rig.settle(*rig.got[settled:])
            settled = len(rig.got)
            rig.subscriber.flush_acks()
            await asyncio.sleep(0)
        assert rig.payloads == [payloads[n % 100] for n in range(250)]
        assert [topic for topic, _, _ in rig.got] == [topics[n % 3].encode() for n in range(250)]
        report = source.report()
        assert report["sent"] == 250
        assert report["done"]
        if qos:
            assert report["latency_ms"]["p99"] >= report["latency_ms"]["p50"] >= 0


async def test_large_frames_are_encoded_as_they_go() -> None:
    frame = b"f" * 900_000
    async with Source(80, payloads=[frame], window=10) as source, Rig(source) as rig:
        while not source.done.is_set():
            assert all(payload == frame for payload in rig.payloads)
            rig.settle_all()
            rig.subscriber.flush_acks()
            await asyncio.sleep(0)
        assert source.report()["acked"] == 80


async def test_the_source_notices_acknowledgements_out_of_order() -> None:
    async with Source(4, window=4) as source:
        reader, writer = await asyncio.open_connection("127.0.0.1", source.port)
        writer.write(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01s")
        writer.write(b"\x82\x0c\x00\x01\x00\x07plant/#\x01")
        await reader.readexactly(4 + 5)
        await until(lambda: source.sent == 4)
        writer.write(b"\x40\x02\x00\x02\x40\x02\x00\x01\x40\x02\x00")
        await until(lambda: source.acked == 2)
        writer.write(b"\x09\xc0\x00\x40\x02\x00\x03\x40\x02\x00\x04")
        await source.done.wait()
        assert source.order_errors == 2
        assert source.pings == 1
        writer.close()
        await writer.wait_closed()


async def test_a_publisher_says_why_it_lost_its_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.packet()

    async with FakeBroker(script) as broker:
        publisher = Publisher(Rig(broker).subscriber.broker)
        await publisher.connect()
        await publisher.publish("plant/1", b"x", 1)
        with pytest.raises(Exception, match="closed the connection"):
            await publisher.drain()
        await publisher.close()
