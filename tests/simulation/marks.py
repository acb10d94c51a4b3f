"""Rare states that must be reached: `mark("name")` where one is. A run over 2,000 seeds fails when one never was.

To add one: a line in MARKS, and `mark` (or `World.mark`) at the place. States inside the product are looked for from
outside, by counters and flags (check.py: `look`): nothing of this is on a hot path.
"""

from __future__ import annotations

from collections import Counter

reached: Counter[str] = Counter()


def mark(name: str) -> None:
    if name not in MARKS:
        raise KeyError(f"mark {name!r} is not in the list of marks.py")
    reached[name] += 1


MARKS: frozenset[str] = frozenset(
    {
        "CONNECT refused",
        "PUBREL lost",
        "SUBACK behind a flood",
        "UNSUBSCRIBE",
        "a bad frame",
        "a broker restored from an older save",
        "a call is cut short",
        "a call refused for one record",
        "a call that hangs",
        "a client takes its own session over",
        "a disk hangs",
        "a filter is refused",
        "a half-open connection",
        "a question about the stream is refused",
        "a record that is refused for good",
        "a shard split",
        "a small window was learned",
        "a spool's log with a torn tail",
        "a topic alias",
        "a torn dead letter",
        "an aggregate",
        "an answer for a repetition",
        "an answer that the broker has forgotten the message of",
        "an answer with some entries failed",
        "an operator must act",
        "connection refused",
        "cut inside of what was on its way",
        "dead letters wait",
        "dead-lettered",
        "dropped",
        "duplicates within the bound",
        "killed",
        "killed between a write and the word of it",
        "messages came again",
        "more than 10,000 unacknowledged",
        "more than 65,535 messages wait",
        "no CONNACK",
        "no SUBACK",
        "reading is paused",
        "reads are coalesced",
        "redelivered on the same connection",
        "shards merged",
        "spooled records are in memory again",
        "spooling",
        "stopped in the middle",
        "stored, and the answer lost",
        "the broker does not know 5.0",
        "the broker does not read",
        "the broker lost the session",
        "the budget is full",
        "the client says why it leaves",
        "the dead letters' disk fails",
        "the session is taken up again",
        "the spool is broken",
        "the spool is full",
        "the spool's disk fails",
        "throttled",
        "throttled by shard",
        "a batch closed: full_count",
        "a batch closed: full_bytes",
        "a batch closed: linger",
        "a batch closed: window",
        "a batch closed: idle",
        "a batch closed: drain",
        "answer: html",
        "answer: empty",
        "answer: torn",
        "answer: doubled",
        "answer: short",
        "answer: long",
        "answer: count",
        "answer: null",
        "answer: list",
        "call: ConnectFailed",
        "call: ConnectionLost",
        "call: Timeout",
        "call: InternalFailure",
        "call: ServiceUnavailable",
        "call: LimitExceededException",
        "call: KMSThrottlingException",
        "call: ExpiredTokenException",
        "call: InvalidSignatureException",
        "call: AccessDeniedException",
        "call: ResourceNotFoundException",
    }
)
