"""The codec alone, on a blocking socket, against a real mosquitto: every packet type both ways."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Self, TypeVar

import pytest

from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import Rig

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import servers


T = TypeVar("T")


class Line:
    """A codec on a socket; acknowledges what it takes at once unless told otherwise."""

    def __init__(self, broker: servers.Server, version: int, client_id: str, **connect: object) -> None:
        self.rig = Rig(version, connected=False, count=0, receive_maximum=50)
        self.events: list[object] = []
        self.socket = socket.create_connection((broker.host, broker.port), timeout=10)
        self.socket.sendall(self.rig.session.connect(client_id=client_id, **connect))  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            n = self.socket.recv_into(self.rig.session.get_buffer(-1))
            assert n, "the broker closed the connection"
            self.rig.session.feed(n)
            self.events += self.rig.session.take_events()
            self.socket.sendall(self.rig.session.take_output())

    def event(self, kind: type[T]) -> T:
        found: list[T] = []

        def done() -> bool:
            found[:] = [event for event in self.events if isinstance(event, kind)]
            return bool(found)

        self.until(done)
        self.events.remove(found[0])
        return found[0]


@pytest.mark.parametrize("version", [4, 5])
def test_with_mosquitto(broker: servers.Server, version: int) -> None:
    expiry = {"session_expiry": 60} if version == 5 else {}
    with (
        Line(broker, version, "taker", clean_start=False, **expiry) as taker,
        Line(broker, version, "giver", user="u", password=b"p") as giver,
    ):
        assert (taker.event(_mqtt.Connack).code, giver.event(_mqtt.Connack).code) == (0, 0)
        wire = taker.rig.session.subscribe(1, [("t/+/x", 2), ("$share/g/s/#", 1), ("ü", 0)])
        taker.socket.sendall(wire)
        assert taker.event(_mqtt.Suback).codes == [2, 1, 0]
        payloads = [b"", b"1", b"x" * 152, bytes(range(256)) * 4000]
        want = []
        number = 0
        for topic in ("t/1/x", "s/a/b", "ü"):
            for qos in (0, 1, 2):
                for payload in payloads:
                    number += 1
                    giver.socket.sendall(
                        _mqtt.publish(topic, payload, qos=qos and 1, packet_id=number, version=version)
                    )
                    want.append((topic.encode(), payload))
        acked: list[int] = []

        def all_acked() -> bool:
            for event in giver.events:
                assert isinstance(event, _mqtt.Puback)
                acked.extend(event.packet_ids)
            giver.events.clear()
            return len(acked) == 24

        giver.until(all_acked)
        assert acked == [i for i in range(1, 37) if (i - 1) // 4 % 3]
        taker.until(lambda: len(taker.rig.seen) == len(want))
        assert [(topic, payload) for topic, payload, _ in taker.rig.seen] == want
        taker.socket.sendall(taker.rig.session.pingreq())
        taker.event(_mqtt.Pingresp)
        assert taker.rig.acks.unacked == 0
        taker.socket.sendall(taker.rig.session.unsubscribe(2, ["ü", "nothing"]))
        unsuback = taker.event(_mqtt.Unsuback)
        assert unsuback.codes == ([0, 0x11] if version == 5 else [])
        taker.socket.sendall(taker.rig.session.disconnect())

    # a second life of the session: nothing is left over, and the broker knows us
    with Line(broker, version, "taker", clean_start=False, **expiry) as taker:
        assert taker.event(_mqtt.Connack).session_present


@pytest.mark.parametrize("version", [4, 5])
def test_qos_2_with_mosquitto(broker: servers.Server, version: int) -> None:
    """PUBLISH, PUBREC, PUBREL, PUBCOMP until the broker has nothing in flight; identifiers come again."""
    import paho.mqtt.publish as paho
    from paho.mqtt.enums import MQTTProtocolVersion

    with Line(broker, version, "taker") as taker:
        taker.event(_mqtt.Connack)
        taker.socket.sendall(taker.rig.session.subscribe(1, [("#", 2)]))
        taker.event(_mqtt.Suback)
        for burst in range(3):
            paho.multiple(
                [("t", b"%d/%d" % (burst, i), 2, False) for i in range(40)],
                hostname=broker.host,
                port=broker.port,
                protocol=MQTTProtocolVersion.MQTTv311,
            )
            taker.until(lambda burst=burst: len(taker.rig.seen) == 40 * (burst + 1))  # type: ignore[misc]
        # every PUBREL is answered before the answer to a PINGREQ that was sent after the last PUBREC
        taker.socket.sendall(taker.rig.session.pingreq())
        taker.event(_mqtt.Pingresp)
        assert taker.rig.payloads == [b"%d/%d" % (burst, i) for burst in range(3) for i in range(40)]
        assert taker.rig.session.duplicates == 0
