"""The ledger of a case: what became of every record, and how often it may have come twice.

Records are numbered. Every check is made from bytes that others wrote: the stream's log, the dead-letter
file, the packets that a proxy saw pass. Nothing that fastkin counts is believed here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aws_kinesis_agg import MAGIC as KPL_MAGIC
from aws_kinesis_agg.deaggregator import messages_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_LATE_S = 0.5
_DATA = re.compile(rb'"Data":"([^"]*)"')
_NUMBER = re.compile(rb"n(\d{7})[.]")


def record(number: int, size: int = 0) -> bytes:
    """The bytes of one record; `size` 0 means one between 60 and 260 that follows from the number."""
    return (b"n%07d." % number).ljust(size or 60 + number * 37 % 200, b"%x" % (number % 16))


def numbers(payload: bytes) -> list[int]:
    """Which records are in there: a record, a frame, a broken frame."""
    return [int(found) for found in _NUMBER.findall(payload)]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened: a packet that passed the proxy, or a call that Kinesis stored."""

    kind: str  # PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, STORED
    link: int  # which connection to the broker; 0: none
    packet_id: int
    which: tuple[int, ...]  # numbers of the records
    dup: bool = False


class History:
    """Everything in the order in which it passed; broker's and Kinesis's sides are seen by one loop."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, kind: str, link: int, packet_id: int, which: Iterable[int], dup: bool = False) -> None:
        self.events.append(Event(kind, link, packet_id, tuple(which), dup))

    def faults(self, safe: set[int], *, whole: bool) -> list[str]:
        """What may not have happened. `safe`: set aside durably. `whole`: every store was seen, none is on a disk.

        - Acknowledgements of a connection leave in the order of its PUBLISHes [MQTT-4.6.0-2, -3], each once, none
          for what was not handed out on it.
        - A PUBREC comes before its PUBREL, and a PUBCOMP answers a PUBREL.
        - What is acknowledged was stored before, or is set aside.
        """
        found: list[str] = []
        waiting: dict[int, deque[Event]] = {}
        released: dict[int, Counter[int]] = {}
        stored: set[int] = set()
        for event in self.events:
            where = f"connection {event.link}, packet {event.packet_id}"
            queue = waiting.setdefault(event.link, deque())
            if event.kind == "STORED":
                stored.update(event.which)
            elif event.kind == "PUBLISH":
                again = event.dup and any(
                    each.packet_id == event.packet_id and each.which == event.which for each in queue
                )
                if not again:  # one that waits here and comes again on the same connection is answered once
                    queue.append(event)
            elif event.kind in ("PUBACK", "PUBREC"):
                if not queue or queue[0].packet_id != event.packet_id:
                    found.append(f"{event.kind} out of order or for nothing: {where}")
                    continue
                early = [n for n in queue.popleft().which if n not in stored and n not in safe]
                if early and whole:
                    found.append(f"{event.kind} before records {early[:5]} were stored: {where}")
            elif event.kind == "PUBREL":
                released.setdefault(event.link, Counter())[event.packet_id] += 1
            elif event.kind == "PUBCOMP":
                if released.get(event.link, Counter())[event.packet_id] < 1:
                    found.append(f"PUBCOMP for nothing: {where}")
                else:
                    released[event.link][event.packet_id] -= 1
        return found


@dataclass
class Ledger:
    published: set[int] = field(default_factory=set)  # the broker took them over
    handed: Counter[int] = field(default_factory=Counter)  # by the broker to fastkin, every time
    acked: set[int] = field(default_factory=set)
    unacked_at_cut: int = 0  # records of messages without acknowledgement when a connection ended
    late_acks: int = 0  # of messages acknowledged so shortly before the end that the broker may not have read it
    repeated: int = 0  # records that the plant published again: the broker had not answered
    too_early: list[int] = field(default_factory=list)  # acknowledged before they were safe
    history: History = field(default_factory=History)
    links: int = 0  # connections to the broker so far
    # asked for what is acknowledged: those of them that are neither stored nor set aside
    unsafe: Callable[[Iterable[int]], list[int]] | None = None

    def ack(self, which: list[int]) -> None:
        self.acked.update(which)
        if self.unsafe is not None:
            self.too_early += self.unsafe(which)

    @property
    def redelivered(self) -> int:
        return self.handed.total() - len(self.handed)


class MqttWatch:
    """Reads along one MQTT connection: what the broker hands out, what is acknowledged."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        ledger.links += 1
        self._link = ledger.links
        self._up = bytearray()
        self._down = bytearray()
        self._version = 0
        self._unacked: dict[int, list[int]] = {}
        self._late: deque[tuple[float, int]] = deque()

    @property
    def unacked(self) -> int:
        return len(self._unacked)

    def up(self, data: bytes) -> None:
        self._up += data
        for first, body in _packets(self._up):
            if first >> 4 == 1:
                self._version = body[6]
            elif first >> 4 in (4, 5):  # PUBACK, PUBREC
                packet_id = int.from_bytes(body[:2], "big")
                self._ledger.history.add("PUBACK" if first >> 4 == 4 else "PUBREC", self._link, packet_id, ())
                which = self._unacked.pop(packet_id, None)
                if which is not None:
                    self._ledger.ack(which)
                    now = time.monotonic()
                    self._late.append((now, len(which)))
                    while self._late[0][0] < now - _LATE_S:
                        self._late.popleft()
            elif first >> 4 == 7:
                self._ledger.history.add("PUBCOMP", self._link, int.from_bytes(body[:2], "big"), ())

    def down(self, data: bytes) -> None:
        self._down += data
        for first, body in _packets(self._down):
            if first >> 4 == 3:
                self._published(first, body)
            elif first >> 4 == 6:
                self._ledger.history.add("PUBREL", self._link, int.from_bytes(body[:2], "big"), ())

    def _published(self, first: int, body: bytes) -> None:
        at = 2 + int.from_bytes(body[:2], "big")
        packet_id = 0
        if first & 0x06:
            packet_id = int.from_bytes(body[at : at + 2], "big")
            at += 2
        if self._version == 5:
            size = shift = 0
            while True:
                size |= (body[at] & 0x7F) << shift
                shift += 7
                at += 1
                if body[at - 1] < 0x80:
                    break
            at += size
        which = numbers(body[at:])
        self._ledger.handed.update(which)
        if packet_id:
            self._unacked[packet_id] = which
            self._ledger.history.add("PUBLISH", self._link, packet_id, which, bool(first & 0x08))

    def closed(self) -> None:
        since = time.monotonic() - _LATE_S
        self._ledger.late_acks += sum(count for when, count in self._late if when >= since)
        self._ledger.unacked_at_cut += sum(map(len, self._unacked.values()))
        self._unacked.clear()


def _packets(buffer: bytearray) -> Iterable[tuple[int, bytes]]:
    """Takes the whole packets off the front."""
    while len(buffer) >= 2:
        size = shift = 0
        for at in range(1, min(5, len(buffer))):
            size |= (buffer[at] & 0x7F) << shift
            shift += 7
            if buffer[at] < 0x80:
                break
        else:
            return
        end = at + 1 + size
        if len(buffer) < end:
            return
        first, body = buffer[0], bytes(buffer[at + 1 : end])
        del buffer[:end]
        yield first, body


def user_records(data: bytes) -> list[bytes]:
    """What is in a record of Kinesis: its own bytes, or those of each record that was aggregated in it."""
    if not data.startswith(KPL_MAGIC):
        return [data]
    message = data[len(KPL_MAGIC) : -16]
    assert hashlib.md5(message).digest() == data[-16:], "an aggregate's checksum is wrong"
    parsed = messages_pb2.AggregatedRecord()
    parsed.ParseFromString(message)
    return [each.data for each in parsed.records]


def dead_letters(path: Path) -> list[bytes]:
    """The payloads of a dead-letter file and of its rotated predecessors; a torn last line is left out."""
    payloads = []
    for each in sorted(path.parent.glob(path.name + "*")):
        for line in each.read_bytes().splitlines():
            try:
                payloads.append(base64.b64decode(json.loads(line)["payload"]))
            except (ValueError, KeyError):
                continue
    return payloads


def spooled(path: Path) -> Counter[int]:
    """The numbers in a spool whose process has ended, read from a copy of file and log."""
    found: Counter[int] = Counter()
    if not path.exists():
        return found
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "spool"
        for suffix in ("", "-wal"):
            if Path(f"{path}{suffix}").exists():
                shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        db = sqlite3.connect(copy)
        try:
            for (body,) in db.execute("SELECT body FROM bodies"):
                for data in _DATA.findall(body):
                    found.update(numbers(base64.b64decode(data)))
        finally:
            db.close()
    return found
