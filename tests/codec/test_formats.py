"""Payloads of several formats into one batcher, and those that belong to none."""

from __future__ import annotations

from typing import Any

import pytest

from fastkin import encode_frame
from fastkin._codec import DEAD, Budget, FormatSink, PayloadFormat, StraySink
from fastkin.errors import DataFormatError, LibraryError
from fastkin.formats.table import FORMATS, format_named
from support.codec_rig import Rig


def test_each_sink_reads_its_own_format_into_the_same_batcher() -> None:
    rig = Rig()
    raw, bulk = FormatSink(rig.batcher, "raw"), FormatSink(rig.batcher, "bulk")
    assert raw.offer(b"a", b'{"n":1}', 1) == 1
    assert bulk.offer(b"b", encode_frame([b"2", b"3"]), 2) == 2
    assert bulk.offer(b"b", b'{"n":4}', 3) == 1  # no frame: set aside
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.topic, reject.token) == ("version", b"b", 3)
    rig.batcher.settle_reject(reject, DEAD)
    told = rig.told.pop()
    assert told[:3] == (3, 1, DEAD)
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b'{"n":1}', b"2", b"3"]
    assert rig.counts() == {1: 1, 2: 2}
    rig.settled()


def test_a_format_that_is_none_is_refused() -> None:
    with pytest.raises(LibraryError, match="one of raw, bulk"):
        FormatSink(Rig().batcher, "nope")


@pytest.mark.parametrize("payload", [b"", b"x" * 1000])
def test_what_belongs_to_no_filter_is_set_aside_with_its_topic(payload: bytes) -> None:
    rig = Rig()
    stray = StraySink(rig.batcher, "'a/#' (raw), 'b/#' (bulk)")
    topic = b"elsewhere/" + "ä".encode() * 400
    assert stray.offer(topic, payload, 7) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.topic, reject.payload, reject.index) == ("topic", topic, payload, None)
    assert "elsewhere/" in reject.reason
    assert "'a/#' (raw), 'b/#' (bulk)" in reject.reason
    assert len(reject.reason) < 2_000
    assert reject.reason.isascii()
    assert rig.batcher.in_flight == 1
    rig.batcher.settle_reject(reject, DEAD)
    assert rig.batcher.dead_lettered == 1
    rig.settled()


def test_without_room_it_is_offered_again() -> None:
    rig = Rig(budget=Budget(4096, 10))
    stray = StraySink(rig.batcher, "'a' (raw)")
    assert stray.offer(b"b", b"x" * 3000, 1) == 1
    assert stray.offer(b"b", b"y", 2) == -1
    (reject,) = rig.batcher.take_rejects()
    rig.batcher.settle_reject(reject, DEAD)
    assert stray.offer(b"b", b"y", 2) == 1


def words(payload: bytes) -> list[bytes]:
    """A format in Python: words of ASCII letters, each a record."""
    for at, byte in enumerate(payload):
        if byte > 127:
            raise DataFormatError(at, f"0x{byte:02x} is no letter")
    return payload.upper().split()


WORDS = PayloadFormat("words", 9, "each word is a record", words)


def test_records_of_a_format_in_python_are_stored() -> None:
    rig = Rig(frame=WORDS)
    assert rig.batcher.offer(b"t", b" one two  three", 5) == 3
    assert rig.batcher.offer(b"t", b"  ", 6) == 0
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b"ONE", b"TWO", b"THREE"]
    assert rig.counts() == {5: 3}
    rig.settled()


def test_a_format_in_python_stands_beside_a_compiled_one() -> None:
    rig = Rig(frame="bulk")
    assert FormatSink(rig.batcher, WORDS).offer(b"t", b"a b", 1) == 2
    assert rig.batcher.offer(b"t", encode_frame([b"c d"]), 2) == 1
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b"A", b"B", b"c d"]
    rig.settled()


def test_what_a_format_in_python_refuses_is_set_aside_whole_with_its_reason() -> None:
    rig = Rig(frame=WORDS)
    assert rig.batcher.offer(b"t", b"ab \xff", 5) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.reason, reject.offset) == ("format", "0xff is no letter", 3)
    assert (reject.payload, reject.index) == (b"ab \xff", None)
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


@pytest.mark.parametrize("records", [lambda payload: payload.decode().split(), lambda _: [None], lambda _: 1 // 0])
def test_a_bug_in_a_format_costs_its_payload_and_no_more(records: Any) -> None:
    rig = Rig(frame=PayloadFormat("wrong", 9, "fails", records))
    assert rig.batcher.offer(b"t", b"\xff", 5) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.kind, reject.offset, reject.payload) == ("format", 0, b"\xff")
    assert reject.reason.startswith("the format wrong failed: ")
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


@pytest.mark.parametrize("offset", [-1, 5, 2**70, None, "3"])
def test_an_offset_outside_the_payload_is_not_told(offset: Any) -> None:
    def records(_: bytes) -> list[bytes]:
        raise DataFormatError(offset, "bad")

    rig = Rig(frame=PayloadFormat("wrong", 9, "fails", records))
    assert rig.batcher.offer(b"t", b"abcd", 5) == 1
    (reject,) = rig.batcher.take_rejects()
    assert (reject.offset, reject.reason) == (0, "bad")
    rig.batcher.settle_reject(reject, DEAD)
    rig.settled()


def test_a_format_that_was_never_made_reads_frames() -> None:
    assert PayloadFormat.__new__(PayloadFormat).decode(encode_frame([b"a"])) == [b"a"]  # and has no wild pointers


def test_a_record_that_a_format_in_python_made_too_large_is_set_aside_alone() -> None:
    rig = Rig(frame=WORDS, max_record_bytes=60)
    assert rig.batcher.offer(b"t", b"a " + b"b" * 61 + b" c", 5) == 3
    (reject,) = rig.batcher.take_rejects()
    # no offset: it does not stand in the payload as it is
    assert (reject.kind, reject.payload, reject.index, reject.offset) == ("oversize", b"B" * 61, 1, 0)
    rig.batcher.settle_reject(reject, DEAD)
    (call,) = rig.store()
    assert [data for data, _, _ in call] == [b"A", b"C"]
    rig.settled()


def test_each_format_reads_payloads_outside_a_batcher_too() -> None:
    assert FORMATS["raw"].decode(b"a b") == [b"a b"]
    assert FORMATS["bulk"].decode(encode_frame([b"a", b"", b"b"])) == [b"a", b"", b"b"]
    assert WORDS.decode(b"a b") == [b"A", b"B"]
    with pytest.raises(DataFormatError) as refused:
        FORMATS["bulk"].decode(b"\xa31.0\x01")
    assert refused.value.offset == 4
    with pytest.raises(DataFormatError, match="0x80 is no letter"):
        WORDS.decode(b"\x80")


def test_a_format_without_a_function_is_refused() -> None:
    with pytest.raises(LibraryError, match="'event' must have a function"):
        PayloadFormat("event", 9, "no function", "records")  # type: ignore[arg-type]


def test_a_name_that_is_no_format_is_told_with_those_that_are() -> None:
    assert format_named("bulk") is FORMATS["bulk"]
    with pytest.raises(LibraryError, match="'nope' is no payload format: use raw, bulk"):
        format_named("nope")


def test_the_numbers_of_formats_stay() -> None:
    """Brokers keep them in sessions: a row may be added, none may get another number."""
    assert {name: row.number for name, row in FORMATS.items()} == {"raw": 1, "bulk": 2, "event": 3, "msgpack": 4}
