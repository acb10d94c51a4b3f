"""Keys made from what a message holds: the same for what comes again, in another process and on another machine."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastkin
from consumer.rig import told
from fastkin import LibraryError, RecordError, encode_frame
from fastkin._codec import (
    DROPPED,
    SPOOLED,
    Budget,
    CallbackSettler,
    FormatSink,
    KeyPlan,
    PayloadFormat,
    Seen,
    Shape,
    ShardTable,
    content_key,
    read_records,
)
from fastkin.formats.event import Enricher
from fastkin.formats.table import FORMATS
from support import content_oracle
from support.codec_rig import Rig, stored

CONTENT = KeyPlan("content")
TOPIC = "/devices/7/event"
EVENT = b'{"eventType":"start","timestamp":"2021-02-03T04:05:06Z","homeId":12,"eventData":{}}'


def entries(rig: Rig) -> list[tuple[bytes, str | None]]:
    return [(data, key) for call in rig.store() for data, key, _ in call]


def offered(payload: bytes, form: PayloadFormat | str = "raw", shape: Shape | None = None, **options: Any) -> Any:
    """What one message becomes: (data, key) of each entry."""
    rig = Rig(key=CONTENT, **options)
    assert FormatSink(rig.batcher, form, shape).offer(TOPIC.encode(), payload, 1) > 0
    return entries(rig)


@pytest.mark.parametrize(
    ("payload", "topic", "index", "key"),
    [
        (b"", "", 0, "42f1f393-6907-8f2a-bfe6-b639387b4d1c"),
        (b"abc", "t", 0, "fd458fd1-7ffe-8805-a879-49c1001b418c"),
        (b"abc", "t", 1, "04541253-5bf5-841a-92ea-5fd9c349ffdb"),
    ],
)  # fmt: skip
def test_keys_never_change(payload: bytes, topic: str, index: int, key: str) -> None:
    """Golden: a record that is sent again by the next release must be known again."""
    assert content_key(payload, topic, index) == key
    assert fastkin.content_key(payload, topic, index=index) == key
    assert (uuid.UUID(key).version, uuid.UUID(key).variant) == (8, uuid.RFC_4122)


@pytest.mark.parametrize("length", [*range(36), 151, 152, 900, 955, 956, 975, 976, 977, 1007, 1008, 1009, 2016, 5000])
def test_the_digest_as_it_is_defined(length: int) -> None:
    """At each length of a last piece, around what there are keys for, and chained."""
    payload = random.Random(length).randbytes(length)
    for topic in ("", "a", TOPIC, "ä" * 700):
        for index in (0, 1, 2**64 - 1):
            assert content_key(payload, topic, index) == content_oracle.content_key(payload, topic, index)


@given(st.binary(max_size=80), st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(0, 99))
def test_one_change_is_another_key(payload: bytes, topic: str, index: int) -> None:
    key = content_key(payload, topic, index)
    assert key == content_key(bytearray(payload), topic, index)
    others = [(payload + b"\0", topic, index), (payload, topic + "\0", index), (payload, topic, index + 1)]
    others += [(payload[:n] + bytes([payload[n] ^ 1]) + payload[n + 1 :], topic, index) for n in range(len(payload))]
    assert len({key, *(content_key(*other) for other in others)}) == len(others) + 1


def test_what_is_topic_and_what_is_payload_counts() -> None:
    assert content_key(b"bc", "a") != content_key(b"c", "ab")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("text",), "data must be contiguous bytes"),
        ((b"", b"t"), "a topic is text, not bytes"),
        ((b"", "\ud800"), "lone surrogate"),
        ((b"", "t", -1), "from 0 to 2\\^64-1"),
        ((b"", "t", 2**64), "from 0 to 2\\^64-1"),
        ((b"", "t", 10**5000), "from 0 to 2\\^64-1"),  # which Python refuses to write
        ((b"", "t", True), "from 0 to 2\\^64-1"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(LibraryError, match=words):
        content_key(*arguments)


@pytest.mark.parametrize("shards", [2, 7, 64])
@pytest.mark.parametrize(
    "key_of",
    [
        lambda n: content_key(b'{"machine":7,"n":%d}' % n, TOPIC),
        lambda n: content_key(b"0", f"/devices/{n}/event"),
        lambda n: content_key(b"a frame", TOPIC, n),
        lambda n: content_key(n.to_bytes(8, "big")),
    ],
    ids=["payloads", "topics", "places", "counters"],
)
def test_they_spread_over_shards(shards: int, key_of: Any) -> None:
    """Chi-square over ranges of MD5, which is how Kinesis chooses a shard: no worse than five sigma."""
    count = 20_000
    found = [0] * shards
    for n in range(count):
        found[hashlib.md5(key_of(n).encode()).digest()[0] * shards >> 8] += 1
    # 256 first bytes fall unevenly to 7 shards
    shares = [sum(byte * shards >> 8 == shard for byte in range(256)) / 256 for shard in range(shards)]
    chi = sum((got - count * share) ** 2 / (count * share) for got, share in zip(found, shares, strict=True))
    assert chi < shards - 1 + 5 * (2 * (shards - 1)) ** 0.5


def test_a_raw_record() -> None:
    assert offered(b"reading") == [(b"reading", content_key(b"reading", TOPIC))]


def test_each_record_of_a_frame_has_its_own() -> None:
    frame = encode_frame([b"5", b"5", b"6"])
    keys = [content_key(frame, TOPIC, index) for index in range(3)]
    assert offered(frame, "bulk") == list(zip([b"5", b"5", b"6"], keys, strict=True))
    assert len(set(keys)) == 3


def test_a_record_too_large_keeps_the_others_keys() -> None:
    """Their places in the frame, whatever became of those before."""
    frame = encode_frame([b"a", b"x" * 100, b"b"])
    made = offered(frame, "bulk", max_record_bytes=50)
    assert made == [(b"a", content_key(frame, TOPIC, 0)), (b"b", content_key(frame, TOPIC, 2))]


@pytest.mark.parametrize("name", ["event", "msgpack"])
def test_formats_in_python(name: str) -> None:
    payload = EVENT if name == "event" else b"\x81\xa1a\x01"
    ((data, key),) = offered(payload, FORMATS[name])
    assert json.loads(data) == json.loads(EVENT if name == "event" else b'{"a":1}')
    assert key == content_key(payload, TOPIC)


def test_a_time_or_a_host_in_what_is_stored_changes_no_key() -> None:
    """The message as it came counts: a redelivery meets another clock, and perhaps another machine."""
    form = FORMATS["event"]
    enriching = PayloadFormat(form.name, form.number, form.doc, Enricher(()).records, topic=True)
    bare = b'{"eventType":"start","homeId":12}'
    made = [
        offered(bare, enriching),
        offered(bare, enriching, Shape(envelope="a")),
        offered(bare, "raw", Shape(envelope="b")),
    ]
    assert {key for ((_, key),) in made} == {content_key(bare, TOPIC)}
    assert len({data for ((data, _),) in made}) == 3


def test_events_that_are_left_out() -> None:
    """Places count among what is stored."""
    frame = encode_frame([b'{"eventType":"a"}', b'{"eventType":"b"}', b'{"eventType":"b","n":1}'])
    made = offered(frame, "bulk", Shape(events=("b",)))
    assert [key for _, key in made] == [content_key(frame, TOPIC, 0), content_key(frame, TOPIC, 1)]


def test_what_did_not_fit_has_the_same_key_when_it_is_offered_again() -> None:
    budget = Budget(600, 100)
    rig = Rig(key=CONTENT, budget=budget)
    assert rig.batcher.offer(b"t", b"x" * 200, 1) == 1
    assert rig.batcher.offer(b"t", b"y" * 200, 2) == -1
    first = entries(rig)
    assert rig.batcher.offer(b"t", b"y" * 200, 2) == 1
    assert [*first, *entries(rig)] == [(text * 200, content_key(text * 200, "t")) for text in (b"x", b"y")]


def test_what_a_program_puts_has_no_topic() -> None:
    rig = Rig(key=CONTENT)
    receipts: list[Any] = [rig.batcher.put(b"a"), rig.batcher.put(b"a", "its own"), rig.batcher.put(b"a", None, "7")]
    frame = encode_frame([b"a", b"b"])
    receipts.append(rig.batcher.put_frame(frame))
    assert [key for _, key in entries(rig)] == [
        content_key(b"a"), "its own", content_key(b"a"), content_key(frame), content_key(frame, index=1),
    ]  # fmt: skip
    assert all(receipt.done() for receipt in receipts)
    with pytest.raises(RecordError, match="the limit is"):
        Rig(key=CONTENT, max_record_bytes=40).batcher.put(b"12345")


@pytest.mark.parametrize("options", [{"aggregate_bytes": 1000}, {"line_bytes": 1000}])
def test_an_aggregate_holds_records_of_one_message(options: Any) -> None:
    """So that it is the same when the message comes again, in whatever company."""
    rig = Rig(key=CONTENT, frame="bulk", **options)
    frames = [encode_frame([b"1", b"2"]), encode_frame([b"3", b"4", b"5"])]
    for n, frame in enumerate(frames):
        assert rig.batcher.offer(b"t", frame, n + 1) > 0
    found = entries(rig)
    assert [key for _, key in found] == [content_key(frame, "t") for frame in frames]
    again = Rig(key=CONTENT, frame="bulk", **options)
    again.batcher.offer(b"t", frames[1], 9)
    again.batcher.offer(b"t", frames[1], 10)  # an equal message is another one
    assert entries(again) == [found[1]] * 2


def test_the_aggregates_of_a_long_frame_have_keys_of_their_own() -> None:
    """Else equal readings at equal places would be taken for one that was sent twice."""
    frame = encode_frame([b"equal reading"] * 100)
    made = offered(frame, "bulk", aggregate_bytes=300)
    assert len(made) > 5
    seen, index = Seen(1000), 0
    records: list[Any] = []
    for data, key in made:
        assert key == content_key(frame, TOPIC, index)
        inside = read_records([told(data, key)], None, True, False)
        index += len(inside)
        records += inside
    assert index == 100
    assert all(seen.is_new(record) for record in records)
    assert not any(seen.is_new(record) for record in records)


def test_lines_that_can_be_none_go_alone_with_their_own_key() -> None:
    frame = encode_frame([b"1", b"no json", b"2", b"3"])
    made = offered(frame, "bulk", line_bytes=1000)
    assert made == [
        (b"1", content_key(frame, TOPIC, 0)),
        (b"no json", content_key(frame, TOPIC, 1)),
        (b"2\n3", content_key(frame, TOPIC, 2)),
    ]


def test_a_retry_and_the_disk_change_no_key() -> None:
    rows = CallbackSettler(lambda *_: None)
    rig = Rig(key=CONTENT, rows=rows)
    rig.batcher.shards = ShardTable([2**128 - 1])
    rig.batcher.offer(b"t", b"a", 1)
    (batch,) = rig.drain()
    assert batch.shard_load() == {-1: (1, 37)}  # evenly spread: nobody asks MD5
    body, counts = bytes(batch), batch.counts
    batch.finish(SPOOLED)
    again = rig.batcher.restore(body, counts, 9)
    assert again.shard_load() == {-1: (1, 37)}
    assert again.entries() == [(b"a", content_key(b"a", "t"), None)]
    assert again.settle(stored(1)) == []


def test_a_plan_renders_it() -> None:
    assert CONTENT.render(b"t", b"abc") == content_key(b"abc", "t")
    with pytest.raises(LibraryError, match="'content' has no parts"):
        KeyPlan("content", [("topic", None)])


def test_it_costs_the_size_of_a_uuid() -> None:
    rig = Rig(key=CONTENT, max_record_bytes=40)
    assert rig.batcher.offer(b"t", b"1234", 1) == 1
    assert [len(batch) for batch in rig.drain()] == [1]
    assert rig.batcher.offer(b"t", b"12345", 2) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.payload) == ("oversize", b"12345")
    rig.batcher.settle_reject(reject, DROPPED)
