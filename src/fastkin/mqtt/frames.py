"""Long WebSocket frames cut into short ones, before anybody holds one whole.

MQTT does not mind where a WebSocket message ends, but a library hands on whole messages only: a broker that sends each
packet as one message would make us hold the largest packet there is, or refuse it, and be sent it again for ever. So
what carries binary data is cut while it comes: each piece becomes a message of its own. All else is left as it is.
"""

from __future__ import annotations

_CONTINUATION, _BINARY = 0, 2  # kinds of frames; 1 is text
_FIN = 0x80
_MASKED = 0x80
_LONG = 126  # in the second byte: two bytes with the length follow; with the next number eight
PIECE_MOST = 65_535


class Frames:
    """The bytes of one connection from the server, in the order they come."""

    __slots__ = ("_binary", "_cut", "_head", "_left")

    def __init__(self) -> None:
        self._head = b""  # of a frame, as far as it came
        self._left = 0  # bytes of the frame in hand that are to come
        self._cut = False  # it is cut
        self._binary = False  # a binary message is not at its end

    def feed(self, data: bytes) -> bytes:
        """What is to be read in the place of `data`."""
        if self._head:
            data, self._head = self._head + data, b""
        out: list[bytes] = []
        at = begin = 0
        end = len(data)
        while at < end:
            if self._left:
                size = min(self._left, end - at)
                self._left -= size
                if self._cut:
                    out += (data[begin:at], *_frames(data[at : at + size]))
                    begin = at + size
                at += size
                continue
            size = _head_size(data, at)
            if end - at < size:
                out.append(data[begin:at])
                self._head = data[at:]
                return b"".join(out)
            self._enter(data, at)
            if self._cut:
                out.append(data[begin:at])
                begin = at + size
            at += size
        if not out:
            return data
        out.append(data[begin:])
        return b"".join(out)

    def _enter(self, data: bytes, at: int) -> None:
        first, second = data[at], data[at + 1]
        code = first & 0x0F
        length = second & 0x7F
        self._left = length
        if length >= _LONG:
            self._left = int.from_bytes(data[at + 2 : at + (4 if length == _LONG else 10)], "big")
        # a mask, or a bit that nobody agreed on, is for the library to judge
        self._cut = not (second & _MASKED or first & 0x70) and (
            (code == _BINARY and (self._left > PIECE_MOST or not first & _FIN))
            or (code == _CONTINUATION and self._binary)
        )
        if self._cut:
            self._binary = not first & _FIN


def _head_size(data: bytes, at: int) -> int:
    if len(data) - at < 2:
        return 2
    second = data[at + 1]
    length = second & 0x7F
    size = 2 if length < _LONG else 4 if length == _LONG else 10
    return size + 4 if second & _MASKED else size


def _frames(payload: bytes) -> list[bytes]:
    out: list[bytes] = []
    for at in range(0, len(payload), PIECE_MOST):
        piece = payload[at : at + PIECE_MOST]
        out += (bytes((_FIN | _BINARY, _LONG)), len(piece).to_bytes(2, "big"), piece)
    return out
