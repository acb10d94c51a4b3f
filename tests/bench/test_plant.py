"""The simulated plant: what it publishes can be told apart and found again."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time

import msgpack
import pytest

from fastkin.bench.plant import (
    DEVICES,
    NUMBERS,
    PAYLOAD_BYTES,
    Message,
    Plant,
    welder_number,
    welder_payload,
)

FIELDS = ["name", "model", "status", *(f"sensor_{n}" for n in range(1, 7))]
EDGES = [0, 1, 999, 1000, 899_999, 900_000, 1000 * 900**2 - 1, 1000 * 900**2, NUMBERS - 1]


def frame_records(frame: bytes) -> list[bytes]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(frame)
    version, *records = list(unpacker)
    assert version == "1.0"
    return records


@pytest.mark.parametrize("n", [*EDGES, *random.Random(1).sample(range(NUMBERS), 200)])
def test_every_payload_is_the_canonical_152_bytes(n: int) -> None:
    payload = welder_payload(n)
    assert len(payload) == PAYLOAD_BYTES
    record = json.loads(payload)
    assert list(record) == FIELDS
    assert record["model"] == "welder"
    assert all(isinstance(record[f"sensor_{k}"], float) for k in range(1, 7))
    assert welder_number(payload) == n


def test_payloads_do_not_repeat() -> None:
    numbers = [*range(20_000), *EDGES]
    assert len({welder_payload(n) for n in numbers}) == len(set(numbers))


@pytest.mark.parametrize("n", [-1, NUMBERS])
def test_numbers_that_cannot_be_told_apart_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="told apart"):
        welder_payload(n)


def test_a_changed_payload_has_no_number() -> None:
    payload = welder_payload(4711)
    for at in range(PAYLOAD_BYTES):
        changed = bytearray(payload)
        changed[at] ^= 1
        assert welder_number(bytes(changed)) != 4711
    assert welder_number(payload[:-1]) is None
    assert welder_number(b"") is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_every_number_comes_once_and_frames_have_their_share(share: float) -> None:
    plant = Plant(bulk_share=share, frame_records=20, first=500)
    taken: list[Message] = []
    for message in plant.records():
        taken.append(message)
        if sum(each.records for each in taken) >= 5000:
            break
    payloads = list(
        itertools.chain.from_iterable(
            [each.payload] if "bulkData" not in each.topic else frame_records(each.payload) for each in taken
        )
    )
    assert [welder_number(each) for each in payloads] == list(range(500, 500 + len(payloads)))
    bulk = sum(each.records for each in taken if "bulkData" in each.topic)
    assert bulk / len(payloads) == pytest.approx(share, abs=0.02)
    assert taken[0].topic.startswith(("plant/device500/", "/devices/device500/"))
    assert len({each.topic for each in taken}) <= 2 * DEVICES


class Recorder:
    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes, int]] = []

    async def publish(self, topic: str, payload: bytes, qos: int = 0) -> None:
        self.taken.append((topic, payload, qos))


def test_the_rate_is_kept() -> None:
    recorder, plant = Recorder(), Plant(rate=2000, frame_records=10)
    begin = time.monotonic()
    asyncio.run(plant.run(recorder, 0.5, asyncio.Event()))
    took = time.monotonic() - begin
    assert 0.5 <= took < 2
    assert 0.4 * 1000 <= plant.published <= 1.1 * 2000 * took
    assert plant.messages == len(recorder.taken)
    assert {qos for _, _, qos in recorder.taken} == {1}


def test_stop_ends_it_at_once() -> None:
    async def run() -> float:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, stop.set)
        begin = time.monotonic()
        await Plant(rate=100).run(Recorder(), 30, stop)
        return time.monotonic() - begin

    assert asyncio.run(run()) < 5
