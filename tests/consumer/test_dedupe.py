"""What was sent twice is seen once, and what only looks alike is seen as often as it is there."""

from __future__ import annotations

import uuid
from collections import Counter, OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastkin
from consumer.rig import aggregate, consumer, put, take, told
from fastkin import LibraryError
from fastkin._codec import Seen, deaggregate, read_records
from fastkin.emulator import Emulator
from support.servers import ACCESS_KEY, SECRET_KEY

KEYS = [str(uuid.UUID(int=n, version=4)) for n in range(8)]


def record(data: bytes, key: str | None) -> Any:
    [one] = read_records([told(data, key)], None, True, True)
    return one


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3))), st.integers(1, 12))
def test_the_last_so_many_are_known(sent: list[tuple[int, int]], most: int) -> None:
    """Against an ordered dict of the last distinct ones."""
    seen, model = Seen(most), OrderedDict[tuple[int, int], None]()
    for key, data in sent:
        expected = (key, data) not in model
        if expected:
            model[key, data] = None
            if len(model) > most:
                model.popitem(last=False)
        assert seen.is_new(record(b"%d" % data, KEYS[key])) is expected
        assert len(seen) == len(model)


def test_an_equal_key_alone_makes_no_duplicate() -> None:
    """Whoever chooses payloads can make two of one key on purpose: the data is compared, too."""
    seen = Seen(10)
    assert [seen.is_new(record(data, KEYS[0])) for data in (b"one", b"two", b"one")] == [True, True, False]


def test_many_more_than_it_holds() -> None:
    seen = Seen(1000)
    records = [record(b"%d" % n, str(uuid.uuid4())) for n in range(5000)]
    assert all(map(seen.is_new, records))
    assert [seen.is_new(one) for one in records[4000:]] == [False] * 1000
    assert (seen.duplicates, len(seen)) == (1000, 1000)
    assert seen.is_new(records[3999])


@pytest.mark.parametrize(
    "key", ["machine-7", None, "", KEYS[0][:-1], KEYS[0] + "0", KEYS[0].replace("-", "x"), "g" + KEYS[0][1:]]
)
def test_a_key_that_is_no_uuid_makes_nothing_a_duplicate(key: str | None) -> None:
    seen = Seen(10)
    assert [seen.is_new(record(b"equal reading", key)) for _ in range(3)] == [True] * 3
    assert (seen.duplicates, seen.unknown, len(seen)) == (0, 3, 0)


def test_the_place_in_an_aggregate_tells_equal_readings_apart() -> None:
    whole = aggregate([(0, b"5"), (0, b"5"), (0, b"5")], [KEYS[0]])
    seen = Seen(10)
    once = read_records([told(whole)], None, True, False)
    assert [seen.is_new(one) for one in once] == [True] * 3
    assert [seen.is_new(one) for one in once] == [False] * 3
    assert seen.is_new(record(b"5", KEYS[0]))  # alone it is another one


@pytest.mark.parametrize("most", [0, -1, 2**31])
def test_how_many_may_be_remembered(most: int) -> None:
    with pytest.raises((LibraryError, OverflowError)):
        Seen(most)


@pytest.mark.parametrize("how", ["topic", "static:x", "field:a", "none", "", None])
def test_it_is_refused_where_keys_do_not_tell_records_apart(how: Any) -> None:
    with pytest.raises(LibraryError, match='give "uuid" or "content"'):
        consumer("http://localhost:1", dedupe=10, partition_key=how)
    consumer("http://localhost:1", partition_key=how)  # without it no matter


@pytest.mark.parametrize("how", ["uuid", "content"])
async def test_what_was_sent_twice_is_handed_out_once(how: str) -> None:
    async with Emulator({"s": 2}) as emulator:
        for _ in range(3):
            for key in KEYS[:4]:
                await put(emulator.url, [b"1", b"2"], key=key)
        async with consumer(emulator.url, dedupe=100, partition_key=how) as one:
            await put(emulator.url, [b'"end"'], key=KEYS[5])
            await put(emulator.url, [b'"end"'], key=KEYS[6])
            await put(emulator.url, [b'"end"'], key=KEYS[7])
            records = await take(one, 11)
            assert Counter(record.data for record in records) == {1: 4, 2: 4, "end": 3}
            assert one.stats()["records"] == 11
            assert one.stats()["duplicates"] <= 16  # those behind the last one were not read


async def test_keys_that_do_not_tell_are_said_once_and_everything_is_handed_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b"1"] * 4, key="machine")
        async with consumer(emulator.url, dedupe=100, limit=2) as one:
            records = one.stream("trim_horizon")
            for _ in range(4):
                assert (await anext(records)).data == 1
            await records.aclose()
    lines = [line.getMessage() for line in caplog.records if "dedupe" in line.getMessage()]
    assert len(lines) == 1
    assert "write with partition_key uuid or content" in lines[0]


@pytest.mark.parametrize("aggregate_bytes", [0, 2000])
async def test_what_fastkin_had_to_send_twice_is_seen_once(aggregate_bytes: int) -> None:
    """Answers are lost after Kinesis stored the records: the same bytes go again, and equal readings stay as many."""
    payloads = [b'{"reading":%d}' % (n % 7) for n in range(600)]
    async with Emulator({"s": 2}, limits=False) as emulator:
        cut = emulator.faults.cut("after", times=3, operation="PutRecords")
        keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        writing = fastkin.Producer(
            "s", region="us-east-1", endpoint_url=emulator.url, aggregate_bytes=aggregate_bytes, max_records=100, **keys
        )
        async with writing as producer:
            for payload in payloads:
                await producer.put(payload)
        assert cut.hits == 3
        async with consumer(emulator.url, dedupe=10_000) as one:
            everything = await take(consumer(emulator.url), _inner(emulator))
            assert len(everything) > 600
            found = await take(one, 600)
    assert Counter(record.raw for record in found) == Counter(payloads)


def _inner(emulator: Emulator) -> int:
    return sum(len(deaggregate(record.data)) for record in emulator.stored("s"))
