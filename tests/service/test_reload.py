"""Reload: changed pipelines restart and lose nothing, others do not notice, wrong settings change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings, Tls
from fastkin.emulator import Emulator
from fastkin.errors import ClosedError, ConfigError, LibraryError
from fastkin.mqtt.publisher import Publisher
from fastkin.service.counters import Carry, merged
from fastkin.status.registry import BY_KEY, Reload
from support.fake_broker import lines, until
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from fastkin.status.registry import Row
    from support.servers import Server

_NAMES = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 100\n") as running:
        yield running


class Plant:
    """Settings for one broker and one emulated stream, and a publisher of numbered messages."""

    def __init__(self, server: Server, emulator: Emulator, publisher: Publisher) -> None:
        self.emulator = emulator
        self.publisher = publisher
        self.client_id = f"reload-{next(_NAMES)}"
        self.broker = Broker(
            host=server.host, port=server.port, client_id=self.client_id, reconnect_min_s=0.05, reconnect_max_s=0.2
        )
        self.published = 0

    def pipeline(self, name: str = "p", **more: Any) -> Pipeline:
        kinesis = Kinesis(
            endpoint_url=self.emulator.url, region="us-east-1", stream="welders",
            access_key=ACCESS_KEY, secret_key=SECRET_KEY, **more.pop("kinesis", {}),
        )  # fmt: skip
        defaults: dict[str, Any] = {"topics": (f"{name}/#",), "dead_letter": "none", "linger_ms": 5.0}
        return Pipeline(id=name, kinesis=kinesis, **defaults | more)

    def settings(self, *pipelines: Pipeline, **broker: Any) -> Settings:
        return Settings(broker=dataclasses.replace(self.broker, **broker), pipelines=pipelines)

    async def publish(self, count: int = 1, topic: str = "p/1", qos: int = 1) -> None:
        for _ in range(count):
            await self.publisher.publish(topic, b"%d" % self.published, qos)
            self.published += 1
        await self.publisher.drain()

    def stored(self) -> Counter[int]:
        return Counter(int(record.data) for record in self.emulator.stored("welders"))

    async def all_stored(self) -> None:
        await until(lambda: len(self.stored()) == self.published, 20)
        assert sorted(self.stored()) == list(range(self.published))


@contextlib.asynccontextmanager
async def plant(server: Server) -> AsyncIterator[Plant]:
    async with Emulator({"welders": 2}) as emulator:
        publisher = Publisher(Broker(host=server.host, port=server.port))
        await publisher.connect()
        try:
            yield Plant(server, emulator, publisher)
        finally:
            await publisher.close()


async def connected(engine: fastkin.Engine, *names: str) -> None:
    async with asyncio.timeout(20):
        for name in names or tuple(engine.pipelines):
            await engine.pipelines[name].subscriber.connected.wait()


def balanced(stats: dict[str, Any]) -> bool:
    ended = stats["stored"] + stats["dead_lettered"] + stats["filtered"] + stats["dropped"]
    return bool(stats["received"] == ended + stats["in_flight"] + stats.get("spooled", 0))


async def test_an_unchanged_pipeline_does_not_notice(server: Server) -> None:
    async with plant(server) as p:
        a, b = p.pipeline("a"), p.pipeline("b")
        async with fastkin.Engine(p.settings(a, b)) as engine:
            await connected(engine)
            before = dict(engine.pipelines)
            await p.publish(5, "a/1")
            changes = await engine.reload(p.settings(a, dataclasses.replace(b, linger_ms=1.0)))
            assert changes == fastkin.Changes(restarted=("b",), unchanged=("a",))
            assert str(changes) == "restarted b; unchanged a"
            assert engine.pipelines["a"] is before["a"]
            assert engine.pipelines["a"].subscriber.traffic.connects == 1
            assert engine.pipelines["b"] is not before["b"]
            await connected(engine)
            await p.publish(5, "a/1")
            await p.publish(5, "b/1")
            await p.all_stored()
            assert engine.stats()["a"]["connects"] == 1


async def test_what_needs_no_new_run_is_taken_up_live(server: Server) -> None:
    async with plant(server) as p:
        old = p.pipeline()
        async with fastkin.Engine(p.settings(old)) as engine:
            await connected(engine)
            run = engine.pipelines["p"]
            new = dataclasses.replace(old, description="the first hall", shutdown_timeout_s=0.5)
            assert (await engine.reload(p.settings(new))).unchanged == ("p",)
            assert engine.pipelines["p"] is run
            assert run.pipeline.shutdown_timeout_s == 0.5
            assert (await engine.reload(p.settings(new), everything=True)).restarted == ("p",)
            assert engine.pipelines["p"] is not run


async def test_nothing_is_lost_and_no_counter_goes_back_over_many_reloads(server: Server) -> None:
    async with plant(server) as p:
        async with fastkin.Engine(p.settings(p.pipeline())) as engine:
            await connected(engine)
            over = asyncio.Event()
            seen: list[dict[str, Any]] = []

            async def look() -> None:
                while not over.is_set():
                    seen.append(engine.stats()["p"])
                    await asyncio.sleep(0.002)

            async def publish() -> None:
                while not over.is_set():
                    await p.publish(20)
                    await asyncio.sleep(0.002)

            work = [asyncio.create_task(look()), asyncio.create_task(publish())]
            for linger in (1.0, 2.0, 3.0, 4.0):
                await asyncio.sleep(0.1)
                assert (await engine.reload(p.settings(p.pipeline(linger_ms=linger)))).restarted == ("p",)
            over.set()
            await asyncio.gather(*work)
            await p.all_stored()
            # the last run may have nothing to do, and so be waited for by nothing else
            await until(lambda: engine.stats()["p"]["connects"] == 5 and engine.stats()["p"]["unacked"] == 0)
            assert engine.stats()["p"]["stored"] == sum(p.stored().values())
        assert all(map(balanced, seen))
        for name in ("received", "stored", "messages", "calls", "connects"):
            values = [stats[name] for stats in seen]
            assert values == sorted(values), name
        assert sum(p.stored().values()) == p.published, "a drain leaves no duplicate"


async def test_pipelines_come_go_and_come_back(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with plant(server) as p:
        a, b, c = p.pipeline("a"), p.pipeline("b"), p.pipeline("c")
        async with fastkin.Engine(p.settings(a, b)) as engine:
            await connected(engine)
            off = dataclasses.replace(b, enabled=False)
            changes = await engine.reload(p.settings(a, off, c))
            assert (changes.stopped, changes.started, changes.unchanged) == (("b",), ("c",), ("a",))
            assert set(engine.pipelines) == {"a", "c"}
            (kept,) = [line for line in lines(caplog, logging.WARNING) if "keeps the session" in line]
            assert f"'{p.client_id}-b'" in kept
            assert "mosquitto_sub -E" in kept
            await connected(engine)
            await p.publish(10, "b/1")  # for a pipeline that is disabled: the broker keeps them
            await p.publish(10, "c/1")
            await until(lambda: len(p.stored()) == 10)
            assert (await engine.reload(p.settings(a, b, c))).started == ("b",)
            await p.all_stored()
            assert engine.stats()["b"]["received"] == 10


async def test_every_pipeline_may_be_disabled(server: Server) -> None:
    async with plant(server) as p:
        off = p.settings(p.pipeline(enabled=False))
        async with fastkin.Engine(p.settings(p.pipeline())) as engine:
            await connected(engine)
            await engine.reload(off)
            assert not engine.pipelines
            assert engine.stats()["p"]["in_flight"] == 0
            await engine.reload(p.settings(p.pipeline()))
            await connected(engine, "p")
            await p.publish(3)
            await p.all_stored()


async def test_another_broker_restarts_all(server: Server) -> None:
    async with plant(server) as p:
        a, b = p.pipeline("a"), p.pipeline("b")
        with mosquitto() as other:
            async with fastkin.Engine(p.settings(a, b)) as engine:
                await connected(engine)
                changes = await engine.reload(p.settings(a, b, port=other.port))
                assert changes.restarted == ("a", "b")
                async with Publisher(Broker(host=other.host, port=other.port)) as there:
                    await there.publish("a/1", b"0", 1)
                    await there.publish("b/1", b"1", 1)
                    await there.drain()
                    await until(lambda: len(p.stored()) == 2)


async def test_a_topic_that_is_not_wanted_any_more_is_unsubscribed(server: Server) -> None:
    async with plant(server) as p, fastkin.Engine(p.settings(p.pipeline(topics=("p/1", "p/2")))) as engine:
        await connected(engine)
        await engine.reload(p.settings(p.pipeline(topics=("p/2", "p/3"))))
        await connected(engine)
        await p.publish(1, "p/3")
        await p.all_stored()
        messages = engine.stats()["p"]["messages"]
        await p.publisher.publish("p/1", b"not wanted", 1)
        await p.publish(1, "p/2")
        await p.all_stored()
        assert engine.stats()["p"]["messages"] == messages + 1, "the broker does not send the other one"
        assert engine.pipelines["p"].subscriber.traffic.connects == 1


async def test_what_a_former_process_subscribed_is_stored(server: Server) -> None:
    """The broker's session knows it still, and nobody told either of us otherwise: what is delivered here is ours."""
    async with plant(server) as p:
        async with fastkin.Engine(p.settings(p.pipeline(topics=("p/1", "p/2")))) as engine:
            await connected(engine)
        async with fastkin.Engine(p.settings(p.pipeline(topics=("p/2",)))) as engine:
            await connected(engine)
            await p.publish(10, "p/1")
            await p.publish(1, "p/2")
            await p.all_stored()
            stats = engine.stats()["p"]
            assert (stats["unrouted"], stats["received"], stats["messages"]) == (0, 11, 11)


async def test_settings_that_cannot_be_used_change_nothing(server: Server, tmp_path: Path) -> None:
    async with plant(server) as p:
        a = p.pipeline("a")
        async with fastkin.Engine(p.settings(a)) as engine:
            await connected(engine)
            run, settings = engine.pipelines["a"], engine.settings
            with pytest.raises(ConfigError, match=r"not\.pem does not exist"):
                await engine.reload(p.settings(a, scheme="mqtts", tls=Tls(ca=str(tmp_path / "not.pem"))))
            with pytest.raises(ConfigError, match="stream"):
                await engine.reload(p.settings(a, Pipeline(id="b", topics=("b",), kinesis=Kinesis())))
            assert engine.pipelines == {"a": run}
            assert engine.settings is settings
            await p.publish(2, "a/1")
            await p.all_stored()
            assert run.subscriber.traffic.connects == 1


async def test_a_certificate_that_was_written_anew_counts_as_a_change(server: Server, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("one")
    async with plant(server) as p:
        settings = p.settings(p.pipeline(kinesis={"ca_bundle": str(bundle)}))
        async with fastkin.Engine(settings) as engine:
            assert (await engine.reload(settings)).unchanged == ("p",)
            bundle.write_text("another")
            assert (await engine.reload(settings)).restarted == ("p",)


async def test_the_order_of_the_pipelines_moves_no_session(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with plant(server) as p:
        a, b, n = p.pipeline("a"), p.pipeline("b"), p.pipeline("n")
        async with fastkin.Engine(p.settings(a, b)) as engine:
            await connected(engine)
            assert (await engine.reload(p.settings(n, b, a))).unchanged == ("b", "a")
            ids = {name: run.subscriber.client_id for name, run in engine.pipelines.items()}
            assert ids == {name: f"{p.client_id}{end}" for name, end in (("a", ""), ("b", "-b"), ("n", "-n"))}
            assert any("put 'a' first" in line for line in lines(caplog))


async def test_reloads_queue(server: Server) -> None:
    async with plant(server) as p, fastkin.Engine(p.settings(p.pipeline())) as engine:
        await connected(engine)
        asked = [p.settings(p.pipeline(linger_ms=float(n))) for n in range(1, 4)]
        done = await asyncio.gather(*(engine.reload(each) for each in asked), engine.reload(asked[-1]))
        assert [changes.restarted for changes in done] == [("p",)] * 3 + [()]
        assert engine.settings is asked[-1]
        await connected(engine)
        await p.publish(5)
        await p.all_stored()


async def test_who_gives_up_waiting_leaves_nothing_half_done(server: Server) -> None:
    async with plant(server) as p, fastkin.Engine(p.settings(p.pipeline())) as engine:
        await connected(engine)
        reload = asyncio.create_task(engine.reload(p.settings(p.pipeline(linger_ms=1.0))))
        for _ in range(3):
            await asyncio.sleep(0)
        reload.cancel()
        await p.publish(5)
        await p.all_stored()
        await until(lambda: engine.pipelines["p"].pipeline.linger_ms == 1.0)


async def test_a_stop_during_a_reload_wins(server: Server) -> None:
    async with plant(server) as p:
        p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        slow = p.pipeline(shutdown_timeout_s=1.0)
        async with fastkin.Engine(p.settings(slow)) as engine:
            await connected(engine)
            await p.publish(5)
            await until(lambda: engine.stats()["p"]["in_flight"] == 5)
            reload = asyncio.create_task(
                engine.reload(p.settings(p.pipeline(linger_ms=1.0), p.pipeline("n", enabled=False)))
            )
            await until(lambda: engine.leaving)
            assert await engine.stop() == 5
            with pytest.raises(ClosedError):
                await reload
            assert not engine.pipelines
            assert balanced(engine.stats()["p"])
            assert engine.stats()["p"]["volatile"] == 0
            with pytest.raises(ClosedError):
                await engine.reload(p.settings(slow))


async def test_before_start_there_is_nothing_to_reload(server: Server) -> None:
    async with plant(server) as p:
        settings = p.settings(p.pipeline())
        with pytest.raises(LibraryError, match="start"):
            await fastkin.Engine(settings).reload(settings)


async def test_records_that_do_not_end_in_time_come_again(server: Server) -> None:
    async with plant(server) as p:
        fault = p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        async with fastkin.Engine(p.settings(p.pipeline(shutdown_timeout_s=0.2))) as engine:
            await connected(engine)
            await p.publish(30)
            await until(lambda: engine.stats()["p"]["in_flight"] == 30)
            changes = await engine.reload(p.settings(p.pipeline(linger_ms=1.0)))
            assert changes.unsettled == 30
            stats = engine.stats()["p"]
            assert (stats["received"], stats["in_flight"]) == (30, 30)
            await connected(engine)
            await until(lambda: engine.pipelines["p"].delivery.batcher.received == 30)
            stats = engine.stats()["p"]
            assert (stats["received"], stats["in_flight"]) == (30, 30), "not counted twice"
            fault.remove()
            await p.all_stored()
            await until(lambda: engine.stats()["p"]["in_flight"] == 0)
            assert engine.stats()["p"]["received"] == engine.stats()["p"]["stored"] == 30


@pytest.mark.parametrize("drawn", [False, True])
async def test_what_the_broker_does_not_keep_is_stored_by_the_old_run(server: Server, drawn: bool) -> None:
    """QoS 0 while Kinesis is away: a reload must not throw away what is in memory, and the new run is at work."""
    async with plant(server) as p:
        fault = p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        broker: dict[str, Any] = {"clean_session": True, "client_id_drawn": drawn}
        old = p.pipeline(qos=0, shutdown_timeout_s=0.2)
        async with fastkin.Engine(p.settings(old, **broker)) as engine:
            await connected(engine)
            await p.publish(10, qos=0)
            await until(lambda: engine.stats()["p"]["in_flight"] == 10)
            assert engine.stats()["p"]["volatile"] == 10
            new = p.settings(dataclasses.replace(old, linger_ms=1.0), **broker)
            assert (await engine.reload(new)).restarted == ("p",)
            await connected(engine)
            await p.publish(10, qos=0)
            await until(lambda: engine.stats()["p"]["in_flight"] == 20)
            assert len(engine.leaving) == 1
            await asyncio.sleep(0.5)  # beyond shutdown_timeout_s
            assert len(engine.leaving) == 1
            fault.remove()
            await p.all_stored()
            await until(lambda: not engine.leaving)
            stats = engine.stats()["p"]
            assert (stats["received"], stats["stored"], stats["in_flight"]) == (20, 20, 0)


async def test_the_new_run_takes_the_spool_of_the_old_one_up(server: Server, tmp_path: Path) -> None:
    async with plant(server) as p:
        fault = p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        old = p.pipeline(
            qos=0, on_full="spool", spool=str(tmp_path / "spool.db"), spool_after_s=0.1, shutdown_timeout_s=0.5
        )
        async with fastkin.Engine(p.settings(old)) as engine:
            await connected(engine)
            await p.publish(20, qos=0)
            await until(lambda: engine.stats()["p"]["spool_rows"] > 0)
            await engine.reload(p.settings(dataclasses.replace(old, linger_ms=1.0)))
            await connected(engine)
            assert not engine.leaving
            assert balanced(engine.stats()["p"])
            fault.remove()
            await until(lambda: set(p.stored()) == set(range(20)), 20)
            await until(lambda: not engine.stats()["p"]["in_flight"] + engine.stats()["p"]["spooled"])
            assert balanced(engine.stats()["p"])


async def test_with_a_drawn_client_id_the_new_run_is_there_before_the_old_one_leaves(server: Server) -> None:
    async with plant(server) as p:
        broker: dict[str, Any] = {"clean_session": True, "client_id_drawn": True}
        async with fastkin.Engine(p.settings(p.pipeline(qos=0), **broker)) as engine:
            await connected(engine)
            over = asyncio.Event()

            async def publish() -> None:
                while not over.is_set():
                    await p.publish(2, qos=0)
                    await asyncio.sleep(0.002)

            work = asyncio.create_task(publish())
            pipeline = p.pipeline(qos=0)
            for linger in (1.0, 2.0, 3.0):
                await asyncio.sleep(0.1)
                drawn = {**broker, "client_id": f"drawn-{linger}"}  # by each reading of the settings anew
                assert (await engine.reload(p.settings(pipeline, **drawn))).unchanged == ("p",)
                pipeline = dataclasses.replace(pipeline, linger_ms=linger)
                assert (await engine.reload(p.settings(pipeline, **drawn))).restarted == ("p",)
            over.set()
            await work
            await p.all_stored()


async def test_a_lingering_run_has_a_deadline_when_the_engine_stops(server: Server) -> None:
    async with plant(server) as p:
        p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        old = p.pipeline(qos=0, shutdown_timeout_s=0.2)
        engine = fastkin.Engine(p.settings(old))
        async with engine:
            await connected(engine)
            await p.publish(10, qos=0)
            await until(lambda: engine.stats()["p"]["in_flight"] == 10)
            await engine.reload(p.settings())
        stats = engine.stats()["p"]
        assert balanced(stats)
        assert stats["in_flight"] == stats["volatile"] == 10, "lost, and told"


async def test_a_new_pipeline_that_cannot_work_takes_no_other_along(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with plant(server) as p:
        a, wrong = p.pipeline("a"), p.pipeline("b", partition_key="none")
        async with fastkin.Engine(p.settings(a)) as engine:
            await connected(engine)
            waiting = asyncio.create_task(engine.wait())
            await engine.reload(p.settings(a, wrong))
            await until(lambda: any("correct it and reload" in line for line in lines(caplog, logging.ERROR)))
            await p.publish(3, "a/1")
            await p.all_stored()
            assert not waiting.done()
            changes = await engine.reload(p.settings(a, dataclasses.replace(wrong, partition_key="uuid")))
            assert (changes.restarted, changes.unchanged) == (("b",), ("a",))
            await connected(engine)
            await p.publish(3, "b/1")
            await p.all_stored()
            assert not engine.leaving
        await waiting


def test_counters_are_carried_over_and_debts_are_paid_once() -> None:
    carry = Carry()
    run = {
        "received": 10,
        "stored": 4,
        "in_flight": 6,
        "state": "closed",
        "flushes": (1, 2),
        "flushed_by_reason": {"linger": 2},
        "peak_bytes": 9,
    }
    carry.add(run)
    now = merged(
        carry,
        [
            {
                "received": 2,
                "stored": 1,
                "in_flight": 1,
                "state": "connected",
                "flushes": (3, 4),
                "flushed_by_reason": {"full": 1},
            }
        ],
    )
    assert (now["received"], now["stored"], now["in_flight"]) == (10, 5, 5)
    assert (now["state"], now["flushes"], now["flushed_by_reason"]) == ("connected", (4, 6), {"linger": 2, "full": 1})
    carry.add({"received": 2, "stored": 2, "in_flight": 0})
    now = merged(carry, [{"received": 9, "stored": 0, "in_flight": 9}])
    assert (now["received"], now["stored"], now["in_flight"]) == (15, 6, 9)
    carry.add({"received": 9, "stored": 7, "in_flight": 2, "volatile": 2})
    now = merged(carry, [])
    assert (now["received"], now["stored"], now["in_flight"], now["volatile"]) == (15, 13, 2, 2)


def test_a_run_that_ends_beside_its_successor_turns_no_counter_back() -> None:
    """The new run was at work for long when the old one gave its last records up: its messages pay no such debt."""
    carry = Carry()
    old = {"received": 10, "stored": 0, "in_flight": 10}
    new = {"received": 8, "stored": 8, "in_flight": 0}
    before = merged(carry, [old, new])
    carry.add(old, beside=8)
    after = merged(carry, [new])
    assert (before["received"], before["in_flight"]) == (after["received"], after["in_flight"]) == (18, 10)
    later = merged(carry, [{"received": 11, "stored": 11, "in_flight": 0}])
    assert (later["received"], later["stored"], later["in_flight"]) == (18, 11, 7)
    carry.add({"received": 11, "stored": 11, "in_flight": 0})
    assert merged(carry, []) == later | {"state": "closed", "last_error": None}
    now = merged(carry, [{"received": 9, "stored": 9, "in_flight": 0}])
    assert (now["received"], now["stored"], now["in_flight"]) == (20, 20, 0)


async def test_every_figure_of_stats_has_a_row_and_each_row_is_told(server: Server, tmp_path: Path) -> None:
    """A figure without a row would restart at zero with a reload."""
    async with plant(server) as p:
        spooled = p.pipeline(on_full="spool", spool=str(tmp_path / "spool.db"))
        async with fastkin.Engine(p.settings(spooled)) as engine:
            await connected(engine)
            assert engine.stats()["p"].keys() == BY_KEY.keys()
            await engine.reload(p.settings(dataclasses.replace(spooled, on_full="pause", spool=None)))
            await connected(engine)
            assert engine.stats()["p"].keys() == BY_KEY.keys(), "with an ended run, and without a spool"
            await engine.reload(p.settings())
            stats = engine.stats()["p"]
            assert stats.keys() == BY_KEY.keys(), "without a run"
            assert (stats["state"], stats["spooling"], stats["connects"]) == ("closed", False, 2)


def example(row: Row) -> Any:
    """A figure as the row tells it, nothing being in flight."""
    if row.key in {"in_flight", "volatile", "spooled"}:
        return 0
    if row.key == "flushes":
        return (1, 2)
    if row.metric is not None and row.metric.kind == "histogram":
        return {"1.0": 2, "+Inf": 1, "sum": 3.5}
    return {"a": 1, "b": 2} if row.metric is not None and row.metric.labels[1:] else 3


def twice(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: 2 * count for name, count in value.items()}
    return tuple(2 * count for count in value) if isinstance(value, tuple) else 2 * value


@pytest.mark.parametrize("key", BY_KEY)
def test_each_figure_goes_over_a_reload_as_its_row_says(key: str) -> None:
    row, value = BY_KEY[key], example(BY_KEY[key])
    run = {name: example(other) for name, other in BY_KEY.items()}
    carry = Carry()
    carry.add(run)
    summed = row.reload is Reload.SUMMED
    assert merged(carry, [run])[key] == (twice(value) if summed else value), "one ended, one is at work"
    assert merged(carry, [])[key] == (value if summed else row.idle), "none is at work"
    latest = row.reload is Reload.LATEST
    assert merged(None, [run, run])[key] == (value if latest else twice(value)), "two are at work"
    assert run[key] == value, "what a run has said stays as it was"


def test_labels_that_one_run_alone_has_are_kept() -> None:
    one, other = ({"received": 0, "in_flight": 0, "retried_by_code": codes} for codes in ({"a": 1, "b": 2}, {"b": 3}))
    carry = Carry()
    carry.add(one)
    assert merged(carry, [other])["retried_by_code"] == {"a": 1, "b": 5}


async def test_another_broker_and_records_that_do_not_end_turn_no_counter_back(server: Server) -> None:
    async with plant(server) as p:
        fault = p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        old = p.pipeline(shutdown_timeout_s=1.0)
        async with fastkin.Engine(p.settings(old)) as engine:
            await connected(engine)
            await p.publish(10)
            await until(lambda: engine.stats()["p"]["in_flight"] == 10)
            before = engine.pipelines["p"]
            reload = asyncio.create_task(engine.reload(p.settings(old, client_id=f"{p.client_id}-other")))
            await until(lambda: "p" in engine.pipelines and engine.pipelines["p"] is not before)
            await connected(engine)
            highest = 0
            while not reload.done():
                await p.publish(1)
                stats = engine.stats()["p"]
                assert balanced(stats)
                assert stats["received"] >= highest
                highest = stats["received"]
                await asyncio.sleep(0.01)
            assert (await reload).unsettled >= 10
            assert engine.stats()["p"]["received"] >= highest
            fault.remove()


@pytest.mark.parametrize(
    "wrong", [{"topics": ("a/#/b",)}, {"partition_key": "{bad"}, {"max_records": 0}, {"format": "nope"}], ids=str
)
@pytest.mark.parametrize("drawn", [False, True])
async def test_settings_made_in_code_that_cannot_be_used_change_nothing(
    server: Server, wrong: dict[str, Any], drawn: bool
) -> None:
    async with plant(server) as p:
        old = p.pipeline()
        async with fastkin.Engine(p.settings(old, client_id_drawn=drawn)) as engine:
            await connected(engine)
            before = engine.pipelines["p"], engine.settings
            with pytest.raises(ConfigError, match="pipeline 'p'"):
                await engine.reload(p.settings(dataclasses.replace(old, **wrong), client_id_drawn=drawn))
            assert (engine.pipelines["p"], engine.settings) == before
            assert engine.leaving == []
            assert (await engine.reload(p.settings(old, client_id_drawn=drawn))).unchanged == ("p",)
            await p.publish(3)
            await p.all_stored()


async def test_a_host_that_is_none_keeps_to_its_pipeline(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Such a name breaks Python's own encoding of it, and is no error of the network."""
    async with plant(server) as p:
        a, b = p.pipeline("a"), p.pipeline("b")
        async with fastkin.Engine(p.settings(a, b)) as engine:
            await connected(engine)
            wrong = dataclasses.replace(b, kinesis=dataclasses.replace(b.kinesis, endpoint_url="http://a..b:4567"))
            assert (await engine.reload(p.settings(a, wrong))).restarted == ("b",)
            await until(lambda: any("no name of a host" in line for line in lines(caplog, logging.ERROR)))
            assert not engine._failure.done()  # type: ignore[union-attr]
            await p.publish(3, "a/1")
            await p.publish(3, "b/1")
            assert (await engine.reload(p.settings(a, b))).restarted == ("b",)
            await p.all_stored()


async def test_what_was_malformed_and_comes_again_turns_no_counter_back(server: Server, tmp_path: Path) -> None:
    """The dead letters had no room, which another file cures: decoded never goes back."""
    async with plant(server) as p:
        full = p.pipeline(format="bulk", dead_letter="/dev/full", shutdown_timeout_s=0.5)
        async with fastkin.Engine(p.settings(full)) as engine:
            await connected(engine)
            for _ in range(5):
                await p.publisher.publish("p/1", b"no frame", 1)
            await until(lambda: engine.stats()["p"]["received"] == 5)
            decoded = [engine.stats()["p"]["decoded"]]
            reload = asyncio.create_task(
                engine.reload(p.settings(dataclasses.replace(full, dead_letter=str(tmp_path / "dead.jsonl"))))
            )
            async with asyncio.timeout(20):
                while not reload.done() or engine.stats()["p"]["dead_lettered"] < 5:
                    decoded.append(engine.stats()["p"]["decoded"])
                    await asyncio.sleep(0.002)
            assert decoded == sorted(decoded)
            assert balanced(engine.stats()["p"])


async def test_a_pipeline_that_could_not_go_on_is_stopped_once(server: Server, tmp_path: Path) -> None:
    async with plant(server) as p:
        spool = {"on_full": "spool", "spool": str(tmp_path / "spool.db")}
        wrong = p.pipeline("b", partition_key="none", **spool)
        async with fastkin.Engine(p.settings(p.pipeline("a"))) as engine:
            await connected(engine)
            await engine.reload(p.settings(p.pipeline("a"), wrong))
            await until(lambda: all(task.done() for task in engine._runs.halts.values()) and bool(engine._runs.halts))
            right = dataclasses.replace(wrong, partition_key="uuid")
            assert (await engine.reload(p.settings(p.pipeline("a"), right))).restarted == ("b",)
            assert not engine._runs.halts
            await connected(engine)
            await p.publish(3, "b/1")
            await p.all_stored()


async def test_a_run_that_fails_as_it_stops_does_not_end_the_reload(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with plant(server) as p:
        a, b = p.pipeline("a"), p.pipeline("b")
        async with fastkin.Engine(p.settings(a, b)) as engine:
            await connected(engine)
            run = engine.pipelines["a"]
            whole = run.client.close

            async def close() -> None:
                await whole()
                raise OSError("the disk is gone")

            run.client.close = close  # type: ignore[method-assign]
            more = {"linger_ms": 1.0}
            changes = await engine.reload(
                p.settings(dataclasses.replace(a, **more), dataclasses.replace(b, **more))  # type: ignore[arg-type]
            )
            assert changes.restarted == ("a", "b")
            assert any("the disk is gone" in record.exc_text for record in caplog.records if record.exc_text)
            await connected(engine)
            await p.publish(2, "a/1")
            await p.publish(2, "b/1")
            await p.all_stored()


async def test_who_gives_up_waiting_for_a_stop_does_not_cut_it_short(server: Server) -> None:
    async with plant(server) as p:
        fault = p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        async with fastkin.Engine(p.settings(p.pipeline(shutdown_timeout_s=20.0))) as engine:
            await connected(engine)
            await p.publish(3)
            await until(lambda: engine.stats()["p"]["in_flight"] == 3)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.stop(), 0.05)
            fault.remove()
            assert await engine.stop() == 0
            await p.all_stored()


@pytest.mark.parametrize("to", ["pause", "gone", "other file", "the same"])
async def test_a_spool_that_a_reload_leaves_behind_is_named(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, to: str
) -> None:
    """What is in it was acknowledged: nobody would send it, and nobody would know."""
    async with plant(server) as p:
        p.emulator.faults.call("InternalFailureException", operation="PutRecords")
        spool = {"on_full": "spool", "spool": str(tmp_path / "spool.db"), "spool_after_s": 0.1}
        old = p.pipeline(shutdown_timeout_s=0.5, **spool)
        async with fastkin.Engine(p.settings(old)) as engine:
            await connected(engine)
            await p.publish(20)
            await until(lambda: engine.stats()["p"]["spool_rows"] > 0)
            other = str(tmp_path / "other.db")
            new = {
                "pause": [dataclasses.replace(old, on_full="pause", spool=None)],
                "gone": [],
                "other file": [dataclasses.replace(old, spool=other)],
                "the same": [dataclasses.replace(old, linger_ms=1.0)],
            }[to]
            await engine.reload(p.settings(*new))
            said = [line for line in lines(caplog, logging.WARNING) if "nobody sends" in line]
            assert len(said) == (to != "the same")
            assert all("spool.db" in line and "20 records" in line for line in said)
            assert balanced(engine.stats()["p"])
