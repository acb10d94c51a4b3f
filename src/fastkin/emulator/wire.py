"""The two encodings of Kinesis: JSON 1.1 and CBOR 1.1 (what the AWS SDK for Java sends).

CBOR here is its own small reader and writer: what comes in is somebody else's bytes and must be
judged by code that shares nothing with the engine's encoder.
"""

from __future__ import annotations

import binascii
import struct
from typing import Any, Final

import orjson

JSON: Final = "application/x-amz-json-1.1"
CBOR: Final = "application/x-amz-cbor-1.1"


class Millis(int):
    """A time on the CBOR wire: tag 1 around milliseconds, as the SDK for Java writes it."""


class WireError(ValueError):
    """The body is not JSON or CBOR, or holds what the subset does not know."""


def loads(body: bytes, content_type: str) -> dict[str, Any]:
    try:
        value = orjson.loads(body) if content_type == JSON else decode_cbor(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise WireError(str(error)) from None
    if not isinstance(value, dict):
        raise WireError("the body is not a map")
    return value


def dumps(value: dict[str, Any], content_type: str) -> bytes:
    """`bytes` become base64 in JSON, byte strings in CBOR; `Millis` become seconds in JSON."""
    if content_type == CBOR:
        out = bytearray()
        _encode(value, out)
        return bytes(out)
    return orjson.dumps(_jsonable(value))


def decode_base64(text: str) -> bytes:
    """Strict: no blanks, right padding."""
    return binascii.a2b_base64(text, strict_mode=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, bytes):
        return binascii.b2a_base64(value, newline=False).decode()
    if isinstance(value, Millis):
        return value / 1000
    return value


# --- CBOR (RFC 8949), definite and indefinite lengths -----------------------------------------

_BREAK: Final = object()
_MAX_DEPTH: Final = 32
_HEADS: Final = {24: ">B", 25: ">H", 26: ">I", 27: ">Q"}


def decode_cbor(body: bytes) -> Any:
    value, at = _decode(body, 0, 0)
    if value is _BREAK:
        raise WireError("a CBOR break stands at byte 0")
    if at != len(body):
        raise WireError(f"{len(body) - at} bytes follow the CBOR value at byte {at}")
    return value


def _decode(body: bytes, at: int, depth: int) -> tuple[Any, int]:
    """The item at `at`, and where the next one begins."""
    # A body of a hundred thousand opening bytes would end in the interpreter's own limit of recursion.
    if depth > _MAX_DEPTH:
        raise WireError(f"CBOR nested deeper than {_MAX_DEPTH} at byte {at}")
    if at >= len(body):
        raise WireError(f"CBOR ends at byte {at}")
    start = at
    initial = body[at]
    major, info = initial >> 5, initial & 31
    at += 1
    length: int | None = info
    if info > 23:
        length, at = _read_length(body, at, info)
    if major in (2, 3):
        if length is None:
            return _decode_chunks(body, at, depth, bytes if major == 2 else str)
        # Compared with what is left, never added to a position: a length of eight bytes may be larger than any
        # position.
        if len(body) - at < length:
            raise WireError(f"CBOR string of {length} bytes at byte {start} is cut")
        raw = body[at : at + length]
        if major == 2:
            return raw, at + length
        try:
            return raw.decode(), at + length
        except UnicodeDecodeError:
            raise WireError(f"CBOR text at byte {start} is not UTF-8") from None
    if major == 4:
        return _decode_array(body, at, depth, length)
    if major == 5:
        return _decode_map(body, at, depth, length)
    if major == 7:
        return _simple(info, length, start, at)
    if length is None:
        raise WireError(f"CBOR head {initial:#x} at byte {start} needs a length")
    if major == 0:
        return length, at
    if major == 1:
        return -1 - length, at
    value, at = _decode(body, at, depth + 1)  # a tag: 1 is a time, the others do not matter here
    if length == 1 and isinstance(value, int | float):
        return Millis(value), at
    return value, at


def _read_length(body: bytes, at: int, info: int) -> tuple[int | None, int]:
    """The rest of a head that does not fit its first byte, and where it ends. None: the length is not said."""
    if info in _HEADS:
        head = _HEADS[info]
        size = struct.calcsize(head)
        if len(body) - at < size:
            raise WireError(f"CBOR ends inside a head at byte {at - 1}")
        return struct.unpack_from(head, body, at)[0], at + size
    if info == 31:
        return None, at
    raise WireError(f"reserved CBOR head {body[at - 1]:#x} at byte {at - 1}")


def _decode_chunks(body: bytes, at: int, depth: int, kind: type) -> tuple[bytes | str, int]:
    """A string of indefinite length: pieces of the same kind up to a break."""
    start = at - 1
    chunks: list[Any] = []
    while True:
        chunk, at = _decode(body, at, depth + 1)
        if chunk is _BREAK:
            empty: Any = kind()
            return empty.join(chunks), at
        if not isinstance(chunk, kind):
            raise WireError(f"a chunk of another type in the CBOR string at byte {start}")
        chunks.append(chunk)


def _decode_array(body: bytes, at: int, depth: int, length: int | None) -> tuple[list[Any], int]:
    items: list[Any] = []
    # Items are appended as they come. A head that says a thousand million of them makes nothing ready for them.
    while length is None or len(items) < length:
        item, at = _decode(body, at, depth + 1)
        if item is _BREAK:
            if length is not None:
                raise WireError(f"a CBOR break inside an array of {length} at byte {at - 1}")
            break
        items.append(item)
    return items, at


def _decode_map(body: bytes, at: int, depth: int, length: int | None) -> tuple[dict[str, Any], int]:
    pairs: dict[str, Any] = {}
    count = 0
    while length is None or count < length:
        key, at = _decode(body, at, depth + 1)
        if key is _BREAK and length is None:
            break
        if not isinstance(key, str):
            raise WireError(f"a CBOR map key that is no text before byte {at}")
        value, at = _decode(body, at, depth + 1)
        if value is _BREAK:
            raise WireError(f"a CBOR map ends after a key at byte {at - 1}")
        pairs[key] = value
        count += 1
    return pairs, at


def _simple(info: int, length: int | None, start: int, at: int) -> tuple[Any, int]:
    if info == 31:
        return _BREAK, at
    if info in (20, 21, 22, 23):
        return (False, True, None, None)[info - 20], at
    if info in (25, 26, 27):
        form = {25: ">e", 26: ">f", 27: ">d"}[info]
        return struct.unpack_from(form, struct.pack(_HEADS[info], length))[0], at
    raise WireError(f"CBOR simple value {length} at byte {start} is not known")


def cbor_head(major: int, length: int) -> bytes:
    """The shortest head of a CBOR item."""
    if length < 24:
        return bytes([major << 5 | length])
    for info, form in _HEADS.items():
        if length < 1 << (8 * struct.calcsize(form)):
            return bytes([major << 5 | info]) + struct.pack(form, length)
    raise WireError(f"{length} does not fit into a CBOR head")


def cbor_text(text: str) -> bytes:
    raw = text.encode()
    return cbor_head(3, len(raw)) + raw


def _encode(value: Any, out: bytearray) -> None:
    if value is None:
        out.append(0xF6)
    elif value is True or value is False:
        out.append(0xF5 if value else 0xF4)
    elif isinstance(value, Millis):
        out += b"\xc1" + cbor_head(0, int(value))
    elif isinstance(value, int):
        out += cbor_head(0, value) if value >= 0 else cbor_head(1, -1 - value)
    elif isinstance(value, float):
        out += b"\xfb" + struct.pack(">d", value)
    elif isinstance(value, str):
        out += cbor_text(value)
    elif isinstance(value, bytes):
        out += cbor_head(2, len(value)) + value
    elif isinstance(value, list):
        out += cbor_head(4, len(value))
        for item in value:
            _encode(item, out)
    elif isinstance(value, dict):
        out += cbor_head(5, len(value))
        for key, item in value.items():
            _encode(key, out)
            _encode(item, out)
    else:
        raise WireError(f"{type(value).__name__} has no CBOR form here")
