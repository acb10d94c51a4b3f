"""A session that the broker no longer has is said for what it is: messages are lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from support.fake_broker import FakeBroker, Peer, Rig, lines, until


async def forgetful(peer: Peer) -> None:
    """Never has a session."""
    await peer.connect()
    await peer.subscribe()
    await peer.until_closed()


def connected(caplog: Any) -> list[str]:
    return [line for line in lines(caplog, logging.INFO) if " connected (" in line]


def test_another_intake_of_this_process_had_the_session(caplog: Any) -> None:
    """As after a reload: the session belongs to the client id, not to the object that used it."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with FakeBroker(forgetful) as broker:
            async with Rig(broker):
                assert lines(caplog, logging.WARNING) == []
            async with Rig(broker):
                (lost,) = lines(caplog, logging.WARNING)
                assert "has lost our session: what was published meanwhile is lost" in lost
                assert "client='rig'" in lost
            async with Rig(broker, client_id="another"):
                assert len(lines(caplog, logging.WARNING)) == 1

    asyncio.run(main())


def test_the_first_connection_of_a_process_does_not_say_new_and_no_more(caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with FakeBroker(forgetful) as broker, Rig(broker):
            (line,) = connected(caplog)
            assert "new session: if this client id had one, the broker has lost it" in line

    asyncio.run(main())


@pytest.mark.parametrize("clean", [True, False])
def test_a_session_that_cannot_have_been_there_is_not_missed(clean: bool, caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with FakeBroker(forgetful) as broker:
            for _ in range(2):
                async with Rig(broker, clean_session=clean, client_id="rig" if clean else ""):
                    pass

    asyncio.run(main())
    for line in connected(caplog):
        assert ("a clean session" if clean else "a new session)") in line
    assert not [line for line in lines(caplog, logging.WARNING) if "lost" in line]


def test_a_session_that_is_there_is_said(caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def script(peer: Peer) -> None:
        await peer.connect(b"\x20\x03\x01\x00\x00")
        await peer.subscribe()
        if peer.number > 1:
            await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker) as rig:
            await until(lambda: rig.subscriber.traffic.connects == 2 and rig.subscriber.connected.is_set())

    asyncio.run(main())
    assert [line.split(", ")[-1] for line in connected(caplog)] == ["the broker has our session)"] * 2


def test_a_broker_of_qos_0_only_is_told_of(caplog: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect(b"\x20\x05\x00\x00\x02\x24\x00")
        await peer.subscribe(0)
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker):
            pass

    asyncio.run(main())
    told = [line for line in lines(caplog, logging.WARNING) if "Maximum QoS" in line]
    assert len(told) == 1
    assert "lost" in told[0]
