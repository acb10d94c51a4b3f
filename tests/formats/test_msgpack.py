"""One MessagePack map becomes one JSON record."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest

from fastkin.errors import DataFormatError
from fastkin.formats.table import FORMATS

ROW = FORMATS["msgpack"]


def record(value: Any) -> bytes:
    (made,) = ROW.decode(msgpack.packb(value))
    return made


WELDER = {
    "name": "welder-17", "amps": 123.5, "ok": True, "off": None, "list": [1, "ä", {"x": []}], "deep": {"a": {"b": -1}},
}  # fmt: skip


def test_a_map_becomes_a_json_object_in_its_order() -> None:
    assert record(WELDER) == json.dumps(WELDER, ensure_ascii=False, separators=(",", ":")).encode()
    assert record({}) == b"{}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"", b'""'),
        (b"\x00\xff\x10", b'"AP8Q"'),
        (2**53 + 1, b"9007199254740993"),
        (2**64 - 1, b"18446744073709551615"),
        (-(2**63), b"-9223372036854775808"),
        (float("nan"), b"null"),
        (float("inf"), b"null"),
        (1.0, b"1.0"),
        (msgpack.Timestamp(0, 0), b'"1970-01-01T00:00:00Z"'),
        (msgpack.Timestamp(1700000000, 0), b'"2023-11-14T22:13:20Z"'),
        (msgpack.Timestamp(1700000000, 120_000_000), b'"2023-11-14T22:13:20.12Z"'),
        (msgpack.Timestamp(1700000000, 1), b'"2023-11-14T22:13:20.000000001Z"'),
        (msgpack.Timestamp(-1, 999_999_999), b'"1969-12-31T23:59:59.999999999Z"'),
        (msgpack.Timestamp(-62135596800, 0), b'"0001-01-01T00:00:00Z"'),
        (msgpack.Timestamp(253402300799, 0), b'"9999-12-31T23:59:59Z"'),
        ([b"a", {"t": msgpack.Timestamp(0, 0)}], b'["YQ==",{"t":"1970-01-01T00:00:00Z"}]'),
    ],
)
def test_what_json_has_no_word_for(value: Any, text: bytes) -> None:
    assert record({"v": value}) == b'{"v":' + text + b"}"


def test_a_key_that_is_a_number_becomes_text() -> None:
    assert record({1: "a", -2: "b", 2**64 - 1: "c"}) == b'{"1":"a","-2":"b","18446744073709551615":"c"}'


@pytest.mark.parametrize(
    ("payload", "offset", "reason"),
    [
        (b"", 0, "empty payload"),
        (msgpack.packb([1]), 0, "a payload is one MessagePack map"),
        (msgpack.packb(7), 0, "a payload is one MessagePack map"),
        (b'{"a":1}', 0, "a payload is one MessagePack map"),  # 0x7b is the number 123
        (b"\x80\x80", 1, "1 bytes behind the end of the map"),
        (b"\xc1", 0, "not MessagePack"),
        (b"\x81\xa1a\xa1\xff", 0, "not MessagePack: 'utf-8' codec can't decode"),
        (b"\x82\xa1a\x01\xa1a\x02", 0, "the key 'a' comes twice in one map"),
        (b"\x82\xa11\x01\x01\x02", 0, "the key '1' comes twice in one map"),
        (b"\x81\xc3\x01", 0, "a key is bool, not text or a whole number"),
        (b"\x81\xc0\x01", 0, "a key is NoneType, not text or a whole number"),
        (b"\x81\xc4\x01a\x01", 0, "a key is bytes, not text or a whole number"),
        (b"\x81\xa1a\xc7\x01\x05x", 0, "extension type 5 has no meaning in JSON"),
        (b"\x81\xa1a" * 300 + b"\x01", 0, "no JSON can be made of it"),
        (b"\x81\xa1a" * 3000 + b"\x01", 0, "not MessagePack"),
        (msgpack.packb({"t": msgpack.Timestamp(253402300800, 0)}), 0, "beyond the years 1 to 9999"),
        (msgpack.packb({"t": msgpack.Timestamp(2**62, 0)}), 0, "beyond the years 1 to 9999"),
    ],
)
def test_what_is_no_map_that_json_can_have_is_refused(payload: bytes, offset: int, reason: str) -> None:
    with pytest.raises(DataFormatError) as refused:
        ROW.decode(payload)
    assert reason in refused.value.reason
    assert refused.value.offset == offset


def test_a_map_cut_at_any_byte_is_refused() -> None:
    whole = msgpack.packb(WELDER | {"b": b"x" * 300, "t": msgpack.Timestamp(1, 1)})
    for n in range(len(whole)):
        with pytest.raises(DataFormatError):
            ROW.decode(whole[:n])


@pytest.mark.parametrize(
    "payload", [b"\xdf\xff\xff\xff\xff", b"\x81\xa1a\xdd\xff\xff\xff\xff", b"\x81\xdb\xff\xff\xff\xff"]
)
def test_a_length_that_is_a_lie_takes_no_memory(payload: bytes) -> None:
    with pytest.raises(DataFormatError):
        ROW.decode(payload)


@pytest.mark.parametrize("many", [b"\x80" * (1 << 19), b"\xc0" * (1 << 19)])
def test_a_payload_of_very_many_values_is_refused(many: bytes) -> None:
    """Each byte would be an object of 64. Counted over all that is in it, however it is nested."""
    array = b"\xdd" + len(many).to_bytes(4, "big") + many
    with pytest.raises(DataFormatError, match=r"at most 524,288 values|max_array_len"):
        FORMATS["msgpack"].decode(b"\x81\xa1a" + array)
    part = b"\xdc\xff\xff" + many[:65535]
    with pytest.raises(DataFormatError, match="at most 524,288 values"):
        FORMATS["msgpack"].decode(b"\x81\xa1a\x99" + part * 9)
    (record,) = FORMATS["msgpack"].decode(b"\x81\xa1a\x97" + part * 7)
    assert len(json.loads(record)["a"]) == 7
