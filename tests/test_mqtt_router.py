"""Filters to sinks, by MQTT's rules; the memory of topics stays bounded."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from fastkin import _mqtt
from fastkin.errors import LibraryError
from mqtt_wire import Rig, publish


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
    assert router.match(topic) == ([sink] if taken else [])


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
    """Every sink with a filter that matches gets the message once, whatever the cache remembers."""
    rig = Rig(4)
    rig.router = _mqtt.Router(max_topics=8)
    seen: list[int] = []

    def taker(number: int) -> _mqtt.CallbackSink:
        def take(topic: bytes, payload: bytes, token: int) -> int:
            seen.append(number)
            return 0

        return _mqtt.CallbackSink(take)

    sinks = [taker(number) for number in range(4)]
    order = list(dict.fromkeys(number for _, number in rows))
    for topic_filter, number in rows:
        rig.router.add(topic_filter, sinks[number])
    rig.connection()
    unrouted = 0
    for name in names * 2:
        want = [number for number in order if any(n == number and topic_matches_sub(f, name) for f, n in rows)]
        assert rig.router.match(name) == [sinks[number] for number in want]
        seen.clear()
        rig.feed(publish(name, qos=1))
        assert seen == want
        unrouted += not want
    assert rig.router.unrouted == unrouted
    assert rig.ledger.ready == 2 * len(names)  # all are acknowledged, also what no filter took


def test_add_after_topics_were_seen() -> None:
    rig = Rig(4, "a/#")
    rig.feed(publish("a/b") + publish("b"))
    assert rig.router.unrouted == 1
    later = _mqtt.CountSink()
    rig.router.add("b", later)
    rig.router.add("+/b", later)
    rig.feed(publish("a/b") + publish("b"))
    assert (len(rig.seen), later.messages) == (2, 2)


def test_untrusted_topics_do_not_grow_memory() -> None:
    rig = Rig(4, "t/#", "other")
    router = rig.router
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


def test_everything_to_one_sink_skips_the_cache_but_not_the_rules() -> None:
    rig = Rig(4, "#", "a/b")
    rig.feed(publish("a/b") + publish("$SYS/x", qos=1, packet_id=1))
    assert (len(rig.seen), rig.router.unrouted, rig.router.cached) == (1, 1, 0)
    assert rig.router.match("$SYS/x") == []
    second = _mqtt.CountSink()
    rig.router.add("$SYS/#", second)
    rig.feed(publish("$SYS/x"))
    assert second.messages == 1


def test_wrong_arguments() -> None:
    router = _mqtt.Router()
    with pytest.raises(TypeError):
        router.add("a", object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        router.add(None, _mqtt.CountSink())  # type: ignore[arg-type]
    with pytest.raises(LibraryError, match="wildcards"):
        router.match("a/#")
    with pytest.raises(TypeError, match="callable"):
        _mqtt.CallbackSink(3)  # type: ignore[arg-type]
