"""The intake against a real mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import paho.mqtt.publish as paho
import pytest
import trustme
import uvloop
from cryptography.hazmat.primitives import serialization

from fastkin.config import Broker, Tls
from fastkin.errors import ConfigError
from fastkin.mqtt._core import CallbackSink
from fastkin.mqtt.publisher import Publisher
from fastkin.mqtt.transport import tls_context
from support.fake_broker import Rig, lines, until
from support.servers import Server, accepts, free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastkin.mqtt.subscriber import Subscriber

pytestmark = pytest.mark.process

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


async def say(server: Server, payloads: Sequence[bytes], qos: int = 1, topic: str = "plant/1") -> None:
    if qos == 2:
        await asyncio.to_thread(say_qos2, server, payloads, topic)
        return
    async with Publisher(Broker(host=server.host, port=server.port)) as publisher:
        for payload in payloads:
            await publisher.publish(topic, payload, qos)
        await publisher.drain()


def say_qos2(server: Server, payloads: Sequence[bytes], topic: str) -> None:
    paho.multiple([(topic, payload, 2, False) for payload in payloads], hostname=server.host, port=server.port)


def numbers(count: int, begin: int = 0) -> list[bytes]:
    return [b"%d" % n for n in range(begin, begin + count)]


# -- receiving and acknowledging ------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_messages_come_and_are_acknowledged_late_and_in_order(run: Any, qos: int, protocol: Any) -> None:
    async def main() -> None:
        with mosquitto("max_inflight_messages 0\n") as server:
            async with Rig(server, [("plant/#", qos)], protocol=protocol) as rig:
                assert rig.subscriber.state == "connected"
                await say(server, numbers(100), qos)
                await until(lambda: len(rig.got) == 100)
                assert rig.payloads == numbers(100)
                assert rig.subscriber.traffic.messages == 100
                assert 1 <= rig.reads <= 100
                if qos == 0:
                    assert {token for _, _, token in rig.got} == {0}
                    assert rig.acks.unacked == 0
                    return
                assert rig.acks.unacked == 100
                rig.settle(*reversed(rig.got[1:]))
                assert rig.acks.ready == 0  # the first is missing, nothing may leave
                rig.settle(rig.got[0])
                assert rig.acks.ready == 100
                rig.subscriber.flush_acks()
                assert rig.acks.unacked == 0
                await say(server, [b"more"], qos)
                await until(lambda: len(rig.got) == 101)

    run(main())


def test_what_is_not_acknowledged_comes_again(run: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            rig = Rig(server)
            rig.start()
            await rig.connected()
            await say(server, numbers(10))
            await until(lambda: len(rig.got) == 10)
            rig.settle(*rig.got[:4])
            rig.subscriber.flush_acks()
            await asyncio.sleep(0.05)
            await rig.crash()
            assert rig.subscriber.state == "closed"
            async with Rig(server) as again:
                await until(lambda: len(again.got) == 6)
                assert again.payloads == numbers(6, 4)
                again.settle_all()
            # what was acknowledged just before leaving does not come again
            async with Rig(server) as third:
                await asyncio.sleep(0.1)
                assert third.got == []

    run(main())


def test_a_broker_restart_is_survived(caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        with mosquitto("autosave_interval 1\nautosave_on_changes true\n", persistence=True) as server:
            async with Rig(server) as rig:
                await say(server, numbers(5))
                await until(lambda: len(rig.got) == 5)
                before = list(rig.got)
                await asyncio.to_thread(server.restart)
                await until(lambda: rig.subscriber.traffic.connects == 2 and rig.subscriber.connected.is_set(), 5.0)
                assert rig.subscriber.traffic.disconnects == 1
                await until(lambda: rig.acks.unacked == 5)  # all five again, and taken for what they are
                assert rig.got == before
                rig.settle(*before)
                assert rig.acks.ready == 5
                rig.subscriber.flush_acks()
                assert rig.acks.unacked == 0
                await say(server, [b"after"])
                await until(lambda: rig.payloads[-1] == b"after")

    asyncio.run(main())
    assert any("connection lost" in line for line in lines(caplog, logging.WARNING))


def test_a_lost_session_is_said(caplog: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            async with Rig(server) as rig:
                await asyncio.to_thread(server.restart, kill=True)
                await until(lambda: rig.subscriber.traffic.connects == 2 and rig.subscriber.connected.is_set(), 5.0)
                await say(server, [b"after"])
                await until(lambda: rig.payloads == [b"after"])
                rig.settle_all()

    asyncio.run(main())
    assert any("has lost our session" in line for line in lines(caplog, logging.WARNING))


def test_several_filters_feed_their_own_sinks() -> None:
    async def main() -> None:
        with mosquitto() as server:
            filters = [(f"site/{n}/+", 1) for n in range(18)] + [("$share/workers/shared/#", 0)]
            rig = Rig(server, filters)
            other: list[bytes] = []
            rig.subscriber.subscriptions.append(("own/#", 1))
            rig.router.add("own/#", CallbackSink(lambda topic, payload, token: other.append(topic) or 0))
            async with rig:
                await say(server, [b"x"], topic="site/0/a")
                await say(server, [b"x"], topic="site/17/a")
                await say(server, [b"x"], topic="own/b")
                await say(server, [b"x"], topic="shared/deep/er", qos=0)
                await say(server, [b"x"], topic="elsewhere")
                await until(lambda: len(rig.got) == 3)
                assert [topic for topic, _, _ in rig.got] == [b"site/0/a", b"site/17/a", b"shared/deep/er"]
                assert other == [b"own/b"]
                rig.settle_all()

    asyncio.run(main())


def test_large_messages_between_small_ones(run: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            sent = [bytes([n % 256]) * (900_000 if n % 10 == 5 else n) for n in range(40)]
            async with Rig(server) as rig:
                await say(server, sent)
                await until(lambda: len(rig.got) == 40, 10)
                assert rig.payloads == sent
                rig.settle_all()

    run(main())


# -- pausing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_sink_without_room_stops_the_reading(run: Any, protocol: Any) -> None:
    async def main() -> None:
        with mosquitto("max_inflight_messages 0\nmax_queued_messages 0\n") as server:
            async with Rig(server, protocol=protocol) as rig:
                rig.room = False
                await say(server, numbers(500))
                await until(lambda: rig.subscriber.paused)
                reads = rig.reads
                rig.subscriber.resume()  # still no room
                await asyncio.sleep(0.05)
                assert rig.got == []
                assert rig.subscriber.paused
                assert rig.reads == reads + 1
                rig.room = True
                rig.subscriber.resume()
                await until(lambda: len(rig.got) == 500)
                assert rig.payloads == numbers(500)
                assert not rig.subscriber.paused
                assert rig.subscriber.paused_s >= 0.049  # uvloop's clock counts milliseconds: 0.05 may be a hair less
                rig.settle_all()

    run(main())


def test_resume_from_within_on_read_comes_later() -> None:
    async def main() -> None:
        with mosquitto() as server:
            async with Rig(server) as rig:
                rig.room = False

                def on_read() -> None:
                    rig.room = True
                    rig.subscriber.resume()

                rig.subscriber.on_read = on_read
                await say(server, numbers(5))
                await until(lambda: len(rig.got) == 5)
                assert rig.payloads == numbers(5)
                rig.settle_all()

    asyncio.run(main())


def test_keep_alive_goes_on_while_reading_is_paused(run: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            async with Rig(server, keep_alive_s=2) as rig:
                rig.room = False
                await say(server, numbers(3))
                await until(lambda: rig.subscriber.paused)
                await asyncio.sleep(6)  # mosquitto ends a connection after 3 s of silence
                assert rig.subscriber.traffic.disconnects == 0
                rig.room = True
                rig.subscriber.resume()
                await until(lambda: len(rig.got) == 3)
                await asyncio.sleep(1.2)
                assert rig.subscriber.traffic.disconnects == 0
                assert rig.subscriber.traffic.connects == 1
                rig.settle_all()
            assert "exceeded timeout" not in server.log()

    run(main())


def test_stop_takes_no_more_but_acknowledges(run: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            rig = Rig(server, keep_alive_s=1)
            rig.start()
            await rig.connected()
            await say(server, numbers(5))
            await until(lambda: len(rig.got) == 5)
            await rig.subscriber.stop()
            assert rig.subscriber.state == "draining"
            await say(server, numbers(5, 5))
            await asyncio.sleep(2)  # twice the keep-alive
            assert len(rig.got) == 5
            rig.settle_all()
            rig.subscriber.flush_acks()
            await rig.subscriber.close()
            assert rig.task is not None
            await rig.task
            assert rig.subscriber.state == "closed"
            assert rig.subscriber.traffic.disconnects == 1
            async with Rig(server) as again:
                await until(lambda: len(again.got) == 5)
                await asyncio.sleep(0.05)
                assert again.payloads == numbers(5, 5)
                again.settle_all()
            assert "Client rig closed its connection" not in server.log()

    run(main())


def test_stop_before_there_is_a_connection() -> None:
    async def main() -> None:
        rig = Rig(type("Nobody", (), {"host": "127.0.0.1", "port": 9})())
        rig.start()
        await asyncio.sleep(0.02)
        await rig.subscriber.stop()
        await rig.subscriber.close()
        assert rig.task is not None
        async with asyncio.timeout(2):
            await rig.task
        assert "nothing listens" in (rig.subscriber.last_error or "")
        unstarted = Rig(type("Nobody", (), {"host": "127.0.0.1", "port": 9})())
        await unstarted.subscriber.close()
        unstarted.subscriber.flush_acks()
        unstarted.subscriber.resume()
        await unstarted.subscriber.run()
        assert unstarted.subscriber.traffic.connects == 0

    asyncio.run(main())


# -- the window -----------------------------------------------------------------------------------------


def test_a_5_0_broker_grants_what_is_asked_for() -> None:
    async def main() -> None:
        with mosquitto("max_queued_messages 0\n") as server:
            async with Rig(server, protocol="5", receive_maximum=300) as rig:
                assert rig.subscriber.granted_window == 300
                await say(server, numbers(1000))
                await until(lambda: len(rig.got) == 300)
                await asyncio.sleep(0.05)
                assert len(rig.got) == 300
                assert rig.acks.unacked == rig.subscriber.granted_window
                rig.settle_all()

    asyncio.run(main())


# -- who may come in ----------------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "welder", "s3cret-word"], check=True)
    with mosquitto(f"allow_anonymous false\npassword_file {passwords}\n") as server:
        yield server


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_user_and_password(guarded: Server, caplog: Any, protocol: Any) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        async with Rig(guarded, user="welder", password="s3cret-word", protocol=protocol) as rig:
            assert rig.subscriber.last_error is None
        wrong = Rig(guarded, user="welder", password="wr0ng-word", protocol=protocol)
        wrong.start()
        await until(lambda: wrong.subscriber.last_error)
        assert "not authorised" in wrong.subscriber.last_error or "bad user name" in wrong.subscriber.last_error
        assert "check user, password" in wrong.subscriber.last_error
        await until(lambda: wrong.states.count("connecting") >= 2)  # it goes on trying
        await wrong.subscriber.close()
        assert wrong.task is not None
        await wrong.task
        assert not wrong.subscriber.traffic.connects

    asyncio.run(main())
    said = "\n".join(lines(caplog, logging.DEBUG))
    assert "s3cret-word" not in said
    assert "wr0ng-word" not in said


def test_a_missing_client_id_is_made_and_said(caplog: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            async with Rig(server, client_id="") as rig:
                first = rig.subscriber.client_id
                assert first
                await asyncio.to_thread(server.restart, kill=True)
                await until(lambda: rig.subscriber.traffic.connects == 2, 5)
                assert rig.subscriber.client_id == first
            assert f"as {first}" in server.log()
            async with Rig(server, client_id="", clean_session=True) as rig:
                assert rig.subscriber.client_id == ""

    asyncio.run(main())
    said = [line for line in lines(caplog, logging.WARNING) if "client id" in line and "restart" in line]
    assert len(said) == 1


def test_a_broker_that_wants_client_ids_gets_one() -> None:
    async def main() -> None:
        with mosquitto("allow_zero_length_clientid false\n") as server:
            async with Rig(server, client_id="", clean_session=True) as rig:
                assert rig.subscriber.client_id.startswith("fastkin-")

    asyncio.run(main())


# -- TLS -------------------------------------------------------------------------------------------------------


class Authority:
    """Certificates of our own."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.directory = directory
        self.ca_file = self._write("ca.pem", self.ca.cert_pem)
        server = self.ca.issue_cert("127.0.0.1", "localhost")
        self.server_key = self._write("server.key", server.private_key_pem)
        self.server_cert = self._write("server.pem", server.cert_chain_pems[0])
        client = self.ca.issue_cert("welder@example.org")
        self.client_key = self._write("client.key", client.private_key_pem)
        self.client_cert = self._write("client.pem", client.cert_chain_pems[0])

    def _write(self, name: str, blob: trustme.Blob) -> str:
        path = self.directory / name
        blob.write_to_path(str(path))
        path.chmod(0o600)
        return str(path)

    def listener(self, *, client_cert: bool) -> str:
        return (
            f"cafile {self.ca_file}\ncertfile {self.server_cert}\nkeyfile {self.server_key}\n"
            f"allow_anonymous true\nrequire_certificate {'true' if client_cert else 'false'}\n"
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_an_encrypted_key_is_opened_with_its_password(authority: Authority, tmp_path: Path) -> None:
    """IC-01: the broker takes the certificate; another password is a settings error that does not show it."""
    key = serialization.load_pem_private_key(Path(authority.client_key).read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"pass-word-1"),
        )
    )
    tls = Tls(ca=authority.ca_file, cert=authority.client_cert, key=str(locked), key_password="pass-word-1")

    async def main() -> None:
        with mosquitto(authority.listener(client_cert=True)) as server:
            async with Rig(server, scheme="mqtts", tls=tls) as rig:
                assert rig.subscriber.last_error is None

    asyncio.run(main())
    with pytest.raises(ConfigError) as wrong:
        tls_context(Broker(host="h", scheme="mqtts", tls=dataclasses.replace(tls, key_password="pass-word-2")))
    assert str(locked) in str(wrong.value)
    assert "pass-word" not in str(wrong.value)


def test_tls_with_a_client_certificate(run: Any, authority: Authority) -> None:
    tls = Tls(
        ca=authority.ca_file, cert=authority.client_cert, key=authority.client_key, alpn=("mqtt", "x-amzn-mqtt-ca")
    )

    async def main() -> None:
        with mosquitto(authority.listener(client_cert=True)) as server:
            broker = Broker(host="127.0.0.1", port=server.port, scheme="mqtts", tls=tls)
            async with Rig(server, scheme="mqtts", tls=tls) as rig, Publisher(broker) as publisher:
                rig.room = False
                sent = [b"%d" % n * 50 for n in range(2000)]
                task = asyncio.ensure_future(asyncio.sleep(0.2))
                for payload in sent:
                    await publisher.publish("plant/1", payload, 1)
                await publisher.drain()
                await task
                assert rig.subscriber.paused
                rig.room = True
                rig.subscriber.resume()
                while len(rig.got) < 1020 or rig.acks.unacked:
                    rig.settle_all()
                    rig.subscriber.flush_acks()
                    await asyncio.sleep(0.01)
                    if rig.subscriber.traffic.messages >= 2000:
                        break
                assert rig.subscriber.traffic.messages == 2000
                rig.settle_all()

    run(main())


@pytest.mark.parametrize(
    ("tls", "reason"),
    [
        (lambda a, other: Tls(), "is not trusted: self-signed certificate in certificate chain; set ca to the file"),
        (lambda a, other: Tls(ca=other.ca_file), "which does not hold the authority that signed it"),
        (lambda a, other: Tls(ca=a.ca_file), "client certificate"),
        (lambda a, other: Tls(ca=a.ca_file, cert=other.client_cert, key=other.client_key), "client certificate"),
    ],
    ids=["no CA", "another CA", "no client certificate", "a stranger's client certificate"],
)
def test_tls_refusals_are_said_in_words(
    run: Any, tmp_path: Path, authority: Authority, tls: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """IC-01: an ERROR, for it does not get well by itself."""
    (tmp_path / "other").mkdir()
    settings = tls(authority, Authority(tmp_path / "other"))

    async def main() -> None:
        with mosquitto(authority.listener(client_cert=True)) as server:
            rig = Rig(server, scheme="mqtts", tls=settings)
            rig.start()
            # The alert of TLS 1.3 comes after our handshake, and a reset may overtake it: some attempt hears it.
            await until(lambda: reason in (rig.subscriber.last_error or ""), 30)
            (level,) = {each.levelno for each in caplog.records if "cannot connect" in each.getMessage()}
            assert level == logging.ERROR
            assert rig.subscriber._attempts.dialect.next(0.0) == 5  # a TLS refusal says nothing about the MQTT version
            await rig.subscriber.close()
            assert rig.task is not None
            await rig.task

    run(main())


def test_an_unchecked_certificate_is_said_loudly(authority: Authority, caplog: Any) -> None:
    async def main() -> None:
        with mosquitto(authority.listener(client_cert=False)) as server:
            async with Rig(server, scheme="mqtts", tls=Tls(insecure_skip_verify=True)):
                pass

    asyncio.run(main())
    assert any("NOT CHECKED" in line for line in lines(caplog, logging.WARNING))


def test_a_plain_port_is_not_tls(run: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            rig = Rig(server, scheme="mqtts")
            rig.start()
            await until(lambda: rig.subscriber.last_error, 12)
            assert rig.subscriber.last_error
            await rig.subscriber.close()

    run(main())


@pytest.mark.parametrize(
    ("tls", "place"),
    [
        ({"ca": "/nowhere/ca.pem"}, "tls ca"),
        ({"cert": "/nowhere/c.pem", "key": "/nowhere/k.pem"}, "tls cert, key"),
    ],
)
def test_missing_certificate_files_are_a_settings_error(tls: dict[str, str], place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        Rig(type("Nobody", (), {"host": "h", "port": 1})(), scheme="mqtts", tls=Tls(**tls))


def test_files_that_are_no_certificates(authority: Authority, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    nobody = type("Nobody", (), {"host": "h", "port": 1})()
    with pytest.raises(ConfigError, match="tls ca"):
        Rig(nobody, scheme="mqtts", tls=Tls(ca=str(junk)))
    with pytest.raises(ConfigError, match="tls cert, key"):
        Rig(nobody, scheme="mqtts", tls=Tls(ca=authority.ca_file, cert=str(junk), key=str(junk)))
    with pytest.raises(ConfigError, match="belong together"):
        Rig(nobody, scheme="mqtts", tls=Tls(cert=authority.client_cert, key=authority.server_key))


# -- WebSocket --------------------------------------------------------------------------------------------------


class Listener(NamedTuple):
    host: str
    port: int


@contextlib.contextmanager
def websockets(extra: str = "") -> Iterator[tuple[Server, Listener]]:
    """A broker with a second listener for WebSocket: this mosquitto does not start with such a one alone."""
    port = free_port()
    with mosquitto(f"listener {port}\nprotocol websockets\n{extra}", anonymous=True) as server:
        while not accepts(port):
            time.sleep(0.01)
        yield server, Listener("127.0.0.1", port)


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_websocket(run: Any, authority: Authority, scheme: Any) -> None:
    extra = authority.listener(client_cert=False) if scheme == "wss" else ""
    tls = Tls(ca=authority.ca_file)

    async def main() -> None:
        with websockets(extra) as (server, listener):
            async with Rig(listener, scheme=scheme, tls=tls) as rig:
                rig.room = False
                sent = [b"%d" % n * (40_000 if n % 50 == 9 else 1) for n in range(300)]
                await say(server, sent)
                await until(lambda: rig.subscriber.paused)
                rig.room = True
                rig.subscriber.resume()
                await until(lambda: len(rig.got) == 300, 10)
                assert rig.payloads == sent
                async with Publisher(
                    Broker(host=listener.host, port=listener.port, scheme=scheme, tls=tls)
                ) as publisher:
                    await publisher.publish("plant/1", b"from a WebSocket", 1)
                    await publisher.drain()
                await until(lambda: rig.payloads[-1] == b"from a WebSocket")
                rig.settle_all()
                rig.subscriber.flush_acks()
            async with Rig(listener, scheme=scheme, tls=tls) as again:
                await asyncio.sleep(0.05)
                assert again.got == []

    run(main())


def test_websocket_on_the_wrong_port_is_said() -> None:
    async def main() -> None:
        with mosquitto() as server:
            rig = Rig(server, scheme="ws", connect_timeout_s=1.0)
            rig.start()
            await until(lambda: rig.subscriber.last_error)
            await rig.subscriber.close()
        gone = Rig(server, scheme="ws")
        gone.start()
        await until(lambda: gone.subscriber.last_error)
        assert "nothing listens" in gone.subscriber.last_error
        await gone.subscriber.close()

    asyncio.run(main())


def test_websocket_survives_a_restart() -> None:
    async def main() -> None:
        with websockets() as (server, listener):
            async with Rig(listener, scheme="ws") as rig:
                await asyncio.to_thread(server.restart, kill=True)
                await until(lambda: rig.subscriber.traffic.connects == 2 and rig.subscriber.connected.is_set(), 5)

    asyncio.run(main())


async def test_the_face_of_an_intake_before_it_runs() -> None:
    rig = Rig(type("Nobody", (), {"host": "h", "port": 1})())
    subscriber: Subscriber = rig.subscriber
    assert (subscriber.state, subscriber.traffic.connects, subscriber.traffic.messages, subscriber.paused_s) == (
        "new",
        0,
        0,
        0.0,
    )
    assert not subscriber.coalescing
    assert not subscriber.paused
    assert subscriber.granted_window == 10_000
