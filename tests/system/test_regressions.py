"""Where the systems that fastkin follows lose or corrupt data: one named test for each loss.

The tests use the real stages: mosquitto, the service (as a process where the loss was a process's), the
emulator, the example functions.

| system | loss | test |
|---|---|---|
| MODE | subscribes with QoS 0 and a clean session: what comes while it is away is gone | test_mode_what_comes_while_the_service_is_away_is_kept |
| MODE | data above the stream's throughput must be reduced by the user | test_mode_what_is_throttled_is_kept_and_not_reduced |
| MODE | a malformed bulk frame may have sent some of its records | test_mode_a_bulk_frame_is_sent_whole_or_not_at_all |
| Electric Imp | failed entries of a call are not sent again | test_electric_imp_failed_entries_are_sent_again |
| Electric Imp | a call that fails altogether is not sent again | test_electric_imp_a_failed_request_is_sent_again |
| Electric Imp | one bad record fails what was read with it | test_electric_imp_one_bad_record_does_not_fail_the_others |
| Spark | any put error discards the record (SP-06) | test_spark_a_put_error_discards_nothing |
| Spark | what it discards is not counted; who wants that asks for it (SP-06) | test_spark_what_is_dropped_on_request_is_counted |
| Spark | a value of another machine discards the unfinished record (SP-14) | test_spark_interleaved_machines_discard_nothing |
| Spark | the consumer does not wait for its writes and only logs their errors (SP-20) | test_spark_a_write_that_fails_is_delivered_again |
| Spark | the consumer reads UTF-8 as ASCII (SP-20) | test_spark_names_in_any_script_survive_the_consumer |
| Spark | records of one machine and second overwrite each other (SP-20) | test_spark_records_of_one_second_do_not_overwrite_each_other |
| IoT pipeline | the rule's filter `t/+` misses `t` itself (IC-05) | test_iot_pipeline_a_filter_can_include_the_base_topic |
| IoT pipeline | one record that fails fails its batch in the transformation (IC-14) | test_iot_pipeline_every_record_has_its_own_result |
| IoT pipeline | one bad JSON fails the batch, in the service (IC-15) | test_iot_pipeline_one_bad_json_disturbs_no_other_record |
| IoT pipeline | one bad JSON fails the batch, in the function (IC-15) | test_iot_pipeline_one_bad_json_costs_one_row |
| IoT pipeline | object names collide within a second (IC-15) | test_iot_pipeline_object_names_never_collide |
| IoT pipeline | a file that is full is overwritten by the next (IC-15) | test_iot_pipeline_rotated_files_never_overwrite_each_other |
| Go service | keys of an assumed role are never refreshed and die after an hour (MK-13) | test_go_service_keys_of_an_assumed_role_outlive_their_hour |
| Go service | payloads may be changed or lost on the way (MK-17) | test_go_service_every_payload_arrives_byte_for_byte |
| Go service | an aggregate has the key of its first record, others are dropped by KCL (MK-17) | test_go_service_an_aggregate_has_one_key_for_all_its_records |
| Go service | one oversize payload ends the process (MK-19) | test_go_service_an_oversize_payload_does_not_end_the_process |
| Go service | an error of the whole request drops up to 5 MiB (MK-20) | test_go_service_request_errors_drop_nothing |
| Go service | acknowledges what is only buffered (MK-21) | test_go_service_nothing_is_acknowledged_before_it_is_stored |
| Go service | a kill loses what was acknowledged and buffered (MK-21) | test_go_service_sigkill_loses_nothing |
"""  # noqa: E501

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import re
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aws_kinesis_agg.deaggregator
import pytest

import fastkin
from aws.test_credentials import ROLE, Sts
from fastkin import encode_frame, lambdas
from fastkin.config import Broker
from fastkin.deadletter.file import DeadLetters
from fastkin.emulator import Emulator
from fastkin.emulator.signature import Secret
from fastkin.mqtt.publisher import Publisher
from lambdas.test_lambdas import Bucket, Tables, example, firehose, kinesis, measured
from service.test_pipeline import rig
from support.fake_http import FakeServer
from support.running import CountingProxy, service, wait_until
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.servers import Server

_NAMES = itertools.count()

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "{client}"

[kinesis]
stream = "welders"
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "p"
topics = ["plant/#"]
{more}
"""


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 100\n") as running:
        yield running


def settings(port: int, url: str, *more: str) -> str:
    return SETTINGS.format(port=port, url=url, client=f"regression-{next(_NAMES)}", more="\n".join(more))


async def threaded(streams: dict[str, int], work: Callable[[Emulator], None], **options: Any) -> None:
    """`work(emulator)` in a thread, beside the emulator's loop: it may block and wait for processes."""
    async with Emulator(streams, **options) as emulator:
        await asyncio.to_thread(work, emulator)


def publish(server: Server, *payloads: bytes, topic: str = "plant/1") -> None:
    async def work() -> None:
        publisher = Publisher(Broker(host=server.host, port=server.port, clean_session=True))
        await publisher.connect()
        for payload in payloads:
            await publisher.publish(topic, payload, 1)
        await publisher.drain()
        await publisher.close()

    asyncio.run(work())


def stored(emulator: Emulator) -> Counter[bytes]:
    return Counter(record.data for record in emulator.stored("welders"))


# -- MODE ------------------------------------------------------------------------------------------


async def test_mode_what_comes_while_the_service_is_away_is_kept(server: Server, tmp_path: Path) -> None:
    """With the settings as they are when nothing is said about QoS and session."""

    def work(emulator: Emulator) -> None:
        with service(tmp_path, settings(server.port, emulator.url)) as run:
            wait_until(lambda: "subscribed" in run.log(), 30, "subscribed")
            assert run.terminate() == 0, run.log()
            payloads = [b"%d" % n for n in range(200)]
            publish(server, *payloads)
            run.start()
            wait_until(lambda: emulator.stored_count("welders") >= 200, 30, "what came meanwhile is stored")
            assert run.terminate() == 0, run.log()
            assert stored(emulator) == Counter(payloads)

    await threaded({"welders": 1}, work)


async def test_mode_what_is_throttled_is_kept_and_not_reduced(server: Server) -> None:
    payloads = [b"%d" % n for n in range(600)]
    async with rig(server, shards=1) as r:
        r.emulator.scale_limits("welders", 0.2)
        await r.publish(*payloads)
        await r.settled(600)
        throttled = sum(r.run.delivery.sender.counters.throttled.values())
        assert throttled > 0, "nothing was throttled: this run proves nothing"
        assert Counter(record.data for record in r.stored()) == Counter(payloads)
        assert r.stats["dropped"] == r.stats["dead_lettered"] == 0


async def test_mode_a_bulk_frame_is_sent_whole_or_not_at_all(server: Server) -> None:
    """Cut at every byte, and with one element that is no byte string: all of the frame, or nothing."""
    records = [b"one", b"two", b"three"]
    frame = encode_frame(records)
    whole = {len(encode_frame(records[:n])) for n in range(4)}
    damaged = [frame[:n] for n in range(1, len(frame)) if n not in whole]
    damaged.append(encode_frame(records[:2]) + b"\xc0" + encode_frame(records[2:])[4:])
    async with rig(server, format="bulk") as r:
        await r.publish(*damaged, frame)
        await r.settled(len(damaged) + 3)
        assert Counter(record.data for record in r.stored()) == Counter(records)
        assert sum(r.run.dead_letters.format_errors.values()) == len(damaged)


# -- Electric Imp ----------------------------------------------------------------------------------


async def test_electric_imp_failed_entries_are_sent_again() -> None:
    async with Emulator({"welders": 2}, limits=False) as emulator:
        fault = emulator.faults.record("InternalFailure", every=3, times=200)
        async with producer(emulator) as one:
            receipts = [await one.put(b"%d" % n) for n in range(400)]
            for receipt in receipts:
                assert (await receipt).sequence_number
        assert fault.hits > 100
        assert stored(emulator) == Counter(b"%d" % n for n in range(400))


async def test_electric_imp_a_failed_request_is_sent_again() -> None:
    async with Emulator({"welders": 1}) as emulator:
        fault = emulator.faults.call("ServiceUnavailableException", times=3)
        async with producer(emulator) as one:
            receipt = await one.put(b"x")
            assert (await receipt).shard_id
        assert fault.hits == 3
        assert stored(emulator) == Counter([b"x"])


async def test_electric_imp_one_bad_record_does_not_fail_the_others(server: Server) -> None:
    """Bad in the frame (too large), bad for Kinesis (refused for good), bad for the reader (no JSON)."""
    large = b"x" * 2000
    records = [b'{"n":1}', b'{"refuse":1}', large, b"{", b'{"n":2}']

    def prepare(emulator: Emulator) -> None:
        emulator.faults.record("InvalidArgumentException", contains=b"refuse")

    async with rig(server, format="bulk", max_record_bytes=1024, prepare=prepare) as r:
        await r.publish(encode_frame(records))
        await r.settled(5)
        arrived = [record.data for record in r.stored()]
        assert Counter(arrived) == Counter([records[0], records[3], records[4]])
        assert r.stats["dropped"] == 2  # no dead letters are configured here
    read: list[int] = []
    answer = lambdas.transform(firehose(*arrived), lambda record: read.append(json.loads(record.data)["n"]))
    assert Counter(one["result"] for one in answer["records"]) == {"Dropped": 2, "ProcessingFailed": 1}
    assert sorted(read) == [1, 2]


def producer(emulator: Emulator) -> fastkin.Producer:
    return fastkin.Producer(
        "welders", region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
    )


# -- Spark -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["throttled", "entry", "call", "cut"])
async def test_spark_a_put_error_discards_nothing(server: Server, kind: str) -> None:
    payloads = [b"%d" % n for n in range(50)]

    def prepare(emulator: Emulator) -> None:
        faults = emulator.faults
        {
            "throttled": lambda: faults.record(times=30),
            "entry": lambda: faults.record("InternalFailure", times=30),
            "call": lambda: faults.call("InternalFailure", times=2, operation="PutRecords"),
            "cut": lambda: faults.cut("before", times=2, operation="PutRecords"),
        }[kind]()

    async with rig(server, prepare=prepare) as r:
        await r.publish(*payloads)
        await r.settled(50)
        assert r.run.delivery.sender.counters.retried > 0, "nothing failed: this run proves nothing"
        assert Counter(record.data for record in r.stored()) == Counter(payloads)
        assert r.stats["dropped"] == 0


async def test_spark_what_is_dropped_on_request_is_counted(server: Server) -> None:
    """`on_full = "drop_newest"`: a stream that takes nothing holds no broker back, and every record has its counter."""
    payloads = [b"%04d" % n * 256 for n in range(1500)]
    async with rig(server, on_full="drop_newest", budget_bytes=2**20) as r:
        await r.until(lambda: r.run.ready, "ready")
        fault = r.emulator.faults.call("ServiceUnavailableException", operation="PutRecords")
        await r.publish(*payloads)
        await r.until(lambda: r.stats["received"] >= 1500, "all received", 60)
        await r.until(lambda: r.stats["dropped"] > 0, "some dropped", 30)
        fault.remove()
        await r.settled(1500)
        stats, arrived = r.stats, Counter(record.data for record in r.stored())
        assert arrived.keys() < set(payloads)
        assert len(arrived) == stats["stored"]
        assert stats["stored"] + stats["dropped"] == 1500


def test_spark_interleaved_machines_discard_nothing() -> None:
    """Upstream's "should not send an incomplete record when it is interrupted by a different record", turned round."""
    assembler = example("assembler").Assembler(
        {"my-machine1": ["temperature", "partsMade"], "my-machine2": ["count", "humidity"]}
    )
    ready = []
    for machine, variable, value in [
        ("my-machine1", "temperature", 1234),
        ("my-machine2", "count", 42),  # interrupts
        ("my-machine1", "partsMade", 5678),
        ("my-machine2", "humidity", 7),
    ]:
        ready += assembler.add(machine, variable, value)
    assert ready == [
        {"machine": "my-machine1", "complete": True, "values": {"temperature": 1234, "partsMade": 5678}},
        {"machine": "my-machine2", "complete": True, "values": {"count": 42, "humidity": 7}},
    ]


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def consumer(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = example("lambda_store")
    monkeypatch.setattr(module, "dynamodb", lambda: tables)
    return module.handler


def deliver(handler: Any, event: dict[str, Any], between: Callable[[], None]) -> int:
    """As an event source mapping does: again from the lowest failed number, until nothing failed; the calls made."""
    records, calls = event["Records"], 0
    while records:
        calls += 1
        assert calls < 10
        numbers = [int(one["itemIdentifier"]) for one in handler({"Records": records}, None)["batchItemFailures"]]
        if not numbers:
            break
        records = [one for one in records if int(one["kinesis"]["sequenceNumber"]) >= min(numbers)]
        between()
    return calls


def test_spark_a_write_that_fails_is_delivered_again(consumer: Any, tables: Tables) -> None:
    machines = [f"m{n}" for n in range(6)]
    tables.failing = {"edge/m2", "edge/m4"}
    event = kinesis(*(measured(machine, v=1) for machine in machines), first=100)
    calls = deliver(consumer, event, lambda: tables.failing.discard(min(tables.failing)))
    assert calls == 3
    assert sorted(machine for machine, _ in tables.items) == [f"edge/{machine}" for machine in machines]


def test_spark_names_in_any_script_survive_the_consumer(consumer: Any, tables: Tables) -> None:
    name = "Schwei\u00dfger\u00e4t \u6eb6\u63a5 \U0001f525"
    payload = measured(name, label={"format": "char", "value": name})
    assert consumer(kinesis(payload), None) == {"batchItemFailures": []}
    ((key, item),) = tables.items.items()
    assert key[0] == f"edge/{name}"
    assert item["label"] == {"S": name}


def test_spark_records_of_one_second_do_not_overwrite_each_other(consumer: Any, tables: Tables) -> None:
    payloads = [measured(time=f"2023-11-14T22:13:20.{n:03}Z", v=n) for n in range(0, 1000, 10)]
    payloads += [measured(time="2023-11-14T22:13:20.000Z", v=n) for n in range(1000, 1100)]
    assert consumer(kinesis(*payloads), None) == {"batchItemFailures": []}
    assert Counter(item["v"]["N"] for item in tables.items.values()) == Counter(
        [str(n) for n in range(0, 1000, 10)] + [str(n) for n in range(1000, 1100)]
    )


# -- IoT pipeline ----------------------------------------------------------------------------------


async def test_iot_pipeline_a_filter_can_include_the_base_topic(server: Server) -> None:
    """`t/+` is one level and not `t`; `t/#` is `t` and all below. The broker and our routing agree."""
    for filters, expected in [
        (("t/+",), {"t/a"}),
        (("t/#",), {"t", "t/a", "t/a/b"}),
        (("t/+", "t"), {"t", "t/a"}),
    ]:
        async with rig(server, topics=filters, partition_key="topic") as r:
            for topic in ("t", "t/a", "t/a/b", "tx"):
                await r.publish(topic.encode(), topic=topic)
            await r.settled(len(expected))
            assert {record.data.decode() for record in r.stored()} == expected
            assert {record.partition_key for record in r.stored()} == expected


def test_iot_pipeline_every_record_has_its_own_result() -> None:
    event = firehose(b'{"v":1}', b"{", b'{"v":null}', b"\xff", b'{"v":5}')

    def fn(record: Any) -> bytes | None:
        value = json.loads(record.data)["v"]
        return None if value is None else b"%d\n" % value

    answer = lambdas.transform(event, fn)
    assert [one["recordId"] for one in answer["records"]] == [one["recordId"] for one in event["records"]]
    assert [one["result"] for one in answer["records"]] == [
        "Ok", "ProcessingFailed", "Dropped", "ProcessingFailed", "Ok",
    ]  # fmt: skip
    assert [base64.b64decode(one["data"]) for one in answer["records"] if one["result"] == "Ok"] == [b"1\n", b"5\n"]


async def test_iot_pipeline_one_bad_json_disturbs_no_other_record(server: Server) -> None:
    """Even when the key is to come from a field of the payload: what has none gets a UUID."""
    payloads = [b'{"m":"press-1"}', b'{"m":', b"\x00\xff", b"", b'{"m":"press-2"}']
    async with rig(server, partition_key="field:m") as r:
        await r.publish(*payloads)
        await r.settled(5)
        keys = {record.data: record.partition_key for record in r.stored()}
    assert keys.keys() == set(payloads)
    assert keys[payloads[0]] == "press-1"
    assert keys[payloads[4]] == "press-2"
    for bad in payloads[1:4]:
        uuid.UUID(keys[bad])


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def csv_function(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = example("lambda_csv")
    monkeypatch.setattr(module, "s3", lambda: bucket)
    monkeypatch.setenv("BUCKET", "lake")
    return module


def test_iot_pipeline_one_bad_json_costs_one_row(csv_function: Any, bucket: Bucket) -> None:
    answer = csv_function.handler(firehose(b'{"message":"a"}', b"{", b'{"message":"b"}'), None)
    assert [one["result"] for one in answer["records"]] == ["Dropped", "ProcessingFailed", "Dropped"]
    (body,) = bucket.objects.values()
    assert body.splitlines() == [b"topic;message", b";a", b";b"]


def test_iot_pipeline_object_names_never_collide(
    csv_function: Any, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """Functions that run at the same moment."""

        @staticmethod
        def now(zone: Any) -> datetime:
            return datetime(2026, 11, 21, 15, 0, 0, 123_456, zone)

    monkeypatch.setattr(csv_function, "datetime", Clock)
    for n in range(300):
        csv_function.handler(firehose(b'{"message":%d}' % n), None)
    assert len(bucket.objects) == 300
    assert {int(body.split(b";")[-1]) for body in bucket.objects.values()} == set(range(300))


def test_iot_pipeline_rotated_files_never_overwrite_each_other(tmp_path: Path) -> None:
    """Two writers share a dead-letter file that is full after a few letters: each letter is there once."""
    path = tmp_path / "dead.jsonl"

    def write(name: str) -> None:
        letters = DeadLetters(path, max_bytes=600, keep=1000)
        for n in range(100):
            letters.write([{"pipeline": name, "reason": "r", "payload": b"%d" % n}])
        letters.close()

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, ["one", "two"]))
    files = list(tmp_path.glob("dead.jsonl*"))
    assert len(files) > 30
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert Counter((one["pipeline"], base64.b64decode(one["payload"])) for one in found) == Counter(
        (name, b"%d" % n) for name in ("one", "two") for n in range(100)
    )


# -- Go service ------------------------------------------------------------------------------------


async def test_go_service_keys_of_an_assumed_role_outlive_their_hour(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hour lasts six seconds here: STS says when its keys end, and Kinesis refuses them from then on."""
    sts = Sts(valid_s=6)
    issued: list[float] = []

    class Keys(dict[str, Secret]):
        """What Kinesis knows of STS' keys: each is good for its six seconds."""

        def get(self, key: str, default: Any = None) -> Any:
            if not (match := re.fullmatch(r"ROLE(\d+)", key)):
                return default
            n = int(match[1])
            while len(issued) < n:
                issued.append(time.monotonic())
            expired = time.monotonic() > issued[n - 1] + 6
            refused.append(key) if expired else None
            return Secret(f"role-secret-{n}", f"role-token-{n}", expired)

        def __getitem__(self, key: str) -> Any:
            if (secret := self.get(key)) is None:
                raise KeyError(key)
            return secret

    refused: list[str] = []

    def prepare(emulator: Emulator) -> None:
        assert emulator.verifier is not None
        emulator.verifier.secrets = Keys()

    async with FakeServer(sts.answer) as fake:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", fake.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        options = {"role_arn": ROLE, "access_key": "BASE", "secret_key": "base-secret"}
        async with rig(server, kinesis=options, emulator={"credentials": {}}, prepare=prepare) as r:
            began, n = time.monotonic(), 0
            while time.monotonic() < began + 8:
                await r.publish(b"%d" % n)
                n += 1
                await asyncio.sleep(0.1)
            await r.settled(n)
            assert Counter(record.data for record in r.stored()) == Counter(b"%d" % i for i in range(n))
            assert r.stats["dropped"] == 0
    assert len(sts.asked) >= 2
    assert not refused, "keys were used after their time"


async def test_go_service_every_payload_arrives_byte_for_byte(server: Server) -> None:
    draw = random.Random(7)
    payloads = [draw.randbytes(size) for size in (0, 1, 2, 3, 255, 4096, 60_000, 300_000) for _ in range(3)]
    payloads += [bytes([n]) for n in range(256)] + [b'{"k": "\\u0000 \xc3\xa4"}\r\n ', b"\xf3\x89\x9a\xc2"]
    async with rig(server) as r:
        await r.publish(*payloads)
        await r.settled(len(payloads))
        assert Counter(record.data for record in r.stored()) == Counter(payloads)


async def test_go_service_an_aggregate_has_one_key_for_all_its_records(server: Server) -> None:
    """KCL drops inner records whose key belongs to another shard: here every inner key is the outer one's."""
    payloads = [b"%03d" % n * 30 for n in range(400)]
    async with rig(server, aggregation="kpl", shards=4, partition_key="topic", linger_ms=20) as r:
        for n, payload in enumerate(payloads):
            await r.publisher.publish(f"plant/{n // 50}", payload, 1)
        await r.publisher.drain()
        await r.settled(400)
        raw = r.stored()
        assert len(raw) < 200
        found: list[tuple[str, bytes]] = []
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
                found.append((record.partition_key, base64.b64decode(inner["kinesis"]["data"])))
        assert Counter(found) == Counter((f"plant/{n // 50}", payload) for n, payload in enumerate(payloads))


async def test_go_service_an_oversize_payload_does_not_end_the_process(server: Server, tmp_path: Path) -> None:
    def work(emulator: Emulator) -> None:
        with service(tmp_path, settings(server.port, emulator.url, 'dead_letter = "dead.jsonl"')) as run:
            wait_until(lambda: "subscribed" in run.log(), 30, "subscribed")
            publish(server, b"before", b"x" * (2**20 + 1), b"after")
            wait_until(lambda: emulator.stored_count("welders") >= 2, 30, "what came after is stored")
            letters = tmp_path / "dead.jsonl"
            wait_until(lambda: letters.exists() and letters.read_bytes().endswith(b"\n"), 30, "the dead letter")
            assert run.process is not None
            assert run.process.poll() is None
            assert run.terminate() == 0, run.log()
            assert stored(emulator) == Counter([b"before", b"after"])
            (letter,) = map(json.loads, letters.read_text().splitlines())
            assert base64.b64decode(letter["payload"]) == b"x" * (2**20 + 1)

    await threaded({"welders": 1}, work)


@pytest.mark.parametrize(
    "what", ["throttled", "5xx", "html", "expired", "cut before", "cut inside", "cut after", "no listener"]
)
async def test_go_service_request_errors_drop_nothing(
    server: Server, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.2)  # expired keys are asked for again after that
    payloads = [b"%d" % n for n in range(100)]
    again: list[asyncio.Task[None]] = []
    async with rig(server) as r:
        await r.until(lambda: r.run.ready, "ready")
        faults = r.emulator.faults
        fault = {
            "throttled": lambda: faults.call("LimitExceededException", times=2),
            "5xx": lambda: faults.call("InternalFailure", times=2),
            "html": lambda: faults.html(times=2),
            "expired": lambda: faults.call("ExpiredTokenException", times=1),
            "cut before": lambda: faults.cut("before", times=3),
            "cut inside": lambda: faults.cut("inside", times=2),
            "cut after": lambda: faults.cut("after", times=2),
            "no listener": lambda: None,
        }[what]()
        if fault is None:
            await r.emulator.close()
            again.append(asyncio.create_task(_later(0.5, r.emulator.start)))
        await r.publish(*payloads)
        await r.until(lambda: r.stats["received"] >= 100 and not r.stats["in_flight"], "all ended", 30)
        await r.until(lambda: r.stats["unacked"] == 0, "all acknowledged")
        await asyncio.gather(*again)
        arrived = Counter(record.data for record in r.stored())
        assert arrived.keys() == set(payloads)
        assert fault is None or fault.hits > 0, "the fault did not strike: this run proves nothing"
        assert r.run.delivery.sender.counters.calls_failed + r.run.delivery.sender.counters.duplicates_possible > 0
        assert arrived.total() - 100 <= r.run.delivery.sender.counters.duplicates_possible
        assert r.stats["dropped"] == r.stats["dead_lettered"] == 0


async def _later(seconds: float, work: Any) -> None:
    await asyncio.sleep(seconds)
    await work()


async def test_go_service_nothing_is_acknowledged_before_it_is_stored(server: Server, tmp_path: Path) -> None:
    def work(emulator: Emulator) -> None:
        with CountingProxy(server.port) as proxy, service(tmp_path, settings(proxy.port, emulator.url)) as run:
            wait_until(lambda: "subscribed" in run.log(), 30, "subscribed")
            fault = emulator.faults.call("ServiceUnavailableException", operation="PutRecords")
            publish(server, *(b"%d" % n for n in range(20)))
            wait_until(lambda: proxy.delivered >= 20 and fault.hits >= 3, 30, "all delivered, and tried")
            assert proxy.acked == 0, "acknowledged, and not stored"
            fault.remove()
            wait_until(lambda: proxy.acked >= 20, 30, "acknowledged when it is stored")
            assert stored(emulator) == Counter(b"%d" % n for n in range(20))

    await threaded({"welders": 1}, work)


async def test_go_service_sigkill_loses_nothing(server: Server, tmp_path: Path) -> None:
    """Killed while Kinesis takes nothing, so that everything delivered is buffered and nothing stored."""

    def work(emulator: Emulator) -> None:
        payloads = [b"%d" % n for n in range(300)]
        with service(tmp_path, settings(server.port, emulator.url)) as run:
            wait_until(lambda: "subscribed" in run.log(), 30, "subscribed")
            publish(server, *payloads[:100])
            wait_until(lambda: emulator.stored_count("welders") >= 100, 30, "the first are stored")
            fault = emulator.faults.cut("before", operation="PutRecords")
            publish(server, *payloads[100:200])
            wait_until(lambda: fault.hits >= 2, 30, "tried")
            run.kill()
            publish(server, *payloads[200:])
            fault.remove()
            run.start()
            wait_until(lambda: len(stored(emulator)) >= 300, 30, "everything is stored")
            assert run.terminate() == 0, run.log()
            assert stored(emulator).keys() == set(payloads)

    await threaded({"welders": 1}, work)


# -- the table above -------------------------------------------------------------------------------


def test_the_table_names_every_test() -> None:
    named = re.findall(r"\| (test_\w+) \|", __doc__ or "")
    own = re.findall(r"^(?:async )?def (test_\w+)\(", Path(__file__).read_text(), re.MULTILINE)
    assert named == [name for name in own if name != "test_the_table_names_every_test"]
