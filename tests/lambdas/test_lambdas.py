"""Helpers for Lambda functions, and the example functions built with them, against tables and buckets that fail."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import logging
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import aws_kinesis_agg.aggregator
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkin import lambdas
from fastkin._codec import KeyPlan
from support.codec_rig import Rig

ROOT = Path(__file__).resolve().parent.parent.parent


def example(name: str) -> Any:
    """A program of examples/, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def firehose(*payloads: bytes, **stream: Any) -> dict[str, Any]:
    """The event of a Firehose transformation; `stream`: kinesisRecordMetadata of every record."""
    return {
        "invocationId": "invocation",
        "deliveryStreamArn": "arn:aws:firehose:us-east-1:123456789012:deliverystream/plant",
        "region": "us-east-1",
        "records": [
            {"recordId": f"id-{n}", "approximateArrivalTimestamp": 1_700_000_000_123, "data": b64(payload)}
            | ({"kinesisRecordMetadata": stream} if stream else {})
            for n, payload in enumerate(payloads)
        ],
    }


def kinesis(*payloads: bytes, shard: int = 0, first: int = 0) -> dict[str, Any]:
    """The event of a Kinesis event source mapping."""
    return {
        "Records": [
            {
                "kinesis": {
                    "kinesisSchemaVersion": "1.0",
                    "partitionKey": "outer",
                    "sequenceNumber": str(first + n),
                    "data": b64(payload),
                    "approximateArrivalTimestamp": 1_700_000_000.25,
                },
                "eventSource": "aws:kinesis",
                "eventID": f"shardId-{shard:012}:{first + n}",
            }
            for n, payload in enumerate(payloads)
        ]
    }


# -- reading


def test_records_of_firehose() -> None:
    (direct,) = lambdas.iter_records(firehose(b"\x00\xff"))
    assert direct == lambdas.Record(b"\x00\xff", record_id="id-0", arrival=1_700_000_000.123)
    metadata = {
        "shardId": "shardId-000000000003", "partitionKey": "k", "sequenceNumber": "4959", "subsequenceNumber": "2",
        "approximateArrivalTimestamp": 1_700_000_001_000,
    }  # fmt: skip
    (behind,) = lambdas.iter_records(firehose(b"x", **metadata))
    assert behind == lambdas.Record(b"x", "id-0", "k", "shardId-000000000003", "4959", 2, 1_700_000_001.0)


def test_records_of_kinesis() -> None:
    (record,) = lambdas.iter_records(kinesis(b"x", shard=6, first=7))
    assert record == lambdas.Record(b"x", "", "outer", "shardId-000000000006", "7", 0, 1_700_000_000.25)


def test_aggregates_of_fastkin_are_taken_apart() -> None:
    rig = Rig(aggregate_bytes=1000, key=KeyPlan("parts", [("text", "press")]))
    payloads = [b"%d" % n * (n % 50) for n in range(200)]
    for payload in payloads:
        rig.batcher.offer(b"t", payload, 1)
    entries = [entry for call in rig.store() for entry in call]
    assert len(entries) < 50
    records = list(lambdas.iter_records(kinesis(*(data for data, _, _ in entries))))
    assert [record.data for record in records] == payloads
    assert len({(record.sequence_number, record.subsequence_number) for record in records}) == 200


def test_aggregates_of_awss_own_writer_are_taken_apart() -> None:
    """It writes several keys and explicit hash keys into one aggregate."""
    aggregator = aws_kinesis_agg.aggregator.RecordAggregator()
    given = [(f"key {n % 3} \u00e4", b"%d" % n * n, str(n) if n % 2 else None) for n in range(40)]
    for key, data, hash_key in given:
        assert aggregator.add_user_record(key, data, hash_key) is None
    _, _, whole = aggregator.clear_and_get().get_contents()
    records = list(lambdas.iter_records(kinesis(bytes(whole))))
    assert [(record.partition_key, record.data) for record in records] == [(key, data) for key, data, _ in given]


@pytest.mark.parametrize("what", ["digest", "short", "message", "index"])
def test_what_only_looks_like_an_aggregate_stays_as_it_is(what: str) -> None:
    import hashlib

    magic = b"\xf3\x89\x9a\xc2"
    data = {
        "digest": magic + b"\x0a\x01k" + b"\x00" * 16,
        "short": magic + b"\x00" * 16,
        "message": magic + b"\x0a\x7fk" + hashlib.md5(b"\x0a\x7fk").digest(),
        "index": magic + (m := b"\x0a\x01k\x1a\x05\x08\x09\x1a\x01x") + hashlib.md5(m).digest(),
    }[what]
    (record,) = lambdas.iter_records(kinesis(data))
    assert record.data == data
    assert record.partition_key == "outer"


@given(st.binary(max_size=200))
def test_any_message_is_read_without_an_error(message: bytes) -> None:
    import hashlib

    list(lambdas.iter_records(kinesis(b"\xf3\x89\x9a\xc2" + message + hashlib.md5(message).digest())))


@pytest.mark.parametrize("event", [{}, {"Records": [{"eventSource": "aws:sqs", "body": "x"}]}])
def test_events_of_others(event: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="neither"):
        list(lambdas.iter_records(event))
    with pytest.raises(ValueError):
        lambdas.batch_item_failures(event, print)
    with pytest.raises(ValueError):
        lambdas.transform(event, lambda record: record.data)


@pytest.mark.process
def test_the_file_stands_alone() -> None:
    """Copied into a function's package it needs neither the compiled part nor anything installed."""
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); assert not [m for m in sys.modules if 'fastkin' in m]"
    subprocess.run([sys.executable, "-I", "-S", "-c", program, str(lambdas.__file__)], check=True)


# -- transform


def test_every_record_has_its_own_result(caplog: pytest.LogCaptureFixture) -> None:
    def fn(record: lambdas.Record) -> bytes | str | None:
        value = json.loads(record.data)
        return {1: b"bytes", 2: "t\u00e4xt", 3: None}[value]

    event = firehose(b"1", b"{", b"2", b"3", b"4")
    event["records"].append({"recordId": "odd", "data": "no base64!"})
    answer = lambdas.transform(event, fn)
    assert answer["records"] == [
        {"recordId": "id-0", "result": "Ok", "data": b64(b"bytes")},
        {"recordId": "id-1", "result": "ProcessingFailed"},
        {"recordId": "id-2", "result": "Ok", "data": b64("t\u00e4xt".encode())},
        {"recordId": "id-3", "result": "Dropped"},
        {"recordId": "id-4", "result": "ProcessingFailed"},
        {"recordId": "odd", "result": "ProcessingFailed"},
    ]
    assert "recordId=id-1 failed: JSONDecodeError" in caplog.text


def test_a_result_of_a_wrong_type_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    answer = lambdas.transform(firehose(b"1", b"2"), lambda r: {"a": 1} if r.data == b"1" else r.data)  # type: ignore[arg-type, return-value]
    assert [r["result"] for r in answer["records"]] == ["ProcessingFailed", "Ok"]
    assert "returned dict, not bytes, str or None" in caplog.text


@given(st.lists(st.one_of(st.none(), st.integers(0, 300)), max_size=30), st.integers(3000, 6000))
def test_the_answer_stays_within_its_bound(sizes: list[int | None], bound: int) -> None:
    results = iter(sizes)
    event = firehose(*(b"x" for _ in sizes))
    answer = lambdas.transform(
        event, lambda _: None if (size := next(results)) is None else b"x" * size, max_response_bytes=bound
    )
    assert len(json.dumps(answer)) <= bound
    assert [r["recordId"] for r in answer["records"]] == [r["recordId"] for r in event["records"]]


def test_what_no_longer_fits_fails_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    answer = lambdas.transform(firehose(*[b"x" * 1_000_000] * 6), lambda record: record.data)
    assert len(json.dumps(answer)) < 6_000_000
    assert [r["result"] for r in answer["records"]] == ["Ok"] * 4 + ["ProcessingFailed"] * 2
    (line,) = caplog.messages
    assert "2 of 6 records failed" in line
    assert "BufferSizeInMBs" in line


def test_a_payload_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    def fn(record: lambdas.Record) -> bytes:
        raise ValueError(record.data.decode())

    lambdas.transform(firehose(b"a\n2026 ERROR forged \x1b[31m"), fn)
    (line,) = caplog.messages
    assert "\n" not in line
    assert "\x1b" not in line


# -- batch_item_failures


def test_all_stored() -> None:
    seen: list[bytes] = []
    answer = lambdas.batch_item_failures(kinesis(b"a", b"b"), lambda r: seen.append(r.data))
    assert answer == {"batchItemFailures": []}
    assert seen == [b"a", b"b"]


def test_the_first_failure_of_a_shard_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[bytes] = []

    def fn(record: lambdas.Record) -> None:
        if record.data == b"bad":
            raise OSError("table away")
        seen.append(record.data)

    event = kinesis(b"a", b"bad", b"after", b"bad", shard=0, first=100)
    event["Records"] += kinesis(b"other shard", shard=1, first=50)["Records"]
    assert lambdas.batch_item_failures(event, fn) == {"batchItemFailures": [{"itemIdentifier": "101"}]}
    assert seen == [b"a", b"other shard"]
    assert "shardId-000000000000 sequence=101 failed" in caplog.text
    assert "table away" in caplog.text


def test_a_failed_inner_record_brings_its_aggregate_back() -> None:
    rig = Rig(aggregate_bytes=1000)
    for n in range(5):
        rig.batcher.offer(b"t", b"%d" % n, 1)
    ((data, _, _),) = (entry for call in rig.store() for entry in call)
    seen: list[bytes] = []

    def fn(record: lambdas.Record) -> None:
        seen.append(record.data)
        if record.data == b"3":
            raise OSError

    answer = lambdas.batch_item_failures(kinesis(b"before", data, b"after", first=10), fn)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "11"}]}
    assert seen == [b"before", b"0", b"1", b"2", b"3"]


def test_a_coroutine_that_nobody_awaits_is_an_error() -> None:
    async def store(record: lambdas.Record) -> None: ...

    with pytest.raises(TypeError, match="nobody would wait"):
        lambdas.batch_item_failures(kinesis(b"x"), store)
    with pytest.raises(TypeError, match="nobody would wait"):
        lambdas.transform(firehose(b"x"), store)  # type: ignore[arg-type]


# -- examples/lambda_store.py


class Tables:
    """As much of DynamoDB as the example uses; an item with the same key replaces the former one."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], dict[str, Any]] = {}
        self.table = self.metadata_table = ""
        self.hosts: dict[str, dict[str, str]] = {}
        self.failing: set[str] = set()  # machine ids

    def put_item(self, *, TableName: str, Item: dict[str, Any]) -> None:  # noqa: N803
        if Item["machine_id"]["S"] in self.failing:
            raise OSError("ProvisionedThroughputExceededException")
        self.table = TableName
        self.items[Item["machine_id"]["S"], Item["timestamp"]["N"]] = Item

    def update_item(self, **request: Any) -> None:
        assert request["UpdateExpression"] == "SET #M = :m"
        self.metadata_table = request["TableName"]
        name = request["ExpressionAttributeNames"]["#M"]
        host = self.hosts.setdefault(request["Key"]["spark_id"]["S"], {})
        host[name] = request["ExpressionAttributeValues"][":m"]["S"]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    monkeypatch.delenv("DATA_TABLE", raising=False)
    return Tables()


@pytest.fixture
def store(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = example("lambda_store")
    monkeypatch.setattr(module, "dynamodb", lambda: tables)
    return module


def measured(machine: str = "press", time: str = "2023-11-14T22:13:20.000Z", **values: Any) -> bytes:
    attributes = {
        name: {"name": name, "description": name, **(value if isinstance(value, dict) else {"value": value})}
        for name, value in values.items()
    }
    data = {"machine": machine, "time": time, "attributes": attributes}
    return json.dumps({"type": "record", "host": "edge", "data": data}, ensure_ascii=False).encode()


def test_one_item_per_record(store: Any, tables: Tables) -> None:
    payload = measured(
        temperature=21.50,
        big=123456789123456789,
        name={"format": "char", "value": "M\u00fcller \u2603"},
        running={"format": "bool", "value": True},
        off={"format": "bool", "value": "False"},
        code={"format": "number", "outputFormat": "char", "value": 7},
        timestamp=5,
    )
    assert store.handler(kinesis(payload), None) == {"batchItemFailures": []}
    ((key, item),) = tables.items.items()
    assert tables.table == "SparkData"
    assert key[0] == "edge/press"
    assert float(key[1]) == pytest.approx(1_700_000_000 + 1800, abs=0.001)
    assert len(key[1].replace(".", "")) <= 38  # digits of a number in DynamoDB
    assert item["expires"] == {"N": "1700001800"}
    assert item["temperature"] == {"N": "21.5"}
    assert item["big"] == {"N": "123456789123456789"}
    assert item["name"] == {"S": "M\u00fcller \u2603"}
    assert item["running"] == {"BOOL": True}
    assert item["off"] == {"BOOL": False}
    assert item["code"] == {"S": "7"}
    assert item["timestamp_"] == {"N": "5"}


def test_records_of_one_second_and_one_millisecond_are_items_of_their_own(store: Any, tables: Tables) -> None:
    times = ["2023-11-14T22:13:20.000Z", "2023-11-14T22:13:20.999Z", "2023-11-14T23:13:20.999+01:00"]
    payloads = [measured(time=time, n=n) for n, time in enumerate(times)]
    for _ in range(2):  # delivered again: still the same items
        store.handler(kinesis(*payloads), None)
    assert len(tables.items) == 3
    assert min(tables.items.items())[1]["n"] == {"N": "0"}
    assert {key.split(".")[0] for _, key in tables.items} == {"1700001800"}


def test_metadata_and_connection_tests(store: Any, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"info": {"fullname": "Presse S\u00fcd"}, "variables": {"t": {"limit": 1.5}}}
    metadata = json.dumps({"type": "metadata", "host": "edge", "data": data}).encode()
    test = b'{"type":"connection_test","host":"edge","data":"CONNECTION_TEST"}'
    monkeypatch.setenv("DATA_TABLE", "Mine")
    monkeypatch.setenv("METADATA_TABLE", "Theirs")
    assert store.handler(kinesis(test, metadata, measured(t=1)), None) == {"batchItemFailures": []}
    assert json.loads(tables.hosts["edge"]["Presse S\u00fcd"]) == data
    assert (tables.table, tables.metadata_table) == ("Mine", "Theirs")  # SP-21


@pytest.mark.parametrize("payload", [b"{", b"\xff", b'{"type":"else"}', measured(x={"format": "bool", "value": "?"})])
def test_what_cannot_be_stored_is_named(store: Any, tables: Tables, payload: bytes) -> None:
    answer = store.handler(kinesis(measured("a", v=1), payload, measured("b", v=1), first=5), None)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "6"}]}
    assert [machine for machine, _ in tables.items] == ["edge/a"]


# -- examples/lambda_csv.py


class Bucket:
    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.failing = False

    def put_object(self, *, Bucket: str, Key: str, Body: bytes) -> None:  # noqa: N803
        if self.failing:
            raise OSError("SlowDown")
        assert Bucket == "lake"
        assert Key not in self.objects
        self.objects[Key] = gzip.decompress(Body)


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def csv_function(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = example("lambda_csv")
    monkeypatch.setattr(module, "s3", lambda: bucket)
    monkeypatch.setenv("BUCKET", "lake")
    monkeypatch.delenv("PREFIX", raising=False)
    return module


def test_rows_of_a_call_are_one_object(csv_function: Any, bucket: Bucket) -> None:
    event = firehose(b'{"topic":"t","message":"Hello; world"}', b'{"topic":"u","message":1}')
    assert [r["result"] for r in csv_function.handler(event, None)["records"]] == ["Dropped", "Dropped"]
    ((key, body),) = bucket.objects.items()
    assert body == b'topic;message\nt;"Hello; world"\nu;1\n'
    assert key.startswith("data/")
    uuid.UUID(key.rsplit("/", 1)[1].removesuffix(".csv.gz"))


def test_nothing_is_dropped_that_the_bucket_did_not_take(csv_function: Any, bucket: Bucket) -> None:
    bucket.failing = True
    with pytest.raises(OSError, match="SlowDown"):
        csv_function.handler(firehose(b"{}"), None)


def test_no_object_without_rows(csv_function: Any, bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    csv_function.handler(firehose(b"{", b"[]"), None)
    assert bucket.objects == {}


# -- examples/assembler.py


def test_only_whole_records_are_handed_out() -> None:
    a = example("assembler").Assembler({"press": ["count", "humidity"]})
    assert a.add("press", "count", 1234) == []
    assert a.add("press", "humidity", 5678) == [
        {"machine": "press", "complete": True, "values": {"count": 1234, "humidity": 5678}}
    ]
    assert len(a) == 0


def test_nothing_unfinished_is_thrown_away() -> None:
    a = example("assembler").Assembler({f"m{n}": ["x", "y"] for n in range(4)}, max_machines=2)
    assert a.add("m0", "x", 1) == []
    assert a.add("m0", "x", 2) == [{"machine": "m0", "complete": False, "values": {"x": 1}}]
    assert a.add("m1", "x", 3) == []
    assert a.add("m2", "x", 4) == [{"machine": "m0", "complete": False, "values": {"x": 2}}]
    assert [record["values"] for record in a.flush()] == [{"x": 3}, {"x": 4}]
    assert a.flush() == []


def test_only_whole_records_are_handed_out_when_asked_for() -> None:
    """SP-13."""
    a = example("assembler").Assembler({f"m{n}": ["x", "y"] for n in range(3)}, max_machines=1, incomplete=False)
    assert a.add("m0", "x", 1) == []
    assert a.add("m0", "x", 2) == []  # the first value had no fellow
    assert a.add("m1", "x", 3) == []  # nor had the second, when there was no room for it
    assert a.add("m1", "y", 4) == [{"machine": "m1", "complete": True, "values": {"x": 3, "y": 4}}]
    assert a.add("m2", "x", 5) == []
    assert a.flush() == []
    assert a.discarded == 3


@pytest.mark.parametrize(("machine", "variable"), [("nobody", "x"), ("m0", "z")])
def test_an_unknown_name_is_an_error(machine: str, variable: str) -> None:
    with pytest.raises(KeyError):
        example("assembler").Assembler({"m0": ["x"]}).add(machine, variable, 1)


# -- examples/machines.py; the machines and what is written of them are those of the tests of spark-protocol-aws-kinesis


def machine(name: str, *variables: dict[str, Any], disabled: bool = False, **info: Any) -> dict[str, Any]:
    return {
        "info": {"name": name, **info},
        "settings": {"model": {"enable": True, "publishDisabled": disabled}},
        "variables": {each["name"]: each for each in variables},
    }


TEMPERATURE, COUNT, HUMIDITY = ({"name": name} for name in ("temperature", "count", "humidity"))
PRESSURE = {"name": "pressure", "srcVariables": [{"srcVariable": "temperature", "srcMachine": "my-machine1"}]}


def plant(**changes: Any) -> dict[str, Any]:
    return {
        "my-machine1": machine("my-machine1", TEMPERATURE),
        "my-machine2": machine("my-machine2", COUNT, disabled=True),
        "my-machineV": machine("my-machineV", PRESSURE, disabled=True, hpl="virtual"),
    } | {name.replace("_", "-"): made for name, made in changes.items()}


def machines_of(configured: dict[str, Any]) -> Any:
    return example("machines").Machines("h", configured)


def test_a_whole_reading_is_a_record() -> None:
    """SP-12: everything that is known of a variable, and its value behind it."""
    described = {"name": "temperature", "description": "Oven", "format": "float"}
    m = machines_of(plant(my_machine1=machine("my-machine1", described)))
    assert m.value("my-machine1", "temperature", 1234, "2018-01-02T03:04:05.678Z") == [
        (
            "h/my-machine1",
            (
                b'{"type":"record","host":"h","data":{"machine":"my-machine1","time":"2018-01-02T03:04:05.678Z",'
                b'"attributes":{"temperature":{"name":"temperature","description":"Oven","format":"float","value":1234}}}}'
            ),
        )
    ]


def test_metadata_of_a_machine_that_is_enabled() -> None:
    """SP-09, SP-10: and none of those that were there at the start."""
    m = machines_of(plant())
    enabled = plant(my_machine2=machine("my-machine2", COUNT))
    assert m.configure(enabled) == [
        (
            "h/my-machine2",
            (
                b'{"type":"metadata","host":"h","data":{"info":{"name":"my-machine2"},'
                b'"variables":{"count":{"name":"count"}}}}'
            ),
        )
    ]
    assert m.configure(enabled) == []  # nothing has changed


def test_metadata_when_variables_change() -> None:
    """SP-09, SP-10."""
    m = machines_of(plant(my_machine2=machine("my-machine2", COUNT)))
    ((_, data),) = m.configure(plant(my_machine2=machine("my-machine2", COUNT, HUMIDITY)))
    assert data == (
        b'{"type":"metadata","host":"h","data":{"info":{"name":"my-machine2"},'
        b'"variables":{"count":{"name":"count"},"humidity":{"name":"humidity"}}}}'
    )


def test_metadata_of_a_virtual_machine() -> None:
    """SP-11: which variable of which machine it is made of, and again when its variables change."""
    m = machines_of(plant())
    ((_, data),) = m.configure(plant(my_machineV=machine("my-machineV", PRESSURE, hpl="virtual")))
    pressure = (
        b'{"type":"metadata","host":"h","data":{"info":{"name":"my-machineV","hpl":"virtual"},"variables":{"pressure":'
        b'{"name":"pressure","srcVariables":[{"srcVariable":"temperature","srcMachine":"my-machine1"}],'
        b'"referencedMachineInfo":{"name":"my-machine1"},'
        b'"referencedMachineConfig":{"enable":true,"publishDisabled":false},'
        b'"referencedVariable":{"name":"temperature"}}'
    )
    assert data == pressure + b"}}}"
    count = {"name": "count", "srcVariables": [{"srcVariable": "count", "srcMachine": "my-machine2"}]}
    both = plant(
        my_machine2=machine("my-machine2", COUNT, HUMIDITY),
        my_machineV=machine("my-machineV", PRESSURE, count, hpl="virtual"),
    )
    (_, (_, data)) = m.configure(both)
    assert data == pressure + (
        b',"count":{"name":"count","srcVariables":[{"srcVariable":"count","srcMachine":"my-machine2"}],'
        b'"referencedMachineInfo":{"name":"my-machine2"},'
        b'"referencedMachineConfig":{"enable":true,"publishDisabled":false},'
        b'"referencedVariable":{"name":"count"}}}}}'
    )


def test_only_whole_readings_are_written_and_machines_do_not_disturb_each_other() -> None:
    """SP-13, and SP-14 turned round: an entry of another machine ends no reading."""
    m = machines_of(plant(my_machine2=machine("my-machine2", COUNT, HUMIDITY)))
    assert m.value("my-machine2", "count", 1, "t1") == []
    assert len(m.value("my-machine1", "temperature", 2, "t2")) == 1
    assert m.value("my-machine2", "count", 3, "t3") == []  # again: the newer value
    ((key, data),) = m.value("my-machine2", "humidity", 4, "t4")
    read = json.loads(data)["data"]
    assert (key, read["time"]) == ("h/my-machine2", "t1")
    assert {name: each["value"] for name, each in read["attributes"].items()} == {"count": 3, "humidity": 4}
    assert m.value("my-machine2", "count", 5, "t5") == []  # a reading begins anew


def test_the_record_of_two_variables_is_written_once_it_is_whole() -> None:
    """SP-12, SP-13: the values of spark's own test, byte for byte."""
    m = machines_of(plant(my_machine2=machine("my-machine2", COUNT, HUMIDITY)))
    assert m.value("my-machine2", "count", 1234, "2018-01-02T03:04:05.678Z") == []
    assert m.value("my-machine2", "humidity", 5678, "2018-01-02T03:04:05.679Z") == [
        (
            "h/my-machine2",
            (
                b'{"type":"record","host":"h","data":{"machine":"my-machine2","time":"2018-01-02T03:04:05.678Z",'
                b'"attributes":{"count":{"name":"count","value":1234},"humidity":{"name":"humidity","value":5678}}}}'
            ),
        )
    ]


def test_a_record_that_another_machine_interrupts_is_written_too() -> None:
    """SP-14 turned round, with the values of spark's own test, which lost the first machine's record."""
    count = {"name": "count", "srcVariables": [{"srcVariable": "count", "srcMachine": "my-machine2"}]}
    m = machines_of(
        plant(
            my_machine2=machine("my-machine2", COUNT, HUMIDITY),
            my_machineV=machine("my-machineV", PRESSURE, count, hpl="virtual"),
        )
    )
    time = "2018-01-02T03:04:05.678Z"
    told = [
        m.value("my-machine2", "count", 1234, time),
        m.value("my-machineV", "pressure", 8765, time),
        m.value("my-machineV", "count", 4321, time),
        m.value("my-machine2", "humidity", 5678, time),
    ]
    values = [
        [{name: each["value"] for name, each in json.loads(data)["data"]["attributes"].items()} for _, data in puts]
        for puts in told
    ]
    assert values == [[], [], [{"pressure": 8765, "count": 4321}], [{"count": 1234, "humidity": 5678}]]


def test_a_machine_that_may_not_publish_writes_nothing() -> None:
    """SP-15: from the start, and as soon as it is told."""
    m = machines_of(plant())
    assert m.value("my-machine2", "count", 1, "t") == []
    assert m.configure(plant(my_machine1=machine("my-machine1", TEMPERATURE, disabled=True))) == []
    assert m.value("my-machine1", "temperature", 1, "t") == []
    assert m.value("nobody", "x", 1, "t") == []
