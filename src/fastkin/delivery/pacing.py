"""When to send, how much, and how soon to try again. Pure: clock values and the random source are passed in.

Theory of operation. A Kinesis shard takes 1,000 records/s and 1 MiB/s and answers what is above with
ProvisionedThroughputExceededException, record by record. Sending less in the first place is cheaper for
everybody, so each shard has a token bucket (`Rate`). Other producers share the shard, so the bucket's rate is
lowered to what was really stored when a throttle is seen, and grows again as long as none is. Keys drawn at
random spread evenly: such records are paced by one bucket for the whole stream, sized by the slowest shard;
records with keys of their own are paced shard by shard, so that a hot shard waits alone.

A call that fails as a whole says something about the way to Kinesis, not about a shard: `Concurrency` halves
the calls in flight, and `Backoff` spaces the attempts with decorrelated jitter.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastkin.limits import CALL_RECORDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random

# Quotas of a provisioned shard, https://docs.aws.amazon.com/streams/latest/dev/service-sizes-and-limits.html
SHARD_RECORDS_PER_S = 1000.0
SHARD_BYTES_PER_S = 1024.0 * 1024.0

_HOLD_S = 0.25  # after a throttle the rate stays put this long: answers to older calls are still coming
_CUT_EVERY_S = 0.1  # throttles closer together than this are one event
_GROWTH_PER_S = 2.0  # e-fold rate of recovery: a tenth of the rate is whole again in about 1.2 s
_ASK_AGAIN_S = 0.1
_FLOOR = 10.0  # records/s: never so slow that the end of a throttle goes unnoticed
_WINDOW_S = 0.25  # over which the stored rate is measured
_BURST_S = 0.25  # what a bucket holds when full, in seconds of its rate
_CALL_RECORDS = float(CALL_RECORDS)  # a bucket must be able to hold one full call
_UTILIZATION_S = 10.0  # the utilization of a bucket is an average over about this long
_LARGEST_CALL = 16 * 1024 * 1024  # Kinesis takes 10 MiB, 13.3 in base64
_DUST = 1e-6  # of a token: rounding must not turn into a wait too short to pass


class Backoff:
    """Decorrelated jitter: each delay is drawn between `base_s` and three times the one before, up to `cap_s`.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    __slots__ = ("_last", "_random", "base_s", "cap_s")

    def __init__(self, base_s: float, cap_s: float, random: Random) -> None:
        self.base_s: float = base_s
        self.cap_s: float = cap_s
        self._random = random
        self._last = base_s

    def next(self) -> float:
        # Drawn from the last one and not from the number of failures. So many senders that failed together drift apart.
        self._last = min(self.cap_s, self._random.uniform(self.base_s, self._last * 3))
        return self._last

    def reset(self) -> None:
        self._last = self.base_s


class Concurrency:
    """How many calls may be open: halved when a call fails as a whole, raised by one per round of successes."""

    __slots__ = ("_limit", "maximum")

    def __init__(self, maximum: int) -> None:
        self.maximum: int = maximum
        self._limit = float(maximum)

    @property
    def limit(self) -> int:
        return int(self._limit)

    def succeeded(self) -> None:
        # A fraction for each success: as many successes as calls are open raise it by one.
        self._limit = min(self.maximum, self._limit + 1.0 / self._limit)

    def failed(self) -> None:
        # Never none: the one that is left is how the end of the trouble is noticed.
        self._limit = max(1.0, self._limit / 2)


class CallSize:
    """How many bytes the body of a call may have: halved when one was not taken in time or was too large, and grown
    again by each one that was. On a slow line this ends with calls that leave within the timeout.

    The floor is no record but some: an endpoint in trouble must not be asked a thousand times for what one call holds.
    """

    __slots__ = ("_late", "limit")

    FLOOR = 16 * 1024

    def __init__(self) -> None:
        self.limit: float = math.inf
        self._late = math.inf  # what was too large, until as much was taken

    def allows(self, nbytes: int) -> bool:
        return nbytes <= self.limit

    def late(self, nbytes: int) -> bool:
        """So many were not taken. True: smaller calls are made from now on."""
        # A call this small is late for another reason than its size.
        if nbytes <= self.FLOOR:
            return False
        # Growth is careful from here on.
        self._late = nbytes
        # by its own size: of calls that were open together each one says the same
        self.limit = min(self.limit, max(nbytes / 2, self.FLOOR))
        return True

    def taken(self, nbytes: int) -> None:
        if self.limit == math.inf or nbytes * 2 < self.limit:
            # So small a call says nothing about a larger one.
            return
        if nbytes >= self._late:
            self._late = math.inf
        # quickly up to what was too large, then slowly: each attempt that is too large costs its own time
        self.limit *= 1.25 if self.limit < 0.75 * self._late else 1.03
        # No call is larger, so there is no limit any more.
        if self.limit > _LARGEST_CALL:
            self.limit = math.inf


class Rate:
    """A token bucket in records and bytes whose rate follows what the other side takes.

    `cap_records` and `cap_bytes` (per second) may be infinite: then nothing is held back until the first
    throttle shows what the limit is.
    """

    __slots__ = (
        "_bytes", "_cut_at", "_hot_at", "_hot_bytes", "_hot_records", "_last", "_limit", "_records", "_seen",
        "_seen_at", "_sent", "_throttled_at", "cap_bytes", "cap_records", "stored_per_s",
    )  # fmt: skip

    def __init__(self, now: float, cap_records: float = math.inf, cap_bytes: float = math.inf) -> None:
        self.cap_records: float = cap_records
        self.cap_bytes: float = cap_bytes
        self._limit = cap_records
        self._last = now
        self._records = self._capacity(cap_records, _CALL_RECORDS)
        self._bytes = self._capacity(cap_bytes, SHARD_BYTES_PER_S)
        self._throttled_at = -math.inf
        self._cut_at = -math.inf
        self.stored_per_s: float = 0.0
        self._seen = 0.0
        self._sent = 0.0
        self._seen_at = now
        self._hot_records = self._hot_bytes = 0.0  # stored lately: what is older counts less and less
        self._hot_at = now

    @staticmethod
    def _capacity(rate: float, least: float) -> float:
        return math.inf if rate == math.inf else max(rate * _BURST_S, least)

    @property
    def limit(self) -> float:
        """Records per second let through now."""
        return self._limit

    @property
    def adapted(self) -> bool:
        """Whether throttling holds the rate below its cap."""
        return self._limit < self.cap_records

    def _refill(self, now: float) -> None:
        passed = now - self._last
        if passed <= 0:
            return
        self._last = now
        # Growth begins only after answers to older calls have come. They say what the rate was, not what it is.
        if self._limit < self.cap_records and now - self._throttled_at > _HOLD_S:
            self._limit = min(self.cap_records, self._limit * math.exp(_GROWTH_PER_S * min(passed, 1.0)))
            # Without a cap there is no end to grow to: far above what is stored the bucket has no say.
            if self.cap_records == math.inf and self._limit > 20 * max(self.stored_per_s, _FLOOR):
                self._limit = math.inf
        # Nothing is known of a limit. Tokens that were spent meanwhile must not count once one is found.
        if self._limit == math.inf:
            self._records = math.inf
        else:
            room = self._capacity(self._limit, _CALL_RECORDS)
            self._records = min(room, self._records + self._limit * passed)
        if self.cap_bytes != math.inf:
            # A throttle names no unit. So bytes are slowed down by the same share as records.
            share = 1.0 if self.cap_records == math.inf else self._limit / self.cap_records
            rate = self.cap_bytes * min(share, 1.0)
            self._bytes = min(self._capacity(rate, SHARD_BYTES_PER_S), self._bytes + rate * passed)

    def wait(self, now: float, records: float, nbytes: float) -> float:
        """Seconds until a call with that load may go, or is worth asking for again: 0.0 when it may go now.

        A load larger than the bucket waits for a full one.
        """
        self._refill(now)
        delay = 0.0
        # What is larger than the bucket could never be had. It goes when the bucket is full, and leaves a debt.
        need = min(records, self._capacity(self._limit, _CALL_RECORDS))
        if need - self._records > _DUST:
            delay = (need - self._records) / self._limit
        if self.cap_bytes != math.inf:
            share = 1.0 if self.cap_records == math.inf else min(self._limit / self.cap_records, 1.0)
            # of the bucket as it is now: a throttled one is smaller and would never hold what a full one does
            need = min(nbytes, self._capacity(self.cap_bytes * share, SHARD_BYTES_PER_S))
            if need - self._bytes > _DUST:
                delay = max(delay, (need - self._bytes) / (self.cap_bytes * share))
        # While the rate grows, what was computed from the rate of now is too long.
        return min(delay, _ASK_AGAIN_S) if self.adapted else delay

    def take(self, records: float, nbytes: float) -> None:
        """Spend tokens for a call that goes out; the bucket may go into debt for an oversized one."""
        self._records -= records
        self._bytes -= nbytes
        self._sent += records

    def grown(self, now: float) -> float:
        """Records per second let through now, what it has grown by since somebody waited included."""
        self._refill(now)
        return self._limit

    def slow_down(self, now: float, limit: float) -> None:
        """To that rate at most, from which it grows; all tokens are gone."""
        self._throttled_at = now
        self._limit = min(self._limit, limit)
        self._records = min(self._records, 0.0)
        self._bytes = min(self._bytes, 0.0)

    def utilization(self, now: float) -> float:
        """The share of the cap that was used lately, the fuller of records and bytes; 0.0 without a cap."""
        fade = math.exp((self._hot_at - now) / _UTILIZATION_S) / _UTILIZATION_S
        return max(self._hot_records * fade / self.cap_records, self._hot_bytes * fade / self.cap_bytes)

    def stored(self, now: float, records: float, nbytes: float = 0.0) -> None:
        """Note what an answer says is stored: the measure for the rate after a throttle."""
        # Older records count less and less. An average over a window would need a list of answers.
        fade = math.exp((self._hot_at - now) / _UTILIZATION_S)
        self._hot_records = self._hot_records * fade + records
        self._hot_bytes = self._hot_bytes * fade + nbytes
        self._hot_at = now
        self._seen += records
        passed = now - self._seen_at
        # Over a shorter time one answer would say anything between nothing and a hundred times the rate.
        if passed >= _WINDOW_S:
            self.stored_per_s = self._seen / passed
            self._seen = self._sent = 0.0
            self._seen_at = now

    def throttled(self, now: float) -> None:
        """The other side took less than was sent: follow it down, at most to half in one step."""
        self._refill(now)
        self._throttled_at = now
        # Calls that were open together tell of the same full second. Each of them would halve the rate again.
        if now - self._cut_at < _CUT_EVERY_S:
            return
        self._cut_at = now
        target = self.stored_per_s * 0.95  # what was stored is what there is room for
        if self._limit != math.inf:
            # What was stored may be little because little was sent. So one step takes half at most.
            target = min(self._limit, max(target, self._limit / 2))
        elif not self.stored_per_s:
            # Just after the start nothing is measured yet: half of what was sent is a better guess than nothing.
            target = self._sent / max(now - self._seen_at, _WINDOW_S) / 2
        self._limit = max(target, min(_FLOOR, self.cap_records))
        # Tokens from before the throttle were wrong. With them the next call would be throttled too.
        self._records = min(self._records, self._capacity(self._limit, _CALL_RECORDS), self._limit * 0.05)


class Pacer:
    """The buckets of one stream: one for evenly spread keys, one per shard for keys with a place of their own.

    A load maps shard ordinal to (records, bytes); ordinal -1 means spread evenly, or unknown.
    """

    __slots__ = ("_shards", "_shares", "even", "shard_bytes", "shard_records")

    def __init__(
        self,
        now: float,
        *,
        shard_records: float = SHARD_RECORDS_PER_S,
        shard_bytes: float = SHARD_BYTES_PER_S,
    ) -> None:
        self.shard_records: float = shard_records
        self.shard_bytes: float = shard_bytes
        self.even: Rate = Rate(now)
        self._shards: list[Rate] = []
        self._shares: list[float] = []  # each shard's part of the key space, the largest is 1

    def set_shards(self, now: float, shares: Sequence[float]) -> None:
        """The shard map is known (or has changed): `shares` is each open shard's part of the key space."""
        # Evenly spread records fill the largest shard first. Its share of them is what the stream can take.
        largest = max(shares)
        self.even = Rate(now, self.shard_records / largest, self.shard_bytes / largest)
        self._shards = [Rate(now, self.shard_records, self.shard_bytes) for _ in shares]
        self._shares = [share / largest for share in shares]

    def clear_shards(self, now: float) -> None:
        """No map, or an on-demand stream whose capacity is not its shards': learn from throttles alone."""
        self.even = Rate(now)
        self._shards = []
        self._shares = []

    def _rate(self, shard: int) -> Rate:
        # A batch that was encoded under a former map may name a shard that is gone: then it counts as spread.
        return self._shards[shard] if 0 <= shard < len(self._shards) else self.even

    def knows(self, shard: int) -> bool:
        """Whether it has a bucket of its own."""
        return 0 <= shard < len(self._shards)

    def wait(self, now: float, load: Mapping[int, tuple[int, int]]) -> float:
        """Seconds until all of the load may go, or is worth asking for again."""
        return max(self.shard_wait(now, shard, *part) for shard, part in load.items())

    def shard_wait(self, now: float, shard: int, records: int, nbytes: int) -> float:
        return self._rate(shard).wait(now, records, nbytes)

    def sent(self, load: Mapping[int, tuple[int, int]]) -> None:
        for shard, (records, nbytes) in load.items():
            self._rate(shard).take(records, nbytes)

    def stored(self, now: float, load: Mapping[int, tuple[int, int]]) -> None:
        for shard, (records, nbytes) in load.items():
            self._rate(shard).stored(now, records, nbytes)

    def room(self, now: float) -> list[float]:
        """What each shard takes a second for its part of the key space: the larger the less likely it is overrun."""
        return [rate.grown(now) / share for rate, share in zip(self._shards, self._shares, strict=True)]

    def by_shard(self, now: float) -> None:
        """Each shard gets its part of what is let through now: keys that were spread evenly are drawn for shards."""
        if self.even.adapted:
            part = self.even.grown(now) / sum(self._shares)
            for rate, share in zip(self._shards, self._shares, strict=True):
                rate.slow_down(now, part * share)
            # What it has learned is theirs now.
            self.even = Rate(now, self.even.cap_records, self.even.cap_bytes)

    def spread_again(self, now: float) -> None:
        """Keys are spread evenly again: by one bucket, which is empty, for the shards' own were used until now."""
        limit = sum(rate.grown(now) for rate in self._shards)
        self.even = Rate(now, self.even.cap_records, self.even.cap_bytes)
        self.even.slow_down(now, limit)

    def utilization(self, now: float) -> list[float]:
        """The share of each shard's limit that was used lately; empty while the shards are not known.

        Of evenly spread keys each shard gets its part of the key space; the bucket is sized by the largest.
        """
        even = self.even.utilization(now)
        return [even * share + rate.utilization(now) for share, rate in zip(self._shares, self._shards, strict=True)]

    def throttled(self, now: float, shard: int | None, *, even: bool) -> None:
        """`shard` is the ordinal the answer named; `even` says the throttled records were evenly spread."""
        # Evenly spread records have no bucket by shard, whichever shard refused some of them.
        if even or shard is None:
            self.even.throttled(now)
        else:
            self._rate(shard).throttled(now)

    @property
    def adapted(self) -> bool:
        return self.even.adapted or any(rate.adapted for rate in self._shards)
