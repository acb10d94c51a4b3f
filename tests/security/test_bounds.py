"""Everything a peer controls has a bound, and here it is held to it. docs/threat-model.md names these tests."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from aiohttp import web

from fastkin._codec import DEAD, Batcher, Budget, KeyPlan
from fastkin.aws.error_table import error_from
from fastkin.aws.http import HttpPool
from fastkin.aws.http_answer import FRAMING_PER_BYTE, MAX_HEADER_COUNT, MAX_HEADERS, PUT_ANSWER, Reply
from fastkin.config import Broker, Kinesis
from fastkin.errors import KinesisError, ProtocolError, TransportError
from fastkin.mqtt import _core as _mqtt
from fastkin.mqtt.connection import Connection
from fastkin.mqtt.reading import STALL
from fastkin.mqtt.subscriber import Subscriber
from fastkin.mqtt.transport import Receiver, open_wire
from fastkin.mqtt.words import farewell, refusal
from support.codec_rig import Rig
from support.fake_http import FakeServer, Link, Request
from support.mqtt_wire import CONNACK_5, packet, props, publish, text

# -- MQTT ------------------------------------------------------------------------------------------


def session(version: int = 5, **options: Any) -> _mqtt.Session:
    router = _mqtt.Router()
    router.add("#", _mqtt.CountSink())
    made = _mqtt.Session(version=version, acks=_mqtt.AckTracker(), router=router, **options)
    made.feed_data(CONNACK_5 if version == 5 else b"\x20\x02\x00\x00")
    made.take_events()
    return made


def refused(made: _mqtt.Session, data: bytes, words: str, code: int) -> None:
    with pytest.raises(ProtocolError, match=words) as caught:
        made.feed_data(data)
    assert caught.value.code == code


def test_a_packet_above_max_packet_bytes_is_never_held() -> None:
    made = session(max_packet_bytes=70_000)
    flags = made.feed_data(b"\x30\xff\xff\xff\x7f\x00\x01t" + (b"" if made.version == 4 else b"\x00"))
    assert not flags
    left = 268_435_455 - 4
    while left:
        room = made.get_buffer(-1)
        assert len(room) <= 1 << 19
        got = min(left, len(room))
        left -= got
        flags = made.feed(got)
        while flags & _mqtt.APART:
            made.take_piece()
            if not made.apart_left:
                made.finish_apart()
            flags = made.resume()
        assert made.buffer_bytes <= 1 << 19
    assert made.messages == 1
    assert made.apart is None


def test_a_control_packet_above_max_packet_bytes_is_refused_from_its_header() -> None:
    made = session(max_packet_bytes=70_000)
    refused(made, b"\x90\xff\xff\xff\x7f", "larger than max_packet_bytes", 0x95)
    assert made.buffer_bytes <= 70_000


def test_a_control_packet_above_128_kib_is_refused_from_its_header() -> None:
    made = session()
    refused(made, b"\xe0\x81\x80\x08", "control packet of more than 131072 bytes", 0x95)
    assert made.buffer_bytes <= 1 << 17
    session().feed_data(b"\x30\x81\x80\x08")  # a PUBLISH may be that long


def test_control_packets_in_one_read_are_counted() -> None:
    suback = packet(0x90, b"\x00\x01" + props(5) + b"\x00")
    session().feed_data(suback * 1024)
    refused(session(), suback * 1025, "more than 1024 control packets at once", 0x96)


def test_pings_nobody_asked_for_are_one_event() -> None:
    made = session()
    made.feed_data(b"\xd0\x00" * 100_000)
    assert len(made.take_events()) == 1


def test_pubacks_are_no_more_than_there_are_identifiers() -> None:
    made = session()
    made.feed_data(b"\x40\x02\x00\x01" * 65_535)
    refused(made, b"\x40\x02\x00\x01", "more PUBACKs", 0x96)


def test_pubrels_whose_answers_nobody_takes_end() -> None:
    made = session()
    refused(made, b"\x62\x02\x00\x01" * 300_000, "PUBRELs without end", 0x96)
    assert len(made.take_output()) < (1 << 20) + 8


def test_user_properties_are_checked_and_not_kept_without_end() -> None:
    made = session()
    made.feed_data(packet(0xE0, b"\x8b" + props(5, *[b"\x26" + text("k") + text("v")] * 5000)))
    (event,) = made.take_events()
    assert len(event.properties["user_property"]) == 32  # type: ignore[attr-defined]


def test_what_a_broker_says_is_cut_and_escaped_in_our_words() -> None:
    long = b"\x1f" + text("bad\n" * 16_000)
    made = session()
    made.feed_data(packet(0xE0, b"\x8b" + props(5, long, b"\x1c" + text("x" * 60_000))))
    (event,) = made.take_events()
    told = farewell(event)  # type: ignore[arg-type]
    assert len(told) < 1200
    assert told.isprintable()
    fresh = _mqtt.Session(version=5, acks=_mqtt.AckTracker(), router=_mqtt.Router())
    fresh.feed_data(packet(0x20, b"\x00\x87" + props(5, long)))
    (connack,) = fresh.take_events()
    assert len(str(refusal(connack))) < 1200  # type: ignore[arg-type]


def test_topics_that_are_remembered_are_bounded_in_count_and_bytes() -> None:
    router = _mqtt.Router(max_topics=1024)
    router.add("a/#", _mqtt.CountSink())
    router.add("+/#", _mqtt.CountSink())
    made = _mqtt.Session(version=4, acks=_mqtt.AckTracker(), router=router)
    made.feed_data(b"\x20\x02\x00\x00")
    for number in range(20_000):
        made.feed_data(publish(f"a/{number}" + "x" * (number % 2000)))
    assert router.cached <= 1024
    assert router.cached_bytes <= 1024 * 128


def test_a_topic_alias_above_what_we_allow_is_refused() -> None:
    refused(session(), publish("a", version=5, properties=b"\x23\x00\x01"), "topic alias above what we allow", 0x94)
    made = session(topic_alias_maximum=2)
    refused(made, publish("a", version=5, properties=b"\x23\x00\x03"), "topic alias above what we allow", 0x94)


class Deaf:
    """A wire to a broker that sends and never reads."""

    def __init__(self) -> None:
        self.waiting = 0
        self.closed = False

    def write(self, data: bytes) -> None:
        self.waiting += len(data)

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = pause_reading = resume_reading = close


async def test_a_broker_that_does_not_read_our_acknowledgements_is_left() -> None:
    subscriber = Subscriber(
        Broker(client_id="c"), [], router=_mqtt.Router(), acks=_mqtt.AckTracker(), on_read=lambda: None
    )
    link = Connection(subscriber, 5)
    wire = Deaf()
    link.connection_made(wire)  # type: ignore[arg-type]
    link.data_received(CONNACK_5)
    for _ in range(100):
        if wire.closed:
            break
        link.data_received(b"\x62\x02\x00\x01" * 4000)
    assert link.reason == "the broker does not read our acknowledgements"
    assert wire.waiting < 2 << 20
    link.connection_lost(None)


async def test_a_connection_that_is_given_up_does_not_wait_for_room() -> None:
    """It was paused when the next message ended it: nothing will be read, and no watchdog is to say that it waits."""
    subscriber = Subscriber(
        Broker(client_id="c"), [], router=_mqtt.Router(), acks=_mqtt.AckTracker(), on_read=lambda: None
    )
    link = subscriber._link = Connection(subscriber, 5)
    link.connection_made(Deaf())  # type: ignore[arg-type]
    link.data_received(CONNACK_5)
    link.reading.pause(STALL)
    assert subscriber.paused
    link.data_received(b"\xf0\x00")  # no packet that a broker sends: AUTH was not asked for
    assert link.reason
    assert not subscriber.paused
    link.connection_lost(None)


# -- frames ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KeyPlan("uuid"), KeyPlan("parts", [("field", ("a",)), ("topic", None)])])
def test_a_frame_of_millions_of_empty_records_is_one_reject(key: KeyPlan) -> None:
    budget = Budget(1 << 20, 1 << 20)
    batcher = Batcher(settler=None, budget=budget, frame="bulk", key=key, target=b'"StreamName":"s"')
    assert batcher.offer(b"t" * 200, b"\xa31.0" + b"\xa0" * 2_000_000, 1) == 1
    (reject,) = batcher.take_rejects()
    assert reject.kind == "records"
    assert "2000000 records in one frame" in reject.reason
    assert budget.peak_bytes < 3 << 20  # the payload itself, which is kept
    batcher.settle_reject(reject, DEAD)
    assert batcher.offer(b"t", b"\xa31.0" + b"\xa0" * 9000, 1) == 9000  # larger than a small budget is no crime


def test_codes_and_messages_of_an_answer_are_cut() -> None:
    rig = Rig(frame="raw", key=KeyPlan("none"))
    rig.batcher.offer(b"t", b"x", 1)
    rig.batcher.close_batch(5)
    batch = rig.batcher.take()
    assert batch is not None
    told = {"FailedRecordCount": 1, "Records": [{"ErrorCode": "C" * 99_999, "ErrorMessage": "m" * 99_999}]}
    (failure,) = batch.settle(orjson.dumps(told))
    assert len(failure.code) == 128
    assert len(failure.message) == 1024


# -- HTTP ------------------------------------------------------------------------------------------

HEAD = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"


async def asked(*parts: bytes, max_answer: int = 1 << 20) -> Reply:
    """The reply to one call, when the endpoint sends these parts; the last one again and again."""

    async def answer(link: Link, request: Request) -> None:
        for part in parts:
            link.send(part)
        for _ in range(2000):
            if link.writer.is_closing():
                break
            link.send(parts[-1])
            await link.writer.drain()

    async with FakeServer(answer) as server:
        pool = HttpPool(server.url, request_timeout_s=20.0)
        try:
            return await pool.request(HEAD, b"", max_answer)
        finally:
            await pool.close()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "trailers": (CHUNKED, b"2\r\n{}\r\n0\r\n", b"X: y\r\n" * 300),
    "one trailer": (CHUNKED, b"2\r\n{}\r\n0\r\nX: ", b"y" * 9000),
    "chunk extension": (CHUNKED, b"2;", b"x" * 9000),
    "early hints": (b"HTTP/1.1 103 Early Hints\r\n" + b"Link: x\r\n" * 100 + b"\r\n",),
    "header line": (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 9000),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (MAX_HEADER_COUNT + 1), b"X: y\r\n"),
    "body": (CHUNKED, b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"),
    "body in small chunks": (CHUNKED, b"2\r\nxx\r\n" * 20_000),
    "body to the end": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 100_000),
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n",),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_an_answer_without_end_is_cut_off(name: str) -> None:
    with pytest.raises(TransportError) as caught:
        await asked(*ENDLESS[name])
    assert caught.value.code == "AnswerTooLarge"
    assert len(str(caught.value)) < 300


async def test_an_honest_answer_byte_by_byte_is_taken() -> None:
    body = b"x" * (2 * MAX_HEADERS // FRAMING_PER_BYTE)

    async def answer(link: Link, request: Request) -> None:
        link.send(CHUNKED + b"".join(b"1\r\nx\r\n" for _ in body) + b"0\r\nTrailer: 1\r\n\r\n")

    async with FakeServer(answer) as server:
        pool = HttpPool(server.url)
        reply = await pool.request(HEAD, b"", PUT_ANSWER)
        assert reply.body == body
        assert "trailer" not in reply.headers
        await pool.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "x" * 5000])
async def test_a_compressed_answer_is_refused_and_never_unpacked(encoding: str) -> None:
    with pytest.raises(TransportError, match="compressed") as caught:
        await asked(f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: 2\r\n\r\n\x1f\x0b".encode())
    assert caught.value.code == "BadAnswer"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_an_error_and_not_followed(status: int) -> None:
    calls = 0

    async def answer(link: Link, request: Request) -> None:
        nonlocal calls
        calls += 1
        link.reply(status, b"", {"Location": f"http://127.0.0.1:{link.writer.get_extra_info('sockname')[1]}/other"})

    async with FakeServer(answer) as server:
        pool = HttpPool(server.url)
        reply = await pool.request(HEAD, b"")
        await pool.close()
    assert calls == 1
    error = error_from(reply, 0.0)
    assert error.http_status == status
    assert isinstance(error, KinesisError)


def test_what_an_endpoint_says_is_cut_and_its_secrets_before_that() -> None:
    secret = "wJalrXUtnFEMI" + "s" * 27
    body = orjson.dumps({"__type": "A" * 5000, "message": "x" * (500 - 10) + secret})
    error = error_from(Reply(403, {"x-amzn-requestid": "r" * 5000}, body), 0.0, (secret,))
    assert len(str(error)) < 800
    assert secret[:8] not in str(error)


# -- WebSocket -------------------------------------------------------------------------------------


class Ended(Receiver):
    def __init__(self) -> None:
        self.received = self.largest = 0
        self.ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = transport

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.largest = max(self.largest, len(data))

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.ended.done():
            self.ended.set_result(exc)


async def test_a_long_websocket_message_is_cut_and_not_held() -> None:
    offered: list[str | None] = []

    async def handler(request: web.Request) -> web.WebSocketResponse:
        offered.append(request.headers.get("Sec-WebSocket-Extensions"))
        socket = web.WebSocketResponse(protocols=("mqtt",))
        await socket.prepare(request)
        for _ in range(200):
            await socket.ping(b"x" * 100)
        await socket.send_bytes(b"x" * 1000)
        await socket.send_bytes(bytes(40 << 20))
        await socket.send_str("x" * (2 << 20))  # no MQTT: not cut, and above what is taken
        async for _ in socket:
            pass
        return socket

    app = web.Application()
    app.router.add_get("/mqtt", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    receiver = Ended()
    await open_wire(Broker(host="127.0.0.1", port=port, scheme="ws", max_packet_bytes=1 << 20), receiver, None)
    async with asyncio.timeout(20):
        await receiver.ended
    assert receiver.received == 1000 + (40 << 20)
    assert receiver.largest <= 65_536
    assert offered == [None]  # compression is not offered: nothing is ever unpacked
    await runner.cleanup()


def test_kinesis_has_no_way_to_turn_verification_off() -> None:
    assert not [name for name in Kinesis.__dataclass_fields__ if "verify" in name or "insecure" in name]
