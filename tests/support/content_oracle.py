"""Keys made from content, in plain Python as src/fastkin/codec/content.h and mqtt/digest.h define them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

WORD, WIDE = 2**64 - 1, 2**128 - 1
PAIR = 16  # bytes
PAIRS = 64


def _splitmix() -> Iterator[int]:
    seed = 0
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & WORD
        z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & WORD
        yield z ^ z >> 31


_words = _splitmix()
NH = b"".join(next(_words).to_bytes(8, "little") for _ in range(2 * PAIRS))
FOLD = [[next(_words) | next(_words) << 64 for _ in range(4)] for _ in range(2)]


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _short(data: bytes) -> int:
    if len(data) >= 4:
        return int.from_bytes(data[:4], "little") << 32 | int.from_bytes(data[-4:], "little")
    return data[0] << 16 | data[len(data) // 2] << 8 | data[-1]


def _add(data: bytes, key: int, total: int) -> tuple[int, int]:
    """Products of keyed words, and where the next key stands."""
    at, length = 0, len(data)
    while at < length - PAIR:
        total += ((_word(data, at) + _word(NH, key)) & WORD) * ((_word(data, at + 8) + _word(NH, key + 8)) & WORD)
        at, key = at + PAIR, key + PAIR
    if at < length:
        first, second = _word(NH, key), _word(NH, key + 8)
        if length - at >= 8:
            total += ((_word(data, at) + first) & WORD) * ((_word(data, length - 8) + second) & WORD)
        else:
            total += ((_short(data[at:]) + first) & WORD) * second
        key += PAIR
    return total & WIDE, key


def _chain(data: bytes, out: list[int]) -> None:
    piece = PAIR * (PAIRS - 1)
    for at in range(0, len(data), piece):
        total, _ = _add(data[at : at + piece], PAIR, 0)
        for i, (low, high, before, more) in enumerate(FOLD):
            out[i] = ((low * (total & WORD) + high * (total >> 64) + before * out[i] + more) & WIDE) >> 64


def _digest(topic: bytes, payload: bytes) -> tuple[int, int]:
    total = ((len(topic) + _word(NH, 0)) & WORD) * ((len(payload) + _word(NH, 8)) & WORD)
    if len(topic) + len(payload) <= PAIR * (PAIRS - 3):
        total, key = _add(topic, PAIR, total)
        total, _ = _add(payload, key, total)
        return total & WORD, total >> 64
    out = [total & WORD, total >> 64]
    _chain(topic, out)
    _chain(payload, out)
    return out[0], out[1]


def _mix(x: int) -> int:
    x = ((x ^ x >> 33) * 0xFF51AFD7ED558CCD) & WORD
    x = ((x ^ x >> 33) * 0xC4CEB9FE1A85EC53) & WORD
    return x ^ x >> 33


def content_key(payload: bytes, topic: str = "", index: int = 0) -> str:
    first, second = _digest(topic.encode(), payload)
    high = _mix((first + index * 0x9E3779B97F4A7C15) & WORD)
    low = _mix((second + high) & WORD)
    return str(uuid.UUID(int=(high & ~0xF000 | 0x8000) << 64 | low >> 2 | 1 << 63))
