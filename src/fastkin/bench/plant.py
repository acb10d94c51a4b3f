"""A plant of simulated welders: numbered records, so that each can be found again in the stream.

A record is the sample JSON of the MQTT-to-Kinesis microservice: nine fields, 152 bytes. Its number is
written into the device's name and the first three sensors, so payloads never repeat, and
`welder_number` reads it back. Most records go out one by one, the rest in bulk frames.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastkin._codec import encode_frame

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICES = 1000
NUMBERS = DEVICES * 900**3  # how many records can be told apart
PAYLOAD_BYTES = 152

_PAYLOAD = (
    b'{"name":"device%03d","model":"welder","status":"%b","sensor_1":%d.%d,"sensor_2":%d.%d,'
    b'"sensor_3":%d.%d,"sensor_4":0.%d,"sensor_5":%d.%d,"sensor_6":%d.%02d}'
)
_STATUS = (b"running", b"running", b"running", b"stopped")
_NUMBER = re.compile(
    rb'\{"name":"device(\d{3})","model":"welder","status":"[a-z]{7}","sensor_1":(\d\d)\.(\d),'
    rb'"sensor_2":(\d\d)\.(\d),"sensor_3":(\d\d)\.(\d),'
)


def welder_payload(n: int) -> bytes:
    """Record `n` of the plant: 152 bytes of JSON, another one for every n below NUMBERS."""
    if not 0 <= n < NUMBERS:
        raise ValueError(f"record number {n}: 0 to {NUMBERS - 1} can be told apart")
    return welder_text(n, (n * 2_654_435_761) & 0xFFFFFFFF)


def welder_text(n: int, noise: int) -> bytes:
    """Record `n` with other values, of 32 bits, where its number does not stand."""
    rest, device = divmod(n, DEVICES)
    rest, one = divmod(rest, 900)
    three, two = divmod(rest, 900)
    return _PAYLOAD % (
        device,
        _STATUS[noise >> 30],
        *divmod(one + 100, 10),
        *divmod(two + 100, 10),
        *divmod(three + 100, 10),
        noise % 10,
        *divmod(noise // 10 % 100, 10),
        100 + noise // 1000 % 900,
        noise // 900_000 % 100,
    )


# The demo and the benches look each record up by its number: that finds a loss, and what came twice.
def welder_number(payload: bytes) -> int | None:
    """The number of a record, or None when the payload is not one of the plant's."""
    n = welder_told(payload)
    return n if n is not None and 0 <= n < NUMBERS and welder_payload(n) == payload else None


def welder_told(payload: bytes) -> int | None:
    """The number that stands in a record, whatever its other values are; None when it is no record of a welder."""
    found = _NUMBER.match(payload)
    if found is None:
        return None
    device, *digits = (int(group) for group in found.groups())
    one, two, three = (10 * whole + tenth - 100 for whole, tenth in zip(digits[::2], digits[1::2], strict=True))
    return ((three * 900 + two) * 900 + one) * DEVICES + device


class Publishes(Protocol):
    """What the plant needs of a publisher (publisher.Publisher has it)."""

    async def publish(self, topic: str, payload: bytes, qos: int = 0) -> None: ...


@dataclass(slots=True)
class Message:
    topic: str
    payload: bytes
    records: int


@dataclass(slots=True, kw_only=True)
class Plant:
    """What the machines say. `published` counts records, the first has number `first`."""

    rate: float = 2000.0  # records per second
    bulk_share: float = 0.5  # of the records that travel in frames
    frame_records: int = 50
    topic: str = "plant/{device}/welder"
    bulk_topic: str = "/devices/{device}/bulkData/telemetry"
    qos: int = 1
    first: int = 0
    published: int = 0
    messages: int = 0

    def records(self) -> Iterator[Message]:
        """Endless: the same messages for the same settings."""
        n = self.first
        owed = 0.0  # records that frames are behind their share
        while True:
            device = f"device{n % DEVICES:03d}"
            if owed >= self.frame_records:
                numbers = range(n, n + self.frame_records)
                frame = encode_frame([welder_payload(each) for each in numbers])
                message = Message(self.bulk_topic.format(device=device), frame, self.frame_records)
                owed -= self.frame_records * (1 - self.bulk_share)
            else:
                message = Message(self.topic.format(device=device), welder_payload(n), 1)
                owed += self.bulk_share
            if self.bulk_share >= 1 and message.records == 1:
                owed = float(self.frame_records)
                continue
            n += message.records
            yield message

    async def run(self, publisher: Publishes, seconds: float, stop: asyncio.Event) -> None:
        """Publish at the rate for so long. A slow broker slows the plant; it does not catch up."""
        messages = self.records()
        message = next(messages)
        begin = time.monotonic()
        debt = 0.0
        before = begin
        while not stop.is_set() and (now := time.monotonic()) - begin < seconds:
            debt = min(debt + (now - before) * self.rate, self.rate / 5)
            before = now
            while debt >= message.records:
                await publisher.publish(message.topic, message.payload, self.qos)
                self.published += message.records
                self.messages += 1
                debt -= message.records
                message = next(messages)
            await asyncio.sleep(0.01)
