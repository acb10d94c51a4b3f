"""Which version of MQTT to speak with a broker when the settings leave it open.

A broker that refuses a version in words does not speak it. That is believed for an hour, for brokers are upgraded now
and then. A broker that closes without a word, or never answers, may only be starting, or stand behind a proxy that
cannot reach it. So its silence is a guess, and a guess expires: else one bad minute would keep us on the older version
for good. After a close it lasts for one connection. After a time-out it lasts longer, for each wrong try costs a whole
time-out.

The silence of a broker that has spoken the preferred version is not taken for a refusal at all. Pure: times come from
outside.
"""

from __future__ import annotations

_FIXED = {"5": 5, "3.1.1": 4}
TOLD_S = 3600.0  # a refusal in words: brokers are upgraded now and then
REFUSALS = frozenset({0x01, 0x84})  # reason codes of CONNACK that say it in words
UNANSWERED_S = 300.0  # no answer in time: asking again costs a whole time-out at each connection


class Dialect:
    """next() says what to try; what came of it is reported with worked(), refused() or unanswered()."""

    __slots__ = ("_fixed", "_once", "_other", "_other_until", "_prefer", "_spoken")

    def __init__(self, protocol: str, prefer: int = 5) -> None:
        self._fixed = _FIXED.get(protocol)
        self._prefer = prefer
        # 4 and 5 are the two versions, as CONNECT writes them.
        self._other = 9 - prefer
        self._spoken = False  # the broker has spoken the preferred version
        self._once = False  # the other one comes next, and only then
        self._other_until = float("-inf")

    def next(self, now: float) -> int:
        """The version of the next attempt."""
        if self._fixed is not None:
            return self._fixed
        once, self._once = self._once, False
        return self._other if once or now < self._other_until else self._prefer

    def worked(self, version: int) -> None:
        if version == self._prefer:
            self._spoken = True
            self._other_until = float("-inf")

    def refused(self, version: int, now: float) -> bool:
        """The broker said that it does not speak `version`. True: try the other one at once."""
        if self._fixed is not None:
            return False
        if version != self._prefer:
            self._other_until = float("-inf")
            return False
        self._spoken = False  # it was replaced by an older one
        self._other_until = now + TOLD_S
        return True

    def unanswered(self, version: int, now: float, *, timed_out: bool) -> bool:
        """The broker took our CONNECT and closed, or let it time out, without a byte. True: try the other one at once.

        After a close the guess lasts for one connection: to ask anew costs one more of them. After a
        time-out it lasts for a while.
        """
        if self._fixed is not None or self._spoken:
            return False
        if version != self._prefer:
            self._other_until = float("-inf")  # it was not the version
            return False
        self._once = True
        if timed_out:
            self._other_until = now + UNANSWERED_S
        return True
