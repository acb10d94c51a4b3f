"""Events of MODE: checked field by field, and completed where a device leaves fields out."""

from __future__ import annotations

import json
import tracemalloc
from datetime import UTC, datetime
from typing import Any

import pytest

from fastkin.errors import DataFormatError
from fastkin.formats import event
from fastkin.formats.event import Enricher
from fastkin.formats.table import FORMATS

WHOLE: dict[str, Any] = {
    "eventType": "start",
    "eventData": {"x": [1, None]},
    "timestamp": "2021-02-03T04:05:06.789Z",
    "homeId": 12,
}
MOST = 1 << 19
NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, UTC)


def as_json(**changes: Any) -> bytes:
    made = WHOLE | changes
    return json.dumps({name: value for name, value in made.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        as_json(),
        b" \n" + as_json() + b"\n",
        as_json(unknown={"kept": None}),
        as_json(originDeviceId=7, originDeviceClass="c", originDeviceIp="10.0.0.1"),
        as_json(originProjectKeyID="k", originProjectKeyName="n"),
        as_json(eventData={}),
        as_json(homeId=2**63),
        as_json(timestamp="2020-02-29T23:59:60+14:30"),
        as_json(timestamp="2020-02-29t00:00:00z"),
    ],
)
def test_an_event_is_stored_byte_for_byte(payload: bytes) -> None:
    """MD-12, MD-13, MD-15: fields that nobody knows pass."""
    assert FORMATS["event"].decode(payload) == [payload]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("eventType", ..., "the event has no eventType"),
        ("eventData", ..., "the event has no eventData"),
        ("timestamp", ..., "the event has no timestamp"),
        ("homeId", ..., "the event has no homeId"),
        ("eventType", 1, "eventType is not a text"),
        ("eventType", None, "eventType is not a text"),
        ("eventData", [], "eventData is not an object"),
        ("eventData", "{}", "eventData is not an object"),
        ("eventData", None, "eventData is not an object"),
        ("timestamp", 1612325106, "timestamp is not a text"),
        ("timestamp", "2021-02-03", "timestamp is not a time as RFC 3339 has it"),
        ("timestamp", "2021-02-03 04:05:06Z", "timestamp is not a time as RFC 3339 has it"),
        ("timestamp", "2021-02-03T04:05:06", "timestamp is not a time as RFC 3339 has it"),
        ("timestamp", "2021-02-30T04:05:06Z", "timestamp is not a time as RFC 3339 has it"),
        ("timestamp", "2021-02-03T24:00:00Z", "timestamp is not a time as RFC 3339 has it"),
        ("timestamp", "2021-02-03T04:05:06+24:00", "timestamp is not a time as RFC 3339 has it"),
        ("homeId", "12", "homeId is not a whole number"),
        ("homeId", 12.0, "homeId is not a whole number"),
        ("homeId", True, "homeId is not a whole number"),
        ("originDeviceId", "7", "originDeviceId is not a whole number"),
        ("originDeviceId", None, "originDeviceId is not a whole number"),
        ("originDeviceClass", 1, "originDeviceClass is not a text"),
        ("originDeviceIp", None, "originDeviceIp is not a text"),
        ("originProjectKeyID", 1, "originProjectKeyID is not a text"),
        ("originProjectKeyName", False, "originProjectKeyName is not a text"),
    ],
)
def test_a_field_that_is_missing_or_of_another_type_is_named(field: str, value: Any, reason: str) -> None:
    """MD-12, MD-13."""
    payload = as_json(**{field: value})
    with pytest.raises(DataFormatError) as refused:
        FORMATS["event"].decode(payload)
    assert (refused.value.field, refused.value.reason) == (field, reason)
    assert refused.value.offset == (0 if value is ... else payload.index(field.encode()) - 1)


@pytest.mark.parametrize("payload", [b"", b"1", b"[]", b'"x"', b"null"])
def test_what_is_no_object_is_no_event(payload: bytes) -> None:
    with pytest.raises(DataFormatError, match="an event is a JSON object"):
        event.records(payload)


def test_an_offset_counts_bytes() -> None:
    payload = '{"ä":"ö",}'.encode()
    with pytest.raises(DataFormatError) as refused:
        event.records(payload)
    assert refused.value.offset == payload.index(b",")


def test_an_event_cut_at_any_byte_is_refused() -> None:
    payload = as_json()
    for n in range(len(payload)):
        with pytest.raises(DataFormatError):
            event.records(payload[:n])


def test_what_a_device_left_out_is_added_behind_what_it_said() -> None:
    """MD-14: time in UTC with Z, device from the topic, home from the settings; the device's own bytes stay."""
    enricher = Enricher(["7=12", "*=99"], lambda: NOW)
    payload = b'{"eventType":"a", "n": 1.50}  \n'
    more = b',"eventData":{},"timestamp":"2024-05-06T07:08:09.123Z","homeId":%d,"originDeviceId":%d}'
    said = b'{"eventType":"a", "n": 1.50'
    assert enricher.records(payload, "/devices/7/event") == [said + more % (12, 7)]
    assert enricher.records(payload, "/devices/8/event") == [said + more % (99, 8)]
    assert enricher.records(payload, "devices/007/event") == [said + more % (12, 7)]


def test_what_is_there_is_not_changed() -> None:
    """MD-14."""
    enricher = Enricher(["*=99"], lambda: NOW)
    whole = as_json(originDeviceId=3)
    assert enricher.records(whole, "/devices/7/event") == [whole]
    assert enricher.records(as_json(), "plant/x") == [as_json()]  # no device in the topic


@pytest.mark.parametrize("topic", ["/devices/8/event", "plant/7", "", "/devices/x/event", "/devices/\u0667/event"])
def test_an_event_without_a_home_is_refused(topic: str) -> None:
    with pytest.raises(DataFormatError) as refused:
        Enricher(["7=12"], lambda: NOW).records(b'{"eventType":"a"}', topic)
    assert refused.value.field == "homeId"


@pytest.mark.parametrize("said", [b'{"eventData":{}}', b"{}", b'{"eventType":"a","homeId":null}'])
def test_an_event_is_completed_and_then_checked(said: bytes) -> None:
    with pytest.raises(DataFormatError):
        Enricher(["*=1"], lambda: NOW).records(said, "/devices/7/event")


@pytest.mark.parametrize("said", ["", "7", "7=", "=7", "a=1", "1=a", "7=1=2", "**=1", "1.5=2", "-1=2"])
def test_a_home_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="is not DEVICE=HOME"):
        Enricher([said])


@pytest.mark.parametrize("one", [b"{},", b"[],", b"0,"])
def test_an_event_of_very_many_values_is_refused_before_anything_is_made_of_it(one: bytes) -> None:
    """Half a gigabyte would be made of eight megabytes."""
    payload = b'{"eventData":{"x":[' + one * MOST + b"0]}}"
    tracemalloc.start()
    try:
        with pytest.raises(DataFormatError, match="at most 524,288 values"):
            event.records(payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_long_text_is_no_many_values() -> None:
    whole = as_json(eventData={"x": "a" * 2 * MOST})
    assert event.records(whole) == [whole]
