"""The cases of the AWSKinesisStreams library's own tests, value for value: what it takes, and what it refuses."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from fastkin import ErrorType, LibraryError, Producer, PutResult, Record
from fastkin.emulator import Emulator
from support.servers import ACCESS_KEY, SECRET_KEY

GOOD: dict[str, Any] = {
    "region": "us-east-1",
    "access_key": ACCESS_KEY,
    "secret_key": SECRET_KEY,
    "stream": "imptestStream",
}


def producer(url: str) -> Producer:
    return Producer(**GOOD, endpoint_url=url)


# -- what is refused

NO_RECORD = [None, "abc", 123, {"val": "123"}, PutResult(None, None)]
NO_RECORDS = [
    None, "abc", 123, {"val": "123"}, [], ["abc", "def"], [{"val": "123"}], [PutResult(None, None)],
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "given"),
    [("put_record", each) for each in NO_RECORD] + [("put_records", each) for each in NO_RECORDS],
)
async def test_the_matrix_of_wrong_types(method: str, given: Any) -> None:
    """EI-10: testWrongTypeRecord and testWrongTypeRecords. Nothing is sent."""
    async with Emulator({"imptestStream": 1}) as emulator, producer(emulator.url) as one:
        with pytest.raises(LibraryError) as caught:
            await getattr(one, method)(given)
        assert "PutRecord" not in emulator.counters.operations
        assert "PutRecords" not in emulator.counters.operations
    assert caught.value.type is ErrorType.LIBRARY_ERROR
    words = "Non empty argument required: records" if given == [] else "Wrong type of argument: "
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("argument", ["region", "access_key", "secret_key", "stream"])
def test_the_matrix_of_initial_parameters(argument: str, value: Any) -> None:
    """EI-05: the eight cases, told where the mistake is and not at the first call. No region is the SDK's, here."""
    given = GOOD | {argument: value}
    if argument == "region" and value is None:
        Producer(**given)
        return
    with pytest.raises(LibraryError, match=argument) as caught:
        Producer(**given)
    assert caught.value.type is ErrorType.LIBRARY_ERROR
    assert SECRET_KEY not in str(caught.value)


def test_a_producer_has_one_stream_for_good() -> None:
    """EI-06: no call names another one."""
    calls = [name for name, each in vars(Producer).items() if name.startswith("put") and callable(each)]
    assert {"put", "put_record", "put_records", "put_many", "put_frame", "put_nowait", "put_and_wait"} == set(calls)
    for name in calls:
        assert not {"stream", "stream_arn"} & inspect.signature(getattr(Producer, name)).parameters.keys()


def test_the_arguments_of_a_record() -> None:
    """EI-13: names, order and defaults."""
    assert str(inspect.signature(Record)).startswith("(data: 'Any', partition_key: 'str', explicit_hash_key:")
    defaults = {name: each.default for name, each in inspect.signature(Record).parameters.items()}
    empty = inspect.Parameter.empty
    assert list(defaults.items()) == [
        ("data", empty),
        ("partition_key", empty),
        ("explicit_hash_key", None),
        ("prev_sequence_number", None),
        ("encoder", None),
    ]


# -- what is taken

TABLE = {"x3": "x4", "x5": 123}
DATA = [
    ("", b'""'),
    (None, b"null"),
    ("abc", b'"abc"'),
    (12345, b"12345"),
    (True, b"true"),
    ([], b"[]"),
    (["x1", "x2"], b'["x1","x2"]'),
    ({}, b"{}"),
    (TABLE, b'{"x3":"x4","x5":123}'),
    (b"", b""),
    (b"testString", b"testString"),
]


@pytest.mark.parametrize(("data", "stored"), DATA)
async def test_each_kind_of_data_is_stored(data: Any, stored: bytes) -> None:
    """EI-07, EI-14: testPutRecord and testPutBlobRecord."""
    async with Emulator({"imptestStream": 1}) as emulator, producer(emulator.url) as one:
        assert (await one.put_record(Record(data, "testPartitionKey"))).error_code is None
        [record] = emulator.stored("imptestStream")
    assert (record.data, record.partition_key) == (stored, "testPartitionKey")


@pytest.mark.parametrize(
    "group",
    [
        [""],
        [None, True],
        ["abc", 12345],
        [[], ["x1", "x2"], {}, TABLE],
        [b""],
        [b"testString", b""],
    ],
    ids=repr,
)
async def test_each_group_of_records_is_stored_in_order(group: list[Any]) -> None:
    """EI-08, EI-14: testPutRecords and testPutBlobRecords."""
    async with Emulator({"imptestStream": 1}) as emulator, producer(emulator.url) as one:
        failed, results = await one.put_records([Record(data, f"testPartitionKey{n}") for n, data in enumerate(group)])
        stored = {each.sequence_number: each.data for each in emulator.stored("imptestStream")}
        assert emulator.counters.operations["PutRecords"] == 1
    assert failed == 0
    assert [stored[result.sequence_number or ""] for result in results] == [
        each if isinstance(each, bytes) else json.dumps(each, separators=(",", ":")).encode() for each in group
    ]


async def test_explicit_hash_keys_choose_the_shard() -> None:
    """EI-17: testPutRecordWithExplicitHashKey and its twin for records; both keys are of the first shard."""
    async with Emulator({"imptestStream": 4}) as emulator, producer(emulator.url) as one:
        places = [
            (await one.put_record(Record("abc", "testPartitionKey1", "12345"))).shard_id,
            (await one.put_record(Record(TABLE, "testPartitionKey", "54321"))).shard_id,
        ]
        _, results = await one.put_records(
            [Record("abc", "testPartitionKey2", "12345"), Record(TABLE, "testPartitionKey", "54321")]
        )
        await one.put_record(Record(12345, "testPartitionKey3"))
    assert places == [result.shard_id for result in results] == ["shardId-000000000000"] * 2


async def test_each_record_is_behind_the_one_before() -> None:
    """EI-18: testPutRecordWithPrevSequenceNumber, a chain of three, the last one with an explicit hash key."""
    async with Emulator({"imptestStream": 1}) as emulator, producer(emulator.url) as one:
        first = await one.put_record(Record("x1", "testPartitionKey1"))
        second = await one.put_record(Record("x2", "testPartitionKey2", None, first.sequence_number))
        third = await one.put_record(Record("x3", "testPartitionKey3", "12345", second.sequence_number))
        assert [each.data for each in emulator.stored("imptestStream")] == [b'"x1"', b'"x2"', b'"x3"']
    numbers = [int(each.sequence_number or 0) for each in (first, second, third)]
    assert numbers == sorted(set(numbers))
