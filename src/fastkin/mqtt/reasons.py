"""What to do about a reason code of a broker: the cure that belongs to reason_text()'s words."""

from __future__ import annotations

from fastkin.mqtt._core import reason_text

# About a subscription, or about a connection that was ended for one.
_CURES = {
    0x80: "the broker gives no reason (3.1.1 has no other code): see its log, mostly a policy does not allow the filter"
    " to this client",
    0x83: "the broker cannot or will not do this: see its log",
    0x87: "check the broker's policy for this client: it must allow the filter",
    0x8F: "the broker does not take this filter: correct it in topics",
    0x91: "the broker says that each packet identifier we tried is in use: see its log",
    0x95: "a packet of ours was larger than the broker takes: shorten the filters in topics, or raise the broker's"
    " limit of packet sizes",
    0x97: "a quota of the broker is used up, often of subscriptions per client: raise it, or set"
    " fewer filters in topics",
    0x9B: "the broker does not give this QoS: set a lower qos",
    0x9E: "the broker has no shared subscriptions: run without workers, in topics set the filter without $share/GROUP/,"
    " and let one fastkin alone subscribe it, or use a broker that has them",
    0xA1: "the broker takes no subscription identifiers, and must say so when we connect: it is the broker's fault;"
    ' protocol = "3.1.1" has none',
    0xA2: "the broker has no wildcards: in topics name each topic in full, or use a broker that has them",
}
# It would end the connection to ask a broker for this once more.
UNAVAILABLE = frozenset({0x9E, 0xA1, 0xA2})


def cure(code: int) -> str:
    """What a person can do; "" when the words say it all."""
    return _CURES.get(code, "")


def with_cure(code: int) -> str:
    """reason_text() and the cure."""
    return f"{reason_text(code)}; {_CURES[code]}" if code in _CURES else reason_text(code)
