"""`Record`: what is sent for each kind of data, and what is refused before anything is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastkin import LibraryError, Record
from fastkin.aws.shards import HASH_SPACE


@pytest.mark.parametrize(
    ("data", "sent"),
    [
        ("", b'""'),
        (None, b"null"),
        ("abc", b'"abc"'),
        ("Hello!", b'"Hello!"'),
        (12345, b"12345"),
        (True, b"true"),
        ([], b"[]"),
        (["x1", "x2"], b'["x1","x2"]'),
        ({}, b"{}"),
        ({"x3": "x4", "x5": 123}, b'{"x3":"x4","x5":123}'),
        (b"", b""),
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"cd"), b"cd"),
        (2**63, b"9223372036854775808"),
        ({"a": 123456789123456789}, b'{"a":123456789123456789}'),
    ],
)
def test_the_golden_bytes_of_each_kind_of_data(data: Any, sent: bytes) -> None:
    """EI-14, EI-34: bytes as they are, everything else as JSON, a plain string with its quotes."""
    assert Record(data, "k").payload == sent


def test_an_encoder_keeps_a_long_number_as_it_is() -> None:
    """EI-15."""
    text = '{"a":123456789123456789}'
    assert (
        Record({"a": "123456789123456789"}, "k", encoder=lambda data: f'{{"a":{data["a"]}}}').payload == text.encode()
    )
    assert Record(["x"], "k", encoder=lambda data: json.dumps(data).encode()).payload == b'["x"]'
    assert Record(b"x", "k", None, None, lambda data: data * 2).payload == b"xx"


@pytest.mark.parametrize(
    ("encoder", "says"), [(lambda _: 5, "encoder returned int"), ("upper", "encoder is a function")]
)
def test_an_encoder_that_makes_no_text_is_refused(encoder: Any, says: str) -> None:
    """EI-15."""
    with pytest.raises(LibraryError, match=says):
        Record("x", "k", encoder=encoder)


def test_data_that_is_no_json_is_refused() -> None:
    with pytest.raises(LibraryError, match=r"data cannot be written as JSON .*: give bytes, or an encoder"):
        Record(object(), "k")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("", "Non empty argument required: partition_key"),
        (None, "Non empty argument required: partition_key"),
        (5, "Wrong type of argument: partition_key is a str, not int"),
        (b"k", "Wrong type of argument: partition_key is a str, not bytes"),
        ("k" * 257, "partition_key has 257 characters, at most 256: shorten it"),
        ("\U0001f600" * 257, "partition_key has 257 characters, at most 256: shorten it"),
        ("\ud800", "partition_key holds a lone surrogate: it cannot be written as UTF-8"),
    ],
)
def test_a_partition_key_that_is_none(key: Any, says: str) -> None:
    """EI-16."""
    with pytest.raises(LibraryError) as caught:
        Record("x", key)
    assert str(caught.value) == says


def test_characters_beyond_the_basic_plane_count_once() -> None:
    """EI-16: 256 code points are 256, though UTF-16 has 512 units for them."""
    assert Record("x", "\U0001f600" * 256).partition_key == "\U0001f600" * 256


@pytest.mark.parametrize(
    ("given", "sent"), [(None, None), (0, "0"), ("0", "0"), (HASH_SPACE - 1, str(HASH_SPACE - 1)), ("12", "12")]
)
def test_an_explicit_hash_key_is_an_int_or_a_decimal(given: Any, sent: str | None) -> None:
    """EI-17."""
    assert Record("x", "k", given).explicit_hash_key == sent


@pytest.mark.parametrize(
    "given",
    [HASH_SPACE, str(HASH_SPACE), -1, "-1", "", "01", "1e3", "0x1", " 1", "\u0661", True, 1.0, b"1", 1 << 20_000],
    ids=lambda _: "",
)
def test_an_explicit_hash_key_that_is_none(given: Any) -> None:
    """EI-17."""
    with pytest.raises(LibraryError, match="explicit_hash_key"):
        Record("x", "k", given)


@pytest.mark.parametrize("given", [5, "", "abc", "1.5", b"1"])
def test_a_previous_sequence_number_that_is_none(given: Any) -> None:
    """EI-18."""
    with pytest.raises(LibraryError, match="prev_sequence_number"):
        Record("x", "k", None, given)


def test_a_buffer_that_changes_later_changes_no_record() -> None:
    data = bytearray(b"before")
    record = Record(data, "k")
    data[:] = b"after!"
    assert record.payload == b"before"
    assert repr(record) == "<Record of 6 bytes, key 'k'>"
