"""What records become before they are stored: the topic in a JSON object, a separator behind."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkin import encode_frame
from fastkin._codec import DEAD, Budget, FormatSink, KeyPlan, PayloadFormat, Shape
from fastkin.errors import DataFormatError, LibraryError
from fastkin.formats.table import FORMATS
from support.codec_rig import Rig

RAW, BULK = FORMATS["raw"], FORMATS["bulk"]
TOPIC = Shape(topic_field="topic")


def shaped(shape: Shape, payload: bytes, topic: bytes = b"t", form: PayloadFormat = RAW) -> list[bytes]:
    return shape.records(topic, form, payload)


def test_the_readme_sample_of_the_iot_pipeline_is_stored_byte_for_byte() -> None:
    """IC-05."""
    rig = Rig()
    sink = FormatSink(rig.batcher, "raw", TOPIC)
    assert sink.offer(b"iot-test-topic/asdasd", b'{"message":"Hello, world!"}', 1) == 1
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b'{"topic":"iot-test-topic/asdasd","message":"Hello, world!"}']
    rig.settled()


@pytest.mark.parametrize(
    ("payload", "stored"),
    [
        (b"{}", b'{"topic":"t"}'),
        (b" { } ", b' {"topic":"t" } '),
        (b'{ "a" : 1 }', b'{"topic":"t", "a" : 1 }'),
        (b'{"a":{"topic":1}}', b'{"topic":"t","a":{"topic":1}}'),  # another object's member is no clash
        (b'{"a":"topic"}', b'{"topic":"t","a":"topic"}'),
        (b'{"a":1,"a":2}', b'{"topic":"t","a":1,"a":2}'),  # the rest is nobody's affair
    ],
)
def test_the_topic_stands_first_and_the_rest_is_unchanged(payload: bytes, stored: bytes) -> None:
    assert shaped(TOPIC, payload) == [stored]


@pytest.mark.parametrize("topic", ['a"b', "a\\b", "a\nb", "ä/ö", "\U0001f600", ""])
def test_a_topic_is_written_as_json(topic: str) -> None:
    (data,) = shaped(TOPIC, b'{"a":1}', topic.encode())
    assert json.loads(data) == {"topic": topic, "a": 1}


def test_the_name_of_the_member_is_written_as_json() -> None:
    (data,) = shaped(Shape(topic_field='the "topic"'), b"{}")
    assert json.loads(data) == {'the "topic"': "t"}


@pytest.mark.parametrize(
    ("payload", "stored"),
    [
        (b'{"topic":1}', b'{"topic":"t"}'),
        (b'{"topic":1,"a":2}', b'{"topic":"t","a":2}'),
        (b'{"a":2,"topic":[1,{"topic":3}]}', b'{"topic":"t","a":2}'),
        (b'{"a":2, "topic" : null , "b":3 }\n', b'{"topic":"t","a":2, "b":3 }\n'),
        (b'{"topic":1,"t\\u006fpic":2,"a":3}', b'{"topic":"t","a":3}'),  # twice, once in disguise
    ],
)
def test_a_member_of_that_name_is_replaced(payload: bytes, stored: bytes) -> None:
    assert shaped(TOPIC, payload) == [stored]


def test_a_member_of_that_name_is_kept_where_the_settings_say_so() -> None:
    shape = Shape(topic_field="topic", topic_clash="keep")
    assert shaped(shape, b'{"a":1,"topic":"mine"}') == [b'{"a":1,"topic":"mine"}']
    assert shaped(shape, b'{"a":1}') == [b'{"topic":"t","a":1}']


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["topic", "a", "topi", "topicc", "Topic", ""]) | st.text(max_size=6)


@given(st.dictionaries(NAMES, VALUES, max_size=5), st.booleans(), st.sampled_from([None, 1]))
def test_any_object_reads_as_itself_with_the_topic_first(
    value: dict[str, Any], plain: bool, indent: int | None
) -> None:
    """Against Python's own reader, escapes and white space included."""
    payload = json.dumps(value, ensure_ascii=plain, indent=indent).encode("utf-8", "surrogatepass")
    (data,) = shaped(TOPIC, payload)
    rest = {name: each for name, each in value.items() if name != "topic"}
    assert list(json.loads(data).items()) == [("topic", "t"), *rest.items()]
    if "topic" not in value:
        assert data == payload.replace(b"{", b'{"topic":"t"' + (b"," if value else b""), 1)


@given(st.binary(max_size=60))
def test_any_bytes_pass_or_are_an_object_with_the_topic(payload: bytes) -> None:
    (data,) = shaped(TOPIC, payload)
    assert data == payload or data.lstrip(b" \t\r\n").startswith(b'{"topic":"t"')


NO_OBJECTS = [b"", b"12", b"[1]", b'"a"', b"\xff\x00", b"{", b'{"a"}', b'{"a":1,}', b'{"a":1}x', b"{1:2}",
              b'{"a":1 "b":2}', b"[" * 70 + b"]" * 70, b'{"a":' * 70 + b"1" + b"}" * 70]  # fmt: skip


@pytest.mark.parametrize("payload", NO_OBJECTS)
def test_what_is_no_object_passes_is_wrapped_or_refused(payload: bytes) -> None:
    """IC-05: a payload that is no JSON object, and each way to treat it."""
    assert shaped(TOPIC, payload) == [payload]
    (data,) = shaped(Shape(topic_field="topic", topic_others="wrap"), payload)
    assert data == b'{"topic":"t","payload":"' + base64.b64encode(payload) + b'"}'
    with pytest.raises(DataFormatError, match="no JSON object"):
        shaped(Shape(topic_field="topic", topic_others="reject"), payload)


@pytest.mark.parametrize(
    ("shape", "bad", "reason"),
    [
        (Shape(topic_field="topic", topic_others="reject"), b"no", "topic_field: a record is no JSON object"),
        (
            Shape(topic_field="n", topic_clash="reject"),
            b'{"n":1}',
            "topic_field: the record has a member 'n' of its own",
        ),
    ],
)
def test_one_record_that_is_refused_costs_the_whole_frame(shape: Shape, bad: bytes, reason: str) -> None:
    rig = Rig()
    frame = encode_frame([b'{"a":1}', bad])
    assert FormatSink(rig.batcher, "bulk", shape).offer(b"t", frame, 3) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.reason, reject.index, reject.payload) == ("topic_field", reason, None, frame)
    assert reject.offset == frame.index(bad)
    rig.batcher.settle_reject(reject, DEAD)
    assert rig.batcher.stored == 0
    rig.settled()


@pytest.mark.parametrize("separator", [",", "\t", "\n", "\r\n"])
def test_a_separator_follows_each_record_whatever_it_is(separator: str) -> None:
    """IC-06."""
    shape = Shape(separator=separator)
    end = separator.encode()
    assert shaped(shape, b"\xff", form=RAW) == [b"\xff" + end]
    assert shaped(shape, encode_frame([b"a", b"", b"c"]), form=BULK) == [b"a" + end, end, b"c" + end]
    assert shaped(Shape(topic_field="topic", separator=separator), b"{}") == [b'{"topic":"t"}' + end]


def test_a_separator_counts_into_the_size_of_a_record() -> None:
    """IC-06: with a key of 36 bytes and a limit of 50, 13 bytes and a line feed fit, and 14 do not."""
    rig = Rig(max_record_bytes=50)
    sink = FormatSink(rig.batcher, "raw", Shape(separator="\n"))
    assert sink.offer(b"t", b"x" * 13, 1) == 1
    assert sink.offer(b"t", b"y" * 14, 2) == 1
    (reject,) = rig.batcher.take_rejects()
    # as it would have been stored: replayed, it is a record and gets no second separator
    assert (reject.kind, reject.payload, reject.index, reject.token) == ("oversize", b"y" * 14 + b"\n", 0, 2)
    rig.batcher.settle_reject(reject, DEAD)
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b"x" * 13 + b"\n"]
    rig.settled()


def test_a_key_can_be_made_of_the_topic_that_was_put_in() -> None:
    rig = Rig(key=KeyPlan("parts", [("field", ("topic",))]))
    FormatSink(rig.batcher, "bulk", TOPIC).offer(b"a/b", encode_frame([b"{}", b'{"n":1}']), 1)
    (call,) = rig.store()
    assert [(data, key) for data, key, _ in call] == [(b'{"topic":"a/b"}', "a/b"), (b'{"topic":"a/b","n":1}', "a/b")]
    rig.settled()


def test_records_of_a_format_in_python_are_shaped() -> None:
    words = PayloadFormat("words", 99, "each word is a record", bytes.split)
    rig = Rig(frame=words)
    assert FormatSink(rig.batcher, words, Shape(separator=",")).offer(b"t", b"a b", 1) == 2
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b"a,", b"b,"]
    rig.settled()


def test_without_room_the_same_payload_is_offered_again() -> None:
    rig = Rig(budget=Budget(4096, 1))
    sink = FormatSink(rig.batcher, "raw", TOPIC)
    assert sink.offer(b"t", b'{"a":1}', 1) == 1
    assert sink.offer(b"t", b'{"a":2}', 2) == -1
    assert rig.batcher.received == 1
    rig.store()
    assert sink.offer(b"t", b'{"a":2}', 2) == 1
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b'{"topic":"t","a":2}']
    rig.settled()


def test_a_long_topic_in_a_frame_of_many_records_is_no_way_to_fill_memory() -> None:
    """900,000 records of 2 bytes would become 60 GB with a topic of 64 KiB in each."""
    rig = Rig(budget=Budget(1 << 20, 1 << 20))
    frame = encode_frame([b"{}"] * 900_000)
    assert FormatSink(rig.batcher, "bulk", TOPIC).offer(b"t" * 65_000, frame, 1) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.index) == ("records", None)
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


def test_an_empty_frame_stays_empty() -> None:
    assert FormatSink(Rig().batcher, "bulk", Shape(separator="\n")).offer(b"t", encode_frame([]), 1) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topic_clash": "x"}, "topic_clash is one of replace, keep, reject, not 'x'"),
        ({"topic_others": "x"}, "topic_others is one of pass, wrap, reject, not 'x'"),
        ({"topic_field": "x" * 1025}, "topic_field has 1025 bytes, at most 1024"),
    ],
)
def test_a_shape_that_is_none_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LibraryError) as refused:
        Shape(**arguments)
    assert str(refused.value) == message


# --- events ---

EVENTS = Shape(events=["start", "stöp", 'a"b'])


def test_events_of_other_types_are_acknowledged_and_counted_as_filtered() -> None:
    """MD-02: what is wanted is stored byte for byte (MD-15)."""
    rig = Rig()
    sink = FormatSink(rig.batcher, "raw", EVENTS)
    wanted = b' {"eventData" : {"x": [1, 2]}, "eventType":"start"} '
    assert sink.offer(b"/devices/7/event", wanted, 1) == 1
    # 0: the message has no record to wait for, and is acknowledged in its turn
    assert sink.offer(b"/devices/7/event", b'{"eventType":"other"}', 2) == 0
    assert (rig.batcher.received, rig.batcher.filtered, rig.batcher.in_flight) == (2, 1, 1)
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [wanted]
    assert rig.counts() == {1: 1}
    rig.settled()


@pytest.mark.parametrize(
    ("event", "passes"),
    [
        ('{"eventType":"start"}', True),
        ('{"eventType":"st\\u0061rt","eventData":{}}', True),
        ('{"eventType":"stöp"}', True),
        ('{"eventType":"st\\u00f6p"}', True),
        ('{"eventType":"a\\"b"}', True),
        ('{"eventData":{"eventType":"start"},"eventType":"no"}', False),
        ('{"eventType":"star"}', False),
        ('{"eventType":"start "}', False),
        ('{"eventType":"Start"}', False),
        ('{"eventType":""}', False),
    ],
)
def test_a_type_is_compared_as_text(event: str, passes: bool) -> None:
    """MD-02."""
    assert shaped(EVENTS, event.encode()) == ([event.encode()] if passes else [])


@pytest.mark.parametrize(
    "event",
    [
        b"",
        b"12",
        b"[]",
        b"{}",
        b'{"eventtype":"start"}',
        b'{"eventType":1}',
        b'{"eventType":null}',
        b'{"eventType":"start',
    ],
)
def test_what_has_no_type_is_set_aside(event: bytes) -> None:
    rig = Rig()
    assert FormatSink(rig.batcher, "raw", EVENTS).offer(b"t", event, 1) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.payload) == ("event", event)
    assert reject.reason == 'events: a record is no JSON object with a text "eventType"'
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


def test_each_record_of_a_frame_is_asked_for_its_type() -> None:
    rig = Rig()
    frame = encode_frame([b'{"eventType":"no"}', b'{"eventType":"start"}', b'{"eventType":"no"}'])
    assert FormatSink(rig.batcher, "bulk", Shape(events=["start"], topic_field="t")).offer(b"x", frame, 9) == 1
    assert (rig.batcher.received, rig.batcher.filtered) == (3, 2)
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b'{"t":"x","eventType":"start"}']
    rig.settled()


def test_what_finds_no_room_is_filtered_once() -> None:
    rig = Rig(budget=Budget(4096, 1))
    sink = FormatSink(rig.batcher, "bulk", EVENTS)
    frame = encode_frame([b'{"eventType":"start"}', b'{"eventType":"no"}'])
    assert sink.offer(b"t", frame, 1) == 1
    assert sink.offer(b"t", frame, 2) == -1
    assert (rig.batcher.received, rig.batcher.filtered) == (2, 1)
    rig.store()
    assert sink.offer(b"t", frame, 2) == 1
    assert (rig.batcher.received, rig.batcher.filtered) == (4, 2)
    rig.store()
    rig.settled()


# --- envelope ---


def test_the_envelope_has_type_host_and_data_in_this_order() -> None:
    """SP-07: the golden bytes of JSON.stringify({type, host, data})."""
    shape = Shape(envelope="plant-pc")
    assert shaped(shape, b'{"machine":"m1"}') == [b'{"type":"record","host":"plant-pc","data":{"machine":"m1"}}']
    assert shaped(shape, encode_frame([b"1", b'"x"']), form=BULK) == [
        b'{"type":"record","host":"plant-pc","data":1}',
        b'{"type":"record","host":"plant-pc","data":"x"}',
    ]
    (data,) = shaped(Shape(envelope='a "b"'), b"[]")
    assert json.loads(data)["host"] == 'a "b"'


def test_the_topic_goes_into_the_record_and_the_separator_behind_the_envelope() -> None:
    shape = Shape(envelope="h", topic_field="topic", separator="\n")
    assert shaped(shape, b'{"a":1}') == [b'{"type":"record","host":"h","data":{"topic":"t","a":1}}\n']


@pytest.mark.parametrize("payload", [b"", b"text", b"{", b'{"a":1}x', b"\xff"])
def test_what_is_no_json_goes_into_no_envelope(payload: bytes) -> None:
    rig = Rig()
    assert FormatSink(rig.batcher, "raw", Shape(envelope="h")).offer(b"t", payload, 1) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.reason, reject.payload) == ("envelope", "envelope: a record is no JSON", payload)
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()
