"""Aggregates taken apart and records decoded, by the compiled code: it agrees with the plain one in every case."""

from __future__ import annotations

import gc
import random
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumer.rig import aggregate, field, sealed, told, varint
from fastkin import ConsumerRecord, DataFormatError, decode_json, lambdas
from fastkin._codec import Reading, deaggregate, read_records
from fastkin.errors import UnexpectedResponse

LARGE = b"\xff" * 9 + b"\x03"  # a number of more than 64 bits


def agrees(data: bytes) -> list[tuple[str | None, bytes]]:
    found = deaggregate(data)
    assert found == lambdas.deaggregate(data)
    return found


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=300)), min_size=1, max_size=40))
def test_what_was_put_together_comes_apart(records: list[tuple[int, bytes]]) -> None:
    keys = ["a", "ü" * 40, ""]
    assert agrees(aggregate(records, keys)) == [(keys[index], data) for index, data in records]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        field(1, b"k"),  # no record
        field(3, field(1, 0) + field(3, b"d")),  # no key
        field(1, b"k") + field(3, field(1, 1) + field(3, b"d")),  # a key that is not there
        field(1, b"k") + field(3, field(1, 2**64 - 1) + field(3, b"d")),
        field(1, b"k") + field(3, b"\x08" + LARGE + field(3, b"d")),
        field(1, b"k") + field(3, field(3, b"d")),  # no index
        field(1, b"k") + field(3, field(1, 0)),  # no data
        field(1, b"k") + field(3, field(1, b"0") + field(3, b"d")),  # the index is bytes
        field(1, b"k") + field(3, field(1, 0) + field(3, 5)),  # the data is a number
        field(1, b"\xff") + field(3, field(1, 0) + field(3, b"d")),  # the key is no UTF-8
        field(1, b"k") + b"\x1a",  # cut
        field(1, b"k") + b"\x1a\x7f",
        field(1, b"k") + b"\x1a" + LARGE,
        field(1, b"k") + b"\x1a" + b"\xff" * 11,
        field(1, b"k") + field(3, field(1, 0) + field(3, b"d")) + b"\x0d1234",  # a type that protobuf has, and we not
        field(1, b"k") + field(3, field(1, 0) + field(3, b"d")) + b"\x80",
    ],
)
def test_what_is_no_aggregate_stays_as_it_is(message: bytes) -> None:
    data = sealed(message)
    assert agrees(data) == [(None, data)]


@pytest.mark.parametrize(
    ("message", "records"),
    [
        (field(3, field(1, 0) + field(3, b"d")) + field(1, b"late"), [("late", b"d")]),
        (field(1, b"k") + field(3, field(3, b"x") + field(3, b"d") + field(1, 7) + field(1, 0)), [("k", b"d")]),
        (field(1, b"k") + field(2, b"5") + field(3, field(1, 0) + field(2, 0) + field(3, b"d") + field(4, b"tag")),
         [("k", b"d")]),
        (field(1, 5) + field(1, b"k") + field(3, 6) + field(9, 9) + field(3, field(1, 0) + field(3, b"")),
         [("k", b"")]),
        (LARGE + b"\x05" + field(1, b"k") + field(3, field(1, 0) + field(3, b"d")), None),
    ],
)  # fmt: skip
def test_odd_aggregates_are_read_as_protobuf_says(message: bytes, records: Any) -> None:
    data = sealed(message)
    found = agrees(data)
    if records is not None:
        assert found == records


def test_magic_alone_is_not_enough() -> None:
    whole = aggregate([(0, b"d")], ["k"])
    for data in (whole[:20], whole[:-1], whole + b"x", b"\x00" + whole[1:], whole[:-1] + bytes([whole[-1] ^ 1])):
        assert agrees(data) == [(None, data)]


@given(st.binary(max_size=60), st.randoms(use_true_random=False))
@example(b"", random.Random(0))
def test_any_message_is_read_alike(noise: bytes, chance: random.Random) -> None:
    agrees(sealed(noise))
    good = bytearray(aggregate([(0, b"abc"), (1, b"d" * 200)], ["k", "l"])[4:-16])
    for _ in range(3):
        good[chance.randrange(len(good))] = chance.randrange(256)
    agrees(sealed(bytes(good)))
    agrees(sealed(bytes(good[: chance.randrange(len(good))])))


@given(st.integers(0, 2**64 - 1))
def test_numbers_of_every_length(value: int) -> None:
    agrees(sealed(field(1, b"k") + varint(5 << 3) + varint(value) + field(3, field(1, 0) + field(3, b"d"))))


@pytest.mark.parametrize(
    ("data", "offset"), [(b"", 0), (b"x", 0), (b'{"a":}', 5), ('{"é":}'.encode(), 6), (b'"\xff"', 0), (b"[1", 2)]
)
def test_no_json_tells_the_byte(data: bytes, offset: int) -> None:
    with pytest.raises(DataFormatError, match="no JSON") as refused:
        decode_json(data)
    assert refused.value.offset == offset


def test_a_record_shows_what_it_is_and_no_payload() -> None:
    [plain] = read_records([told(b'{"secret":1}')], "shard", False, False)
    assert repr(plain) == "ConsumerRecord(shard_id='shard', sequence_number='7', partition_key='k', 12 bytes)"
    [_, second] = read_records([told(aggregate([(0, b"1"), (0, b"x")], ["k"]))], "shard", False, False)
    assert "subsequence_number=1" in repr(second)
    assert "error=DataFormatError" in repr(second)
    with pytest.raises(TypeError, match="made by a Consumer"):
        ConsumerRecord()


def test_records_leave_nothing_behind() -> None:
    batch = [told(aggregate([(0, b"[1]"), (0, b"x")], ["k"]))]
    for _ in range(3):
        read_records(batch, "shard", False, False)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(200):
        read_records(batch, "shard", False, False)
    gc.collect()
    assert len(gc.get_objects()) - before < 20


def test_a_wrong_record_costs_no_error_until_somebody_asks() -> None:
    """A stranger's aggregate of six bytes a record: at most 100 bytes each beside the record itself."""
    count = 20_000
    answer = [told(aggregate([(0, b"")] * count, ["k"]))]
    read_records(answer, "shard", False, False)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        records = read_records(answer, "shard", False, False)
        each = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert len(records) == count
    assert each <= sys.getsizeof(records[0]) + 100


def test_an_error_is_made_once_and_tells_the_byte() -> None:
    [record] = read_records([told(b'{"a":}')], "shard", False, False)
    error = record.error
    assert isinstance(error, DataFormatError)
    assert (error.offset, error.__traceback__, error.__context__) == (5, None, None)
    assert record.error is error
    assert record.data is None


def mixed() -> list[dict[str, Any]]:
    return [
        told(aggregate([(0, b"1"), (0, b"x"), (0, b"3"), (0, b"4")], ["k"]), sequence="1"),
        told(b"5", sequence="2"),
        told(aggregate([(0, b"6"), (0, b"")], ["k"]), sequence="3"),
    ]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6, 7, 8])
def test_portions_are_the_whole(most: int) -> None:
    reading = Reading(mixed(), "shard", False, False)
    taken = []
    while reading.more:
        portion = reading.take(most)
        assert len(portion) == min(most, 7 - len(taken))
        taken += portion
    assert [(one.raw, one.sequence_number, one.subsequence_number) for one in taken] == [
        (b"1", "1", 0), (b"x", "1", 1), (b"3", "1", 2), (b"4", "1", 3), (b"5", "2", None), (b"6", "3", 0),
        (b"", "3", 1),
    ]  # fmt: skip
    assert reading.take(most) == []
    assert reading.wrong == 2
    assert reading.first_wrong is taken[1]


def test_an_answer_is_looked_at_before_any_record_is_taken() -> None:
    with pytest.raises(UnexpectedResponse, match="a record of GetRecords"):
        Reading([*mixed(), told(b"8") | {"SequenceNumber": 8}], "shard", False, False)
