"""What the machines of a plant say: simulated welders, seeded, in four forms of message.

    forms = Forms("bulk", seed=1, samples=100)
    forms.payload(4711)              message 4711: the same bytes for the same seed
    forms.records(payload)           what must be in the stream when it was stored
    forms.number(record)             the number of a record: messages * samples + place in its message

Every message of a form has one length, and its number stands at places that are the same in all of them. So a block of
messages becomes the next one by a few strided copies (`Block`): a source that plays a million messages a second makes
each of them anew, none comes twice, and no Python runs for a message.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import msgpack
import orjson

from fastkin._codec import encode_frame
from fastkin.bench.plant import DEVICES, welder_payload, welder_text, welder_told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FORMS: Final = {
    "welder": "the nine fields of the microservice's sample, 152 bytes of JSON",
    "wide": "some forty fields of one machine, 829 bytes of JSON",
    "bulk": "a bulk frame of samples of arc current, voltage, wire feed and gas flow, each a record",
    "msgpack": "a MessagePack map, stored as JSON",
}
FRAMES: Final = 100  # devices that send frames: a block of more of them would be megabytes
_DIGITS: Final = 10
_ID = re.compile(rb'"id":"(\d{10})(?:-(\d{4}))?"')
_SENSORS = re.compile(rb'"sensor_1":(\d\d)\.(\d),"sensor_2":(\d\d)\.(\d),"sensor_3":(\d\d)\.(\d),')
MOST_SAMPLES: Final = 10_000  # that have four digits


@dataclass(slots=True)
class Reading:
    """What is measured at a torch in one moment."""

    current: float  # A
    voltage: float  # V
    wire_feed: float  # m/min
    gas_flow: float  # l/min
    arc: int  # 1: it burns
    event: int  # 1: it was struck just now, 2: it went out just now


class Welder:
    """One machine. It welds a seam, rests, and begins anew; gas flows a little before and after the arc."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._burning = draw.random() < 0.7
        self._left = draw.randrange(1, 60)  # readings until that changes
        self._current = draw.uniform(120, 320)

    def read(self) -> Reading:
        draw = self._draw
        self._left -= 1
        event = 0
        if self._left <= 0:
            self._burning = not self._burning
            event = 1 if self._burning else 2
            self._left = draw.randrange(40, 120) if self._burning else draw.randrange(5, 40)
            self._current = draw.uniform(120, 320)
        if not self._burning:
            flows = self._left <= 3 or event == 2
            return Reading(0.0, 0.0, 0.0, draw.uniform(11, 13) if flows else 0.0, 0, event)
        current = self._current * draw.gauss(1, 0.04)
        # the line of a MIG/MAG source: more current, more voltage and more wire
        voltage = 14 + 0.05 * current + draw.gauss(0, 0.6)
        return Reading(current, voltage, current / 32 + draw.gauss(0, 0.1), draw.uniform(11.5, 12.5), 1, event)


def _five(value: float) -> str:
    """Five characters of a number from 0 to 999, good JSON: 182.4, 23.41, 0.000."""
    return f"{value:.6f}"[:5]


def _measured(reading: Reading) -> str:
    return (
        f'"current":{_five(reading.current)},"voltage":{_five(reading.voltage)},'
        f'"wire_feed":{_five(reading.wire_feed)},"gas_flow":{_five(reading.gas_flow)},'
        f'"arc":{reading.arc},"arc_event":{reading.event}'
    )


class Block:
    """Messages of one length behind each other, whose numbers are written over to make the next ones of them."""

    def __init__(self, items: Sequence[bytes], places: Sequence[Sequence[int]], digits: Callable[[int], bytes]) -> None:
        """`places`: for each byte of `digits(number)` where it stands in every item."""
        self.stride: int = len(items[0])
        self.count: int = len(items)
        if any(len(item) != self.stride for item in items):
            raise ValueError("messages of a block differ in length")
        self.data: bytearray = bytearray(b"".join(items))
        self._places = places
        self._digits = digits
        self._now = digits(0)

    def write(self, number: int) -> None:
        """From now on it is block `number`."""
        text = self._digits(number)
        if text == self._now:
            return
        for at, places in enumerate(self._places):
            if text[at] != self._now[at]:
                column = text[at : at + 1] * self.count
                for place in places:
                    self.data[place :: self.stride] = column
        self._now = text


class Forms:
    """The messages 0, 1, 2, ... of a plant in one form."""

    def __init__(self, form: str, *, seed: int = 1, samples: int = 100, sample_hz: float = 20_000.0) -> None:
        """`samples`: records of a frame, `sample_hz`: how fast they were taken; of `bulk` alone.

        ValueError: there is no such form, or a number is out of its range.
        """
        if form not in FORMS:
            raise ValueError(f"form {form!r}: there is {', '.join(FORMS)}")
        if not 1 <= samples <= MOST_SAMPLES:
            raise ValueError(f"{samples} samples a frame: 1 to {MOST_SAMPLES:,} can be told apart")
        if not 1 <= sample_hz <= 1_000_000:
            raise ValueError(f"{sample_hz:g} samples a second: 1 to 1,000,000")
        self.form = form
        self.samples: int = samples if form == "bulk" else 1
        self.block = FRAMES if form == "bulk" else DEVICES
        draw = random.Random(seed)
        machines = [Welder(draw) for _ in range(self.block)]
        make: dict[str, Callable[[int], bytes]] = {
            "welder": lambda n: welder_text(n, draw.getrandbits(32)),
            "wide": lambda n: _wide(n, machines[n], draw),
            "bulk": lambda n: _frame(n, machines[n], self.samples, sample_hz),
            "msgpack": lambda n: _map(n, machines[n]),
        }
        self.templates: list[bytes] = [make[form](n) for n in range(self.block)]
        self.payload_bytes: int = len(self.templates[0])
        self.places: list[list[int]] = self._find_places()
        self._block: Block | None = None

    def _find_places(self) -> list[list[int]]:
        if self.form == "welder":
            found = _SENSORS.search(self.templates[0])
            assert found is not None
            return [[at] for group in range(1, 7) for at in range(*found.span(group))]
        # the digits that the messages of a block share; those behind them are the place in the block
        shared = _DIGITS - (len(str(self.block)) - 1)
        text = b"%010d" % (self.block - 1)
        starts = [found.start() for found in re.finditer(text, self.templates[-1])]
        assert len(starts) == self.samples
        return [[start + at for start in starts] for at in range(shared)]

    def digits(self, block: int) -> bytes:
        """What stands at `places` in the messages of a block."""
        if self.form == "welder":
            return bytes(welder_payload(block * DEVICES)[place] for (place,) in self.places)
        return b"%0*d" % (len(self.places), block)

    def topic(self, n: int) -> str:
        device = f"device{n % self.block:03d}"
        return f"/devices/{device}/bulkData/telemetry" if self.form == "bulk" else f"plant/{device}/welder"

    @property
    def settings(self) -> dict[str, object]:
        """What a pipeline is told about these messages."""
        if self.form == "bulk":
            return {"bulk_label": "telemetry"}
        told: dict[str, object] = {"topics": ["plant/+/welder"]}
        if self.form == "msgpack":
            told["format"] = "msgpack"
        return told

    @property
    def filter(self) -> str:
        """The topic filter that all of them match."""
        return "/devices/+/bulkData/telemetry" if self.form == "bulk" else "plant/+/welder"

    def payloads(self, block: int) -> list[bytes]:
        """All messages of a block."""
        if self._block is None:
            self._block = Block(self.templates, self.places, self.digits)
        made = self._block
        made.write(block)
        data, size = bytes(made.data), made.stride
        return [data[at : at + size] for at in range(0, len(data), size)]

    def payload(self, n: int) -> bytes:
        return self.payloads(n // self.block)[n % self.block]

    def records(self, payload: bytes) -> list[bytes]:
        """What a message becomes in the stream."""
        if self.form == "bulk":
            unpacker = msgpack.Unpacker()
            unpacker.feed(payload)
            return list(unpacker)[1:]
        if self.form == "msgpack":
            return [orjson.dumps(msgpack.unpackb(payload))]
        return [payload]

    def all_records(self, first: int, count: int) -> Iterator[bytes]:
        """Those of messages `first` to `first + count - 1`, in order."""
        end = first + count
        for block in range(first // self.block, -(-end // self.block)):
            begin = block * self.block
            for payload in self.payloads(block)[max(0, first - begin) : end - begin]:
                yield from self.records(payload)

    def number(self, record: bytes) -> int | None:
        """The number that stands in a stored record; None when there is none."""
        if self.form == "welder":
            return welder_told(record)
        found = _ID.search(record)
        return None if found is None else int(found[1]) * self.samples + int(found[2] or 0)


def _frame(n: int, machine: Welder, samples: int, sample_hz: float) -> bytes:
    return encode_frame(
        [
            b'{"id":"%010d-%04d","t":%.6f,%b}' % (n, at, at / sample_hz % 10, _measured(machine.read()).encode())
            for at in range(samples)
        ]
    )


def _map(n: int, machine: Welder) -> bytes:
    reading = machine.read()
    return cast(
        "bytes",  # its stub says None too
        msgpack.packb(
            {
                "id": f"{n:010d}",
                "current": reading.current,
                "voltage": reading.voltage,
                "wire_feed": reading.wire_feed,
                "gas_flow": reading.gas_flow,
                "arc": reading.arc,
                "arc_event": reading.event,
            }
        ),
    )


def _wide(n: int, machine: Welder, draw: random.Random) -> bytes:
    reading = machine.read()
    power = reading.current * reading.voltage / 1000
    temperatures = ",".join(f'"temperature_{k}":{_five(draw.uniform(20, 90))}' for k in range(1, 11))
    phases = ",".join(f'"phase_{k}_current":{_five(draw.uniform(5, 40))}' for k in range(1, 4))
    return (
        f'{{"id":"{n:010d}","machine":"device{n:03d}","model":"welder","firmware":"4.{draw.randrange(10)}.'
        f'{draw.randrange(10)}","plant":"north","line":"line-{draw.randrange(10)}","cell":"cell-{draw.randrange(100):02d}",'
        f'"operator":"op-{draw.randrange(1000):03d}","job":"job-{draw.randrange(100_000):05d}",'
        f'"program":{draw.randrange(10, 100)},"seam":{draw.randrange(100, 1000)},"layer":{draw.randrange(1, 10)},'
        f'"process":"{draw.choice(("mig", "mag", "tig"))}",{_measured(reading)},"power":{_five(power)},'
        f'"wire_diameter":{draw.choice(("0.8", "1.0", "1.2"))},"wire_left":{_five(draw.uniform(1, 18))},'
        f'"gas":"{draw.choice(("M20", "M21", "C1+"))}","gas_pressure":{_five(draw.uniform(2, 6))},'
        f'"travel_speed":{_five(draw.uniform(20, 80))},"stick_out":{_five(draw.uniform(12, 18))},'
        f'"torch_angle":{_five(draw.uniform(10, 30))},"coolant_flow":{_five(draw.uniform(1, 3))},'
        f'"arc_seconds":{draw.randrange(100_000, 1_000_000)},"starts":{draw.randrange(10_000, 100_000)},'
        f'{phases},{temperatures},"alarm":"none","quality":"{draw.choice(("ok--", "warn"))}"}}'
    ).encode()
