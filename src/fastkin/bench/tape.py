"""PUBLISH packets of a plant, a block at a time: no message comes twice, and no Python runs for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fastkin.bench.forms import Block
from fastkin.mqtt import _core as _mqtt

if TYPE_CHECKING:
    from fastkin.bench.forms import Forms

CYCLE = 65_535  # packet identifiers: message n of a connection has n % CYCLE + 1
_SLICE = 256 * 1024  # bytes a write, about


class Tape(Protocol):
    """What a source plays."""

    def cut(self, begin: int, most: int) -> tuple[bytes | memoryview, int]:
        """Packets from message `begin` on, `most` of them or what one write takes; how many they are."""
        ...


class PlantTape:
    """The packets of messages `first`, `first + 1`, ... of a plant; message 0 of the tape is message `first`."""

    def __init__(self, forms: Forms, *, qos: int, version: int, first: int = 0) -> None:
        """ValueError: `first` is not where a block begins."""
        if first % forms.block:
            raise ValueError(f"message {first} does not begin a block of {forms.block}")
        packets = [
            _mqtt.publish(forms.topic(n), payload, qos=qos, packet_id=1 if qos else 0, version=version)
            for n, payload in enumerate(forms.templates)
        ]
        payload_at = len(packets[0]) - forms.payload_bytes
        self._packets = Block(packets, [[payload_at + at for at in places] for places in forms.places], forms.digits)
        self._first = first // forms.block
        # before it are the topic, and with 5.0 a length of no properties stands behind it
        self._id_at = payload_at - 2 - (version == 5) if qos else 0
        identifiers = [n % CYCLE + 1 for n in range(CYCLE + forms.block)]
        self._high = bytes(each >> 8 for each in identifiers)
        self._low = bytes(each & 0xFF for each in identifiers)
        self._now = -1
        self._made = memoryview(b"")

    def cut(self, begin: int, most: int) -> tuple[bytes | memoryview, int]:
        packets = self._packets
        block, at = divmod(begin, packets.count)
        if block != self._now:
            self._make(block)
        end = min(at + most, packets.count, at + max(1, _SLICE // packets.stride))
        return self._made[at * packets.stride : end * packets.stride], end - at

    def _make(self, block: int) -> None:
        packets = self._packets
        packets.write(self._first + block)
        if self._id_at:
            n = block * packets.count % CYCLE
            packets.data[self._id_at :: packets.stride] = self._high[n : n + packets.count]
            packets.data[self._id_at + 1 :: packets.stride] = self._low[n : n + packets.count]
        # A copy: what was cut from the block before may still wait in a socket's buffer.
        self._made = memoryview(bytes(packets.data))
        self._now = block
