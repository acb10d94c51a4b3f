"""Where reading begins: what is wrong is refused before anything is sent."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from consumer.rig import consumer
from fastkin import LibraryError, Position, ShardIteratorType
from fastkin.emulator import Emulator

NOT_SENT = [  # the wrong types and options of the reference system's own tests: (type, options)
    (None, {}),
    ("", {}),
    ("abc", {}),
    ({"test": "test"}, {}),
    ("AT_SEQUENCE_NUMBER", None),
    ("AT_SEQUENCE_NUMBER", {}),
    ("AT_SEQUENCE_NUMBER", {"timestamp": "1459799926.480"}),
    ("AFTER_SEQUENCE_NUMBER", None),
    ("AFTER_SEQUENCE_NUMBER", {}),
    ("AFTER_SEQUENCE_NUMBER", {"timestamp": "1459799926.480"}),
    ("AT_TIMESTAMP", None),
    ("AT_TIMESTAMP", {}),
    ("AT_TIMESTAMP", {"starting_sequence_number": "12345"}),
]
# left out there; here None says the same
EXPLICIT = {"starting_sequence_number": None, "timestamp": None}


@pytest.mark.parametrize(("kind", "options"), NOT_SENT)
async def test_the_iterator_matrix_is_refused_before_anything_is_sent(kind: Any, options: Any) -> None:
    """EI-25: each of the thirteen cases."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        with pytest.raises(LibraryError):
            await one.get_shard_iterator("testShardId", kind, **(EXPLICIT if options is None else options))
        assert emulator.counters.calls == 0


def test_the_matrix_has_thirteen_cases() -> None:
    """EI-25."""
    assert len(NOT_SENT) == 13


@pytest.mark.parametrize("shard", [None, ""])
async def test_an_iterator_needs_a_shard(shard: Any) -> None:
    """EI-25: the reference system's two cases of a wrong shard."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        with pytest.raises(LibraryError, match="Non empty argument required: shard_id"):
            await one.get_shard_iterator(shard, "LATEST")
        assert emulator.counters.calls == 0


@pytest.mark.parametrize(
    ("iterator", "limit"), [(None, None), ({}, None), (None, 10), ("", None), ("x", 0), ("x", 10_001), ("x", True)]
)
async def test_get_records_needs_an_iterator_and_a_limit_that_may_be(iterator: Any, limit: Any) -> None:
    """EI-27: the reference system's wrong options, and limits that no call takes."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        with pytest.raises(LibraryError):
            await one.get_records(iterator, limit)
        assert emulator.counters.calls == 0


def test_there_are_five_kinds() -> None:
    """EI-25."""
    assert set(ShardIteratorType) == {
        "AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER", "AT_TIMESTAMP", "TRIM_HORIZON", "LATEST",
    }  # fmt: skip


@pytest.mark.parametrize(
    "moment",
    [
        1_764_000_000,
        1_764_000_000.0,
        datetime(2025, 11, 24, 16, tzinfo=UTC),
        datetime(2025, 11, 24, 17, tzinfo=timezone(timedelta(hours=1))),
        datetime(2025, 11, 24, 16),  # noqa: DTZ001 - without a zone it is UTC
    ],
)
def test_a_time_is_seconds_or_a_datetime(moment: float | datetime) -> None:
    position = Position(ShardIteratorType.AT_TIMESTAMP, timestamp=moment)
    assert position.members() == {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": 1_764_000_000}


@pytest.mark.parametrize("moment", [True, -1, float("nan"), float("inf"), "1764000000", 2**40])
def test_what_is_no_time(moment: Any) -> None:
    with pytest.raises(LibraryError, match="AT_TIMESTAMP needs one, seconds since 1970 or a datetime"):
        Position(ShardIteratorType.AT_TIMESTAMP, timestamp=moment)


@pytest.mark.parametrize("number", [5, "", "-1", "1.5", "0x1", "1 ", "01"])
def test_what_is_no_sequence_number(number: Any) -> None:
    with pytest.raises(LibraryError, match="AFTER_SEQUENCE_NUMBER needs one, a str of decimal digits"):
        Position(ShardIteratorType.AFTER_SEQUENCE_NUMBER, number)


def test_what_a_kind_does_not_take() -> None:
    with pytest.raises(LibraryError, match="timestamp: LATEST takes none"):
        Position(ShardIteratorType.LATEST, timestamp=5)
    with pytest.raises(LibraryError, match="starting_sequence_number: TRIM_HORIZON takes none"):
        Position(ShardIteratorType.TRIM_HORIZON, "5")


@pytest.mark.parametrize("text", ["yesterday", "", "AT_TIMESTAMP", "nan"])
def test_texts_that_are_no_position(text: str) -> None:
    with pytest.raises(LibraryError):
        Position.parse(text)


def test_a_place_in_one_shard_is_no_position_of_a_stream() -> None:
    with pytest.raises(LibraryError, match="is a place in one shard"):
        consumer("http://localhost:1").stream(Position(ShardIteratorType.AFTER_SEQUENCE_NUMBER, "5"))
    with pytest.raises(LibraryError, match="is no kind of iterator"):
        consumer("http://localhost:1").stream(None)  # type: ignore[arg-type]
