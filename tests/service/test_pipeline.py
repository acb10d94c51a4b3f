"""One pipeline against a real broker and the emulator: formats, keys, dead letters, operator errors, shutdown."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import re
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import aws_kinesis_agg.deaggregator
import pytest

import fastkin
from fastkin import _codec
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.emulator import Emulator, StreamSpec
from fastkin.errors import ConfigError
from fastkin.mqtt import _core as _mqtt
from fastkin.mqtt.publisher import Publisher
from fastkin.settings import load
from support.fake_http import FakeServer
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from support.fake_http import Link, Request
    from support.servers import Server


# A session of its own for each: the broker keeps what the one before left unacknowledged.
_RIGS = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 100\n") as running:
        yield running


class Rig:
    """An engine with one pipeline, a publisher, and the stream it writes to."""

    def __init__(self, engine: fastkin.Engine, publisher: Publisher, emulator: Emulator) -> None:
        self.engine = engine
        self.publisher = publisher
        self.emulator = emulator

    @property
    def stats(self) -> dict[str, Any]:
        stats = self.engine.stats()["p"]
        ended = stats["stored"] + stats["dead_lettered"] + stats["filtered"] + stats["dropped"]
        assert stats["received"] == ended + stats["in_flight"]
        return stats

    @property
    def run(self) -> Any:
        return self.engine.pipelines["p"]

    async def publish(self, *payloads: bytes, topic: str = "plant/hall1/m1", qos: int = 1) -> None:
        for payload in payloads:
            await self.publisher.publish(topic, payload, qos)
        await self.publisher.drain()

    async def until(self, condition: Callable[[], bool], what: str, timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}; {self.stats}"
            await asyncio.sleep(0.01)

    async def settled(self, count: int) -> None:
        """`count` records have ended, and every message is acknowledged."""
        await self.until(lambda: self.stats["received"] >= count and not self.stats["in_flight"], f"{count} ended")
        await self.until(lambda: self.stats["unacked"] == 0, "all acknowledged")

    def stored(self) -> list[Any]:
        return self.emulator.stored("welders")


@contextlib.asynccontextmanager
async def rig(
    server: Server,
    *,
    shards: int | StreamSpec = 2,
    broker: dict[str, Any] | None = None,
    prepare: Any = None,
    **pipeline: Any,
) -> AsyncIterator[Rig]:
    kinesis = pipeline.pop("kinesis", {})
    options = pipeline.pop("emulator", {})
    async with Emulator({"welders": shards}, **options) as emulator:
        if prepare is not None:
            prepare(emulator)
        defaults: dict[str, Any] = {
            "endpoint_url": emulator.url, "region": "us-east-1", "stream": "welders",
            "access_key": ACCESS_KEY, "secret_key": SECRET_KEY,
        }  # fmt: skip
        settings = Settings(
            broker=Broker(
                **{"host": server.host, "port": server.port, "client_id": f"rig-{next(_RIGS)}"} | (broker or {})
            ),
            pipelines=(
                Pipeline(
                    **{"id": "p", "topics": ("plant/#",), "dead_letter": "none"} | pipeline,
                    kinesis=Kinesis(**defaults | kinesis),
                ),
            ),
        )
        async with fastkin.Engine(settings) as engine:
            async with asyncio.timeout(20):
                await engine.pipelines["p"].subscriber.connected.wait()
            publisher = Publisher(Broker(host=server.host, port=server.port))
            await publisher.connect()
            try:
                yield Rig(engine, publisher, emulator)
            finally:
                await publisher.close()


async def test_one_bad_frame_is_one_error_one_dead_letter_and_no_record(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    path = tmp_path / "dead.jsonl"
    good = fastkin.encode_frame([b"a", b"", b"c"])
    bad = good + b"\xc0"
    async with rig(server, shards=1, format="bulk", dead_letter=str(path)) as r:
        await r.publish(good, bad, fastkin.encode_frame([]), good)
        await r.settled(7)
        assert [record.data for record in r.stored()] == [b"a", b"", b"c"] * 2
        assert r.stats["dead_lettered"] == 1
        assert r.stats["received"] == 7
        assert r.stats["format_errors"] == {"element": 1}
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    for part in ("pipeline=p", "plant/hall1/m1", f"byte {len(good)}", "nil", f"{len(bad)} bytes", bad.hex()):
        assert part in errors[0]
    (line,) = path.read_text().splitlines()
    letter = json.loads(line)
    assert base64.b64decode(letter["payload"]) == bad
    assert letter["topic"] == "plant/hall1/m1"
    assert letter["offset"] == len(good)
    assert path.stat().st_mode & 0o777 == 0o600


async def test_an_oversize_payload_is_set_aside_and_the_next_one_flows(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    async with rig(server, dead_letter=str(path), max_record_bytes=1000) as r:
        await r.publish(b"x" * 964, b"x" * 965, b"next")
        await r.settled(3)
        assert sorted(len(record.data) for record in r.stored()) == [4, 964]
        assert r.stats["dead_lettered"] == 1
    assert len(base64.b64decode(json.loads(path.read_text())["payload"])) == 965


async def test_an_oversize_element_does_not_take_its_frame_along(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    async with rig(server, shards=1, format="bulk", dead_letter=str(path), max_record_bytes=100) as r:
        await r.publish(fastkin.encode_frame([b"a", b"x" * 65, b"b"]))
        await r.settled(3)
        assert [record.data for record in r.stored()] == [b"a", b"b"]
    assert json.loads(path.read_text())["index"] == 1


async def test_the_topic_of_a_message_is_spliced_into_its_record(server: Server) -> None:
    """IC-05, IC-06: with one format, and beside frames of a bulk label."""
    async with rig(server, shards=1, topic_field="topic", separator="\n") as r:
        await r.publish(b'{"message":"Hello, world!"}', topic="plant/asdasd")
        await r.settled(1)
        assert [each.data for each in r.stored()] == [b'{"topic":"plant/asdasd","message":"Hello, world!"}\n']
    topics = ("plant/#", "/devices/+/bulkData/telemetry")
    async with rig(server, shards=1, topic_field="topic", topics=topics, bulk_label="telemetry") as r:
        await r.publish(fastkin.encode_frame([b"{}", b"1"]), topic="/devices/7/bulkData/telemetry")
        await r.publish(b"{}")
        await r.settled(3)
        wanted = [b'{"topic":"/devices/7/bulkData/telemetry"}', b"1", b'{"topic":"plant/hall1/m1"}']
        assert [each.data for each in r.stored()] == wanted


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_events_are_filtered_by_type_and_frames_beside_them_are_not(server: Server, protocol: Any) -> None:
    """MD-02, MD-05: a format and a filter for each subscription of one pipeline."""
    topics = ("/devices/+/event", "/devices/+/bulkData/telemetry")
    start, stop = b'{"eventType":"start","eventData":{}}', b'{"eventType":"stop","eventData":{}}'
    async with rig(
        server, shards=1, broker={"protocol": protocol}, topics=topics, bulk_label="telemetry", events=("start",)
    ) as r:
        await r.publish(start, stop, stop, topic="/devices/7/event")
        await r.publish(fastkin.encode_frame([stop]), topic="/devices/7/bulkData/telemetry")
        await r.settled(4)
        assert [each.data for each in r.stored()] == [start, stop]
        assert (r.stats["stored"], r.stats["filtered"]) == (2, 2)


async def test_frames_are_filtered_where_events_come_and_not_where_the_label_does(server: Server) -> None:
    topics = ("plant/#", "/devices/+/bulkData/telemetry")
    frame = fastkin.encode_frame([b'{"eventType":"stop"}', b'{"eventType":"start"}'])
    async with rig(server, shards=1, format="bulk", topics=topics, bulk_label="telemetry", events=("start",)) as r:
        await r.publish(frame)
        await r.publish(frame, topic="/devices/7/bulkData/telemetry")
        await r.settled(4)
        assert (r.stats["stored"], r.stats["filtered"]) == (3, 1)


async def test_an_event_is_checked_and_completed(server: Server, tmp_path: Path) -> None:
    """MD-12, MD-14: what is wrong is one dead letter, and what a device left out is added from topic and settings."""
    path = tmp_path / "dead.jsonl"
    async with rig(
        server, shards=1, format="event", enrich=True, homes=("7=12",), topics=("/devices/+/event",),
        events=("start",), dead_letter=str(path),
    ) as r:  # fmt: skip
        await r.publish(b'{"eventType":"start"}', b'{"eventType":"stop"}', b'{"eventType":1}', topic="/devices/7/event")
        await r.publish(b'{"eventType":"start"}', topic="/devices/8/event")
        await r.settled(4)
        (record,) = r.stored()
        assert record.data.startswith(b'{"eventType":"start","eventData":{},"timestamp":"')
        assert record.data.endswith(b'Z","homeId":12,"originDeviceId":7}')
        assert (r.stats["filtered"], r.stats["format_errors"]) == (1, {"format": 2})
    reasons = {json.loads(line)["reason"] for line in path.read_text().splitlines()}
    assert reasons == {"eventType is not a text", "the event has no homeId"}


async def test_json_records_become_lines_of_few_kinesis_records(server: Server) -> None:
    async with rig(server, shards=1, aggregation="lines", linger_ms=200) as r:
        await r.publish(*(b'{"n":%d}' % n for n in range(200)))
        await r.settled(200)
        stored = r.stored()
        assert [line for each in stored for line in each.data.split(b"\n")] == [b'{"n":%d}' % n for n in range(200)]
        assert len(stored) < 100
        assert r.stats["stored"] == 200


@pytest.mark.parametrize("label", [None, "telemetry"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_messages_of_excluded_topics_are_acknowledged_and_filtered(
    server: Server, protocol: Any, label: str | None
) -> None:
    """SP-15: a machine that is not to publish, with one format and with two."""
    topics = ("plant/#",) if label is None else ("plant/#", "/devices/+/bulkData/telemetry")
    async with rig(
        server, shards=1, broker={"protocol": protocol}, topics=topics, bulk_label=label,
        exclude=("plant/+/m2", "/devices/8/#"),
    ) as r:  # fmt: skip
        for topic in ("plant/hall1/m1", "plant/hall1/m2", "plant/hall2/m2", "plant/hall2/m3"):
            await r.publish(topic.encode(), topic=topic)
        wanted = [b"plant/hall1/m1", b"plant/hall2/m3"]
        if label is not None:
            for device in (7, 8):
                frame = fastkin.encode_frame([b"%d" % device])
                await r.publish(frame, topic=f"/devices/{device}/bulkData/telemetry")
            wanted.append(b"7")
        await r.settled(4 if label is None else 6)
        assert [each.data for each in r.stored()] == wanted
        assert (r.stats["filtered"], r.stats["dead_lettered"]) == (2 if label is None else 3, 0)


async def test_a_forged_topic_cannot_forge_a_log_line(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with rig(server, format="bulk") as r:
        await r.publish(b"junk", topic="plant/a\u2028ERROR everything is lost")
        await r.settled(1)
    assert any("everything is lost" in record.getMessage() for record in caplog.records)
    assert all(len(record.getMessage().splitlines()) == 1 for record in caplog.records)


async def test_a_template_key_keeps_each_machine_on_one_shard(server: Server) -> None:
    async with rig(server, shards=4, partition_key="template:{hostname}/{topic[2]}") as r:
        for machine in range(40):
            await r.publish(*(b"%d" % n for n in range(5)), topic=f"plant/hall1/m{machine}")
        await r.settled(200)
        shards: dict[str, set[str]] = {}
        for record in r.stored():
            shards.setdefault(record.partition_key, set()).add(record.shard_id)
        assert shards.keys() == {f"{socket.gethostname()}/m{machine}" for machine in range(40)}
        assert all(len(found) == 1 for found in shards.values())
        assert len(set.union(*shards.values())) == 4


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ("topic", "plant/hall1/m1"),
        ("topic:1", "hall1"),
        ("client", "CLIENT"),
        ("static:always", "always"),
        ("field:machine.id", "w7"),
    ],
)
async def test_keys_come_from_where_the_settings_say(server: Server, spec: str, key: str) -> None:
    client = f"the-client-{next(_RIGS)}"
    async with rig(server, partition_key=spec, broker={"client_id": client}) as r:
        await r.publish(b'{"machine":{"id":"w7"}}')
        await r.settled(1)
        assert r.stored()[0].partition_key == key.replace("CLIENT", client)


async def test_a_stream_that_chooses_shards_gets_no_key(server: Server) -> None:
    spec = StreamSpec(shards=4, mode="ON_DEMAND", auto_keys=True)
    async with rig(server, shards=spec, partition_key="none") as r:
        await r.publish(*(b"%d" % n for n in range(100)))
        await r.settled(100)
        assert {record.partition_key for record in r.stored()} == {None}
        assert len({record.shard_id for record in r.stored()}) > 1


@pytest.mark.parametrize(
    ("auto", "setting", "problem"),
    [
        (False, {"partition_key": "none"}, "partition_key: 'none' needs a stream with RecordDistributionStrategy AUTO"),
        (True, {"aggregation": "kpl"}, "aggregation: stream welders chooses shards itself"),
    ],
)
async def test_a_setting_the_stream_does_not_fit_ends_the_engine(
    server: Server, auto: bool, setting: dict[str, Any], problem: str
) -> None:
    async with Emulator({"welders": StreamSpec(shards=2, mode="ON_DEMAND", auto_keys=auto)}) as emulator:
        kinesis = Kinesis(
            endpoint_url=emulator.url,
            region="us-east-1",
            stream="welders",
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
        )
        settings = Settings(
            broker=Broker(host=server.host, port=server.port, client_id="misfit"),
            pipelines=(Pipeline(id="p", topics=("plant/#",), kinesis=kinesis, **setting),),
        )
        async with fastkin.Engine(settings) as engine, asyncio.timeout(10):
            with pytest.raises(ConfigError, match=problem):
                await engine.wait()
            assert engine.stats()["p"]["messages"] == 0


async def test_a_static_key_on_several_shards_is_warned_about_once(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(server, partition_key="static:always") as r:
        await r.publish(b"1")
        await r.settled(1)
    said = [record.getMessage() for record in caplog.records if "one static partition key" in record.getMessage()]
    assert len(said) == 1


async def test_aggregates_are_read_back_by_the_reference_deaggregator(server: Server) -> None:
    payloads = [b"%d" % n * 20 for n in range(300)]
    async with rig(server, aggregation="kpl", shards=4) as r:
        await r.publish(*payloads)
        await r.settled(300)
        raw = r.stored()
        assert len(raw) < 100
        found: list[bytes] = []
        for record in raw:
            entry = {
                "kinesis": {
                    "data": base64.b64encode(record.data).decode(), "partitionKey": record.partition_key,
                    "sequenceNumber": record.sequence_number, "approximateArrivalTimestamp": 0.0,
                    "kinesisSchemaVersion": "1.0",
                },
            }  # fmt: skip
            for inner in aws_kinesis_agg.deaggregator.deaggregate_records([entry]):
                assert inner["kinesis"]["partitionKey"] == record.partition_key
                found.append(base64.b64decode(inner["kinesis"]["data"]))
        assert Counter(found) == Counter(payloads)


async def test_putrecords_alone_is_permission_enough(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def prepare(emulator: Emulator) -> None:
        for operation in ("DescribeStreamSummary", "ListShards", "DescribeStream"):
            emulator.faults.call("AccessDeniedException", operation=operation)

    async with rig(server, prepare=prepare) as r:
        await r.publish(*(b"%d" % n for n in range(50)))
        await r.settled(50)
        assert len(r.stored()) == 50
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert any("cannot be described" in record.getMessage() for record in caplog.records)


async def test_an_operator_error_keeps_the_data_until_it_is_mended(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.05)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.2)
    async with rig(server) as r:
        fault = r.emulator.faults.call("AccessDeniedException", operation="PutRecords")
        await r.publish(*(b"%d" % n for n in range(20)))
        await r.until(lambda: r.stats["calls_failed"] >= 2, "refused twice")
        assert r.stats["in_flight"] == r.stats["unacked"] == 20
        fault.remove()
        await r.settled(20)
        assert len(r.stored()) == 20
    assert any("allow kinesis:PutRecords" in record.getMessage() for record in caplog.records)


async def test_a_throttle_that_lasts_becomes_an_error_with_the_cure(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(server, throttle_error_after_s=0.5) as r:
        r.emulator.scale_limits("welders", 0.01)
        await r.publish(*(b"%d" % n for n in range(300)))
        await r.until(
            lambda: any(record.levelno == logging.ERROR for record in caplog.records), "an ERROR about throttling"
        )
        r.emulator.scale_limits("welders", 1.0)
        await r.settled(300)
    error = next(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert "shardId-" in error
    assert " of welders, " in error
    rate = float(re.search(r"([\d.]+) records/s", error)[1])  # type: ignore[index]
    assert 1 <= rate <= 100, "four shards of ten a second, and what the burst had"
    assert "add shards" in error
    warnings = [record for record in caplog.records if "go again, slower" in record.getMessage()]
    assert 1 <= len(warnings) <= 3, "a warning per throttled call is a flood"


async def test_the_error_of_a_hot_shard_says_what_it_takes(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """All records have one key: its shard's own bucket counts them, and no other."""
    async with rig(server, throttle_error_after_s=0.5, partition_key="static:one") as r:
        r.emulator.scale_limits("welders", 0.05)
        await r.publish(*(b"%d" % n for n in range(300)))
        await r.until(
            lambda: any(record.levelno == logging.ERROR for record in caplog.records), "an ERROR about throttling"
        )
        r.emulator.scale_limits("welders", 1.0)
        await r.settled(300)
    error = next(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert re.search(r"throttled for \d+ s at shardId-\d+ of welders, [1-9]\d* records/s", error), error


@pytest.mark.parametrize("operation", ["*", "PutRecords"])
async def test_what_comes_before_kinesis_can_be_reached_is_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, operation: str
) -> None:
    """The broker hands QoS 0 out once, and to sessions it knows: a start in an outage must subscribe all the same."""
    monkeypatch.setattr("fastkin.service.preflight._RETRY_S", 0.1)
    faults = []

    def prepare(emulator: Emulator) -> None:
        faults.append(emulator.faults.cut("before", operation=operation))

    async with rig(server, prepare=prepare, qos=0, broker={"client_id": "", "clean_session": True}) as r:
        assert r.run.ready is (operation == "PutRecords")
        await r.publish(*(b"%d" % n for n in range(20)), qos=0)
        await r.until(lambda: r.stats["received"] == 20 and r.stats["calls_failed"] > 0, "taken, and refused")
        assert r.stored() == []
        faults.pop().remove()
        await r.settled(20)
        assert len(r.stored()) == 20
        await r.until(lambda: r.run.ready and len(r.run.delivery.sender.shards or ()) == 2, "the stream was looked at")
    said = any("not ready" in record.getMessage() for record in caplog.records)
    assert said is (operation == "*")


async def test_the_accounts_hold_at_every_moment_while_faults_run(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every record is in exactly one counter, at each look: between any two turns of the loop, in every settlement."""
    caplog.set_level(logging.CRITICAL)
    payloads = [b"record %d " % n + b"." * (n % 300) for n in range(3000)]
    frames = [fastkin.encode_frame(payloads[at : at + 20]) for at in range(0, len(payloads), 20)]
    frames[3::30] = [frame + b"\xc0" for frame in frames[3::30]]  # five of them are spoilt
    spoilt, oversize = 5 * 20, 5
    path = tmp_path / "dead.jsonl"
    looks = 0
    async with rig(
        server, shards=4, format="bulk", dead_letter=str(path), max_record_bytes=2000, max_records=50,
        budget_bytes=256 * 1024, linger_ms=5.0, emulator={"latency_ms": 3},
    ) as r:  # fmt: skip

        def look(_: object = None) -> None:
            nonlocal looks
            looks += 1
            stats = r.stats  # asserts the identity
            assert min(stats[name] for name in ("stored", "dead_lettered", "dropped", "in_flight")) >= 0

        async def watch() -> None:
            while True:
                look()
                await asyncio.sleep(0)

        r.run._hook = look
        faults = r.emulator.faults
        faults.record("InternalFailure", probability=0.05, seed=1)
        faults.throttle(every=7)
        faults.call("InternalFailure", status=500, every=11)
        faults.cut("after", every=13)
        faults.cut("inside", every=17)
        faults.wrong_count(-1, every=19)
        faults.html(503, every=23)
        watching = asyncio.create_task(watch())
        await r.publish(*frames, fastkin.encode_frame([b"x" * 3000] * oversize))
        await r.settled(len(payloads) - spoilt + 5 + oversize)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        stats = r.stats
        assert looks > 100
        assert stats["calls_failed"] > 5
        assert stats["retries"] > 0
        assert stats["duplicates_possible"] > 0
        assert stats["dead_lettered"] == 5 + oversize == len(path.read_text().splitlines())
        assert stats["stored"] == len(payloads) - spoilt
        assert stats["buffered_bytes"] == 0
        good = {payload for at, payload in enumerate(payloads) if at // 20 not in range(3, 150, 30)}
        assert {record.data for record in r.stored()} == good


@pytest.mark.parametrize(("per_message", "held"), [(1, 50), (7, 49)])
async def test_reading_stops_at_the_backlog_count_while_kinesis_is_away(
    server: Server, per_message: int, held: int
) -> None:
    """BACKLOG_COUNT counts records, whatever they come in; the broker keeps what is beyond it."""
    named = {"BROKER": "h", "TOPIC": "t/#", "KIN_STREAM_NAME": "s", "CLIENTID": "c", "BACKLOG_COUNT": "50"}
    backlog = load(env=named).pipelines[0].budget_records
    most = 0
    async with rig(
        server, budget_records=backlog, on_full="pause", format="bulk", max_records=10, linger_ms=5.0,
        emulator={"limits": False},
    ) as r:  # fmt: skip

        def look(_: object = None) -> None:
            nonlocal most
            most = max(most, r.stats["in_flight"])

        r.run._hook = look
        fault = r.emulator.faults.cut("before", operation="PutRecords")
        payloads = [b"%d" % n for n in range(per_message * 60)]
        frames = [fastkin.encode_frame(payloads[at : at + per_message]) for at in range(0, len(payloads), per_message)]
        await r.publish(*frames)
        await r.until(lambda: r.run.subscriber.paused, "reading is paused")
        for _ in range(5):
            await asyncio.sleep(0.1)
            look()
            assert r.run.subscriber.paused
            assert not r.run.subscriber._link.wire.is_reading()
            assert r.stats["received"] == r.stats["in_flight"] == held
            assert r.stats["messages"] == held // per_message
        assert r.stats["calls_failed"] > 0
        assert r.stored() == []
        fault.remove()
        await r.settled(len(payloads))
        assert Counter(record.data for record in r.stored()) == Counter(payloads)  # nothing lost, nothing twice
        assert not r.run.subscriber.paused
        assert r.run.subscriber._link.wire.is_reading()
        assert r.stats["buffered_bytes"] == 0
        # and it flows as before
        await r.publish(*frames)
        await r.settled(2 * len(payloads))
        assert r.stats["connects"] == 1
    assert most <= backlog


async def test_every_reason_to_close_a_batch_is_counted(server: Server) -> None:
    def counted(r: Rig) -> dict[int, int]:
        return {reason: count for reason, count in enumerate(r.stats["flushes"]) if count}

    async with rig(server, max_records=10, linger_ms=60_000.0) as r:
        await r.publish(*[b"x"] * 10)
        await r.settled(10)
        assert counted(r) == {_codec.FULL_COUNT: 1}
    async with rig(server, max_batch_bytes=1024, linger_ms=60_000.0) as r:
        await r.publish(b"x" * 500, b"x" * 500)
        await r.until(lambda: r.stats["stored"] == 1, "the first is stored when the second does not fit")
        assert counted(r) == {_codec.FULL_BYTES: 1}
        assert await r.engine.stop() == 0
        assert counted(r) == {_codec.FULL_BYTES: 1, _codec.DRAIN: 1}
    async with rig(server, linger_ms=2000.0) as r:
        began = time.monotonic()
        await r.publish(b"x")
        await r.settled(1)
        assert time.monotonic() - began < 1.0
        assert counted(r) == {_codec.IDLE: 1}
    async with rig(server, linger_ms=60.0, emulator={"latency_ms": 400}) as r:
        await r.publish(b"x")
        await r.until(lambda: r.stats["calls_open"] == 1, "a call is open: there is no hurry")
        await r.publish(b"y")
        await r.until(lambda: r.stats["calls_open"] == 2, "the linger has passed")
        assert counted(r) == {_codec.IDLE: 1, _codec.LINGER: 1}
        await r.settled(2)
    async with rig(server, linger_ms=60_000.0, broker={"receive_maximum": 5, "protocol": "5"}) as r:
        await r.publish(*[b"x"] * 5)
        await r.settled(5)
        assert counted(r) == {_codec.WINDOW: 1}


async def test_a_throttle_of_whole_calls_that_lasts_becomes_an_error_too(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(server, throttle_error_after_s=0.5) as r:
        fault = r.emulator.faults.throttle(operation="PutRecords")
        await r.publish(*(b"%d" % n for n in range(50)))
        await r.until(lambda: any("throttled for" in record.getMessage() for record in caplog.records), "an ERROR")
        assert any("stream welders, 0 records/s" in record.getMessage() for record in caplog.records)
        fault.remove()
        await r.settled(50)
        assert len(r.stored()) == 50


async def test_a_single_record_waits_no_longer_than_the_linger(server: Server) -> None:
    linger = 0.1
    async with rig(server, linger_ms=linger * 1000, emulator={"latency_ms": 20}) as r:
        waits = []
        for n in range(30):
            began = time.monotonic()
            await r.publish(b"%d" % n)
            while r.emulator.stored_count("welders") <= n:
                await asyncio.sleep(0.001)
            waits.append(time.monotonic() - began)
            await asyncio.sleep(0.02)
        assert max(waits) < linger + 0.02 + 0.1


async def test_a_window_smaller_than_a_batch_does_not_wait_for_the_linger(server: Server) -> None:
    """The broker hands out ten unacknowledged messages: a batch of 500 would never fill."""
    async with rig(server, linger_ms=2000.0, broker={"receive_maximum": 10, "protocol": "5"}) as r:
        began = time.monotonic()
        await r.publish(*(b"%d" % n for n in range(100)))
        await r.settled(100)
        assert time.monotonic() - began < 2.0
        assert r.stats["flushes"][fastkin._codec.WINDOW] >= 1


async def test_dead_letters_that_cannot_be_written_hold_the_acknowledgement_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.deadletter.insist._RETRY_S", 0.05)
    folder = tmp_path / "gone"
    path = folder / "dead.jsonl"
    async with rig(server, format="bulk", dead_letter=str(path)) as r:
        await r.publish(b"junk")
        await r.until(
            lambda: any("dead letters and all" in record.getMessage() for record in caplog.records), "an ERROR"
        )
        assert any(str(path) in record.getMessage() for record in caplog.records)
        assert r.stats["unacked"] == 1
        assert r.stats["dead_lettered"] == 0
        folder.mkdir()
        await r.settled(1)
        assert r.stats["dead_lettered"] == 1
    assert len(path.read_text().splitlines()) == 1


async def test_stop_drains_what_is_held_and_acknowledges_it(server: Server) -> None:
    async with rig(server, linger_ms=10_000.0, emulator={"latency_ms": 100}) as r:
        await r.publish(*(b"%d" % n for n in range(80)))
        await r.until(lambda: r.stats["received"] == 80, "all received")
        assert await r.engine.stop() == 0
        assert len(r.stored()) == 80
        assert r.run.acks.unacked == 0


async def test_stop_gives_up_at_its_deadline_and_counts_what_is_left(server: Server) -> None:
    async with rig(server, shutdown_timeout_s=0.3, broker={"client_id": "deadline"}) as r:
        r.emulator.faults.call("ServiceUnavailable", operation="PutRecords")
        await r.publish(*(b"%d" % n for n in range(30)))
        await r.until(lambda: r.stats["received"] == 30, "all received")
        assert await r.engine.stop() == 30
        assert r.stored() == []


async def test_a_disabled_pipeline_opens_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """SP-01: listed as disabled, and nobody is dialled: neither the broker nor the stream. The other one works."""
    caplog.set_level(logging.INFO)

    async def answer(link: Link, _request: Request) -> None:
        link.reply(500, b"{}")

    async with FakeServer(answer) as broker, FakeServer(answer) as stream:
        kinesis = Kinesis(
            stream="s", region="us-east-1", endpoint_url=stream.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
        )
        pipelines = [Pipeline(id=name, enabled=on, topics=("a",), kinesis=kinesis) for name, on in
                     (("off", False), ("on", True))]  # fmt: skip
        at = Broker(host="127.0.0.1", port=broker.port, client_id="disabled")
        async with fastkin.Engine(Settings(broker=at, pipelines=tuple(pipelines[:1]))) as engine:
            assert engine.stats() == {}
            await asyncio.sleep(0.3)
        assert (broker.connections, stream.connections) == (0, 0)
        async with fastkin.Engine(Settings(broker=at, pipelines=tuple(pipelines))) as engine:
            assert engine.stats().keys() == {"on"}
            async with asyncio.timeout(20):
                while not (broker.connections and stream.connections):  # the same two, of one that is not disabled
                    await asyncio.sleep(0.01)
    told = [each.getMessage() for each in caplog.records if "disabled" in each.getMessage()]
    assert ["pipeline=off" in line for line in told] == [True, True]


async def test_two_pipelines_do_not_wait_for_each_other(server: Server) -> None:
    async with Emulator({"up": 1, "down": 1}) as emulator:
        emulator.faults.call("ServiceUnavailable", operation="PutRecords", stream="down")
        settings = Settings(
            broker=Broker(host=server.host, port=server.port, client_id="pair"),
            pipelines=tuple(
                Pipeline(
                    id=name,
                    topics=("pair/#",),
                    dead_letter="none",
                    shutdown_timeout_s=0.2,
                    kinesis=Kinesis(
                        stream=name, region="us-east-1", endpoint_url=emulator.url, access_key="a", secret_key="b"
                    ),
                )
                for name in ("up", "down")
            ),
        )
        async with fastkin.Engine(settings) as engine:
            async with asyncio.timeout(10):
                for run in engine.pipelines.values():
                    await run.subscriber.connected.wait()
            publisher = Publisher(Broker(host=server.host, port=server.port))
            await publisher.connect()
            for n in range(50):
                await publisher.publish("pair/1", b"%d" % n, 1)
            await publisher.drain()
            await publisher.close()
            async with asyncio.timeout(10):
                while engine.stats()["up"]["stored"] < 50:
                    await asyncio.sleep(0.01)
            assert engine.stats()["up"]["in_flight"] == 0
            assert engine.stats()["down"]["stored"] == 0
            assert await engine.stop() == 50


async def test_the_put_check_writes_one_connection_test(server: Server) -> None:
    async with rig(server, startup_check="put") as r:
        await r.until(lambda: len(r.stored()) == 1, "the connection test is stored")
        (record,) = r.stored()
        host = socket.gethostname()
        assert record.data == f'{{"type":"connection_test","host":"{host}","data":"CONNECTION_TEST"}}'.encode()
        assert record.partition_key == "key"
        assert r.stats["received"] == 0


@pytest.mark.parametrize(
    ("check", "operation", "code"),
    [
        ("put", "PutRecords", "AccessDeniedException"),
        ("dry_run", "PutRecords", "AccessDeniedException"),
        ("describe", "DescribeStreamSummary", "ResourceNotFoundException"),  # to describe is no permission one needs
    ],
)
async def test_a_start_check_that_fails_is_an_error_and_not_ready_until_it_passes(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, check: str, operation: str,
    code: str,
) -> None:  # fmt: skip
    """SP-08: the process lives and asks again. A dry run and a description write nothing, `put` one record."""
    monkeypatch.setattr("fastkin.service.preflight._RETRY_S", 0.1)

    def refuse(emulator: Emulator) -> None:
        emulator.faults.call(code, operation=operation)

    async with rig(server, prepare=refuse, startup_check=check) as r:
        assert code in str(r.run.unready())
        assert r.run.subscriber.connected.is_set()
        told = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
        assert told
        assert all(f"pipeline=p stage=send not ready: {code}" in line for line in told)
        assert all("trying again" in line for line in told)
        r.emulator.faults.clear()
        await r.until(lambda: r.run.unready() is None, "ready")
        assert [record.partition_key for record in r.stored()] == (["key"] if check == "put" else [])
        await r.publish(b"1")
        await r.settled(1)


async def test_a_start_check_of_none_asks_nothing(server: Server) -> None:
    """SP-08: not even a description. Such a pipeline is ready at once."""
    asked = []

    def listen(emulator: Emulator) -> None:
        asked.extend(emulator.faults.latency(0, operation=name) for name in ("DescribeStreamSummary", "ListShards"))

    async with rig(server, prepare=listen, startup_check="none") as r:
        assert r.run.unready() is None
        await r.publish(b"1")
        await r.settled(1)
        assert [fault.hits for fault in asked] == [0, 0]


async def test_a_shard_map_that_is_refused_at_first_is_read_later(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastkin.delivery.stream_watch._EVERY_S", 0.05)
    denied: list[Any] = []

    def prepare(emulator: Emulator) -> None:
        denied.append(emulator.faults.call("AccessDeniedException", operation="ListShards"))

    async with rig(server, prepare=prepare) as r:
        await r.until(lambda: r.emulator.counters.operations.get("ListShards", 0) >= 4, "asked again")
        assert r.run.delivery.sender.shards is None
        denied[0].remove()
        await r.until(lambda: r.run.delivery.sender.shards is not None, "the map is there")
        assert len(r.run.delivery.sender.shards) == 2
    said = [record for record in caplog.records if "no shard map" in record.getMessage()]
    assert len([record for record in said if record.levelno >= logging.WARNING]) == 1
    assert "kinesis:ListShards" in said[0].getMessage()


async def retained(server: Server, **broker: Any) -> int:
    """How often a retained message comes to a session that connects three times."""
    async with rig(server, broker=broker, topics=("retained/#",)) as r:
        await r.until(lambda: r.stats["messages"] >= 1, "the retained message")
        for connects in (2, 3):
            r.run.subscriber.connected.clear()
            r.run.subscriber._link.abort()
            await r.until(lambda n=connects: r.stats["connects"] >= n and r.run.subscriber.connected.is_set(), "again")
            last = b"after %d" % connects  # the retained one comes before it
            await r.publish(last, topic="retained/new")
            await r.until(lambda data=last: data in {record.data for record in r.stored()}, "what came after it")
        await r.settled(r.stats["received"])
        return sum(record.data == b"kept" for record in r.stored())


async def test_retained_messages_come_once_to_a_session(server: Server) -> None:
    publisher = Publisher(Broker(host=server.host, port=server.port))
    await publisher.connect()
    link = publisher._open_link()
    packet = _mqtt.publish("retained/state", b"kept", retain=True, version=link.version)
    link.send(packet, 0)
    await publisher.drain()
    await publisher.close()
    assert await retained(server, protocol="5") == 1
    assert await retained(server, protocol="5", retain_handling="always") == 3


async def test_an_endpoint_that_never_answers_does_not_keep_us_from_the_broker(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the broker would not know our session meanwhile, and drop what it cannot queue for it."""
    monkeypatch.setattr("fastkin.service.pipeline._FIRST_LOOK_S", 0.1)
    over = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    hole = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{hole.sockets[0].getsockname()[1]}"
    try:
        async with rig(server, kinesis={"endpoint_url": url}, shutdown_timeout_s=0.2) as r:
            await r.publish(b"one", b"two")
            await r.until(lambda: r.stats["received"] == 2, "both are taken")
            assert r.stats["unacked"] == 2
            assert not r.run.ready
    finally:
        over.set()
        hole.close()
