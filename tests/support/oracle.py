"""The slow obvious twin of the compiled core: what it must do, in plain Python."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from typing import Any

KEY_CHARS = 256
KEY_BYTES = 1024


class BadFrameError(Exception):
    """Not a bulk frame; `offset` is where it stops being one."""

    def __init__(self, offset: int, reason: str) -> None:
        self.offset = offset
        super().__init__(f"{reason} at {offset}")


_NUMBER = {1: ">B", 2: ">H", 4: ">I"}


def _value(payload: bytes, at: int, *, version: bool) -> tuple[bytes, int]:
    """One str (`version`) or bin or raw at `at`: its bytes and where the next value starts."""
    code = payload[at]
    if 0xA0 <= code <= 0xBF:
        width, size = 0, code & 31
    elif version and code in (0xD9, 0xDA, 0xDB):
        width, size = {0xD9: 1, 0xDA: 2, 0xDB: 4}[code], -1
    elif not version and code in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):
        width, size = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}[code], -1
    else:
        raise BadFrameError(at, f"type 0x{code:02x}")
    body = at + 1 + width
    if body > len(payload):
        raise BadFrameError(at, "truncated header")
    if size < 0:
        (size,) = struct.unpack(_NUMBER[width], payload[at + 1 : body])
    if body + size > len(payload):
        raise BadFrameError(at, "truncated value")
    return payload[body : body + size], body + size


def _array(payload: bytes, at: int) -> tuple[int, int] | None:
    """An array header at `at`: how many elements, where the first starts."""
    if at >= len(payload):
        return None
    code = payload[at]
    if 0x90 <= code <= 0x9F:
        return code & 15, at + 1
    if code not in (0xDC, 0xDD):
        return None
    width = 2 if code == 0xDC else 4
    if at + 1 + width > len(payload):
        raise BadFrameError(at, "truncated array header")
    (count,) = struct.unpack(_NUMBER[width], payload[at + 1 : at + 1 + width])
    return count, at + 1 + width


def decode_frame(payload: bytes) -> list[bytes]:
    if not payload:
        raise BadFrameError(0, "empty")
    at, expected = 0, -1
    if (array := _array(payload, 0)) is not None:
        count, at = array
        if count == 0:
            raise BadFrameError(0, "empty array")
        if at == len(payload):
            raise BadFrameError(at, "nothing in the array")
        expected = count - 1
    start = at
    version, at = _value(payload, at, version=True)
    if version != b"1.0":
        raise BadFrameError(start, "version")
    if expected < 0 and (array := _array(payload, at)) is not None:
        expected, at = array
    records: list[bytes] = []
    while at < len(payload):
        if len(records) == expected:
            raise BadFrameError(at, "trailing bytes")
        record, at = _value(payload, at, version=False)
        records.append(record)
    if expected > len(records):
        raise BadFrameError(at, "too few elements")
    return records


def encode_frame(records: list[bytes]) -> bytes:
    out = b"\xa31.0"
    for record in records:
        size = len(record)
        if size < 1 << 8:
            out += b"\xc4" + struct.pack(">B", size)
        elif size < 1 << 16:
            out += b"\xc5" + struct.pack(">H", size)
        else:
            out += b"\xc6" + struct.pack(">I", size)
        out += record
    return out


def key_problem(raw: bytes) -> str | None:
    if not raw:
        return "is empty"
    if len(raw) > KEY_BYTES:
        return "more than 256"
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "not valid UTF-8"
    return "more than 256" if len(text) > KEY_CHARS else None


def render(parts: list[tuple[str, Any]], topic: bytes, data: bytes) -> bytes | None:
    """The raw key, None when a part is absent. For payloads that are valid JSON or no JSON at all."""
    out = b""
    for kind, value in parts:
        if kind == "text":
            out += value.encode()
        elif kind in ("topic", "level") and not topic:
            return None
        elif kind == "topic":
            out += topic
        elif kind == "level":
            levels = topic.split(b"/")
            if value >= len(levels):
                return None
            out += levels[value]
        else:
            found = _field(data, value)
            if found is None:
                return None
            out += found
    return out


class _Number(str):
    __slots__ = ()


def _field(data: bytes, path: tuple[str, ...]) -> bytes | None:
    def first_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(reversed(pairs))

    try:
        node = json.loads(data, object_pairs_hook=first_wins, parse_int=_Number, parse_float=_Number)
    except ValueError:
        return None
    for name in path:
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    if isinstance(node, bool):
        return b"true" if node else b"false"
    return node.encode() if isinstance(node, str) else None


def hash_of(key: str) -> int:
    return int.from_bytes(hashlib.md5(key.encode()).digest())


def shard_of(ends: list[int], at: int) -> int:
    return next((i for i, end in enumerate(ends) if at <= end), -1)


def hash_key_valid(text: str) -> bool:
    return re.fullmatch(r"(0|[1-9][0-9]{0,38})", text) is not None and int(text) < 2**128


@dataclass
class Limits:
    records: int = 500
    batch: int = 5 * 1024 * 1024
    record: int = 1024 * 1024


@dataclass
class Cut:
    """One batch: entries and what Kinesis counts."""

    entries: list[tuple[bytes, str | None]] = field(default_factory=list)
    size: int = 0


def size_of(data: bytes, key: str | None) -> int:
    return len(data) + (0 if key is None else len(key.encode()))


def cut(records: list[tuple[bytes, str | None]], limits: Limits) -> tuple[list[Cut], list[int]]:
    """The batches, and the indices of the records that are too large."""
    cuts: list[Cut] = [Cut()]
    rejected = []
    for index, (data, key) in enumerate(records):
        size = size_of(data, key)
        if size > min(limits.record, limits.batch):
            rejected.append(index)
            continue
        if cuts[-1].size + size > limits.batch or len(cuts[-1].entries) == limits.records:
            cuts.append(Cut())
        cuts[-1].entries.append((data, key))
        cuts[-1].size += size
    return [one for one in cuts if one.entries], rejected


def body(entries: list[tuple[bytes, str | None]], target: dict[str, str]) -> dict[str, Any]:
    """The request, as json.loads reads it."""
    records = []
    for data, key in entries:
        record = {"Data": base64.b64encode(data).decode()}
        if key is not None:
            record["PartitionKey"] = key
        records.append(record)
    return {"Records": records, **target}


class BadAnswerError(Exception):
    pass


Ending = tuple[str, str] | None  # code and message of a failed entry, None for a stored one


def read_answer(answer: bytes, count: int) -> list[Ending]:
    """How each entry ended, or BadAnswerError."""
    try:
        parsed = json.loads(answer)
    except ValueError as error:
        raise BadAnswerError("no JSON") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("Records"), list):
        raise BadAnswerError("no Records")
    failed = parsed.get("FailedRecordCount")
    if not isinstance(failed, int | float) or isinstance(failed, bool):
        raise BadAnswerError("no FailedRecordCount")
    if len(parsed["Records"]) != count:
        raise BadAnswerError("wrong count")
    out: list[Ending] = []
    for entry in parsed["Records"]:
        if not isinstance(entry, dict):
            raise BadAnswerError("an entry is no object")
        code = entry.get("ErrorCode")
        if not isinstance(code, str | None):
            raise BadAnswerError("an ErrorCode is no string")
        if code:
            message = entry.get("ErrorMessage")
            out.append((code, message if isinstance(message, str) else ""))
            continue
        for name in ("ShardId", "SequenceNumber"):
            if not isinstance(entry.get(name), str) or not entry[name]:
                raise BadAnswerError("no place")
        out.append(None)
    return out
