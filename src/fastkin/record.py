"""One record for Kinesis, as a program gives it: checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Callable  # noqa: TC003 - who reads our annotations needs it
from typing import Any

import orjson

from fastkin.errors import LibraryError, printable

KEY_CHARACTERS = 256  # API_PutRecords: "Unicode strings with a maximum length limit of 256 characters"
HASH_KEYS = 2**128  # the hash keys of a stream
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,38}")  # ExplicitHashKey and SequenceNumberForOrdering in the API's model
_SEQUENCE = re.compile(r"0|[1-9][0-9]{0,128}")


class Record:
    """Data and key of one record.

    data: bytes, bytearray and memoryview go out as they are. Anything else goes out as JSON, a str with its quotes.
    partition_key: 1 to 256 characters. explicit_hash_key: 0 to 2**128-1, as an int or in decimal; it chooses the shard
    instead of the key. prev_sequence_number: the record gets a higher number than this one; only `put_record` sends it,
    and streams that choose shards themselves refuse it.
    encoder: makes bytes or str of the data instead, whatever the data is.

    LibraryError: an argument is wrong, or the data cannot be written as JSON.
    """

    __slots__ = ("data", "explicit_hash_key", "partition_key", "payload", "prev_sequence_number")

    def __init__(
        self,
        data: Any,
        partition_key: str,
        explicit_hash_key: int | str | None = None,
        prev_sequence_number: str | None = None,
        encoder: Callable[[Any], bytes | str] | None = None,
    ) -> None:
        self.data: Any = data
        self.partition_key: str = _key(partition_key)
        self.explicit_hash_key: str | None = None if explicit_hash_key is None else _hash_key(explicit_hash_key)
        self.prev_sequence_number: str | None = (
            None if prev_sequence_number is None else _sequence(prev_sequence_number)
        )
        self.payload: bytes = _encoded(data, encoder)  # the bytes that are sent

    def __repr__(self) -> str:
        return f"<Record of {len(self.payload)} bytes, key {self.partition_key!r}>"


def _key(key: object) -> str:
    if key is None or key == "":
        raise LibraryError("Non empty argument required: partition_key")
    if not isinstance(key, str):
        raise LibraryError(f"Wrong type of argument: partition_key is a str, not {type(key).__name__}")
    # Characters are code points, also those that UTF-16 writes as two.
    if len(key) > KEY_CHARACTERS:
        raise LibraryError(f"partition_key has {len(key)} characters, at most {KEY_CHARACTERS}: shorten it")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise LibraryError("partition_key holds a lone surrogate: it cannot be written as UTF-8") from None
    return key


def _hash_key(key: object) -> str:
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise LibraryError(f"Wrong type of argument: explicit_hash_key is an int or a str, not {type(key).__name__}")
    # Not by str(): Python refuses to write a number of very many digits.
    if isinstance(key, int) and 0 <= key < HASH_KEYS:
        return str(key)
    if isinstance(key, str) and _DECIMAL.fullmatch(key) and int(key) < HASH_KEYS:
        return key
    shown = printable(repr(key), 60) if isinstance(key, str) or key.bit_length() < 256 else "a huge number"
    raise LibraryError(f"explicit_hash_key: {shown} is not 0 to 2**128-1, in decimal without leading zeros")


def _sequence(number: object) -> str:
    if not isinstance(number, str) or not _SEQUENCE.fullmatch(number):
        raise LibraryError(
            f"prev_sequence_number: {printable(repr(number), 60)} is not a sequence number: give the one of a PutResult"
        )
    return number


def _encoded(data: Any, encoder: Callable[[Any], bytes | str] | None) -> bytes:
    if encoder is not None:
        if not callable(encoder):
            raise LibraryError(f"Wrong type of argument: encoder is a function, not {type(encoder).__name__}")
        made = encoder(data)
        if isinstance(made, str):
            return made.encode()
        if not isinstance(made, bytes | bytearray | memoryview):
            raise LibraryError(f"encoder returned {type(made).__name__}: it must return bytes or str")
        return bytes(made)
    if isinstance(data, bytes | bytearray | memoryview):
        # A copy: what the caller does with its buffer later must not change what was checked and signed.
        return bytes(data)
    try:
        return orjson.dumps(data)
    except orjson.JSONEncodeError as error:
        raise LibraryError(f"data cannot be written as JSON ({error}): give bytes, or an encoder") from None
