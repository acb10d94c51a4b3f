"""An MQTT server for one subscriber, which plays pre-encoded messages as fast as they are taken.

    async with Source(10_000) as source: ... connect to source.port ...; await source.done.wait()
    python -m fastkin.bench.source --messages 1000000 --window 20000     prints its port, then runs

It measures receivers: what it sends is encoded beforehand (or a block at a time, by a `tape`) and written in large
slices, packet identifiers run from 1 to 65535 and around, so that acknowledgements are checked by comparing bytes with
what is expected. It speaks 3.1.1 and 5.0, as much as a subscriber needs. When the subscriber comes back
to its session, what was not acknowledged is played again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from array import array
from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self, cast

from fastkin.bench.plant import welder_payload
from fastkin.bench.tape import CYCLE
from fastkin.mqtt import _core as _mqtt

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from fastkin.bench.tape import Tape

DISTINCT = 1024  # payloads
_SLICE = 256 * 1024  # bytes a write, about
_TAPE_BYTES = 64 << 20  # what is encoded beforehand: a cycle of small messages, not one of large frames
_HIGH = 512 * 1024  # bytes waiting in the transport
_TICK_S = 0.001  # of a paced source
_GOODBYE_S = 30.0  # for the subscriber to leave once everything is acknowledged
_PUBACK = 0x40
_ACKS = b"".join(b"\x40\x02" + i.to_bytes(2, "big") for i in range(1, CYCLE + 1)) * 2


def welders(count: int = DISTINCT) -> list[bytes]:
    """152 B of JSON each, as one machine says it."""
    return [welder_payload(n) for n in range(count)]


def frames(records: int = 100, count: int = 32) -> list[bytes]:
    """Bulk frames of so many welder records each."""
    return [frame([welder_payload(n * records + i) for i in range(records)]) for n in range(count)]


def frame(records: Sequence[bytes]) -> bytes:
    """The bulk format: str "1.0", then one bin per record."""
    out = bytearray(b"\xa31.0")
    for record in records:
        size = len(record)
        if size < 1 << 8:
            out += b"\xc4" + size.to_bytes(1, "big")
        elif size < 1 << 16:
            out += b"\xc5" + size.to_bytes(2, "big")
        else:
            out += b"\xc6" + size.to_bytes(4, "big")
        out += record
    return bytes(out)


class _Tape:
    """One cycle of encoded PUBLISH packets. Message n of a run is packet n % length."""

    def __init__(self, payloads: Sequence[bytes], topics: Sequence[str], qos: int, version: int, count: int) -> None:
        self._payloads = payloads
        self._topics = topics
        self._qos = qos
        self._version = version
        # A cycle is as long as there are identifiers: then message n always has the same packet, and packets are made
        # once.
        self.length = min(count, CYCLE) if qos == 0 else CYCLE
        self._end = max(1, min(self.length, count))  # no more of the cycle is needed
        self._size = sum(map(len, payloads)) / len(payloads) + 40
        self._starts = array("Q")
        # Large payloads are encoded when they are sent: 65,535 of them would not fit into memory.
        if self._size * self._end <= _TAPE_BYTES:
            packets = [self._encode(i) for i in range(self._end)]
            self._bytes = memoryview(b"".join(packets))
            self._starts.extend(accumulate(map(len, packets), initial=0))

    def _encode(self, i: int) -> bytes:
        return _mqtt.publish(
            self._topics[i % len(self._topics)],
            self._payloads[i % len(self._payloads)],
            qos=self._qos,
            packet_id=i % CYCLE + 1 if self._qos else 0,
            version=self._version,
        )

    def cut(self, begin: int, most: int) -> tuple[bytes | memoryview, int]:
        """Packets from message `begin` on, `most` of them or what one write takes; how many they are."""
        at = begin % self.length
        end = min(at + most, self._end, at + max(1, int(_SLICE / self._size)))
        if self._starts:
            return self._bytes[self._starts[at] : self._starts[end]], end - at
        return b"".join([self._encode(i) for i in range(at, end)]), end - at


class Source:
    """Serves one subscriber. `done` is set when everything is acknowledged (QoS 0: written).

    Large because what it is told, and what its player counts, stand in one place.
    """

    def __init__(
        self,
        messages: int,
        *,
        payloads: Sequence[bytes] | None = None,
        topics: Sequence[str] = ("plant/1/welder",),
        qos: int = 1,
        window: int = 20_000,
        rate: float | None = None,
        batch: int | None = None,
        latency: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        tape: Callable[[int], Tape] | None = None,
        held: bool = False,
        on_write: Callable[[int, int], None] | None = None,
        tls: ssl.SSLContext | None = None,
        siblings: Sequence[Source] = (),
    ) -> None:
        """`window` is lowered to a 5.0 subscriber's Receive Maximum. `rate`: messages per second, None for full speed.

        `batch`: at most so many messages a write, 1 being what a broker does that forwards each as it comes.
        `latency`: record the time from each write to its acknowledgement.
        `tape`: gives the packets to play for a version of MQTT, 4 or 5, instead of `payloads` and `topics` in turn.
        `held`: nothing is played before go(). `on_write`: called before messages are written, with the first and how
        many. `tls`: speak TLS. `siblings`: sources that serve the second, third, ... subscriber on this one's port,
        told apart by their client ids.
        """
        if qos not in {0, 1}:
            raise ValueError(f"QoS {qos}: a source plays QoS 0 or 1")
        self.messages = messages
        self.qos = qos
        self.window: int = min(window, CYCLE)
        self.rate = rate
        self.batch = batch
        self.host = host
        self.port: int = port
        self.done: asyncio.Event = asyncio.Event()
        self.left: asyncio.Event = asyncio.Event()  # the subscriber has gone
        self.subscribed: asyncio.Event = asyncio.Event()
        self.sent = 0  # with repetitions
        self.acked = 0
        self.order_errors = 0
        self.connects = 0
        self.pings = 0
        self.filters: list[str] = []
        self.client_id = ""
        self.held: bool = held
        self._make_tape = tape or (
            lambda version: _Tape(welders() if payloads is None else payloads, topics, qos, version, messages)
        )
        self._tapes: dict[int, Tape] = {}
        self._on_write = on_write
        self._tls = tls
        self._siblings = siblings
        self._latency: array[float] | None = array("d") if latency else None
        self._began = 0.0
        self._ended = 0.0
        self._server: asyncio.Server | None = None
        self._player: _Player | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for source in self._all():
            # encoding takes longer than a client cares to wait
            source._tapes = {version: source._make_tape(version) for version in (4, 5)}
        self._server = await loop.create_server(lambda: _Player(self), self.host, self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.drop()
        await self._server.wait_closed()

    def drop(self) -> None:
        """Cut the connection, as a network does."""
        for source in self._all():
            if source._player is not None:
                source._player.abort()

    def _all(self) -> list[Source]:
        """This one and its siblings."""
        return [self, *self._siblings]

    def _of(self, client_id: str) -> Source:
        """Who serves this client."""
        for source in self._all():
            if source.client_id in ("", client_id):
                return source
        return self

    def go(self) -> None:
        """Play, when it was held."""
        self.held = False
        if self.subscribed.is_set():
            self._start()
            if self._player is not None:
                self._player.begin()

    def report(self) -> dict[str, Any]:
        """`messages` are to be played, `sent` counts repetitions too, `order_errors` acknowledgements out of order."""
        seconds = (self._ended or time.perf_counter()) - self._began if self._began else 0.0
        line: dict[str, Any] = {
            "messages": self.messages,
            "sent": self.sent,
            "acked": self.acked,
            "order_errors": self.order_errors,
            "connects": self.connects,
            "seconds": round(seconds, 6),
            "done": self.done.is_set(),
        }
        if self._latency:
            times = sorted(self._latency)
            line["latency_ms"] = {
                f"p{part}": round(times[min(len(times) - 1, len(times) * part // 100)] * 1000, 3) for part in (50, 99)
            }
        return line

    # -- what the player reports -----------------------------------------------------------------

    def _start(self) -> None:
        self.subscribed.set()
        if not self._began and not self.held:
            self._began = time.perf_counter()
            if self.messages == 0:
                self._finish()

    def _finish(self) -> None:
        if not self.done.is_set():
            self._ended = time.perf_counter()
            self.done.set()


# Enough of a broker to measure with, and no more: it believes its subscriber, and a malformed packet is not its
# subject.
class _Player(asyncio.Protocol):
    """One connection of the subscriber."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._tape: Tape | None = None
        self._version = 4
        self._buffer = b""
        self._next = 0  # the message to write next; the source's `acked` is the first without its PUBACK
        self._early: set[int] = set()  # acknowledged before their turn
        self._window = source.window
        self._blocked = False
        self._playing = False
        self._clock = 0.0
        self._due = 0.0
        self._writes: deque[tuple[int, float]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._transport.set_write_buffer_limits(high=_HIGH)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._playing = False
        if self._timer is not None:
            self._timer.cancel()
        if self._source._player is self:
            self._source._player = None
            self._source.left.set()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._play()

    # -- out ---------------------------------------------------------------------------------------

    def _play(self) -> None:
        source = self._source
        if not self._playing or source.held or self._transport is None or self._tape is None:
            return
        room = source.messages
        if source.rate is not None:
            now = self._loop.time()
            self._due += (now - self._clock) * source.rate
            self._clock = now
            room = int(self._due)
        room = min(room, source.messages - self._next)
        if source.qos:
            room = min(room, source.acked + self._window - self._next)
        while room > 0 and not self._blocked:
            data, count = self._tape.cut(self._next, min(room, source.batch or room))
            if source._on_write is not None:
                source._on_write(self._next, count)
            self._transport.write(data)
            self._next += count
            source.sent += count
            room -= count
            if source.rate is not None:
                self._due -= count
            if source._latency is not None:
                self._writes.append((self._next, self._loop.time()))
        if source.rate is not None:
            # what could not be sent in time is not caught up: no more than 10 ms of it
            self._due = min(self._due, 1 + source.rate * 0.01)
            if self._timer is None and self._next < source.messages:
                # not before the next message is due: a slow source shall not wake the machine that is measured
                wait = max(_TICK_S, (1 - self._due) / source.rate)
                self._timer = self._loop.call_later(wait, self._tick)
        if source.qos == 0 and self._next >= source.messages:
            self._finish_when_written()

    def begin(self) -> None:
        """From now on time passes for a paced source."""
        self._clock = self._loop.time()
        self._play()

    def _tick(self) -> None:
        self._timer = None
        self._play()

    def _finish_when_written(self) -> None:
        if self._transport is not None and self._transport.get_write_buffer_size() and self._playing:
            self._loop.call_later(_TICK_S, self._finish_when_written)
        elif self._playing:
            self._source._finish()

    # -- in ----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        at = 0
        if data[0] == _PUBACK and self._source.qos:
            at = self._run(data)
        end = len(data)
        while end - at >= 2:
            size, head = 0, 1
            while True:
                if head > end - at - 1:
                    size = -1
                    break
                byte = data[at + head]
                size |= (byte & 0x7F) << (7 * (head - 1))
                head += 1
                if byte < 0x80:
                    break
            if size < 0 or end - at < head + size:
                break
            self._packet(data[at], data[at + head : at + head + size])
            at += head + size
        self._buffer = data[at:]
        self._play()

    def _run(self, data: bytes) -> int:
        """Acknowledgements in order, compared as bytes; how many bytes they are."""
        source = self._source
        count = min(len(data) // 4, self._next - source.acked, CYCLE)
        if count == 0 or self._early:
            return 0
        at = source.acked % CYCLE * 4
        if data[: 4 * count] != _ACKS[at : at + 4 * count]:
            return 0  # something else is among them: one by one
        self._settled(count)
        return 4 * count

    def _settled(self, count: int) -> None:
        source = self._source
        source.acked += count
        if source._latency is not None:
            now = self._loop.time()
            while self._writes and self._writes[0][0] <= source.acked:
                source._latency.append(now - self._writes.popleft()[1])
        if source.acked >= source.messages:
            source._finish()

    def _packet(self, kind: int, body: bytes) -> None:
        source = self._source
        assert self._transport is not None
        if kind == _PUBACK:
            self._puback(int.from_bytes(body[:2], "big"))
        elif kind == 0x10:
            self._connect(body)
        elif kind == 0x82:
            self._subscribe(body)
        elif kind == 0xC0:
            source.pings += 1
            self._transport.write(b"\xd0\x00")
        elif kind == 0xE0:
            self._playing = False
            self._transport.close()

    def _puback(self, packet_id: int) -> None:
        source = self._source
        # which of the outstanding messages has this identifier
        message = source.acked + (packet_id - 1 - source.acked) % CYCLE
        if message >= self._next or message in self._early:
            source.order_errors += 1  # for nothing we sent
            return
        if message != source.acked:
            source.order_errors += 1
            self._early.add(message)
            return
        count = 1
        while source.acked + count in self._early:
            self._early.remove(source.acked + count)
            count += 1
        self._settled(count)

    def _connect(self, body: bytes) -> None:
        assert self._transport is not None
        self._version = body[6]
        clean = bool(body[7] & 2)
        at = 10
        maximum = CYCLE
        if self._version == 5:
            length, at = _varint(body, at)
            maximum = _receive_maximum(body[at : at + length])
            at += length
        client_id = body[at + 2 : at + 2 + int.from_bytes(body[at : at + 2], "big")].decode()
        source = self._source = self._source._of(client_id)
        source.client_id = client_id
        self._window = min(source.window, maximum)
        present = source.connects > 0 and not clean
        source.connects += 1
        source.left.clear()
        if source._player is not None:
            source._player.abort()  # the same session, taken over
        source._player = self
        # What was not acknowledged is played again, as a broker does for a kept session.
        self._next = source.acked
        self._tape = source._tapes[self._version]
        self._transport.write(bytes((0x20, 3 if self._version == 5 else 2, present, 0)) + b"\0" * (self._version == 5))

    def _subscribe(self, body: bytes) -> None:
        source = self._source
        assert self._transport is not None
        at = 2
        if self._version == 5:
            length, at = _varint(body, at)
            at += length
        codes = bytearray()
        while at + 2 < len(body):
            size = int.from_bytes(body[at : at + 2], "big")
            source.filters.append(body[at + 2 : at + 2 + size].decode())
            codes.append(min(body[at + 2 + size] & 3, source.qos))
            at += 3 + size
        head = body[:2] + (b"\0" if self._version == 5 else b"")
        self._transport.write(bytes((0x90, len(head) + len(codes))) + head + codes)
        self._clock = self._loop.time()
        self._playing = True
        source._start()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _receive_maximum(properties: bytes) -> int:
    at = 0
    sizes = {0x11: 4, 0x17: 1, 0x19: 1, 0x21: 2, 0x22: 2, 0x27: 4}
    while at < len(properties) and (kind := properties[at]) in sizes:
        if kind == 0x21:
            return int.from_bytes(properties[at + 1 : at + 3], "big")
        at += 1 + sizes[kind]
    return CYCLE


async def _serve(args: argparse.Namespace) -> int:
    payloads = None
    if args.payload == "bulk":
        payloads = frames(args.records)
    elif args.payload != "welder":
        payloads = [bytes([65 + i % 26]) * int(args.payload) for i in range(26)]
    source = Source(
        args.messages,
        payloads=payloads,
        topics=args.topic.split(","),
        qos=args.qos,
        window=args.window,
        rate=args.rate,
        batch=args.batch,
        latency=args.latency,
        port=args.port,
    )
    async with source:
        print(source.port, flush=True)
        try:
            async with asyncio.timeout(args.timeout):
                await source.done.wait()
        except TimeoutError:
            pass
        print(json.dumps(source.report()), flush=True)
        # The subscriber shall see the end of what it works on, not the end of the connection.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await source.left.wait()
    return 0 if source.done.is_set() else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The process: prints its port, then, when all is acknowledged, one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m fastkin.bench.source", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="port to listen on, on loopback; 0: any that is free")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--payload", default="welder", help="welder (152 B JSON), bulk, or a number of bytes")
    parser.add_argument("--records", type=int, default=100, help="records in each bulk frame")
    parser.add_argument(
        "--topic", default="plant/1/welder", help="topics, separated by commas; messages take them in turn"
    )
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1)
    parser.add_argument("--window", type=int, default=20_000, help="how many messages may be unacknowledged")
    parser.add_argument("--rate", type=float, help="messages per second; without it: full speed")
    parser.add_argument("--batch", type=int, help="most messages in one write")
    parser.add_argument("--latency", action="store_true", help="report the time from write to acknowledgement")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds until it gives up")
    args = parser.parse_args(argv)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_serve(args))
    return int(uvloop.run(_serve(args)))


if __name__ == "__main__":
    sys.exit(main())
