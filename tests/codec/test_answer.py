"""PutRecords answers as Kinesis, kinesalite and kinesis-mock write them, and as nobody should."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkin._codec import DROPPED
from fastkin.errors import UnexpectedResponse
from support import oracle
from support.codec_rig import Rig, answer, entry, failure, stored

KINESIS = (
    b'{"EncryptionType":"KMS","FailedRecordCount":1,"Records":['
    b'{"SequenceNumber":"4964","ShardId":"shardId-000000000000"},'
    b'{"ErrorCode":"ProvisionedThroughputExceededException","ErrorMessage":"Rate exceeded for shard '
    b'shardId-000000000001 in stream s under account 123456789012."}]}'
)
KINESALITE = (
    b'{"FailedRecordCount":0,"Records":[{"ShardId":"shardId-0","SequenceNumber":"1"},'
    b'{"ShardId":"shardId-0","SequenceNumber":"2"}]}'
)
KINESIS_MOCK = (
    b'{"EncryptionType":"NONE","FailedRecordCount":1,"Records":[{"ErrorCode":null,"ErrorMessage":null,"SequenceNumber":"1",'
    b'"ShardId":"shardId-0"},{"ErrorCode":"InternalFailure","ErrorMessage":null,"SequenceNumber":null,"ShardId":null}]}'
)


def judge(reply: bytes, count: int) -> list[oracle.Ending] | None:
    """How the codec sees each entry; None: unusable."""
    rig = Rig()
    for i in range(count):
        rig.batcher.add(b"%d" % i, i + 1)
    [batch] = rig.drain()
    ends: list[oracle.Ending] = [None] * count
    try:
        failures = batch.settle(reply)
    except UnexpectedResponse as error:
        said = str(error)
        batch.finish(DROPPED)
        rig.settled()
        assert "the answer cannot be used" in said
        return None
    for one in failures:
        for data, _, _ in one.batch.entries():
            ends[int(data)] = (one.code, one.message)
        one.batch.finish(DROPPED)
    assert sorted(rig.counts() if not failures else []) == (list(range(1, count + 1)) if not failures else [])
    rig.settled()
    return ends


def expected(reply: bytes, count: int) -> list[oracle.Ending] | None:
    try:
        return oracle.read_answer(reply, count)
    except oracle.BadAnswerError:
        return None


@pytest.mark.parametrize("reply", [KINESIS, KINESALITE, KINESIS_MOCK])
def test_real_ones(reply: bytes) -> None:
    ends = judge(reply, 2)
    assert ends is not None
    assert ends == expected(reply, 2)
    assert judge(reply, 1) is None
    assert judge(reply, 3) is None
    for end in range(len(reply)):
        assert judge(reply[:end], 2) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
STORED_ENTRY = st.fixed_dictionaries(
    {"ShardId": TEXT, "SequenceNumber": TEXT},
    optional={"ErrorCode": st.none(), "ErrorMessage": st.none(), "Extra": VALUES},
)
FAILED_ENTRY = st.fixed_dictionaries(
    {"ErrorCode": TEXT}, optional={"ErrorMessage": st.none() | TEXT, "ShardId": st.none() | TEXT, "Extra": VALUES}
)
ODD_ENTRY = st.dictionaries(
    st.sampled_from(["ShardId", "SequenceNumber", "ErrorCode", "ErrorMessage", "x"]), VALUES, max_size=5
)


@st.composite
def answers(draw: st.DrawFn, entries: Any) -> tuple[bytes, int]:
    items = [draw(st.permutations(list(one.items())).map(dict)) for one in draw(st.lists(entries, max_size=6))]
    top = draw(
        st.fixed_dictionaries(
            {"FailedRecordCount": st.integers(0, 9), "Records": st.just(items)},
            optional={"EncryptionType": st.sampled_from(["NONE", "KMS", None]), "Other": VALUES},
        )
    )
    top = dict(draw(st.permutations(list(top.items()))))
    indent = draw(st.sampled_from([None, 1]))
    text = json.dumps(top, indent=indent, ensure_ascii=draw(st.booleans()))
    return draw(st.sampled_from(["", " ", "\n\t\r "])).encode() + text.encode() + b" " * draw(st.integers(0, 2)), len(
        items
    )


@given(answers(st.one_of(STORED_ENTRY, FAILED_ENTRY)))
@settings(max_examples=200)
def test_any_order_any_blanks(reply: tuple[bytes, int]) -> None:
    body, count = reply
    if count:
        assert judge(body, count) == expected(body, count) is not None


@given(answers(st.one_of(STORED_ENTRY, FAILED_ENTRY, ODD_ENTRY)), st.integers(-1, 1))
@settings(max_examples=200)
def test_odd_ones(reply: tuple[bytes, int], off: int) -> None:
    body, count = reply
    if count + off > 0:
        assert judge(body, count + off) == expected(body, count + off)


@given(answers(st.one_of(STORED_ENTRY, FAILED_ENTRY)), st.data())
@settings(max_examples=300)
def test_mutated_ones(reply: tuple[bytes, int], data: st.DataObject) -> None:
    body = bytearray(reply[0])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                body[at] = data.draw(st.sampled_from(b'{}[]",:\\nu0 -.eE'))
            case 1:
                del body[at : at + data.draw(st.integers(1, 4))]
            case _:
                body[at:at] = data.draw(st.sampled_from([b'"', b"{", b"}", b"]", b",", b"null", b"\\", b"\xff"]))
        if not body:
            return
    ends = judge(bytes(body), max(1, reply[1]))
    try:
        parsed = json.loads(bytes(body))
    except ValueError:
        return  # we may take what json.loads is stricter about, control characters in a string
    if not isinstance(parsed, dict) or bytes(body).count(b"Records") != 1 or len(set(_names(bytes(body)))) < 2:
        return
    assert ends == expected(bytes(body), max(1, reply[1])) or _twice(bytes(body)) or b"\\" in body


def _names(body: bytes) -> list[str]:
    return list(json.loads(body))


def _twice(body: bytes) -> bool:
    """A key that stands twice in one object: json.loads takes the last."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        found = found or len({name for name, _ in pairs}) < len(pairs)
        return dict(pairs)

    json.loads(body, object_pairs_hook=look)
    return found


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (b"", "it is no JSON object"),
        (b"[]", "it is no JSON object"),
        (b"{}", "Records is missing"),
        (b'{"FailedRecordCount":0}', "Records is missing"),
        (b'{"FailedRecordCount":0,"Records":null}', "Records is no array"),
        (b'{"FailedRecordCount":0,"Records":{}}', "Records is no array"),
        (b'{"FailedRecordCount":0,"Records":[]}', "it has 0 entries for 1 records sent"),
        (b'{"FailedRecordCount":0,"Records":[1]}', "an entry is no object"),
        (b'{"FailedRecordCount":0,"Records":[{}]}', "neither an ErrorCode nor both"),
        (b'{"FailedRecordCount":0,"Records":[{"ShardId":"s"}]}', "neither an ErrorCode nor both"),
        (b'{"FailedRecordCount":0,"Records":[{"SequenceNumber":"1"}]}', "neither an ErrorCode nor both"),
        (b'{"FailedRecordCount":0,"Records":[{"ShardId":"s","SequenceNumber":1}]}', "neither"),
        (b'{"FailedRecordCount":0,"Records":[{"ShardId":"s","SequenceNumber":"","ErrorCode":""}]}', "neither"),
        (b'{"FailedRecordCount":0,"Records":[{"ErrorCode":5}]}', "an ErrorCode is no string"),
        (b'{"Records":[{"ShardId":"s","SequenceNumber":"1"}]}', "FailedRecordCount is missing or no number"),
        (b'{"FailedRecordCount":null,"Records":[{"ShardId":"s","SequenceNumber":"1"}]}', "no number"),
        (b'{"FailedRecordCount":"0","Records":[]}', "no number"),
        (b'{"FailedRecordCount":true,"Records":[]}', "no number"),
        (b'{"FailedRecordCount":-,"Records":[]}', "no number"),
        (stored(1) + b"x", "it is not JSON"),
        (stored(1)[:-1] + b",}", "it is not JSON"),
        (stored(1)[:-1] + b',"Records":[]}', "Records is there twice"),
        (stored(1)[:-1] + b',"EncryptionType":"KMS', "it is not JSON"),
        (stored(1)[:-1] + b',"EncryptionType":nul}', "it is not JSON"),
        (stored(1)[:-1] + b',"x":' + b"[" * 61 + b"]" * 61 + b"}", "it is not JSON"),
        (b'{"Records":[{"ErrorCode":"a"} 1', "it is not JSON"),
        (b'{"Records":[{"ErrorCode":"a" 1', "it is not JSON"),
        (b'{"Records":[{"ErrorCode":"a",}', "it is not JSON"),
        (b'{"Records":[{"x":tru}]}', "it is not JSON"),
        (b'{"Records":[{"ShardId":nul}]}', "it is not JSON"),
        (b'{"Records":[{"ShardId":"\\', "it is not JSON"),
        (stored(2), "more entries than the 1 records sent"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(reply: bytes, why: str) -> None:
    rig = Rig()
    rig.batcher.add(b"x", 1)
    [batch] = rig.drain()
    with pytest.raises(UnexpectedResponse) as caught:
        batch.settle(reply)
    assert why in str(caught.value)
    assert caught.value.code == "UnexpectedResponse"
    assert caught.value.retriable
    batch.finish(DROPPED)
    rig.settled()


# --- entries that are read by what the one before them was like ---

NUMBER = "49640000000000000000000000000000000000000000000000000042"
ALIKE = b'{"SequenceNumber":"%s","ShardId":"shardId-00000000000%d"}'


def alike(*others: bytes, form: bytes = ALIKE) -> bytes:
    """Two entries of that form, the others, and one as `ALIKE`."""
    entries = [form % (NUMBER.encode(), shard) for shard in range(2)]
    return b'{"FailedRecordCount":0,"Records":[%b]}' % b",".join([*entries, *others, ALIKE % (b"7" * 56, 9)])


@pytest.mark.parametrize("byte", [bytes([each]) for each in b'"\\{}[]:, n0Z'] + [b"\xc3", b"\x00"])
def test_one_byte_in_an_entry_like_the_others(byte: bytes) -> None:
    """Wherever it stands: the answer says what it says when each entry is read by itself."""
    entry = ALIKE % (NUMBER[::-1].encode(), 3)
    assert judge(alike(entry), 4) == [None] * 4
    for at in range(len(entry)):
        changed = entry[:at] + byte + entry[at + 1 :]
        by_itself = judge(alike(changed, form=ALIKE.replace(b"{", b"{ ")), 4)
        assert judge(alike(changed), 4) == by_itself, changed


@pytest.mark.parametrize(
    "other",
    [
        b'{"SequenceNumber":"%s","ShardId":""}' % (b"1" * 76),  # as long, and stored nowhere
        b'{"ErrorCode":"InternalFailure","ErrorMessage":"%s"}' % (b"x" * 63),
        b'{"ErrorCode":"x", "SequenceNumber":"%s","ShardId":"s"}' % (b"1" * 59),
        b'{"SequenceNumber":"%s","ShardId":"shardId-00000000000\\""}' % (b"1" * 55),
        b'{"SequenceNumber":"%s\\","ShardId":"shardId-000000000000"}' % (b"1" * 55),
        b'{"SequenceNumber":"%s","ShardId":null,"x":"1234567890123"}' % (b"1" * 56),
        b"{}",
        b"null",
        b'{"ShardId":"%s","SequenceNumber":"1"}' % (b"s" * 600),
    ],
)
def test_another_entry_among_entries_that_are_alike(other: bytes) -> None:
    for count, reply in [(4, alike(other)), (5, alike(other, other)), (5, alike(ALIKE % (b"5" * 56, 5), other))]:
        assert judge(reply, count) == expected(reply, count)


def test_an_answer_that_ends_within_an_entry_like_the_others() -> None:
    reply = alike(ALIKE % (b"3" * 56, 3))
    for end in range(len(reply)):
        assert judge(reply[:end], 4) is None


def test_entries_of_many_lengths() -> None:
    """More kinds than are learned, and some longer than what is learned at all."""
    lengths = [1, 2, 3, 500, 4, 5, 6, 7, 8, 9, 10, 1, 1, 500, 500, 2, 2, 11, 12, 13, 13, 13]
    entries = [b'{"ShardId":"%s","SequenceNumber":"%d"}' % (b"s" * n, i) for i, n in enumerate(lengths)]
    assert judge(b'{"FailedRecordCount":0,"Records":[%b]}' % b",".join(entries), len(entries)) == [None] * len(entries)


def test_failed_record_count_is_not_believed() -> None:
    reply = json.dumps({"FailedRecordCount": 0, "Records": [entry(), failure("A", "m")]}).encode()
    assert judge(reply, 2) == [None, ("A", "m")]
    reply = json.dumps({"FailedRecordCount": 7, "Records": [entry(), entry()]}).encode()
    assert judge(reply, 2) == [None, None]


def test_an_entry_with_a_code_and_a_place_has_failed() -> None:
    assert judge(answer([entry(ErrorCode="A", ErrorMessage="m")]), 1) == [("A", "m")]


def test_messages_that_cannot_be_decoded_are_shown_as_they_are() -> None:
    assert judge(b'{"FailedRecordCount":1,"Records":[{"ErrorCode":"A","ErrorMessage":"\\ud800 \xff"}]}', 1) == [
        ("A", "\\ud800 \ufffd")
    ]
