"""A payload that is one MessagePack map becomes one JSON record, for machines that do not speak JSON.

What JSON has no word for: bytes become base64; a timestamp becomes RFC 3339 in UTC, with as many digits of its fraction
as it has; a NaN or an infinity becomes null, as JSON.stringify does it. Whole numbers are written in full, from -2^63
to 2^64 - 1: who reads them as a double loses digits beyond 2^53. A key that is a whole number becomes text. Other keys,
other extension types, a key twice and text that is no UTF-8 are refused.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgpack
import orjson

from fastkin.errors import DataFormatError

if TYPE_CHECKING:
    from collections.abc import Sized

# Of one payload. Each is an object of Python: an empty map of one byte takes 64, and a message may hold eight million.
_VALUES = 1 << 19
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def records(payload: bytes) -> list[bytes]:
    """One record. DataFormatError: the payload is not one map that JSON can have."""
    left = _VALUES

    def count(values: Sized) -> None:
        nonlocal left
        left -= len(values)  # the root is the one value that stands in no other
        if left < 0:
            raise DataFormatError(0, f"a payload has at most {_VALUES:,} values")

    def array(values: list[Any]) -> list[Any]:
        count(values)
        return values

    def table(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        count(pairs)
        return _map(pairs)

    most = len(payload)
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=False, object_pairs_hook=table, list_hook=array, ext_hook=_refuse, max_buffer_size=0,
        max_ext_len=most, max_bin_len=most, max_str_len=most, max_array_len=min(most, _VALUES),
        max_map_len=min(most, _VALUES),
    )  # fmt: skip
    unpacker.feed(payload)
    try:
        value = unpacker.unpack()
    except msgpack.OutOfData:
        raise DataFormatError(len(payload), "truncated: the map goes on" if payload else "empty payload") from None
    except DataFormatError:
        raise
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise DataFormatError(0, f"not MessagePack: {error or type(error).__name__}") from None
    end = unpacker.tell()
    if not isinstance(value, dict):
        raise DataFormatError(0, "a payload is one MessagePack map")
    if end != len(payload):
        raise DataFormatError(end, f"{len(payload) - end} bytes behind the end of the map")
    try:
        return [orjson.dumps(value, default=_told)]
    except orjson.JSONEncodeError as error:
        if isinstance(error.__cause__, DataFormatError):  # of _told
            raise error.__cause__ from None
        raise DataFormatError(0, f"no JSON can be made of it: {error}") from None


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        name = key
        if type(key) is int:
            name = str(key)
        elif type(key) is not str:
            raise DataFormatError(0, f"a key is {type(key).__name__}, not text or a whole number")
        if name in made:
            raise DataFormatError(0, f"the key {name!a:.100} comes twice in one map")
        made[name] = value
    return made


def _refuse(code: int, _: bytes) -> None:
    raise DataFormatError(0, f"extension type {code} has no meaning in JSON")


def _told(value: object) -> str:
    """What orjson does not know."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, msgpack.Timestamp):
        return _time(value)
    raise TypeError(f"{type(value).__name__} has no meaning in JSON")


def _time(stamp: msgpack.Timestamp) -> str:
    try:
        whole = (_EPOCH + timedelta(seconds=stamp.seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    except OverflowError:
        raise DataFormatError(0, f"a timestamp of {stamp.seconds} s is beyond the years 1 to 9999") from None
    fraction = f".{stamp.nanoseconds:09d}".rstrip("0").rstrip(".")
    return f"{whole:0>19}{fraction}Z"
