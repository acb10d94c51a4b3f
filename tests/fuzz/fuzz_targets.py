# cython: language_level=3, annotation_typing=False, binding=False
"""What is fuzzed: one function per target. It takes any bytes and returns, or the oracle inside it raises.

Run by libFuzzer on the sanitizer build (run.py, there compiled), and by tests/fuzz/test_corpus.py on the release
build with every input that was ever worth keeping. `close_end` and `open_end` are set by run.py: they make the
byte behind a bytes object one that must not be read.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import re
import tempfile
from base64 import b64encode
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkin._codec import (
    DEAD,
    DRAIN,
    DROPPED,
    STORED,
    Batch,
    Batcher,
    Budget,
    CallbackSettler,
    FormatSink,
    KeyPlan,
    Seen,
    Shape,
    ShardTable,
    deaggregate,
    decode_frame,
    decode_json,
    encode_frame,
    read_records,
)  # fmt: skip
from fastkin.aws.http_answer import MAX_ANSWER, MAX_HEADERS, Reply
from fastkin.aws.http_connection import Connection, StaleConnectionError
from fastkin.errors import ConfigError, DataFormatError, ProtocolError, RecordError, TransportError, UnexpectedResponse
from fastkin.mqtt import _core as _mqtt
from fastkin.settings import load_settings
from support import oracle

if TYPE_CHECKING:
    from collections.abc import Callable


def _nothing(data: bytes) -> None:
    pass


close_end: Callable[[bytes], None] = _nothing
open_end: Callable[[bytes], None] = _nothing


# -- frame: payloads of a publisher into a batcher --------------------------------------------------

_TABLE = ShardTable([2**126, 2**127, 2**128 - 1])
_FIELD = KeyPlan("parts", [("level", 0), ("text", "\u00fc"), ("field", ("a", "b"))])
_TOPIC = KeyPlan("parts", [("topic", None)])


class _Lanes:
    """Batchers with one budget, and how many settlements they told."""

    def __init__(self) -> None:
        self.told = 0
        self.budget = Budget(1 << 20, 1 << 16)
        settler = CallbackSettler(self._settled)
        self.all: list[Batcher] = []
        for frame, plan, aggregate, records, nbytes, each in (
            ("bulk", KeyPlan("uuid"), 0, 50, 6000, 500),
            ("bulk", _FIELD, 0, 50, 6000, 500),
            ("raw", _FIELD, 0, 50, 6000, 500),
            ("bulk", _FIELD, 200, 50, 6000, 500),
            ("bulk", _TOPIC, 0, 3, 64, 40),
            ("raw", _TOPIC, 0, 3, 64, 40),
            ("bulk", KeyPlan("none"), 0, 4, 6000, 500),
            ("bulk", KeyPlan("uuid"), 90, 2, 6000, 500),
        ):
            batcher = Batcher(
                settler=settler, budget=self.budget, frame=frame, key=plan, target=b'"StreamName":"s"',  # type: ignore[arg-type]
                max_records=records, max_batch_bytes=nbytes, max_record_bytes=each, aggregate_bytes=aggregate,
            )  # fmt: skip
            batcher.shards = _TABLE
            self.all.append(batcher)
        # a budget that a handful of records fill
        self.small = Budget(2000, 20)
        self.disk_full = Batcher(
            settler=settler, budget=self.small, frame="bulk", key=_FIELD, target=b'"StreamName":"s"',
            max_records=5, max_batch_bytes=300,
        )  # fmt: skip

    def _settled(self, token: int, count: int, outcome: int, answer: object, at: int) -> None:
        self.told += count


_batchers = _Lanes()


def frame(data: memoryview) -> None:
    """byte 0: the batcher; byte 1: length of the topic, bit 7: compare with the oracle; topic; payload."""
    if len(data) < 2:
        return
    which = data[0] % 10
    at = 2 + (data[1] & 31)
    topic = bytes(data[2:at])
    payload = data[at:]
    if which == 9:
        _put_frame(payload)
        return
    batcher = _batchers.disk_full if which == 8 else _batchers.all[which]
    budget = _batchers.small if which == 8 else _batchers.budget
    _batchers.told = 0
    received = batcher.received
    taken = batcher.offer(topic, payload, 7)
    assert taken >= 0, "an empty budget has no room"
    assert batcher.received == received + taken
    rejects = batcher.take_rejects()
    for reject in rejects:
        assert reject.reason
        assert reject.token == 7
        batcher.settle_reject(reject, DEAD)
    stored: list[bytes] = []
    batcher.close_batch(DRAIN)
    batches: list[Batch] = []
    while (batch := batcher.take()) is not None:
        part, others = batch.split([0, -1]) if data[1] & 32 else (batch, None)
        batches += [one for one in (part, others) if one is not None]
    for one in Batch.gather(batches) if data[1] & 64 else batches:
        body = json.loads(bytes(one))
        assert len(body["Records"]) == len(one)
        if data[1] & 128:
            stored += [entry for entry, _, _ in one.entries()]
        one.finish(DROPPED)
    assert batcher.in_flight == 0
    assert budget.bytes == budget.records == 0
    assert _batchers.told == taken
    if data[1] & 128 and which in {0, 6}:
        _compare(bytes(payload), taken, rejects, stored)


def _compare(payload: bytes, taken: int, rejects: list[Any], stored: list[bytes]) -> None:
    """Batcher, decoder and oracle say the same."""
    try:
        wanted = oracle.decode_frame(payload)
    except oracle.BadFrameError:
        assert taken == len(rejects) == 1
        try:
            decode_frame(payload)
        except DataFormatError as error:
            assert 0 <= error.offset <= len(payload)
        else:
            raise AssertionError("the decoder takes what the batcher sets aside")
        return
    assert decode_frame(payload) == wanted
    if not any(reject.kind == "records" for reject in rejects):
        assert taken == len(wanted)
    if not rejects:
        # split and gather may change the order, not the records
        assert sorted(stored) == sorted(wanted)


def _put_frame(payload: memoryview) -> None:
    batcher = _batchers.all[1]
    try:
        receipt = batcher.put_frame(payload)
    except (DataFormatError, RecordError):
        receipt = None
    batcher.close_batch(DRAIN)
    while (batch := batcher.take()) is not None:
        batch.finish(DROPPED)
    assert receipt is None or receipt.done()
    assert batcher.in_flight == 0
    assert _batchers.budget.bytes == _batchers.budget.records == 0


# -- answer: what a Kinesis endpoint may say -------------------------------------------------------


class _Asked:
    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.budget = Budget(1 << 20, 1 << 16)
        self.batcher = Batcher(
            settler=CallbackSettler(self._settled), budget=self.budget, frame="raw", key=KeyPlan("none"), target=b"",
            max_records=3,
        )  # fmt: skip

    def _settled(self, token: int, count: int, outcome: int, answer: object, at: int) -> None:
        self.told += [(token, outcome)] * count


_asked = _Asked()


def answer(data: memoryview) -> None:
    """An answer to three records, one of them put by somebody who waits."""
    reply = bytes(data)
    batcher = _asked.batcher
    _asked.told.clear()
    receipt = batcher.put(b"1")
    batcher.add(b"2", 2)
    batcher.add(b"3", 3)
    batch = batcher.take()
    assert batch is not None
    close_end(reply)
    try:
        failures = batch.settle(reply)
    except UnexpectedResponse as error:
        assert len(str(error)) < 1000
        assert len(batch) == 3, "a refused answer must leave the batch whole"
        assert not receipt.done()
        batch.finish(DROPPED)
        assert len(_asked.told) == 2
    else:
        failed = 0
        for one in failures:
            assert one.code
            assert len(one.code) <= 128
            assert len(one.message) <= 1024
            failed += len(one.batch)
        stored = [token for token, outcome in _asked.told if outcome == STORED]
        waited = receipt.done() and receipt.exception() is None
        assert len(stored) + waited + failed == 3
        if waited:
            receipt.result()
        _agree(reply, stored, waited)
        for one in failures:
            one.batch.finish(DROPPED)
    finally:
        open_end(reply)
    assert receipt.done()
    assert batcher.in_flight == 0
    assert _asked.budget.bytes == _asked.budget.records == 0


def _agree(reply: bytes, stored: list[int], waited: bool) -> None:
    """What was settled is what Python's own reader finds in the answer."""
    if b"\\" in reply or reply.count(b'"Records"') != 1:
        return  # names are compared as they are written, escapes of what is skipped are not looked at
    # laxer than RFC 8259 on purpose, see codec/json.pxi: control characters in strings, UTF-8 that is skipped
    read: Any = json.loads(reply.decode("utf-8", "replace"), strict=False, parse_int=str, parse_float=str)
    entries = read["Records"]
    assert len(entries) == 3
    for token, entry in enumerate(entries, 1):
        good = (token in stored) if token > 1 else waited
        assert good == (not entry.get("ErrorCode")), entry
        if good:
            assert entry["ShardId"]
            assert entry["SequenceNumber"]


# -- restore: what a disk may hand back for a body that was put there -------------------------------


class _Spooled:
    def __init__(self) -> None:
        self.told = 0
        self.budget = Budget(1 << 20, 1 << 16)
        self.batchers = []
        for plan in (KeyPlan("uuid"), _TOPIC):
            batcher = Batcher(
                settler=None, budget=self.budget, frame="raw", key=plan, target=b'"StreamName":"s"',
                rows=CallbackSettler(self._settled),
            )  # fmt: skip
            batcher.adopt_spooled(1 << 40)
            self.batchers.append(batcher)
        self.batchers[0].shards = _TABLE

    def _settled(self, token: int, count: int, outcome: int, answer: object, at: int) -> None:
        assert token == 5
        self.told += count


_spooled = _Spooled()


def restore(data: memoryview) -> None:
    """byte 0: the batcher; byte 1: how many bytes of counts; counts; body."""
    if len(data) < 2:
        return
    batcher = _spooled.batchers[data[0] & 1]
    at = 2 + min(data[1], len(data) - 2)
    spooled = batcher.spooled
    _spooled.told = 0
    try:
        batch = batcher.restore(data[at:], bytes(data[2:at]), 5)
    except DataFormatError as error:
        assert 0 <= error.offset <= len(data) - at
        assert batcher.in_flight == 0
        assert batcher.spooled == spooled
        return
    records = batch.user_records
    assert len(batch) <= records == batcher.in_flight == spooled - batcher.spooled
    body = json.loads(bytes(batch))
    assert len(body["Records"]) == len(batch) == len(batch.entries())
    assert bytes(data[at:]).startswith(bytes(batch)[: -len(b'"StreamName":"s"}')])
    assert sum(count for count, _ in batch.shard_load().values()) == len(batch)
    batch.finish(DROPPED)
    batcher.adopt_spooled(records)
    assert _spooled.told == records
    assert batcher.in_flight == 0
    assert batcher.spooled == spooled


# -- reading: what a stream may hold, for a consumer --------------------------------------------------

_MAGIC = b"\xf3\x89\x9a\xc2"
_SEEN = Seen(3)


def reading(data: memoryview) -> None:
    """byte 0, bit 0: the rest is the message of an aggregate, with magic and sum; bit 1: decode as JSON; data."""
    if not data:
        return
    rest = bytes(data[1:])
    stored = _MAGIC + rest + hashlib.md5(rest).digest() if data[0] & 1 else rest
    close_end(stored)
    found = deaggregate(stored)
    open_end(stored)
    assert sum(len(one) for _, one in found) <= len(stored)
    whole = len(found) == 1 and found[0] == (None, stored)
    assert whole or stored.startswith(_MAGIC)
    assert whole or all(isinstance(key, str) for key, _ in found)
    told = {"SequenceNumber": "1", "Data": b64encode(stored).decode(), "PartitionKey": "k"}
    records = read_records([told], "s", not data[0] & 2, False)
    assert [record.raw for record in records] == [one for _, one in found]
    for place, record in enumerate(records):
        assert record.subsequence_number == (None if whole else place)
        assert record.partition_key == ("k" if whole else found[place][0])
        if data[0] & 2:
            _decoded(record)
        _SEEN.is_new(record)
        assert _SEEN.is_new(record) is not _told_by_its_key(record)
    assert len(_SEEN) <= 3


def _told_by_its_key(record: Any) -> bool:
    return re.fullmatch("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", record.partition_key) is not None


def _decoded(record: Any) -> None:
    if record.error is None:
        assert record.data == decode_json(record.raw) or "NaN" in repr(record.data)
    else:
        assert record.data is None
        assert 0 <= record.error.offset <= len(record.raw) + 2  # what is no UTF-8 counts as it is shown


# -- shape: records that become others before they are stored ----------------------------------------

_SHAPES = (
    Shape(topic_field="topic"),
    Shape(topic_field="topic", topic_clash="keep", topic_others="wrap", separator="\n"),
    Shape(topic_field="a", topic_clash="reject", topic_others="reject"),
    Shape(envelope='a "host"'),
    Shape(envelope="h", topic_field="t\n", topic_others="wrap", separator="\r\n"),
    Shape(events=("start", "\u00fc")),
    Shape(events=("start",), topic_field="topic", envelope="h"),
    Shape(separator=","),
)


class _Shaped:
    def __init__(self) -> None:
        self.told = 0
        self.budget = Budget(1 << 20, 1 << 16)
        self.batcher = Batcher(
            settler=CallbackSettler(self._settled), budget=self.budget, frame="raw", key=KeyPlan("content"),
            target=b'"StreamName":"s"', max_record_bytes=400,
        )  # fmt: skip
        self.sinks = [FormatSink(self.batcher, form, shape) for form in ("raw", "bulk") for shape in _SHAPES]

    def _settled(self, token: int, count: int, outcome: int, answer: object, at: int) -> None:
        self.told += count


_shaped = _Shaped()


def shape(data: memoryview) -> None:
    """byte 0: format and shape; byte 1: length of the topic; topic; payload."""
    if len(data) < 2:
        return
    at = 2 + (data[1] & 31)
    batcher, which = _shaped.batcher, data[0] & 15
    filtered, received, _shaped.told = batcher.filtered, batcher.received, 0
    payload = bytes(data[at:])
    close_end(payload)
    taken = _shaped.sinks[which].offer(bytes(data[2:at]), payload, 7)
    open_end(payload)
    assert taken >= 0, "an empty budget has no room"
    assert batcher.received - received == taken + batcher.filtered - filtered
    rejects = batcher.take_rejects()
    for reject in rejects:
        assert reject.reason
        assert 0 <= reject.offset <= len(payload)
        batcher.settle_reject(reject, DEAD)
    batcher.close_batch(DRAIN)
    stored: list[bytes] = []
    while (batch := batcher.take()) is not None:
        stored += [entry for entry, _, _ in batch.entries()]
        batch.finish(DROPPED)
    if not rejects:
        assert len(stored) == taken
        if which & 7 in {3, 4, 6} and b"\\" not in payload:  # an envelope: JSON, but for escapes in what is skipped
            for one in stored:
                assert _object(one)["type"] == "record"
    assert _shaped.told == taken
    assert batcher.in_flight == 0
    assert _shaped.budget.bytes == _shaped.budget.records == 0


def _object(text: bytes) -> Any:
    # laxer than RFC 8259 on purpose, see codec/json.pxi
    return json.loads(text.decode("utf-8", "replace"), strict=False, parse_int=str, parse_float=str)


# -- lines: many records in one ----------------------------------------------------------------------


class _Lined:
    def __init__(self) -> None:
        self.told = 0
        self.budget = Budget(1 << 20, 1 << 16)
        settler = CallbackSettler(self._settled)
        self.batchers = [
            Batcher(
                settler=settler, budget=self.budget, frame="bulk", key=KeyPlan(kind), target=b'"StreamName":"s"',  # type: ignore[arg-type]
                line_bytes=most, max_record_bytes=each,
            )
            for kind in ("uuid", "content", "none")
            for most, each in ((40, 500), (500, 80), (60, 1000))
        ]  # fmt: skip

    def _settled(self, token: int, count: int, outcome: int, answer: object, at: int) -> None:
        self.told += count


_lined = _Lined()
_SPACES = bytes.maketrans(b"\r\n", b"  ")


def lines(data: memoryview) -> None:
    """byte 0: the batcher; records, each behind a byte 255."""
    if not data:
        return
    batcher = _lined.batchers[data[0] % len(_lined.batchers)]
    given = bytes(data[1:]).split(b"\xff")
    _lined.told = 0
    taken = batcher.offer(b"t", encode_frame(given), 7)
    assert taken == len(given)
    rejects = batcher.take_rejects()
    for reject in rejects:
        batcher.settle_reject(reject, DEAD)
    gone = {reject.index for reject in rejects}
    left = deque(one for n, one in enumerate(given) if n not in gone)
    batcher.close_batch(DRAIN)
    while (batch := batcher.take()) is not None:
        counts = batch.counts or b"\1\0\0\0" * len(batch)
        for n, (entry, _, _) in enumerate(batch.entries()):
            many = int.from_bytes(counts[4 * n : 4 * n + 4], "little")
            if many == 1:
                one = left.popleft()
                assert entry in {one, one.translate(_SPACES)}
                continue
            # as many lines as records, each the record itself but for its line ends
            assert entry.split(b"\n") == [left.popleft().translate(_SPACES) for _ in range(many)]
        batch.finish(DROPPED)
    assert not left
    assert _lined.told == taken
    assert batcher.in_flight == 0
    assert _lined.budget.bytes == _lined.budget.records == 0


# -- mqtt: packets of a broker ---------------------------------------------------------------------

_CONNACK = {4: b"\x20\x02\x00\x00", 5: b"\x20\x03\x00\x00\x00"}
_EVENTS = (_mqtt.Connack, _mqtt.Suback, _mqtt.Unsuback, _mqtt.Puback, _mqtt.Pingresp, _mqtt.Disconnect)


class _Kept:
    """A sink that takes everything and settles it later."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def offer(self, topic: bytes, payload: bytes, token: int) -> int:
        if not token:
            return 0
        self.tokens.append(token)
        return 2


class _Held:
    """A sink that refuses each third payload once."""

    def __init__(self) -> None:
        self.asked = 0
        self.seen: list[tuple[bytes, bytes]] = []

    def offer(self, topic: bytes, payload: bytes, token: int) -> int:
        self.asked += 1
        if self.asked % 3 == 1:
            return -1
        self.seen.append((topic, payload))
        return 0


def _session(flags: int) -> tuple[_mqtt.Session, _mqtt.AckTracker, _Kept, _Held]:
    version = 4 if flags & 1 else 5
    acks = _mqtt.AckTracker()
    router = _mqtt.Router(max_topics=16)
    kept = _Kept()
    counting = _mqtt.CallbackSink(kept.offer)
    held = _Held()
    if flags & 2:
        router.add("#", _mqtt.CallbackSink(held.offer))
    if flags & 4:
        router.add("+/a/#", counting)
        router.add("$share/g/b/+", counting)
    else:
        router.add("#", counting)
    session = _mqtt.Session(
        version=version, acks=acks, router=router, max_packet_bytes=4000, topic_alias_maximum=3, receive_maximum=4
    )
    if not flags & 8:
        session.feed_data(_CONNACK[version])
    return session, acks, kept, held


def _finish(session: _mqtt.Session, acks: _mqtt.AckTracker, kept: _Kept) -> tuple[int, list[str], bytes]:
    """What must hold whatever came, and what came of it."""
    for token in kept.tokens:
        acks.settled(token, 2)
    # a message whose bytes have not all come waits, and nothing was walked behind it
    coming = session.apart is not None and session.apart.token != 0
    assert acks.ready + coming == acks.unacked, "not ready although all is settled"
    ready = acks.ready
    output = session.take_output()
    assert len(output) >= 4 * ready
    events = session.take_events()
    for event in events:
        assert isinstance(event, _EVENTS), repr(event)
    return session.messages, [repr(event) for event in events], output


def _walk_on(session: _mqtt.Session, acks: _mqtt.AckTracker, flags: int) -> None:
    """Until it waits for bytes, with what is set aside let go."""
    while flags & (_mqtt.STALLED | _mqtt.APART):
        if flags & _mqtt.APART:
            apart = session.apart
            assert apart is not None
            size = len(session.take_piece())
            assert size or not session.apart_left
            if not session.apart_left:
                session.finish_apart()
                if apart.token:
                    acks.settled(apart.token)
        flags = session.resume()


def mqtt(data: memoryview) -> None:
    """byte 0: version and sinks; byte 1: how reads are cut, or not compared; the stream."""
    if len(data) < 2:
        return
    flags, cut = data[0], data[1]
    stream = data[2:]
    session, acks, kept, held = _session(flags)
    whole: tuple[str, int] | None = None
    try:
        _walk_on(session, acks, session.feed_data(stream))
    except ProtocolError as error:
        whole = (error.reason, error.offset)
        assert error.offset <= len(stream) + 5
        assert 0x80 <= error.code <= 0xFF
    assert session.buffer_bytes <= 1 << 20
    first = _finish(session, acks, kept)
    if cut & 3 != 3:
        return
    # the same in pieces: read as the loop reads, with the rest of the receive buffer out of bounds
    session, acks, kept, other = _session(flags)
    pieces: tuple[str, int] | None = None
    at, step = 0, 1 + (cut & 63)
    try:
        while at < len(stream):
            part = stream[at : at + step]
            at += len(part)
            step = 1 + (step * 5 + cut) % 97
            room = session.get_buffer(-1)
            taken = min(len(part), len(room))
            room[:taken] = part[:taken]
            flags = session.feed(taken)
            if taken < len(part):
                flags = session.feed_data(part[taken:])
            _walk_on(session, acks, flags)
    except ProtocolError as error:
        pieces = (error.reason, error.offset)
    second = _finish(session, acks, kept)
    if whole is None or pieces is None:
        assert whole == pieces
        assert first[0] == second[0]
        assert held.seen == other.seen
    assert first == second or cut & 128 or _puback(first[1]), (first, second)


def _puback(events: list[str]) -> bool:
    return any(event.startswith("Puback") for event in events)


# -- router: topics of a publisher against filters of the operator ---------------------------------


def router(data: memoryview) -> None:
    """Lines: a topic, then up to eight filters. Matching and what is remembered of it, by the plain rule: the first
    filter that takes the topic decides among several sinks, what none takes is the last one's."""
    lines = bytes(data).split(b"\n")[:9]
    table = _mqtt.Router(max_topics=8)
    filters: list[str] = []
    sinks: list[_mqtt.CountSink] = []
    for line in lines[1:]:
        try:
            text = line.decode()
            sink = _mqtt.CountSink()
            table.add(text, sink)
        except ValueError:
            continue  # not UTF-8, or no filter
        filters.append(re.sub(r"^\$share/[^/]+/", "", text) if text.startswith("$share/") else text)
        sinks.append(sink)
    other = _mqtt.CountSink()
    if sinks:
        table.add("no/such/topic", other)
        table.otherwise = other
    session = _mqtt.Session(version=4, acks=_mqtt.AckTracker(), router=table, max_packet_bytes=4000)
    session.feed_data(_CONNACK[4])
    topic = lines[0][:2000]
    body = len(topic).to_bytes(2, "big") + topic
    length = len(body)
    packet = bytes((0x30, length & 127 | 128, length >> 7)) if length > 127 else bytes((0x30, length))
    try:
        session.feed_data(packet + body + packet + body)
    except ProtocolError:
        return
    name = topic.decode()
    plain = [at for at, text in enumerate(filters) if any(_takes(form, name.split("/")) for form in _plain(text))]
    lenient = [at for at, text in enumerate(filters) if any(_takes(form, name.split("/")) for form in _lenient(text))]
    first = (plain + lenient)[:1]
    for at, sink in enumerate(sinks):
        assert sink.messages == (2 if [at] == first else 0), (filters, name)
    if sinks and name != "no/such/topic":
        assert other.messages == (0 if first else 2)
    assert table.cached <= 8
    assert table.cached_bytes <= 8 * 128


def _plain(text: str) -> list[list[str]]:
    forms = [text]
    forms += [text[len(p) :] for p in ("$queue/", "$exclusive/") if text.startswith(p) and text != p]
    return [form.split("/") for form in forms]


def _lenient(text: str) -> list[list[str]]:
    """Without one or two levels of a prefix that begins with $."""
    levels = text.split("/")
    return [levels[cut:] for cut in (1, 2) if text.startswith("$") and "/".join(levels[cut:])]


def _takes(pattern: list[str], levels: list[str]) -> bool:
    if levels[0].startswith("$") and pattern[0] in {"#", "+"}:
        return False
    for at, part in enumerate(pattern):
        if part == "#":
            return True
        if at >= len(levels) or (part != "+" and part != levels[at]):
            return False
    return len(pattern) == len(levels)


# -- http: what comes over a connection to an endpoint ---------------------------------------------


class _Handle:
    def cancel(self) -> None:
        pass


class _Loop:
    """As much of an event loop as a connection needs."""

    def __init__(self) -> None:
        self.ready: deque[tuple[Any, tuple[Any, ...]]] = deque()

    def get_debug(self) -> bool:
        return False

    def time(self) -> float:
        return 0.0

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def call_soon(self, callback: Any, *arguments: Any, context: Any = None) -> _Handle:
        self.ready.append((callback, arguments))
        return _Handle()

    def call_later(self, delay: float, callback: Any, *arguments: Any) -> _Handle:
        return _Handle()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise AssertionError(context)

    def run(self) -> None:
        while self.ready:
            callback, arguments = self.ready.popleft()
            callback(*arguments)


class _Wire:
    """A transport that takes everything at once and says later that it is gone."""

    def __init__(self, loop: _Loop, protocol: Any) -> None:
        self.loop, self.protocol = loop, protocol
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        pass

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: object) -> None:
        pass

    def writelines(self, data: object) -> None:
        pass

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closing:
            self.closing = True
            self.loop.call_soon(self.protocol.connection_lost, None)


def _nobody(connection: object) -> None:
    pass


def _exchange(stream: memoryview, step: int) -> tuple[object, bool]:
    """Reply or error, and whether the connection could be used again."""
    loop = _Loop()
    connection = Connection(loop, "h:443", tls=True, gone=_nobody)  # type: ignore[arg-type]
    wire = _Wire(loop, connection)
    connection.connection_made(wire)  # type: ignore[arg-type]
    call = connection.exchange(b"POST / HTTP/1.1\r\n\r\n", b"{}", 30.0)
    call.send(None)
    for at in range(0, len(stream), step):
        if wire.closing:
            break
        connection.data_received(bytes(stream[at : at + step]))
        loop.run()
        assert connection.answer.received <= MAX_ANSWER
    usable = connection.usable
    if not wire.closing:
        connection.eof_received()
        wire.abort()
    loop.run()
    try:
        call.send(None)
        loop.run()
        call.send(None)
        loop.run()
        call.send(None)
    except StopIteration as done:
        return done.value, usable
    except (TransportError, StaleConnectionError) as error:
        assert "\n" not in str(error)
        assert "\r" not in str(error)
        assert len(str(error)) < 1000
        return type(error).__name__, usable
    raise AssertionError("the call does not end with its connection")


def http(data: memoryview) -> None:
    """byte 0: the size of reads; then what the endpoint sends."""
    if not data:
        return
    reply, _ = _exchange(data[1:], max(1, len(data)))
    if isinstance(reply, Reply):
        assert 200 <= reply.status <= 999
        assert len(reply.body) < len(data)
        assert sum(len(name) + len(value) for name, value in reply.headers.items()) <= MAX_HEADERS
    if data[0]:
        cut, _ = _exchange(data[1:], data[0])
        assert cut == reply, (cut, reply)


# -- settings: a file and an environment -----------------------------------------------------------

_NAMES = [
    "FASTKIN_BROKER_URL", "FASTKIN_URL", "FASTKIN_STREAM", "FASTKIN_REGION", "FASTKIN_TOPICS", "FASTKIN_FORMAT",
    "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "BROKER", "TOPIC", "KIN_STREAM_NAME", "BULK_LABEL",
    "FASTKIN_PARTITION_KEY", "FASTKIN_BUDGET_BYTES", "FASTKIN_ENDPOINT_URL",
]  # fmt: skip


class _Text(io.BytesIO):
    """One file after the other without a disk: what load_settings() opens."""


_FILE = Path(tempfile.gettempdir()) / f"fuzz-settings-{os.getpid()}.toml"


def settings(data: memoryview) -> None:
    """The environment's lines NAME=value or one of sixteen numbered names, a NUL, then the TOML file."""
    given, nul, toml = bytes(data).partition(b"\0")
    if not nul:
        given, toml = b"", given
    env: dict[str, str] = {}
    for line in given.split(b"\n"):
        name, equals, value = line.decode("utf-8", "surrogateescape").partition("=")
        if equals and name:
            env[_NAMES[ord(name) % 16] if len(name) == 1 else name] = value
    _FILE.write_bytes(toml)
    try:
        load_settings(_FILE, env=env)
    except ConfigError as error:
        assert error.place
        for line_ in str(error).split("\n"):
            assert line_.isprintable(), line_
    finally:
        _FILE.unlink()


TARGETS: dict[str, Callable[[memoryview], None]] = {
    "frame": frame,
    "answer": answer,
    "restore": restore,
    "reading": reading,
    "shape": shape,
    "lines": lines,
    "mqtt": mqtt,
    "router": router,
    "http": http,
    "settings": settings,
}
