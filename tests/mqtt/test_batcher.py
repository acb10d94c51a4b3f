"""Session, router, AckTracker and real batchers together: nothing lost, nothing twice, acknowledged in order."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from fastkin import _codec
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import connack, publish


def answer(count: int) -> bytes:
    record = {"SequenceNumber": "49545115243490985018280067714973144582180062593244200961", "ShardId": "s-0"}
    return json.dumps({"FailedRecordCount": 0, "Records": [record] * count}).encode()


class Plant:
    """Two batchers behind one session: raw for everything, bulk for what comes as frames."""

    def __init__(self, version: int, budget: int) -> None:
        self.acks = _mqtt.AckTracker()
        self.budget = _codec.Budget(budget, 1_000_000)
        self.router = _mqtt.Router()
        self.raw = self.batcher("raw")
        self.bulk = self.batcher("bulk")
        self.router.add("raw/#", self.raw)
        self.router.add("both/#", self.raw)
        self.router.add("+/bulk", self.bulk)
        self.session = _mqtt.Session(version=version, acks=self.acks, router=self.router)
        self.session.feed_data(connack(version))
        self.stored: list[bytes] = []
        self.sent = b""
        self.waiting: list[_codec.Batch] = []

    def batcher(self, frame: str) -> _codec.Batcher:
        return _codec.Batcher(
            settler=self.acks,
            budget=self.budget,
            frame=frame,  # type: ignore[arg-type]
            key=_codec.KeyPlan("uuid"),
            target=b'"StreamName":"s"',
            max_records=7,
        )

    def collect(self, reason: int | None = None) -> None:
        for batcher in (self.raw, self.bulk):
            if reason is not None:
                batcher.close_batch(reason)
            while (batch := batcher.take()) is not None:
                self.waiting.append(batch)

    def settle(self, batch: _codec.Batch) -> None:
        self.stored += [data for data, _, _ in batch.entries()]
        assert batch.settle(answer(len(batch))) == []

    def flush(self) -> None:
        """Answers come in the wrong order; acknowledgements must not."""
        self.collect(_codec.DRAIN)
        while self.waiting:
            self.settle(self.waiting.pop())
        for batcher in (self.raw, self.bulk):
            for reject in batcher.take_rejects():
                batcher.settle_reject(reject, _codec.DEAD)
        self.sent += self.session.take_output()


message = st.tuples(
    st.sampled_from(["raw/1", "raw/bulk", "both/bulk", "x/bulk", "nobody"]),
    st.lists(st.integers(0, 60), max_size=6),
    st.integers(0, 2),
)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from([4, 5]),
    st.lists(message, max_size=40),
    st.sampled_from([400, 2_000, 1 << 20]),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
)
def test_nothing_lost_and_acknowledged_in_order(
    version: int, rows: list[tuple[str, list[int], int]], budget: int, reads: list[int]
) -> None:
    plant = Plant(version, budget)
    want: list[bytes] = []
    sent = b""
    data = b""
    for number, (topic, sizes, qos) in enumerate(rows, 1):
        records = [bytes([number, index]) * size for index, size in enumerate(sizes)]
        payload = _codec.encode_frame(records)
        data += publish(topic, payload, qos=qos, packet_id=number, version=version)
        if topic == "x/bulk":
            want += records
        else:  # the first filter decides, and what no filter takes is the first sink's
            want.append(payload)
        if qos:
            sent += bytes((0x50 if qos == 2 else 0x40, 2, 0, number))
    at = turn = 0
    while at < len(data) or plant.session.stalled:
        if plant.session.stalled:
            plant.flush()
            plant.session.resume()
            continue
        size = reads[turn % len(reads)]
        plant.session.feed_data(data[at : at + size])
        at += size
        turn += 1
        plant.collect()
    plant.flush()
    assert sorted(plant.stored) == sorted(want)
    assert plant.sent == sent
    assert plant.acks.unacked == 0
    assert (plant.budget.bytes, plant.budget.records) == (0, 0)
    assert plant.router.unrouted == 0


def test_a_bad_frame_is_acknowledged_once_it_is_set_aside() -> None:
    plant = Plant(4, 1 << 20)
    plant.session.feed_data(
        publish("x/bulk", b"junk", qos=1, packet_id=1) + publish("raw/1", b"good", qos=1, packet_id=2)
    )
    plant.collect(_codec.DRAIN)
    plant.settle(plant.waiting.pop())
    assert (plant.acks.unacked, plant.acks.ready) == (2, 0)
    (reject,) = plant.bulk.take_rejects()
    assert (reject.topic, reject.payload, reject.index) == (b"x/bulk", b"junk", None)
    plant.bulk.settle_reject(reject, _codec.DEAD)
    assert plant.session.take_output() == b"\x40\x02\x00\x01\x40\x02\x00\x02"


def test_settlements_after_a_reconnect_acknowledge_nothing() -> None:
    plant = Plant(5, 1 << 20)
    plant.session.feed_data(publish("raw/1", b"1", qos=1, packet_id=1, version=5))
    plant.collect(_codec.DRAIN)
    plant.acks.reset(True)
    plant.session = _mqtt.Session(version=5, acks=plant.acks, router=plant.router)
    plant.session.feed_data(connack(5) + publish("raw/1", b"1", qos=1, packet_id=1, version=5, flags=8))
    plant.settle(plant.waiting.pop())
    assert plant.session.take_output() == b""
    plant.flush()
    assert plant.sent == b"\x40\x02\x00\x01"


def test_records_that_came_again_are_counted() -> None:
    """What the broker sends again may be stored already: of QoS 0 nothing comes again, whatever its flag says."""
    plant = Plant(5, 1 << 20)
    frame = _codec.encode_frame([b"1", b"2", b"3"])
    packets = [
        publish("raw/1", b"x", qos=1, packet_id=1, version=5),
        publish("raw/1", b"x", qos=1, packet_id=2, flags=8, version=5),
        publish("a/bulk", frame, qos=1, packet_id=3, flags=8, version=5),
        publish("x/bulk", frame, qos=2, packet_id=4, flags=8, version=5),
        publish("nobody", b"x", qos=1, packet_id=5, flags=8, version=5),
    ]
    for packet in packets:
        plant.session.feed_data(packet)
    assert plant.raw.received + plant.bulk.received == 1 + 1 + 3 + 3 + 1
    assert plant.acks.repeated == 1 + 3 + 3 + 1
    plant.session.feed_data(packets[3])  # QoS 2: known, and not taken again
    assert plant.acks.repeated == 8
    plant.acks.reset(True)
    assert plant.acks.repeated == 8
