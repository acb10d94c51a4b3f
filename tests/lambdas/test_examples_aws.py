"""The example functions with the SDK of AWS and a server that answers as DynamoDB and S3 do: moto, as a process.

test_lambdas.py has the cases; here is what only a service can say: that it takes what the functions send, and keeps it.
"""

from __future__ import annotations

import gzip
import json
import os
from typing import TYPE_CHECKING, Any

import boto3
import pytest

import fastkin
from fastkin.testing import AsyncEmulator
from lambdas.test_lambdas import b64, example, firehose, kinesis, measured
from support.servers import moto

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(240)  # the first one waits for the server

REGION = "us-east-1"


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[str]:
    with moto() as running:
        yield running.url


@pytest.fixture
def aws(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a function finds in Lambda's environment; the services are moto's."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_REGION", REGION)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the keys of the first who asked


def make_table(dynamodb: Any, name: str, **keys: str) -> None:
    dynamodb.create_table(
        TableName=name,
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": key, "AttributeType": kind} for key, kind in keys.items()],
        KeySchema=[{"AttributeName": key, "KeyType": role} for key, role in zip(keys, ("HASH", "RANGE"), strict=False)],
    )


@pytest.fixture
def dynamodb(aws: None) -> Iterator[Any]:
    """With the two tables of the example, empty."""
    client = boto3.client("dynamodb")
    make_table(client, "SparkData", machine_id="S", timestamp="N")
    make_table(client, "SparkMetadata", spark_id="S")
    yield client
    for name in client.list_tables()["TableNames"]:
        client.delete_table(TableName=name)
    client.close()


def items(dynamodb: Any, table: str = "SparkData") -> list[dict[str, Any]]:
    return list(dynamodb.scan(TableName=table, ConsistentRead=True)["Items"])


# --- examples/lambda_store.py ---


def test_records_become_items_of_dynamodb(dynamodb: Any) -> None:
    """SP-19: char is S, bool is BOOL, number is N, what has no format is N, and outputFormat wins over format."""
    payload = measured(
        name={"format": "char", "value": "M\u00fcller"},
        running={"format": "bool", "value": True},
        count={"format": "number", "value": 1234},
        temperature=21.5,
        big=123456789012345678901234567890,
        code={"format": "number", "outputFormat": "char", "value": 7},
    )
    assert example("lambda_store").handler(kinesis(payload), None) == {"batchItemFailures": []}
    (item,) = items(dynamodb)
    timestamp = item.pop("timestamp")["N"]
    assert timestamp.startswith("1700001800.000")  # 2023-11-14T22:13:20Z and half an hour
    assert item == {
        "machine_id": {"S": "edge/press"},
        "expires": {"N": "1700001800"},
        "name": {"S": "M\u00fcller"},
        "running": {"BOOL": True},
        "count": {"N": "1234"},
        "temperature": {"N": "21.5"},
        "big": {"N": "123456789012345678901234567890"},
        "code": {"S": "7"},
    }


def test_what_comes_again_is_the_same_item_of_dynamodb(dynamodb: Any) -> None:
    """SP-20: records of one second are items of their own, and a batch that is delivered again adds none."""
    event = kinesis(*(measured(n=n) for n in range(3)))
    for _ in range(2):
        assert example("lambda_store").handler(event, None) == {"batchItemFailures": []}
    assert sorted(item["n"]["N"] for item in items(dynamodb)) == ["0", "1", "2"]


def test_metadata_is_an_attribute_of_the_host_in_dynamodb(dynamodb: Any) -> None:
    """SP-19: UpdateItem of SparkMetadata, one attribute for each machine; a connection test is ignored."""

    def metadata(fullname: str, limit: float) -> bytes:
        data = {"info": {"fullname": fullname}, "variables": {"t": {"limit": limit}}}
        return json.dumps({"type": "metadata", "host": "edge", "data": data}).encode()

    test = b'{"type":"connection_test","host":"edge","data":"CONNECTION_TEST"}'
    event = kinesis(metadata("Press 1", 1.5), test, metadata("Press 2", 2.5), metadata("Press 1", 3.5))
    assert example("lambda_store").handler(event, None) == {"batchItemFailures": []}
    (host,) = items(dynamodb, "SparkMetadata")
    assert host.pop("spark_id") == {"S": "edge"}
    read = {name: json.loads(value["S"])["variables"]["t"]["limit"] for name, value in host.items()}
    assert read == {"Press 1": 3.5, "Press 2": 2.5}
    assert items(dynamodb) == []


def test_what_dynamodb_refuses_is_delivered_again(dynamodb: Any) -> None:
    """SP-20: a failed write is answered by the number of its record, and what comes behind it is not written."""
    event = kinesis(measured("a", v=1), measured("b", v="no number"), measured("c", v=1), first=5)
    answer = example("lambda_store").handler(event, None)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "6"}]}
    assert [item["machine_id"]["S"] for item in items(dynamodb)] == ["edge/a"]


def test_tables_have_other_names_on_request(dynamodb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SP-21."""
    make_table(dynamodb, "Mine", machine_id="S", timestamp="N")
    monkeypatch.setenv("DATA_TABLE", "Mine")
    assert example("lambda_store").handler(kinesis(measured(t=1)), None) == {"batchItemFailures": []}
    assert [item["t"] for item in items(dynamodb, "Mine")] == [{"N": "1"}]
    monkeypatch.setenv("DATA_TABLE", "Nobodys")
    answer = example("lambda_store").handler(kinesis(measured(t=1), first=9), None)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "9"}]}


async def test_from_the_producer_to_the_table(dynamodb: Any) -> None:
    """All of the way: what fastkin stored, as the event that Lambda makes of it, in the table."""
    async with AsyncEmulator({"machines": 1}, region=REGION) as stream:
        async with fastkin.Producer("machines") as producer:
            for n in range(20):
                await producer.put(measured(f"m{n}", value=n))
        await stream.until_stored(20)
        records = [
            {
                "eventSource": "aws:kinesis",
                "eventID": f"{record.shard_id}:{record.sequence_number}",
                "kinesis": {
                    "partitionKey": record.partition_key,
                    "sequenceNumber": record.sequence_number,
                    "data": b64(record.data),
                    "approximateArrivalTimestamp": record.arrival,
                },
            }
            for record in stream.stored()
        ]
    assert example("lambda_store").handler({"Records": records}, None) == {"batchItemFailures": []}
    stored = {item["machine_id"]["S"]: item["value"]["N"] for item in items(dynamodb)}
    assert stored == {f"edge/m{n}": str(n) for n in range(20)}


# --- examples/lambda_csv.py ---


@pytest.fixture
def s3(aws: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    client = boto3.client("s3")
    client.create_bucket(Bucket="lake")
    monkeypatch.setenv("BUCKET", "lake")
    yield client
    for name in keys(client):
        client.delete_object(Bucket="lake", Key=name)
    client.delete_bucket(Bucket="lake")
    client.close()


def keys(s3: Any) -> list[str]:
    return [each["Key"] for each in s3.list_objects_v2(Bucket="lake").get("Contents", [])]


def test_rows_are_an_object_of_s3(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """IC-14, IC-15: each record is answered for itself; what is no JSON object fails alone, the others are stored."""
    monkeypatch.setenv("PREFIX", "dev/data/")
    event = firehose(b'{"topic":"t","message":"Hello, world!"}', b"{", b'{"topic":"u","message":"a;b"}')
    answer = example("lambda_csv").handler(event, None)
    assert [(record["recordId"], record["result"]) for record in answer["records"]] == [
        ("id-0", "Dropped"), ("id-1", "ProcessingFailed"), ("id-2", "Dropped"),
    ]  # fmt: skip
    (name,) = keys(s3)
    assert name.startswith("dev/data/")
    assert name.endswith(".csv.gz")
    body = s3.get_object(Bucket="lake", Key=name)["Body"].read()
    assert gzip.decompress(body) == b'topic;message\nt;Hello, world!\nu;"a;b"\n'


def test_calls_of_one_moment_are_objects_of_their_own(s3: Any) -> None:
    """IC-15: the names of the sample's files collided."""
    for _ in range(3):
        example("lambda_csv").handler(firehose(b'{"topic":"t","message":"m"}'), None)
    assert len(keys(s3)) == 3


def test_firehose_calls_again_when_s3_takes_nothing(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """IC-15: what is answered as dropped is forgotten by Firehose, so the function fails as a whole instead."""
    monkeypatch.setenv("BUCKET", "nobodys-lake")
    with pytest.raises(s3.exceptions.NoSuchBucket):
        example("lambda_csv").handler(firehose(b"{}"), None)
