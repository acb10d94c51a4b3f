"""Partition keys: drawn, fixed, made of topic and payload; hash key to shard."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import uuid
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkin._codec import KeyPlan, ShardTable, uuid_key
from fastkin.errors import LibraryError, RecordError
from support import oracle
from support.codec_rig import Rig

EVEN = [(2**128 // 16) * (i + 1) - 1 for i in range(15)] + [2**128 - 1]


def test_uuids_are_distinct_and_of_version_4() -> None:
    keys = [uuid_key() for _ in range(10_000)]
    assert len(set(keys)) == 10_000
    for key in keys:
        parsed = uuid.UUID(key)
        assert str(parsed) == key
        assert parsed.version == 4
        assert parsed.variant == uuid.RFC_4122


def test_every_free_bit_is_drawn() -> None:
    ones = [0] * 128
    for _ in range(4000):
        value = uuid.UUID(uuid_key()).int
        for bit in range(128):
            ones[bit] += value >> bit & 1
    fixed = {127 - 48: 0, 127 - 49: 4000, 127 - 50: 0, 127 - 51: 0, 127 - 64: 4000, 127 - 65: 0}
    for bit, count in enumerate(ones):
        if bit in fixed:
            assert count == fixed[bit], bit
        else:
            assert 1700 < count < 2300, bit  # nine standard deviations


def test_keys_spread_over_shards() -> None:
    table = ShardTable(EVEN)
    n = 32_000
    counts = Counter(table.find(uuid_key()) for _ in range(n))
    chi = sum((counts[i] - n / 16) ** 2 / (n / 16) for i in range(16))
    assert chi < 50  # 15 degrees of freedom: less than one in 80,000


def _child(queue: Any) -> None:
    queue.put([uuid_key() for _ in range(50)])


@pytest.mark.process
def test_a_forked_child_draws_keys_of_its_own() -> None:
    uuid_key()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    drawn = [key for _ in children for key in queue.get(timeout=20)]
    for child in children:
        child.join()
    queue.close()
    drawn += [uuid_key() for _ in range(50)]
    assert len(set(drawn)) == 200


@pytest.mark.process
def test_a_batcher_of_a_forked_child_draws_keys_of_its_own() -> None:
    rig = Rig()
    rig.batcher.add(b"x")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        rig.batcher.add(b"x")
        os.write(writing, str(rig.drain()[0].entries()[1][1]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    rig.batcher.add(b"x")
    mine = rig.store()[0][1][1]
    assert os.read(reading, 100).decode() != mine
    os.close(reading)
    os.close(writing)


# -- plans

NAMES = ["id", "a", "b", "\u00fc", "x y", 'q"', ""]
SCALARS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
PARTS = st.one_of(
    st.tuples(st.just("text"), st.text(st.characters(codec="utf-8"), max_size=90)),
    st.just(("topic", None)),
    st.tuples(st.just("level"), st.integers(0, 3)),
    st.tuples(st.just("field"), st.lists(st.sampled_from(NAMES[:-1]), min_size=1, max_size=2).map(tuple)),
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    value = draw(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5))
    indent = draw(st.sampled_from([None, 1]))
    return json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent).encode()


@given(st.lists(PARTS, min_size=1, max_size=4), st.text(st.characters(codec="utf-8"), max_size=120), documents())
def test_render_as_the_oracle(parts: list[tuple[str, Any]], topic: str, data: bytes) -> None:
    raw = oracle.render(parts, topic.encode(), data)
    plan = KeyPlan("parts", parts)
    problem = None if raw is None else oracle.key_problem(raw)
    # a text or topic that is too long is found before the field that is absent
    if problem or raw is None:
        try:
            key = plan.render(topic.encode(), data)
        except RecordError as error:
            key, said = "", str(error)
        if key:
            assert raw is None
            assert uuid.UUID(key).version == 4
        else:
            assert raw is None or str(problem) in said
        return
    assert raw is not None
    assert plan.render(topic.encode(), data) == raw.decode()
    rig = Rig(key=plan)
    assert rig.batcher.offer(topic.encode(), data, 1) == 1
    [[(stored, key, _)]] = rig.store()
    assert stored == data
    assert key == raw.decode()
    rig.settled()


@given(st.binary(max_size=80))
def test_garbage_gives_a_key_or_a_reject(data: bytes) -> None:
    plan = KeyPlan("parts", [("field", ("a", "b"))])
    for payload in (data, b'{"a":{"b":' + data + b"}}", b'{"a":{"b":"' + data + b'"}}', b'{"' + data + b'":1}'):
        try:
            key = plan.render(b"t", payload)
        except RecordError:
            continue
        assert 1 <= len(key) <= 256


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (b'{"a":{"b":"x"}}', "x"),
        (b' {"z":[1,{"a":2},"]"],"a" : {"c":{} , "b":\t-1.50e+3 }}', "-1.50e+3"),
        (b'{"a":{"b":true}}', "true"),
        (b'{"a":{"b":false,"b":1}}', "false"),
        (b'{"a":{"b":"\\u00e9\\ud83d\\ude00\\n\\t\\r\\b\\f\\"\\\\\\/"}}', '\u00e9\U0001f600\n\t\r\b\f"\\/'),
        (b'{"\\u0061":{"\\u0062":0}}', "0"),
        (b'{"\\u00' + b"x" * 2000 + b'":1,"a":{"\\u0062x":2,"b":"\\u00FC\\uD83D\\uDE00"}}', "\u00fc\U0001f600"),
        (b'{"a":{"b":"first"},"a":{"b":"second"}}', "first"),
        (b'{"a":{"b":"first"}, and then nothing more', "first"),
        ('{"a":{"b":"\u20ac\u00fc"}}'.encode(), "\u20ac\u00fc"),
    ],
)  # fmt: skip
def test_fields(data: bytes, key: str) -> None:
    assert KeyPlan("parts", [("field", ("a", "b"))]).render(b"t", data) == key


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no JSON", b"[]", b"{}", b'{"a"', b'{"a":', b'{"a":1}', b'{"a":{"b":null}}', b'{"a":{"b":[1]}}',
        b'{"a":{"b":{}}}', b'{"a":{"b":', b'{"a":{"b":01x}}'[:10], b'{"a":{"b":"x', b'{"a":{"b":"x\\', b'{"a":{"b":tru',
        b'{"a":{"b":-}}', b'{"a":{"b":1.}}', b'{"a":{"b":1e}}', b'{"a":{"b":+1}}', b'{"z":nul,"a":{"b":1}}',
        b'{"z":' + b"[" * 61 + b"]" * 61 + b',"a":{"b":1}}', b'{"z":"\\u00zz","a":{}}', b'{"z":[1 2],"a":{"b":1}}',
        b'{"z":{"y" 1},"a":{"b":1}}', b'{"z":[1,,2],"a":{"b":1}}', b'{"z" 1}', b'{"z":[}', b'{"z":{]',
        b'{"\\ud800a":1}', b'{"z":{"y":1,2}}',
    ],
)  # fmt: skip
def test_an_absent_field_gets_a_uuid_and_is_counted(data: bytes) -> None:
    rig = Rig(key=KeyPlan("parts", [("text", "k"), ("field", ("a", "b"))]))
    assert rig.batcher.offer(b"t", data, 1) == 1
    [[(_, key, _)]] = rig.store()
    assert key is not None
    assert uuid.UUID(key).version == 4
    assert rig.batcher.keys_missing == 1
    rig.settled()


@pytest.mark.parametrize(
    "value", [b'"\\ud800"', b'"\\udc00"', b'"\\ud800\\u0041"', b'"\\q"', b'"\\u12"', b'"\xff"', b'""']
)
def test_a_field_that_can_be_no_key(value: bytes) -> None:
    rig = Rig(key=KeyPlan("parts", [("field", ("a",))]))
    assert rig.batcher.offer(b"t", b'{"a":' + value + b"}", 9) == 1
    [reject] = rig.batcher.take_rejects()
    assert ("empty" if value == b'""' else "UTF-8") in reject.reason
    assert (reject.token, reject.index, reject.topic) == (9, None, b"t")
    rig.batcher.settle_reject(reject, 1)
    rig.settled()


def test_depth_is_bounded() -> None:
    plan = KeyPlan("parts", [("field", ("a",))])
    assert plan.render(b"", b'{"z":' + b"[" * 60 + b"]" * 60 + b',"a":7}') == "7"
    assert plan.render(b"", b'{"z":' + b"[" * 100_000) != "7"
    assert plan.render(b"", b'{"z":' + b'{"y":' * 100_000) != "7"


@pytest.mark.parametrize("n", [255, 256, 257])
def test_length_in_code_points(n: int) -> None:
    for letter in ("a", "\u00fc", "\u20ac", "\U0001f600", '"', "\n"):
        rig = Rig(key=KeyPlan("parts", [("topic", None)]))
        topic = (letter * n).encode()
        assert rig.batcher.offer(topic, b"x", 1) == 1
        if n <= 256:
            [[(_, key, _)]] = rig.store()
            assert key == letter * n
        else:
            [reject] = rig.batcher.take_rejects()
            assert "more than 256" in reject.reason
            rig.batcher.settle_reject(reject, 1)
        rig.settled()


@given(st.binary(min_size=1, max_size=8))
def test_utf8_as_python_sees_it(topic: bytes) -> None:
    plan = KeyPlan("parts", [("topic", None)])
    try:
        text = topic.decode()
    except UnicodeDecodeError:
        with pytest.raises(RecordError, match="UTF-8"):
            plan.render(topic, b"")
    else:
        assert plan.render(topic, b"") == text


@pytest.mark.parametrize(
    "bad", ["80", "c0af", "c1bf", "e08080", "eda080", "f0808080", "f4908080", "f5808080", "e282", "e28261", "c3", "fe"]
)
def test_utf8_that_is_none(bad: str) -> None:
    with pytest.raises(RecordError, match="UTF-8"):
        KeyPlan("parts", [("topic", None)]).render(bytes.fromhex(bad), b"")


@pytest.mark.parametrize(
    "value", ["x" * 1025, "\\n" + "x" * 1025, "x" * 1023 + "\\u00fc", "x" * 1022 + "\\u20ac", "\\n" * 1025]
)
def test_a_field_longer_than_any_key(value: str) -> None:
    plan = KeyPlan("parts", [("field", ("a",))])
    with pytest.raises(RecordError, match="more than 256"):
        plan.render(b"t", f'{{"a":"{value}"}}'.encode())
    with pytest.raises(RecordError, match="more than 256"):
        KeyPlan("parts", [("topic", None), ("topic", None)]).render(value.encode(), b"")


def test_levels() -> None:
    def level(n: int, topic: bytes) -> str:
        return KeyPlan("parts", [("text", "k"), ("level", n)]).render(topic, b"")

    assert level(0, b"plant/welder7/data") == "kplant"
    assert level(1, b"plant/welder7/data") == "kwelder7"
    assert level(2, b"plant/welder7/data") == "kdata"
    assert level(1, b"plant//data") == "k"
    assert level(1, b"plant/") == "k"
    assert uuid.UUID(level(3, b"plant/welder7/data"))
    assert uuid.UUID(level(0, b""))


def test_a_fixed_key_and_the_topic_are_remembered_not_confused() -> None:
    rig = Rig(key=KeyPlan("parts", [("text", 'f"'), ("level", 0)]))
    for topic in (b"a/1", b"a/1", b"b/1", b"a", b"a"):
        rig.batcher.offer(topic, b"x", 1)
    assert [key for _, key, _ in rig.store()[0]] == ['f"a', 'f"a', 'f"b', 'f"a', 'f"a']
    rig.settled()


def test_no_key() -> None:
    rig = Rig(key=KeyPlan("none"))
    rig.batcher.offer(b"t", b"abc", 1)
    [batch] = rig.drain()
    assert json.loads(bytes(batch))["Records"] == [{"Data": "YWJj"}]
    assert batch.size == 3
    batch.finish(3)
    assert KeyPlan("none").render(b"t", b"") == ""
    assert uuid.UUID(KeyPlan("uuid").render(b"t", b""))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("uuid", [("text", "x")]), ("none", [("topic", None)]), ("parts", []), ("odd", []), ("parts", [("odd", 1)]),
        ("parts", [("field", "a.b")]), ("parts", [("field", ())]), ("parts", [("field", ("x" * 1025,))]),
    ],
)  # fmt: skip
def test_plans_that_are_none(kind: Any, parts: Any) -> None:
    with pytest.raises(LibraryError):
        KeyPlan(kind, parts)


# -- explicit hash keys and shards


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("0", True), ("1", True), ("01", False), ("", False), ("-1", False), ("1.0", False),
        (" 1", False), ("00", False),
        (str(2**128 - 1), True), (str(2**128), False), ("9" * 39, False), ("9" * 38, True), ("1" + "0" * 39, False),
        ("\u0661", False), ("1\n", False), ("12a", False),
    ],
)  # fmt: skip
def test_explicit_hash_keys(text: str, fine: bool) -> None:
    rig = Rig()
    assert oracle.hash_key_valid(text) == fine
    if fine:
        rig.batcher.add(b"x", 1, "k", text)
        [[(_, key, hash_key)]] = rig.store()
        assert (key, hash_key) == ("k", text)
    else:
        with pytest.raises(RecordError, match="explicit hash key"):
            rig.batcher.add(b"x", 1, "k", text)
        with pytest.raises(LibraryError):
            ShardTable(EVEN).find("", text)
    rig.settled()


@given(
    st.text(max_size=20).filter(lambda s: s.isprintable()),
    st.lists(st.integers(0, 2**128 - 1), max_size=9, unique=True),
)
def test_shards_by_key(key: str, ends: list[int]) -> None:
    ends.sort()
    table = ShardTable(ends)
    assert len(table) == len(ends)
    assert table.find(key) == oracle.shard_of(ends, oracle.hash_of(key))


@given(st.integers(0, 2**128 - 1), st.lists(st.integers(0, 2**128 - 1), max_size=9, unique=True))
def test_shards_by_hash_key(at: int, ends: list[int]) -> None:
    ends.sort()
    assert ShardTable(ends).find("", str(at)) == oracle.shard_of(ends, at)
    for end in ends:
        assert ShardTable(ends).find("", str(end)) == ends.index(end)


@pytest.mark.parametrize("ends", [[5, 5], [6, 5], [-1], [2**128]])
def test_tables_that_are_none(ends: list[int]) -> None:
    with pytest.raises(LibraryError):
        ShardTable(ends)


def test_entries_know_their_shard() -> None:
    table = ShardTable(EVEN)
    rig = Rig(key=KeyPlan("parts", [("topic", None)]))
    rig.batcher.offer(b"early", b"x", 1)
    assert rig.batcher.shards is None
    rig.batcher.shards = table
    assert rig.batcher.shards is table
    rig.batcher.offer(b"early", b"xx", 1)
    rig.batcher.add(b"xxx", 1, "caller")
    rig.batcher.add(b"xxxx", 1, None, "0")  # no topic: a UUID
    [batch] = rig.drain()
    load: dict[int, list[int]] = {}
    for shard, size in [(-1, 6), (table.find("early"), 7), (table.find("caller"), 9), (0, 40)]:
        load.setdefault(shard, [0, 0])[0] += 1
        load[shard][1] += size
    assert batch.shard_load() == {shard: tuple(both) for shard, both in load.items()}
    batch.finish(3)
    rig.settled()
    drawn = Rig()
    drawn.batcher.shards = table
    drawn.batcher.offer(b"t", b"x", 1)
    [batch] = drawn.drain()
    assert batch.shard_load() == {-1: (1, 37)}
    batch.finish(3)
    fielded = Rig(key=KeyPlan("parts", [("field", ("id",))]))
    fielded.batcher.shards = table
    fielded.batcher.offer(b"t", b'{"id":"w7"}', 1)
    [batch] = fielded.drain()
    assert batch.shard_load() == {oracle.shard_of(EVEN, oracle.hash_of("w7")): (1, 13)}
    batch.finish(3)


def test_md5_is_that_of_the_standard_library() -> None:
    assert oracle.hash_of("x") == int(hashlib.md5(b"x").hexdigest(), 16)
