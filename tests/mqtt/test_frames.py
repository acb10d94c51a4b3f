"""Long WebSocket frames are cut; what they carry, and all other frames, stay what they are."""

from __future__ import annotations

import random

import pytest

from fastkin.mqtt.frames import PIECE_MOST, Frames


def frame(code: int, payload: bytes, *, fin: bool = True, mask: bool = False) -> bytes:
    size = len(payload)
    length = bytes((size,)) if size < 126 else b"\x7f" + size.to_bytes(8, "big")
    if 126 <= size <= 65_535:
        length = b"\x7e" + size.to_bytes(2, "big")
    head = bytes((fin << 7 | code, length[0] | mask << 7)) + length[1:]
    return head + (b"mask" if mask else b"") + payload


def read(data: bytes) -> list[tuple[int, bool, bytes]]:
    """Code, whether it is the last of its message, and payload of each frame."""
    out = []
    while data:
        size, head = data[1] & 0x7F, 2
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[2:head], "big")
        out.append((data[0] & 15, bool(data[0] & 0x80), data[head : head + size]))
        assert len(out[-1][2]) == size
        data = data[head + size :]
    return out


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_reads(seed: int) -> None:
    draw = random.Random(seed)
    sent, binary, others = b"", b"", []
    for _ in range(draw.randrange(1, 8)):
        kind = draw.random()
        if kind < 0.3:
            payload = draw.randbytes(draw.choice([0, 5, 125, 126, 65_535, 65_536, 200_000]))
            sent += frame(2, payload)
            binary += payload
        elif kind < 0.7:
            parts = [draw.randbytes(draw.choice([0, 1, 300, 70_000])) for _ in range(draw.randrange(2, 5))]
            for at, payload in enumerate(parts):
                sent += frame(2 if at == 0 else 0, payload, fin=at == len(parts) - 1)
                binary += payload
                if draw.random() < 0.4:
                    sent += frame(9, b"ping")
                    others.append((9, True, b"ping"))
        else:
            sent += frame(1, b"te", fin=False) + frame(0, b"xt")
            others += [(1, False, b"te"), (0, True, b"xt")]
    frames = Frames()
    out, at = b"", 0
    while at < len(sent):
        size = draw.choice([1, 2, 3, 1000, 100_000])
        out += frames.feed(sent[at : at + size])
        at += size
    got = read(out)
    assert b"".join(payload for code, _, payload in got if code == 2) == binary
    assert [each for each in got if each[0] != 2] == others
    assert all(fin and len(payload) <= PIECE_MOST for code, fin, payload in got if code == 2)


def test_short_frames_are_not_touched() -> None:
    data = b"".join(frame(2, bytes(n)) for n in range(200))
    assert Frames().feed(data) is data


@pytest.mark.parametrize(
    "data", [frame(2, bytes(70_000), mask=True), b"\xc2" + frame(2, bytes(70_000))[1:], frame(0, b"stray")]
)
def test_what_is_wrong_is_left_for_the_library_to_judge(data: bytes) -> None:
    assert Frames().feed(data) == data
