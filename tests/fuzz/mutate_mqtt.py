"""Random mutations of MQTT packets into the codec: a result or ProtocolError, nothing else.

    python tests/fuzz/mutate_mqtt.py [--count N] [--seed N] [--keep FILE]

Meant for the sanitizer build, where a read past the end stops the process; --keep leaves the bytes
of the last session in FILE for that case. A run is repeatable: batch by batch from (seed, batch).
"""

from __future__ import annotations

import argparse
import mmap
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastkin.errors import ProtocolError
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import CONNACKS, connack, corpus

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 2000
PACKETS = 12  # the most one session is fed before a new one takes its place
# values that sit at the edges of lengths, identifiers and flags
EDGES = bytes((0, 1, 2, 3, 0x7F, 0x80, 0x81, 0xFF, 0x23, 0x2B, 0x26, 0x0B, 0x62, 0x90))
EVENTS = (
    _mqtt.Connack,
    _mqtt.Suback,
    _mqtt.Unsuback,
    _mqtt.Puback,
    _mqtt.Pingresp,
    _mqtt.Disconnect,
)


def mutate(wire: bytes, draw: Callable[[], float], seeds: list[bytes]) -> bytes:
    """One to four changes: flip, overwrite, cut, insert, repeat, splice."""
    data = bytearray(wire)
    for _ in range(1 + int(draw() * draw() * 4)):
        size = len(data)
        if not size:
            return b"\x30"
        # near the front sit header, lengths and properties
        at = int(draw() * draw() * size)
        kind = int(draw() * 8)
        if kind < 2:
            data[at] ^= 1 << int(draw() * 8)
        elif kind < 4:
            data[at] = EDGES[int(draw() * len(EDGES))]
        elif kind == 4:
            del data[at : at + 1 + int(draw() * 8)]
        elif kind == 5:
            data[at:at] = EDGES[: 1 + int(draw() * 4)]
        elif kind == 6:
            data[at:at] = data[at : at + 1 + int(draw() * 16)]
        else:
            other = seeds[int(draw() * len(seeds))]
            data[at:] = other[int(draw() * len(other)) :][:300]
    return bytes(data)


class Target:
    """One session after the other; most have a sink in C, some one that stalls."""

    def __init__(self, version: int, draw: Callable[[], float], first: bytes) -> None:
        self.draw = draw
        self.acks = _mqtt.AckTracker()
        router = _mqtt.Router(max_topics=16)
        self.counting = _mqtt.CountSink(self.acks)
        if draw() < 0.15:
            router.add("#", _mqtt.CallbackSink(self.stalling))
        router.add("+/#" if draw() < 0.5 else "#", self.counting)
        self.session = _mqtt.Session(
            version=version,
            acks=self.acks,
            router=router,
            max_packet_bytes=30_000,
            topic_alias_maximum=3,
        )
        self.session.feed_data(first)

    def stalling(self, topic: bytes, payload: bytes, token: int) -> int:
        return -1 if self.draw() < 0.3 else 0

    def feed(self, data: bytes) -> None:
        session = self.session
        if self.draw() < 0.2:
            cut = int(self.draw() * len(data))
            session.feed_data(data[:cut])
            data = data[cut:]
        flags = session.feed_data(data)
        while flags & (_mqtt.STALLED | _mqtt.APART):
            if (apart := session.apart) is not None:
                session.take_piece()
                if not session.apart_left:
                    session.finish_apart()
                    self.acks.settled(apart.token)
            flags = session.resume()
        self.counting.release()

    def check(self) -> None:
        """What must hold whatever came."""
        ready, unacked = self.acks.ready, self.acks.unacked
        apart = self.session.apart  # not all of its bytes came
        assert ready + (apart is not None and apart.token != 0) == unacked, "not ready although all is settled"
        assert len(self.session.take_output()) >= 4 * ready
        for event in self.session.take_events():
            assert isinstance(event, EVENTS), repr(event)
            repr(event)


def run(count: int, seed: int, keep: Path | None = None) -> tuple[int, int]:
    """(sessions that ended in ProtocolError, PUBLISHes taken)."""
    broken = messages = 0
    store = None
    if keep is not None:
        keep.write_bytes(bytes(1 << 20))
        with keep.open("r+b") as file:
            store = mmap.mmap(file.fileno(), 1 << 20)
    packets = {version: corpus(version) for version in (4, 5)}
    done = 0
    while done < count:
        rng = random.Random(f"{seed}/{done // BATCH}")
        draw = rng.random
        batch_end = min(done + BATCH, count)
        while done < batch_end:
            version = 4 if draw() < 0.4 else 5
            seeds = packets[version]
            history = [connack(version)]
            if draw() < 0.1:
                options = CONNACKS[version]
                history = [mutate(options[int(draw() * len(options))], draw, seeds)]
            try:
                target = Target(version, draw, history[0])
            except ProtocolError:
                broken += 1
                done += 1
                continue
            try:
                for _ in range(PACKETS):
                    wire = seeds[int(draw() * len(seeds))]
                    if len(wire) > 5000 and draw() < 0.9:
                        continue
                    # whole packets between keep a session alive and build up its state
                    if draw() < 0.6:
                        wire = mutate(wire, draw, seeds)
                        done += 1
                    history.append(wire)
                    if store is not None:
                        record = b"".join(history)[-(1 << 19) :]
                        store[: len(record) + 4] = len(record).to_bytes(4, "big") + record
                    target.feed(wire)
            except ProtocolError:
                broken += 1
                target.counting.release()
            except BaseException:
                print(f"seed {seed}, batch {done // BATCH}, version {version}: {history!r}")
                raise
            messages += target.session.messages
            target.check()
    return broken, messages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="mutated packets (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a file for the bytes of the last session")
    arguments = parser.parse_args()
    start = time.perf_counter()
    broken, messages = run(arguments.count, arguments.seed, arguments.keep)
    took = time.perf_counter() - start
    print(
        f"{arguments.count} mutated packets, seed {arguments.seed}: {broken} protocol errors,"
        f" {messages} PUBLISHes taken, nothing else; {arguments.count / took:,.0f} a second"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
