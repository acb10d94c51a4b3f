"""What workers of an earlier start left is taken to its end, and nothing that still holds something is thrown away."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.config import Broker, Kinesis, Pipeline, Settings, Workers
from fastkin.delivery.spool_file import Put, Spool
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from fastkin.mqtt.visit import has_session, visit
from fastkin.service import leftovers, workers
from fastkin.service.leftovers import Leftovers, find
from fastkin.service.members import settings_of
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from support.servers import Server

KEYS: dict[str, Any] = {"region": "us-east-1", "access_key": "AKID", "secret_key": "secret-of-some-length"}


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\n") as running:
        yield running


def settings(url: str, host: str, port: int, client: str, **pipeline: Any) -> Settings:
    made = Pipeline(
        id="a", kinesis=Kinesis(stream="s", endpoint_url=url, **KEYS), topics=(f"{client}/#",), dead_letter="none",
        linger_ms=5, startup_check="none", **pipeline,
    )  # fmt: skip
    return Settings(broker=Broker(host=host, port=port, client_id=client), pipelines=(made,), workers=Workers(count=2))


@asynccontextmanager
async def stalling(server: Server, seconds: float) -> AsyncIterator[int]:
    """A port in front of the broker; of the first connection what follows CONNACK comes so much later."""
    connections = 0

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        first = connections == 1
        from_broker, to_broker = await asyncio.open_connection(server.host, server.port)

        async def up() -> None:
            while data := await reader.read(65536):
                to_broker.write(data)
            to_broker.close()

        async def down() -> None:
            pieces = 0
            while data := await from_broker.read(65536):
                pieces += 1
                if first and pieces == 2:
                    await asyncio.sleep(seconds)
                writer.write(data)
            writer.close()

        await asyncio.gather(up(), down(), return_exceptions=True)

    proxy = await asyncio.start_server(client, "127.0.0.1", 0)
    async with proxy:
        yield proxy.sockets[0].getsockname()[1]


async def test_a_session_is_not_ended_while_the_line_stands_still(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages are still to come, though nothing has come for longer than a session takes that is empty."""
    monkeypatch.setattr(leftovers, "_QUIET_S", 0.3)
    async with Emulator({"s": 2}) as emulator, stalling(server, 3.0) as port:
        made = settings(emulator.url, "127.0.0.1", port, "stall")
        theirs = settings_of(made, 2)
        direct = Broker(host=server.host, port=server.port, client_id=theirs.broker.client_id, clean_session=False)
        await visit(direct, [(theirs.pipelines[0].filters[0], 1)])
        async with Publisher(Broker(host=server.host, port=server.port)) as publisher:
            for n in range(200):
                await publisher.publish("stall/m", b"%d" % n, 1)
            await publisher.drain()
        assert await has_session(direct)
        async with Leftovers(made, [2]) as left:
            await left.wait()
        assert {int(each.data) for each in emulator.stored("s")} == set(range(200))
        assert not await has_session(direct)


@pytest.mark.parametrize("state", ["damaged pages", "damaged rows", "locked", "foreign"])
async def test_a_spool_that_was_not_emptied_stays(
    state: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its records are acknowledged and in no other place. One ERROR names the file, and the sessions are ended."""
    monkeypatch.setattr(leftovers, "_BROKEN_S", 0.5)
    monkeypatch.setattr(leftovers, "_QUIET_S", 0.3)
    path = tmp_path / "spool-w2.db"
    held: Spool | None = None
    if state == "foreign":
        path.write_bytes(b"my thesis " * 100)
    else:
        with Spool(path, max_bytes=100 << 20) as spool:
            size = 20_000 if state == "damaged pages" else 1000
            # no bodies of PutRecords: each row counts as damaged when it is read
            spool.write([Put((b"%d-" % n).ljust(size, b"."), b"", 10, 10) for n in range(200)])
    if state == "damaged pages":
        with path.open("r+b") as file:
            for at in range(8192, path.stat().st_size, 8192):
                file.seek(at)
                file.write(b"\xff" * 512)
    if state == "locked":
        held = Spool(path, max_bytes=100 << 20)
        held.open()
    before = path.read_bytes() if state == "foreign" else b""
    async with Emulator({"s": 2}) as emulator:
        made = settings(
            emulator.url, server.host, server.port, f"spool-{state.replace(' ', '-')}",
            on_full="spool", spool=str(tmp_path / "spool.db"),
        )  # fmt: skip
        assert await find(made, 2) == [2]
        with caplog.at_level(logging.INFO, "fastkin.workers"):
            async with asyncio.timeout(60), Leftovers(made, [2]) as left:
                await left.wait()
    assert path.exists()
    if state == "foreign":
        assert path.read_bytes() == before
    if held is not None:
        held.close()
    if state in {"damaged rows", "locked"}:
        with Spool(path, max_bytes=100 << 20) as spool:
            found = spool.open()
            assert found.rows + found.damaged == 200
    told = [each.getMessage() for each in caplog.records if each.name == "fastkin.workers"]
    (error,) = [each for each in told if "is left as it is" in each]
    assert str(path) in error
    assert any("is stored but for its spool" in each for each in told)


async def test_an_empty_spool_is_deleted(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_QUIET_S", 0.3)
    with Spool(tmp_path / "spool-w2.db", max_bytes=1 << 20):
        pass
    async with Emulator({"s": 2}) as emulator:
        made = settings(
            emulator.url, server.host, server.port, "empty", on_full="spool", spool=str(tmp_path / "spool.db")
        )
        async with asyncio.timeout(60), Leftovers(made, [2]) as left:
            await left.wait()
    assert list(tmp_path.iterdir()) == []


async def test_a_process_that_cannot_be_made_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No descriptor or no process to be had: the others go on, and this one comes when there is one."""
    place = workers._Place("0", ["true"], {})
    monkeypatch.setattr(workers, "_AGAIN_S", 0.01)

    def none(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers.subprocess, "Popen", none)
    run = asyncio.create_task(place.run())
    async with asyncio.timeout(10):
        while place.restarts < 2:
            await asyncio.sleep(0.01)
    assert not run.done()
    assert "cannot be started (Resource temporarily unavailable)" in str(place.trouble)
    assert sum("cannot be started" in each.getMessage() for each in caplog.records) >= 2
    with suppress(TimeoutError):
        await place.stop(1.0)
    await asyncio.wait_for(run, 5)
