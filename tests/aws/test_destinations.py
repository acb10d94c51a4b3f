"""A destination is a row: Kinesis and Firehose differ in nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fastkin._codec import AnswerNames, KeyPlan
from fastkin.aws.destinations import FIREHOSE, KINESIS
from fastkin.aws.endpoint import light_endpoint
from fastkin.aws.native import KinesisClient
from fastkin.aws.sdk import SdkClient
from fastkin.config import Kinesis
from fastkin.delivery.delivery import Delivery, Options
from fastkin.emulator import Emulator
from fastkin.emulator.signature import Secret
from fastkin.errors import LibraryError, RecordError, UnexpectedResponse
from fastkin.limits import KIB, MIB
from fastkin.runtime.deadline import Deadline
from support.codec_rig import Rig

if TYPE_CHECKING:
    from pathlib import Path

    from fastkin.aws.client import Client


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def firehose() -> Emulator:
    return Emulator(firehose=["plant"], credentials={"AKID": Secret("secret")})


def settings(emulator: Emulator) -> Kinesis:
    return Kinesis(
        stream="plant", region="us-east-1", endpoint_url=emulator.url, access_key="AKID", secret_key="secret"
    )


async def delivered(client: Client, records: list[bytes]) -> Delivery:
    """Puts the records through a delivery of their own and waits until all have ended."""
    await client.start()
    delivery = Delivery(
        client,
        Options(budget_bytes=64 * MIB, budget_records=100_000, max_batch_bytes=10 * MIB),
        name="plant", stream="plant", key=KeyPlan("uuid"),
    )  # fmt: skip
    delivery.open()
    receipts = [delivery.batcher.put(record) for record in records]
    await delivery.flush()
    for receipt in receipts:
        assert len((await receipt).sequence_number) == 52  # its RecordId
        assert (await receipt).shard_id is None
    await delivery.close(Deadline(5.0, "plant"), spool_limit=Deadline(5.0, "plant"))
    await client.close()
    return delivery


@pytest.mark.parametrize("kind", [KinesisClient, SdkClient])
async def test_records_reach_another_destination(kind: type[KinesisClient | SdkClient]) -> None:
    """Host, target, signature, members, entries without keys, limits and answer are those of the row."""
    records = [b"%d" % n for n in range(1200)]
    async with firehose() as emulator:
        delivery = await delivered(kind(settings(emulator), destination=FIREHOSE), records)
        stored = [record.data for record in emulator.stored("plant")]
    assert sorted(stored) == sorted(records)
    assert delivery.stats()["stored"] == 1200


async def test_what_fails_there_goes_again() -> None:
    async with firehose() as emulator:
        fault = emulator.faults.record("ServiceUnavailableException", times=3)
        delivery = await delivered(KinesisClient(settings(emulator), destination=FIREHOSE), [b"a", b"b", b"c", b"d"])
        stored = [record.data for record in emulator.stored("plant")]
    assert fault.hits == 3
    assert sorted(stored) == [b"a", b"b", b"c", b"d"]
    assert delivery.stats()["retries"] == 3


async def test_calls_stay_within_the_limits_of_the_row() -> None:
    async with firehose() as emulator:
        client = KinesisClient(settings(emulator), destination=FIREHOSE)
        delivery = await delivered(client, [b"x" * 900 * KIB] * 9)
        assert client.calls == 3  # four to a call of 4 MiB
        with pytest.raises(RecordError, match=str(1000 * KIB)):
            delivery.batcher.put(b"x" * (1000 * KIB + 1))


@pytest.mark.parametrize(
    ("region", "account", "kinesis", "other"),
    [
        ("eu-west-1", None, "kinesis.eu-west-1.amazonaws.com", "firehose.eu-west-1.amazonaws.com"),
        (
            "eu-west-1",
            "1" * 12,
            "111111111111.data-kinesis.eu-west-1.amazonaws.com",
            "firehose.eu-west-1.amazonaws.com",
        ),
        ("cn-north-1", None, "kinesis.cn-north-1.amazonaws.com.cn", "firehose.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_each_destination_has_its_hosts(region: str, account: str | None, kinesis: str, other: str) -> None:
    for row, host in ((KINESIS, kinesis), (FIREHOSE, other)):
        endpoint = light_endpoint(Kinesis(stream="s", region=region), account, destination=row)
        assert endpoint is not None
        assert endpoint.data.host == host


def test_each_destination_has_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KINESIS", "http://localhost:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_FIREHOSE", "http://localhost:2")
    for row, host in ((KINESIS, "localhost:1"), (FIREHOSE, "localhost:2")):
        endpoint = light_endpoint(Kinesis(stream="s", region="eu-west-1"), destination=row)
        assert endpoint is not None
        assert endpoint.data.host == host


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b'{"RequestResponses":[]}', "it has 0 entries for 1 records"),
        (b'{"FailedPutCount":0}', "RequestResponses is missing"),
        (b'{"RequestResponses":[{"RecordId":"r"}]}', "FailedPutCount is missing or no number"),
        (b'{"FailedPutCount":0,"RequestResponses":[{"ShardId":"s"}]}', "neither an ErrorCode nor RecordId"),
        (b'{"FailedRecordCount":0,"Records":[{"ShardId":"s","SequenceNumber":"1"}]}', "RequestResponses is missing"),
    ],
)
def test_an_answer_is_read_by_the_names_of_the_row(answer: bytes, why: str) -> None:
    rig = Rig(answer=FIREHOSE.answer)
    rig.batcher.put(b"a")
    (batch,) = rig.drain()
    with pytest.raises(UnexpectedResponse, match=why):
        batch.settle(answer)
    assert batch.settle(b'{"FailedPutCount":0,"RequestResponses":[{"RecordId":"r"}]}') == []
    rig.settled()


@pytest.mark.parametrize("places", [(), ("a", "b", "c")])
def test_an_answer_has_one_or_two_members_for_the_place(places: tuple[str, ...]) -> None:
    with pytest.raises(LibraryError, match="one or two"):
        AnswerNames("Records", "Failed", *places)
