"""JSON records in one Kinesis record, a line each."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from fastkin import encode_frame
from fastkin._codec import DRAIN, SPOOLED, STORED, Batch, CallbackSettler, KeyPlan
from fastkin.errors import LibraryError
from support.codec_rig import Rig, answer, entry, failure, stored


def lines(records: list[bytes], most: int = 51_200, **options: Any) -> list[bytes]:
    rig = Rig(line_bytes=most, **options)
    for n, record in enumerate(records):
        assert rig.batcher.offer(b"t", record, n + 1) == 1
    out = [data for call in rig.store() for data, _, _ in call]
    assert rig.counts() == dict.fromkeys(range(1, len(records) + 1), 1)
    rig.settled()
    return out


def test_json_records_become_lines_of_one_kinesis_record() -> None:
    records = [b'{"a":1}', b"[1, 2]", b'"text"', b"12", b"null"]
    assert lines(records) == [b"\n".join(records)]


def test_one_record_alone_is_a_line() -> None:
    assert lines([b'{"a":1}']) == [b'{"a":1}']


def test_line_ends_between_tokens_become_spaces() -> None:
    pretty = b'{\n  "a": "x\\ny\\"",\r\n  "b": 2\n}\n'
    flat = b'{   "a": "x\\ny\\"",    "b": 2 } '
    assert lines([pretty, b"1"]) == [flat + b"\n1"]
    assert json.loads(flat) == json.loads(pretty)
    assert lines([pretty]) == [flat]  # alone, too


@pytest.mark.parametrize(
    "other",
    [b"", b" ", b"\n", b"text", b"{", b'{"a":1}{"b":2}', b'{"a":1}\n{"b":2}', b'{"a":"x\ny"}', b'{"a":"x\ry"}',
     b'{"a\n":1}', b'["x\\\ny"]', b"\xff\xfe", b"\x00", b"[" * 70 + b"]" * 70],
)  # fmt: skip
def test_what_is_no_json_goes_alone_byte_for_byte_and_in_its_turn(other: bytes) -> None:
    assert lines([b"1", b"2", other, b"3", b"4"]) == [b"1\n2", other, b"3\n4"]


def test_a_kinesis_record_of_lines_is_bounded() -> None:
    record = b'{"n":12345}'  # 11 bytes, 12 with a line end
    assert lines([record] * 7, most=35) == [b"\n".join([record] * 3)] * 2 + [record]
    assert lines([record] * 4, most=34) == [b"\n".join([record] * 2)] * 2
    # one that is larger than the bound goes all the same, and alone
    large = b'["' + b"x" * 100 + b'",\n1]'
    assert lines([record, large, record], most=35) == [record, large.replace(b"\n", b" "), record]


def test_the_key_counts_into_the_largest_record() -> None:
    # 36 bytes of UUID leave 14 for two lines of 6 and the line end
    assert lines([b"123456"] * 4, max_record_bytes=49) == [b"123456\n123456"] * 2
    assert lines([b"123456"] * 2, max_record_bytes=48) == [b"123456"] * 2


def test_records_of_different_keys_share_no_line_record() -> None:
    rig = Rig(line_bytes=1000, key=KeyPlan("parts", [("topic", None)]))
    for topic in (b"a", b"a", b"b", b"a"):
        rig.batcher.offer(topic, b"1", 1)
    (call,) = rig.store()
    assert [(data, key) for data, key, _ in call] == [(b"1\n1", "a"), (b"1", "b"), (b"1", "a")]
    rig.settled()


def test_lines_need_no_key() -> None:
    """Nobody takes them apart by their keys."""
    rig = Rig(line_bytes=1000, key=KeyPlan("none"))
    rig.batcher.offer(b"t", encode_frame([b"1", b"2"]), 1)
    assert [rig.batcher.offer(b"t", record, 2) for record in (b"3", b"4")] == [1, 1]
    (call,) = rig.store()
    assert [(data, key) for data, key, _ in call] == [(encode_frame([b"1", b"2"]), None), (b"3\n4", None)]
    rig.settled()


def test_each_message_is_settled_by_the_lines_it_has() -> None:
    rig = Rig(line_bytes=1000, frame="bulk")
    rig.batcher.offer(b"t", encode_frame([b"1", b"2"]), 7)
    rig.batcher.offer(b"t", encode_frame([b"3"]), 8)
    (batch,) = rig.drain()
    assert (len(batch), batch.user_records, rig.batcher.in_flight) == (1, 3, 3)
    assert batch.settle(stored(1)) == []
    assert [(token, count, outcome) for token, count, outcome, _, _ in rig.told] == [(7, 2, STORED), (8, 1, STORED)]
    rig.settled()


def test_a_record_of_lines_that_is_refused_is_taken_apart_by_lines() -> None:
    rig = Rig(line_bytes=1000)
    for n in range(5):
        rig.batcher.offer(b"t", b'{"n":%d}' % n, n + 1)
    (batch,) = rig.drain()
    (refused,) = batch.settle(answer([failure()]))
    assert not refused.batch.single

    def leaves(one: Batch) -> list[Batch]:
        return [one] if one.single else [leaf for half in one.halves() for leaf in leaves(half)]

    parts = leaves(refused.batch)
    assert [part.entries()[0][0] for part in parts] == [b'{"n":%d}' % n for n in range(5)]
    assert len({part.entries()[0][1] for part in parts}) == 1
    for part in parts:
        assert part.settle(answer([entry()])) == []
    assert rig.counts() == dict.fromkeys(range(1, 6), 1)
    rig.settled()


def test_lines_come_back_from_the_disk() -> None:
    rows: list[tuple[int, int]] = []
    rig = Rig(line_bytes=1000, rows=CallbackSettler(lambda token, count, *_: rows.append((token, count))))
    for n in range(3):
        rig.batcher.offer(b"t", b"%d" % n, n + 1)
    (batch,) = rig.drain()
    body, counts = bytes(batch), batch.counts
    batch.finish(SPOOLED)
    again = rig.batcher.restore(body, counts, 99)
    left, right = again.halves()
    assert [left.entries()[0][0], right.entries()[0][0]] == [b"0", b"1\n2"]
    for half in (left, right):
        half.settle(stored(1))
    assert rows == [(99, 1), (99, 2)]
    rig.settled()


def test_a_receipt_hears_of_its_line() -> None:
    rig = Rig(line_bytes=1000)
    receipts = [rig.batcher.put(b"1"), rig.batcher.put(b"no json"), rig.batcher.put(b"2")]
    rig.batcher.close_batch(DRAIN)
    rig.store()
    assert all(receipt.done() for receipt in receipts)
    rig.settled()


def test_any_mixture_comes_out_line_by_line() -> None:
    draw = random.Random(5)
    kinds = [b'{"a":%d}', b"[%d,\n%d]", b"no %d", b'"%d\\n"', b"\r\n%d", b'"\n%d"']
    for _ in range(200):
        records = []
        for _ in range(draw.randrange(1, 30)):
            kind = draw.choice(kinds)
            records.append(kind % tuple(draw.randrange(1000) for _ in range(kind.count(b"%d"))))
        out = []
        for data in lines(records, most=draw.choice([10, 40, 1000])):
            out += [data] if data in records else data.split(b"\n")
        wanted = [r if is_other(r) else r.replace(b"\n", b" ").replace(b"\r", b" ") for r in records]
        assert out == wanted


def is_other(record: bytes) -> bool:
    try:
        json.loads(record)
    except ValueError:
        return True
    return False


def test_two_ways_at_once_are_refused() -> None:
    with pytest.raises(LibraryError, match="choose one"):
        Rig(line_bytes=1000, aggregate_bytes=1000)


def test_what_lines_hold_is_charged_and_let_go() -> None:
    rig = Rig(line_bytes=1000)
    held = [0]
    for n in range(5):
        rig.batcher.offer(b"t", b'{"n":%d}' % n, n + 1)
        held.append(rig.budget.bytes)
    assert all(before < after for before, after in itertools.pairwise(held))
    assert (rig.budget.records, rig.batcher.open_records) == (5, 5)
    rig.batcher.abandon(ValueError())
    rig.settled()
