"""A reload never leaves less than there was, and the probes say what is so."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import trustme

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings, Status, Tls
from fastkin.emulator import Emulator
from fastkin.errors import ConfigError
from fastkin.mqtt.publisher import Publisher
from fastkin.mqtt.subscriber import Subscriber
from fastkin.service.pipeline import PipelineRun
from support.fake_broker import until
from support.servers import free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.servers import Server

IDS = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


def made(server: Server, emulator: Emulator, *names: str, broker: dict[str, Any] | None = None) -> Settings:
    kinesis = Kinesis(stream="s", region="us-east-1", endpoint_url=emulator.url, access_key="a", secret_key="b")
    pipelines = tuple(
        Pipeline(id=name, topics=(f"{name}/#",), kinesis=kinesis, dead_letter="none", linger_ms=1.0)
        for name in names or ("p",)
    )
    return Settings(
        broker=Broker(port=server.port, client_id=f"safe-{next(IDS)}", reconnect_max_s=0.5, **(broker or {})),
        pipelines=pipelines,
        status=Status(port=free_port()),
    )


def changed(settings: Settings, **changes: Any) -> Settings:
    first, *others = settings.pipelines
    return dataclasses.replace(settings, pipelines=(dataclasses.replace(first, **changes), *others))


async def probe(settings: Settings, path: str) -> tuple[int, dict[str, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", settings.status.port)
    writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
    head, _, body = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return int(head.split()[1]), json.loads(body)


async def probed(settings: Settings, path: str, code: int) -> dict[str, Any]:
    """The page, once it has that code."""
    async with asyncio.timeout(20):
        while True:
            got, told = await probe(settings, path)
            if got == code:
                return told
            await asyncio.sleep(0.05)


async def passes(server: Server, emulator: Emulator, topic: str = "p/1") -> None:
    """A message comes to the stream."""
    stored = emulator.stored_count("s")
    async with Publisher(Broker(host=server.host, port=server.port)) as publisher:
        await publisher.publish(topic, b"x", 1)
        await publisher.drain()
    await until(lambda: emulator.stored_count("s") > stored, 20)


async def test_a_reload_uses_the_very_certificates_that_it_checked(server: Server, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(ca))
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator, broker={"scheme": "mqtts", "tls": Tls(ca=str(ca))})
        async with fastkin.Engine(settings) as engine:
            reload = asyncio.create_task(engine.reload(changed(settings, linger_ms=2.0)))
            while not engine.leaving and not reload.done():
                await asyncio.sleep(0)
            ca.unlink()  # swapped between check and use
            changes = await reload
            assert changes.restarted == ("p",)
            assert set(engine.pipelines) == {"p"}
            assert engine.pipelines["p"].pipeline.linger_ms == 2.0
            assert (await probe(settings, "/healthz"))[0] == 200
            code, told = await probe(settings, "/readyz")
            assert code == 503
            assert "p" in told["pipelines"]


async def test_a_bundle_that_is_swapped_while_the_old_run_drains_changes_nothing(
    server: Server, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.pem"
    trustme.CA().cert_pem.write_to_path(str(bundle))
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        kinesis = dataclasses.replace(
            settings.pipelines[0].kinesis, endpoint_url="https://127.0.0.1:1", ca_bundle=str(bundle)
        )
        async with fastkin.Engine(settings) as engine:
            await until(engine.pipelines["p"].subscriber.connected.is_set)
            reload = asyncio.create_task(engine.reload(changed(settings, kinesis=kinesis)))
            while not engine.leaving and not reload.done():
                await asyncio.sleep(0)
            bundle.write_text("not a certificate")
            await reload
            await probed(settings, "/readyz", 503)
            run = engine.pipelines["p"]
            await until(lambda: run.start_error or run.failed())
            assert run.failed() is None
            assert "ca_bundle" not in str(run.start_error)
            assert (await probe(settings, "/healthz"))[0] == 200


async def test_a_wrong_bundle_is_refused_before_anything_is_touched(server: Server, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("not a certificate")
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        kinesis = dataclasses.replace(
            settings.pipelines[0].kinesis, endpoint_url="https://127.0.0.1:1", ca_bundle=str(bundle)
        )
        async with fastkin.Engine(settings) as engine:
            await probed(settings, "/readyz", 200)
            run = engine.pipelines["p"]
            with pytest.raises(ConfigError, match="ca_bundle"):
                await engine.reload(changed(settings, kinesis=kinesis))
            assert engine.pipelines == {"p": run}
            assert (await probe(settings, "/readyz"))[0] == 200
            await passes(server, emulator)


async def test_what_cannot_be_started_leaves_the_former_run(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, wrong = PipelineRun.start, iter([True])

    def start(run: PipelineRun) -> None:
        if run.pipeline.linger_ms == 2.0 and next(wrong, False):
            raise OSError("no more threads")
        real(run)

    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        async with fastkin.Engine(settings) as engine:
            await probed(settings, "/readyz", 200)
            monkeypatch.setattr(PipelineRun, "start", start)
            with contextlib.suppress(OSError):
                await engine.reload(changed(settings, linger_ms=2.0))
            assert set(engine.pipelines) == {"p"}, "it runs as before"
            assert engine.pipelines["p"].pipeline.linger_ms == 1.0
            await passes(server, emulator)
            told = await probed(settings, "/readyz", 503)
            assert "no more threads" in told["pipelines"]["p"]["reason"]
            assert "former ones" in told["pipelines"]["p"]["reason"]
            assert any("no more threads" in record.getMessage() for record in caplog.records)
            changes = await engine.reload(changed(settings, linger_ms=2.0))
            assert changes.restarted == ("p",)
            await probed(settings, "/readyz", 200)


async def test_settings_that_the_stream_refuses_leave_the_former_ones_at_work(server: Server) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        async with fastkin.Engine(settings) as engine:
            await probed(settings, "/readyz", 200)
            wrong = changed(settings, partition_key="none")  # for streams that choose shards themselves
            await engine.reload(wrong)
            await passes(server, emulator)
            told = await probed(settings, "/readyz", 503)
            assert "partition_key" in told["pipelines"]["p"]["reason"]
            assert (await probe(settings, "/healthz"))[0] == 200
            assert engine.stats()["p"]["stored"] == 1
            await engine.reload(changed(settings, linger_ms=3.0))
            await probed(settings, "/readyz", 200)


async def test_a_wrong_pipeline_at_the_first_start_takes_no_other_along(server: Server) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = changed(made(server, emulator, "a", "b"), partition_key="none")
        async with fastkin.Engine(settings) as engine:
            waiting = asyncio.create_task(engine.wait())
            told = await probed(settings, "/healthz", 503)
            assert "partition_key" in told["pipelines"]["a"]["reason"]
            assert told["pipelines"]["b"]["ok"]
            await until(engine.pipelines["b"].subscriber.connected.is_set)
            await passes(server, emulator, "b/1")
            assert not waiting.done()
        await waiting


async def test_a_wrong_pipeline_alone_ends_the_engine(server: Server) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = changed(made(server, emulator), partition_key="none")
        async with fastkin.Engine(settings) as engine:
            with pytest.raises(ConfigError, match="partition_key"):
                await asyncio.wait_for(engine.wait(), 20)


async def test_a_pipeline_whose_task_was_cancelled_does_not_look_alive(server: Server) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        async with fastkin.Engine(settings) as engine:
            await probed(settings, "/readyz", 200)
            (task,) = (task for task in asyncio.all_tasks() if task.get_name() == "fastkin[p].run")
            task.cancel()
            await asyncio.wait([task])
            told = await probed(settings, "/healthz", 503)
            assert "was cancelled" in told["pipelines"]["p"]["reason"]
            with pytest.raises(fastkin.FastkinError, match="was cancelled"):
                await asyncio.wait_for(engine.wait(), 20)


async def test_nothing_is_ready_when_every_pipeline_is_disabled(server: Server) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        async with fastkin.Engine(settings) as engine:
            await probed(settings, "/readyz", 200)
            await engine.reload(changed(settings, enabled=False))
            code, told = await probe(settings, "/readyz")
            assert (code, told["reason"]) == (503, "no pipeline is enabled")
            assert (await probe(settings, "/healthz"))[0] == 200, "a restart would mend nothing"


async def test_a_pipeline_between_two_runs_is_not_ready(server: Server) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = changed(made(server, emulator), shutdown_timeout_s=5.0)
        async with fastkin.Engine(settings) as engine:
            await probed(settings, "/readyz", 200)
            fault = emulator.faults.call("InternalFailure", operation="PutRecords")
            async with Publisher(Broker(host=server.host, port=server.port)) as publisher:
                await publisher.publish("p/1", b"x", 1)
                await publisher.drain()
            await until(lambda: engine.stats()["p"]["in_flight"] == 1)
            reload = asyncio.create_task(engine.reload(changed(settings, linger_ms=2.0)))
            await until(lambda: engine.leaving)
            code, told = await probe(settings, "/readyz")
            assert code == 503
            assert "not running" in told["pipelines"]["p"]["reason"]
            fault.remove()
            await reload
            await probed(settings, "/readyz", 200)


# --- the status port ---


async def test_a_port_that_is_taken_holds_up_no_pipeline(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        other = await asyncio.start_server(lambda *_: None, "127.0.0.1", settings.status.port)
        async with fastkin.Engine(settings) as engine:
            await until(engine.pipelines["p"].subscriber.connected.is_set)
            await passes(server, emulator)
            (said,) = (one.getMessage() for one in caplog.records if one.levelno == logging.ERROR)
            assert f"cannot listen on 127.0.0.1 port {settings.status.port}" in said
            assert "choose another in [status]" in said
            other.close()
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(OSError):
                        if (await probe(settings, "/readyz"))[0] == 200:
                            break
                    await asyncio.sleep(0.1)


@pytest.mark.parametrize("said", [b"", b"GET /metrics HT"], ids=["silent", "half a request"])
async def test_a_probe_gets_in_beside_any_number_of_silent_connections(server: Server, said: bytes) -> None:
    async with Emulator({"s": 1}) as emulator:
        settings = made(server, emulator)
        async with fastkin.Engine(settings):
            held = []
            for _ in range(100):
                reader, writer = await asyncio.open_connection("127.0.0.1", settings.status.port)
                writer.write(said)
                held.append((reader, writer))
            for _ in range(3):
                code, told = await probe(settings, "/healthz")
                assert (code, told["alive"]) == (200, True)
            # the oldest made room, and the newest are still there
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(held[0][0].read(), 5) == b""
            assert not held[-1][0].at_eof()
            for _, writer in held:
                writer.transport.abort()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()


async def test_a_stop_is_not_held_up_by_a_run_that_still_says_goodbye(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run that a reload replaces leaves the broker first, which may be deaf; stop() has less time than that."""
    async with Emulator({"s": 1}) as emulator:
        settings = changed(made(server, emulator, broker={"clean_session": True}), shutdown_timeout_s=0.5)
        async with fastkin.Engine(settings) as engine:
            await until(lambda: engine.pipelines["p"].subscriber.connected.is_set())
            close = Subscriber.close
            asked = 0

            async def deaf_at_first(subscriber: Subscriber) -> None:
                nonlocal asked
                asked += 1
                await (asyncio.get_running_loop().create_future() if asked == 1 else close(subscriber))

            monkeypatch.setattr(Subscriber, "close", deaf_at_first)
            reload = asyncio.create_task(engine.reload(changed(settings, linger_ms=2.0)))
            await until(lambda: asked == 1)
            began = asyncio.get_running_loop().time()
            assert await engine.stop() == 0
            assert asyncio.get_running_loop().time() - began < 0.5 + 1.2
            assert not engine.leaving
            await asyncio.wait([reload])
            reload.exception()
    assert not any("did not stop in time" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("turns", range(4))
async def test_a_goodbye_that_is_cut_short_before_it_began_leaves_nothing(server: Server, turns: int) -> None:
    """A reload and a stop in one turn of the loop: Python warned of a coroutine that nobody awaited."""
    async with Emulator({"s": 1}) as emulator:
        run = PipelineRun((settings := made(server, emulator)).pipelines[0], settings.broker)
        run.start()
        await until(run.subscriber.connected.is_set)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            stop = asyncio.create_task(run.stop(linger=True))
            while run._leave is None:
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            run.hurry()
            assert await stop == 0
            del run, stop
            gc.collect()
    assert [str(each.message) for each in told] == []
