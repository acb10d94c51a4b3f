"""Filters to sinks, by MQTT's rules; the memory of topics stays bounded."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from fastkin.errors import LibraryError
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import Rig, publish


def prefixed(topic_filter: str, topic: str) -> bool:
    """Does the filter take the topic without one or two levels of a prefix that begins with $?"""
    rest = topic_filter
    if rest.startswith("$share/"):
        rest = rest.split("/", 2)[2]
    if not rest.startswith("$"):
        return False
    for _ in range(2):
        rest = rest.partition("/")[2]
        if rest and topic_matches_sub(rest, topic):
            return True
    return False


@pytest.mark.parametrize(
    ("topic_filter", "topic", "taken"),
    [
        # the examples of section 4.7
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "a", True),
        ("#", "/", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("+/tennis/#", "sport/tennis", True),
        ("#", "$SYS/monitor", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/monitor/Clients", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
        ("$SYS/#", "$SYS", True),
        ("+", "$a", False),
        # the rest
        ("a", "a", True),
        ("a", "A", False),
        ("a", "ab", False),
        ("ab", "a", False),
        ("a/", "a", False),
        ("a", "a/", False),
        ("a//b", "a//b", True),
        ("a/+/b", "a//b", True),
        ("+//#", "a/", True),
        ("a/b/#", "a", False),
        ("a/+/#", "a", False),
        ("a/+/#", "a/x", True),
        ("ü/€", "ü/€", True),
        ("$share/g/a/+", "a/b", True),
        ("$share/g//a", "/a", True),
        ("$share/g/#", "$SYS/x", False),
        ("$shared/x", "$shared/x", True),
        ("a/$x", "a/$x", True),
        ("a/+", "a/$x", True),
    ],
)
def test_matches(topic_filter: str, topic: str, taken: bool) -> None:
    assert _mqtt.matches(topic_filter, topic) is taken
    router = _mqtt.Router()
    sink = _mqtt.CountSink()
    router.add(topic_filter, sink)
    assert router.match(topic) == [sink], "the only sink there is takes what the broker delivers"
    other = _mqtt.CountSink()
    router.otherwise = other
    router.add("no/such/topic", other)
    assert router.match(topic) == [sink if taken or prefixed(topic_filter, topic) else other]


@pytest.mark.parametrize(
    ("topic_filter", "fault"),
    [
        ("", "at least one character"),
        ("a\0", "NUL"),
        ("\udfff", "UTF-8"),
        ("a" * 65536, "at most 65535"),
        ("a#", "stand alone"),
        ("a/#b", "stand alone"),
        ("#/a", "last level"),
        ("a/#/b", "last level"),
        ("a+", "stand alone"),
        ("+a/b", "stand alone"),
        ("a/b+c", "stand alone"),
        ("$share", "GROUP/FILTER"),
        ("$share/", "GROUP/FILTER"),
        ("$share/g", "GROUP/FILTER"),
        ("$share/g/", "GROUP/FILTER"),
        ("$share//a", "GROUP/FILTER"),
        ("$share/g+/a", "group name"),
        ("$share/#/a", "group name"),
        ("$share/g/a#", "stand alone"),
    ],
)
def test_invalid_filters(topic_filter: str, fault: str) -> None:
    got = _mqtt.valid_filter(topic_filter)
    assert got is not None
    assert fault in got
    with pytest.raises(LibraryError, match=fault.replace("$", r"\$")):
        _mqtt.Router().add(topic_filter, _mqtt.CountSink())
    with pytest.raises(LibraryError):
        _mqtt.matches(topic_filter, "a")


@pytest.mark.parametrize("topic_filter", ["#", "+", "/", "//", "a/+/#", "$share/g/#", "$share/g//", "$sharex", "ü"])
def test_valid_filters(topic_filter: str) -> None:
    assert _mqtt.valid_filter(topic_filter) is None


level = st.sampled_from(["", "a", "b", "ab", "$a", "ü"])
topics = st.lists(level, min_size=1, max_size=5).map("/".join).filter(bool)
filters = (
    st.tuples(st.lists(level | st.just("+"), min_size=1, max_size=5), st.booleans())
    .map(lambda drawn: "/".join([*drawn[0], "#"] if drawn[1] else drawn[0]))
    .filter(bool)
)


@settings(max_examples=2000, deadline=None)
@given(filters, topics)
def test_matches_as_paho_does(topic_filter: str, topic: str) -> None:
    assert _mqtt.matches(topic_filter, topic) == topic_matches_sub(topic_filter, topic)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(filters, st.integers(0, 3)), max_size=8), st.lists(topics, max_size=20))
def test_routes(rows: list[tuple[str, int]], names: list[str]) -> None:
    """The first filter that matches says who takes a message, whatever the cache remembers; match() says the same."""
    rig = Rig(4)
    rig.router = _mqtt.Router(max_topics=8)
    seen: list[int] = []

    def taker(number: int) -> _mqtt.CallbackSink:
        def take(topic: bytes, payload: bytes, token: int) -> int:
            seen.append(number)
            return 0

        return _mqtt.CallbackSink(take)

    sinks = [taker(number) for number in range(5)]
    for topic_filter, number in rows:
        rig.router.add(topic_filter, sinks[number])
    rig.router.otherwise = sinks[4]
    rig.connection()
    for name in names * 2:
        plain = [number for f, number in rows if topic_matches_sub(f, name)]
        lenient = [number for f, number in rows if prefixed(f, name)]
        want = (plain + lenient + [4])[:1] if len({number for _, number in rows}) != 1 else [rows[0][1]]
        if not rows:
            want = []
        assert rig.router.match(name) == [sinks[number] for number in want]
        seen.clear()
        rig.feed(publish(name, qos=1))
        assert seen == want
    assert rig.router.unrouted == (0 if rows else 2 * len(names))
    assert rig.acks.ready == 2 * len(names)


def test_add_after_topics_were_seen() -> None:
    rig = Rig(4, "a/#")
    rig.feed(publish("a/b") + publish("b"))
    assert len(rig.seen) == 2
    later = _mqtt.CountSink()
    rig.router.add("b", later)
    rig.router.add("+/b", later)
    rig.feed(publish("a/b") + publish("b") + publish("c/b") + publish("c"))
    assert (len(rig.seen), later.messages) == (4, 2)


def test_one_sink_takes_all_and_looks_at_no_topic() -> None:
    rig = Rig(4, "#", "$SYS/broker/uptime", "$queue/t")
    rig.feed(publish("a/b") + publish("$SYS/broker/uptime") + publish("t", qos=1, packet_id=1) + publish("$x"))
    assert (len(rig.seen), rig.router.unrouted, rig.router.cached) == (4, 0, 0)
    assert rig.router.match("$SYS/x") == [rig.sink]


def test_the_identifier_decides_among_several() -> None:
    rig = Rig(5)
    rig.router = router = _mqtt.Router()
    raw, bulk, stray = _mqtt.CountSink(), _mqtt.CountSink(), _mqtt.CountSink()
    router.add("#", raw, 1)
    router.add("bulk/+", bulk, 2)
    router.otherwise = stray
    assert router.match("bulk/1", [2]) == [bulk]
    assert router.match("a", [2]) == [bulk]
    for several in ([], [1, 2], [9]):  # by the filters then
        assert router.match("bulk/1", several) == [raw]
    assert router.match("$SYS/x", []) == [stray]
    assert router.match("$SYS/x", [1]) == [raw]
    rig.connection()
    user = b"\x26\x00\x01a\x00\x02bc"
    before = (0, 0, 0)
    for properties, want in [
        (b"\x0b\x02", (0, 1, 0)),
        (user + b"\x01\x01" + b"\x0b\x02" + b"\x02\x00\x00\x00\x05" + b"\x03\x00\x01x", (0, 1, 0)),
        (b"\x0b\x02\x0b\x02", (0, 1, 0)),
        (b"\x0b\x01\x0b\x02", (1, 0, 0)),
        (b"\x0b\x82\x01", (1, 0, 0)),
        (b"", (1, 0, 0)),
    ]:
        rig.feed(publish("bulk/1", version=5, properties=properties))
        now = (raw.messages, bulk.messages, stray.messages)
        assert tuple(n - b for n, b in zip(now, before, strict=True)) == want, properties
        before = now


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_only_a_kept_session_has_what_was_removed(version: int, several: bool, resumed: bool) -> None:
    rig = Rig(version, "a/#", "$queue/q")
    if several:
        rig.router.add("frames", _mqtt.CountSink())
    rig.router.remove("old/+")
    rig.router.remove("$share/g/#")
    rig.connection(connected=False)
    rig.feed((b"\x20\x03" if version == 5 else b"\x20\x02") + bytes((resumed, 0)) + b"\0" * (version == 5))
    for name in ("old/1", "a/b", "q", "$SYS/x"):
        rig.feed(publish(name, qos=1, version=version))
    want = [b"a/b", b"q", b"$SYS/x"] if resumed else [b"old/1", b"a/b", b"q", b"$SYS/x"]
    assert [topic for topic, _, _ in rig.seen] == want
    assert rig.router.unrouted == resumed
    assert rig.router.stray == (b"old/1" if resumed else b"")
    assert rig.router.match("old/1", resumed=resumed) == ([] if resumed else [rig.sink])
    assert rig.router.former == ["old/+", "$share/g/#"]
    assert rig.acks.ready == 0 if not resumed else rig.acks.unacked == 4


def test_untrusted_topics_do_not_grow_memory() -> None:
    rig = Rig(4, "t/#", "other")
    router = rig.router
    router.add("frames", _mqtt.CountSink())  # several sinks: topics are matched
    for i in range(60_000):
        rig.feed(publish(f"t/{i:060d}"))
    assert router.cached <= 8192
    assert router.cached_bytes <= 8192 * 128
    for i in range(3_000):
        rig.feed(publish(f"t/{i:01000d}"))
    assert router.cached_bytes <= 8192 * 128
    before = router.cached
    rig.feed(publish("t/" + "x" * 2000))
    assert router.cached == before
    assert len(rig.seen) == 63_001


def test_small_and_no_cache() -> None:
    for size in (0, 1, 4, 9):
        rig = Rig(4, "t/#", "u")
        rig.router = _mqtt.Router(max_topics=size)
        rig.router.add("t/#", rig.sink)
        rig.router.add("frames", _mqtt.CountSink())
        rig.connection()
        for i in range(100):
            rig.feed(publish(f"t/{i}") + publish(f"t/{i}"))
        assert len(rig.seen) == 200
        assert rig.router.cached <= size
    with pytest.raises(LibraryError, match="negative"):
        _mqtt.Router(max_topics=-1)


def test_a_router_without_filters() -> None:
    rig = Rig(4)
    rig.router = _mqtt.Router()
    rig.connection()
    rig.feed(publish("a", qos=1, packet_id=3) + publish("a"))
    assert rig.router.unrouted == 2
    assert rig.router.match("a") == []
    assert rig.session.take_output() == b"\x40\x02\x00\x03"


def test_wrong_arguments() -> None:
    router = _mqtt.Router()
    with pytest.raises(TypeError):
        router.add("a", object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        router.add(None, _mqtt.CountSink())  # type: ignore[arg-type]
    with pytest.raises(LibraryError, match="wildcards"):
        router.match("a/#")
    with pytest.raises(LibraryError, match="identifier"):
        router.add("a", _mqtt.CountSink(), 268_435_456)
    with pytest.raises(TypeError):
        router.otherwise = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="callable"):
        _mqtt.CallbackSink(3)  # type: ignore[arg-type]
