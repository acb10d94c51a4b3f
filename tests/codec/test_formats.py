"""Payloads of several formats into one lane, and those that belong to none."""

from __future__ import annotations

import pytest

from fastkin import encode_frame
from fastkin._codec import DEAD, Budget, FormatSink, StraySink
from fastkin.errors import LibraryError
from support.codec_rig import Rig


def test_each_sink_reads_its_own_format_into_the_same_lane() -> None:
    rig = Rig()
    raw, bulk = FormatSink(rig.lane, "raw"), FormatSink(rig.lane, "bulk")
    assert raw.offer(b"a", b'{"n":1}', 1) == 1
    assert bulk.offer(b"b", encode_frame([b"2", b"3"]), 2) == 2
    assert bulk.offer(b"b", b'{"n":4}', 3) == 1  # no frame: set aside
    (reject,) = rig.lane.take_rejects()
    assert (reject.kind, reject.topic, reject.token) == ("version", b"b", 3)
    rig.lane.settle_reject(reject, DEAD)
    told = rig.told.pop()
    assert told[:3] == (3, 1, DEAD)
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b'{"n":1}', b"2", b"3"]
    assert rig.counts() == {1: 1, 2: 2}
    rig.settled()


def test_a_format_that_is_none_is_refused() -> None:
    with pytest.raises(LibraryError, match="raw or bulk"):
        FormatSink(Rig().lane, "event")


@pytest.mark.parametrize("payload", [b"", b"x" * 1000])
def test_what_belongs_to_no_filter_is_set_aside_with_its_topic(payload: bytes) -> None:
    rig = Rig()
    stray = StraySink(rig.lane, "'a/#' (raw), 'b/#' (bulk)")
    topic = b"elsewhere/" + "ä".encode() * 400
    assert stray.offer(topic, payload, 7) == 1
    (reject,) = rig.lane.take_rejects()
    assert (reject.kind, reject.topic, reject.payload, reject.index) == ("topic", topic, payload, None)
    assert "elsewhere/" in reject.reason
    assert "'a/#' (raw), 'b/#' (bulk)" in reject.reason
    assert len(reject.reason) < 2_000
    assert reject.reason.isascii()
    assert rig.lane.in_flight == 1
    rig.lane.settle_reject(reject, DEAD)
    assert rig.lane.dead_lettered == 1
    rig.settled()


def test_without_room_it_is_offered_again() -> None:
    rig = Rig(budget=Budget(4096, 10))
    stray = StraySink(rig.lane, "'a' (raw)")
    assert stray.offer(b"b", b"x" * 3000, 1) == 1
    assert stray.offer(b"b", b"y", 2) == -1
    (reject,) = rig.lane.take_rejects()
    rig.lane.settle_reject(reject, DEAD)
    assert stray.offer(b"b", b"y", 2) == 1
