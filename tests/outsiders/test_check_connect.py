"""`fastkin check --connect` fails where `fastkin run` would be refused, and takes nothing from a service that runs."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import pytest

from fastkin.config import Broker
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from support.fake_broker import FakeBroker, Peer, until
from support.mqtt_wire import publish
from support.running import service
from support.servers import mosquitto

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process


def settings(port: int, url: str, *, topics: str = '"t/#"', more: str = "", client: str = "c") -> str:
    return (
        f'[broker]\nurl = "mqtt://127.0.0.1:{port}"\nclient_id = "{client}"\nconnect_timeout_s = 5\n'
        f'[kinesis]\nregion = "us-east-1"\nendpoint_url = "{url}"\naccess_key = "a"\nsecret_key = "b"\nstream = "s"\n'
        f'[[pipeline]]\nid = "p"\ntopics = [{topics}]\ndead_letter = "none"\n{more}'
    )


SECOND = '[[pipeline]]\nid = "q"\ntopics = ["q/#"]\nqos = 2\ndead_letter = "none"\n'


async def check(tmp_path: Path, text: str, *options: str) -> tuple[int, str, str]:
    path = tmp_path / "check.toml"
    path.write_text(text)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTKIN_", "AWS_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fastkin.commands.cli", "check", "-q", "--connect", *options, str(path),
        env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    assert b"Traceback" not in err
    return process.returncode, out.decode(), err.decode()


async def test_each_filter_of_each_pipeline_is_subscribed_and_its_reason_code_told(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    async def script(peer: Peer) -> None:
        await peer.connect()
        filters = await peer.subscribe(*((0x87, 1) if not asked else (2,)))
        asked.append(filters)
        await peer.until_closed()

    async with Emulator({"s": 1}) as emulator, FakeBroker(script) as broker:
        text = settings(broker.port, emulator.url, topics='"forbidden/#", "plant/+"', more=SECOND)
        code, out, err = await check(tmp_path, text)
    assert asked == [["forbidden/#", "plant/+"], ["q/#"]]
    assert code == 1
    (line,) = (line for line in err.splitlines() if line.startswith("failed: filter"))
    assert "'forbidden/#' of pipeline p" in line
    assert "0x87" in line
    assert "policy" in line
    told = [line for line in out.splitlines() if line.startswith("ok: filter")]
    assert len(told) == 2
    assert "'plant/+' of pipeline p: granted with QoS 1 (code 0x01)" in told[0]
    assert "'q/#' of pipeline q: granted with QoS 2 (code 0x02)" in told[1]


async def test_a_shared_filter_is_asked_for_under_a_group_and_an_id_of_its_own(tmp_path: Path) -> None:
    asked: list[str] = []
    ids: list[bytes] = []
    clean: list[int] = []

    async def script(peer: Peer) -> None:
        body = await peer.connect()
        clean.append(body[7] & 2)
        ids.append(body)
        asked.extend(await peer.subscribe())
        await peer.until_closed()

    async with Emulator({"s": 1}) as emulator, FakeBroker(script) as broker:
        text = settings(broker.port, emulator.url, topics='"$share/production/a/+/b"', client="production-id")
        code, out, _ = await check(tmp_path, text)
    assert code == 0
    (topic,) = asked
    prefix, group, rest = topic.split("/", 2)
    assert (prefix, rest) == ("$share", "a/+/b")
    assert group != "production"
    assert clean == [2]
    assert b"production-id" not in ids[0]
    assert "'$share/production/a/+/b' of pipeline p: granted" in out
    assert "fastkin-check-" in out


async def test_it_takes_no_message_from_a_service_that_runs(tmp_path: Path) -> None:
    """Of a shared group, while messages come all the time."""
    with mosquitto() as server:
        async with Emulator({"s": 1}) as emulator:
            text = settings(server.port, emulator.url, topics='"$share/g/t/#"', client="the-service")
            with service(tmp_path, text) as run:
                await until(lambda: "subscribed" in run.log(), 30)
                sent = 0
                checking = asyncio.create_task(check(tmp_path, text))
                async with Publisher(Broker(port=server.port)) as publisher:
                    while not checking.done():
                        await publisher.publish("t/1", b"%d" % sent, 1)
                        sent += 1
                        await asyncio.sleep(0.01)
                    await publisher.drain()
                code, out, err = await checking
                assert code == 0, err
                assert "granted with QoS 1" in out
                await until(lambda: emulator.stored_count("s") == sent, 30)
                assert "disconnected" not in run.log()
                assert run.terminate() == 0


async def test_the_own_id_is_used_when_asked_for_and_leaves_no_trace(tmp_path: Path) -> None:
    with mosquitto() as server:
        async with Emulator({"s": 1}) as emulator:
            text = settings(server.port, emulator.url, client="mine", more=SECOND)
            code, out, err = await check(tmp_path, text, "--own-id")
            assert code == 0, err
            assert "connected as mine for pipeline p" in out
            assert "connected as mine-q for pipeline q" in out
            assert "pushed off" in err
            # a session that it made is gone: nothing was collected for it
            async with Publisher(Broker(port=server.port)) as publisher:
                await publisher.publish("t/1", b"x", 1)
                await publisher.drain()
            with service(tmp_path, text) as run:
                await until(lambda: run.log().count("subscribed") == 2, 30)
                assert run.log().count("a new session") == 2, run.log()
                assert run.terminate() == 0
            assert emulator.stored_count("s") == 0


async def test_what_is_queued_for_the_own_id_stays_queued(tmp_path: Path) -> None:
    with mosquitto() as server:
        async with Emulator({"s": 1}) as emulator:
            text = settings(server.port, emulator.url, client="queued")
            with service(tmp_path, text) as run:
                await until(lambda: "subscribed" in run.log(), 30)
                assert run.terminate() == 0
                async with Publisher(Broker(port=server.port)) as publisher:
                    for number in range(50):
                        await publisher.publish("t/1", b"%d" % number, 1)
                    await publisher.drain()
                code, _, err = await check(tmp_path, text, "--own-id")
                assert code == 0, err
                run.start()
                await until(lambda: emulator.stored_count("s") >= 50, 30)
                assert run.terminate() == 0
            assert {bytes(one.data) for one in emulator.stored("s")} == {b"%d" % n for n in range(50)}


@pytest.mark.parametrize("topic", ["t/1", "t/+"])
async def test_what_can_be_no_record_stays_queued_too(topic: str, tmp_path: Path) -> None:
    """Too large, or ill-formed: the service sets it aside, a check has no place for it and must not acknowledge it."""
    sent = 0
    came: list[int] = []

    async def script(peer: Peer) -> None:
        nonlocal sent
        body = await peer.connect(b"\x20\x03\x01\x00\x00")
        if b"queued" in body:
            # before SUBACK, as brokers send what is queued
            peer.send(publish(topic, bytes(5000), qos=1, packet_id=7, version=5), publish("t/1", b"good", version=5))
            sent += 1
        await peer.subscribe()
        while came[-1:] != [0xE0]:
            came.append((await peer.packet())[0])

    async with Emulator({"s": 1}) as emulator, FakeBroker(script) as broker:
        text = settings(broker.port, emulator.url, client="queued")
        text = text.replace("[kinesis]", "max_packet_bytes = 1024\n[kinesis]")
        code, _, err = await check(tmp_path, text, "--own-id")
    assert code == 0, err
    assert sent >= 1
    assert 0x40 not in came


async def test_verbose_tells_of_each_call_and_connection_and_of_no_secret(tmp_path: Path) -> None:
    with mosquitto() as server:
        async with Emulator({"s": 1}) as emulator:
            text = settings(server.port, emulator.url).replace('secret_key = "b"', 'secret_key = "hush-hush"')
            code, _, err = await check(tmp_path, text)
            assert (code, "DEBUG" in err) == (0, False)
            (tmp_path / "v.toml").write_text(text)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fastkin.commands.cli", "check", "-v", "--connect", str(tmp_path / "v.toml"),
                stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            _, told = await asyncio.wait_for(process.communicate(), 60)
    lines = [line for line in told.decode().splitlines() if " DEBUG " in line]
    assert any("DescribeStreamSummary" in line and "status 200" in line for line in lines), told
    assert any("is connecting now" in line for line in lines)
    assert "hush-hush" not in told.decode()
