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
        "a batch closed: drain",
        "a batch closed: full_bytes",
        "a batch closed: full_count",
        "a batch closed: idle",
        "a batch closed: linger",
        "a batch closed: window",
        "a broker restored from an older save",
        "a call is cut short",
        "a call refused for one record",
        "a call that hangs",
        "a client takes its own session over",
        "a disk hangs",
        "a filter is refused",
        "a half-open connection",
        "a pipeline restarted by a reload",
        "a pipeline stopped by a reload",
        "a question about the stream is refused",
        "a receipt of what was dropped",
        "a receipt of what was refused",
        "a receipt of what was spooled",
        "a record that is refused for good",
        "a reload over a reload",
        "a reload that a stop overtook",
        "a shard split",
        "a small window was learned",
        "a spool's log with a torn tail",
        "a topic alias",
        "a torn dead letter",
        "an aggregate",
        "an answer for a repetition",
        "an answer with some entries failed",
        "an engine stopped in the middle",
        "an operator must act",
        "answer: count",
        "answer: doubled",
        "answer: empty",
        "answer: html",
        "answer: list",
        "answer: long",
        "answer: null",
        "answer: short",
        "answer: torn",
        "call: AccessDeniedException",
        "call: ConnectFailed",
        "call: ConnectionLost",
        "call: ExpiredTokenException",
        "call: InternalFailure",
        "call: InvalidSignatureException",
        "call: KMSThrottlingException",
        "call: LimitExceededException",
        "call: ResourceNotFoundException",
        "call: ServiceUnavailable",
        "call: Timeout",
        "closed in the middle",
        "connection refused",
        "cut inside of what was on its way",
        "dead letters wait",
        "dead-lettered",
        "dropped",
        "duplicates within the bound",
        "ended between a write and the word of it",
        "flush()",
        "killed",
        "memory charged is memory held",
        "messages came again",
        "more than 10,000 unacknowledged",
        "more than 65,535 messages wait",
        "no CONNACK",
        "no SUBACK",
        "put() refuses a record",
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
    }
)
