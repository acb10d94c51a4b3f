"""Reading that is paused goes on: whoever frees room in the middle of anything is heard."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvloop

from fastkin.mqtt._core import publish
from support.fake_broker import FakeBroker, Peer, Rig, until

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


async def ten(peer: Peer) -> None:
    await peer.connect()
    await peer.subscribe()
    peer.send(*(publish("plant/1", b"%d" % n, qos=1, packet_id=n, version=peer.version) for n in range(1, 11)))
    await peer.until_closed()


class Refusing(Rig):
    """Has no room for the fourth message three times, and hears of room while it says so."""

    refusals = 3

    def _take(self, topic: bytes, payload: bytes, token: int) -> int:
        if payload == b"4" and self.refusals:
            self.refusals -= 1
            self.subscriber.resume()  # the only call there will be for this refusal
            return -1
        return super()._take(topic, payload, token)


def test_room_that_comes_while_a_sink_says_no(run: Any) -> None:
    """The records of an earlier message are settled in the middle of the feed that is about to stall."""

    async def main() -> None:
        async with FakeBroker(ten) as broker:
            rig = Refusing(broker)
            async with rig:
                await until(lambda: len(rig.got) == 10)
                assert rig.payloads == [b"%d" % n for n in range(1, 11)]
                assert not rig.subscriber.paused
                rig.settle_all()

    run(main())


def test_room_that_comes_in_on_read(run: Any) -> None:
    async def main() -> None:
        async with FakeBroker(ten) as broker:
            rig = Rig(broker)
            rig.room = False

            def on_read() -> None:
                if rig.subscriber.paused:
                    rig.room = True
                    rig.subscriber.resume()

            rig.subscriber.on_read = on_read
            async with rig:
                await until(lambda: len(rig.got) == 10)
                rig.settle_all()

    run(main())


@pytest.mark.parametrize("again", [1, 2])
def test_a_connection_that_is_lost_while_paused_does_not_pause_the_next(run: Any, again: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        peer.send(publish("plant/1", b"x", qos=1, packet_id=1, version=peer.version))
        if peer.number <= again:
            peer.send(b"\x00\x00")  # behind it: nonsense, seen once there is room
            await peer.until_closed()
            return
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker)
            rig.room = False
            rig.start()
            for number in range(1, again + 1):
                await until(lambda number=number: rig.subscriber.traffic.connects == number and rig.subscriber.paused)
                rig.room = True
                rig.subscriber.resume()
                rig.room = False
                await until(lambda number=number: rig.subscriber.traffic.disconnects == number)
            await until(lambda: rig.subscriber.traffic.connects == again + 1 and rig.subscriber.paused)
            rig.room = True
            rig.subscriber.resume()
            await until(lambda: len(rig.got) == again + 1 and not rig.subscriber.paused)
            assert rig.subscriber.paused_s >= 0.0
            await rig.subscriber.close()

    run(main())


def test_pauses_of_several_causes_end_when_the_last_has_ended() -> None:
    """stop() while a sink has no room, then room: nothing more is taken; close() reads the rest away and leaves."""

    async def main() -> None:
        async with FakeBroker(ten) as broker:
            rig = Rig(broker)
            rig.room = False
            rig.start()
            await until(lambda: rig.subscriber.paused)
            await rig.subscriber.stop()
            rig.room = True
            rig.subscriber.resume()
            await asyncio.sleep(0.05)
            assert rig.got == []
            async with asyncio.timeout(8):
                await rig.subscriber.close()
                assert rig.task is not None
                await rig.task

    asyncio.run(main())
