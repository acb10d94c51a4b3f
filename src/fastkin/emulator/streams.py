"""Streams, shards and what they hold: pure, the clocks are passed in.

A shard owns a range of the 128-bit hash key space, a log of records and two token buckets.
Positions in the log and sequence numbers are the same thing shifted: a sequence number is the
shard's 36-digit prefix followed by a 20-digit counter, so it is as long as a real one, ascends
within its shard, and names it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import orjson

from .wire import CBOR, JSON, cbor_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_md5: Any
try:  # the same digest without OpenSSL's set-up per call: 0.2 instead of 0.5 us for a UUID
    _md5 = importlib.import_module("_md5").md5
except ImportError:  # an interpreter built without it
    _md5 = functools.partial(hashlib.md5, usedforsecurity=False)


Keep = Literal["all", "count"]

HASH_SPACE: Final = 1 << 128
MIB: Final = 1 << 20
SHARD_RECORDS_PER_S: Final = 1000  # docs.aws.amazon.com/streams/latest/dev/service-sizes-and-limits
SHARD_BYTES_PER_S: Final = 1 * MIB
# A stream with large records lets one through at once and charges it afterwards
# (streams/latest/dev/large-records: bursts up to 10 MiB, 1 MiB/s on average).
LARGE_RECORD_BURST: Final = 10 * MIB
READ_CALLS_PER_S: Final = 5
READ_BYTES_PER_S: Final = 2 * MIB
READ_BURST: Final = 10 * MIB  # a call that returns 10 MiB is paid for by the following 5 s

_COUNTER_BASE: Final = 10**19  # keeps the counter at 20 digits, so that f"{n}" needs no padding
THROTTLED: Final = "ProvisionedThroughputExceededException"


class StoredRecord(NamedTuple):
    """One stored record, as the ledger gives it back."""

    shard_id: str
    sequence_number: str
    partition_key: str | None
    data: bytes
    arrival: float
    explicit_hash_key: str | None


# What the log holds: arrival, partition key, data, explicit hash key. A plain tuple of references.
LogEntry = tuple[float, str | None, bytes, str | None]


@dataclass(slots=True)
class Limits:
    """What a shard takes: AWS's figures times `factor`."""

    records_per_s: float = SHARD_RECORDS_PER_S
    bytes_per_s: float = SHARD_BYTES_PER_S
    record_burst: float = SHARD_RECORDS_PER_S
    byte_burst: float = SHARD_BYTES_PER_S

    def scaled(self, factor: float) -> Limits:
        return Limits(
            self.records_per_s * factor,
            self.bytes_per_s * factor,
            self.record_burst * factor,
            self.byte_burst * factor,
        )


UNLIMITED: Final = Limits(math.inf, math.inf, math.inf, math.inf)


def error_fragment(code: str, message: str, content_type: str) -> str:
    """One failed entry of a PutRecords answer, ready to be joined (latin-1 for raw bytes)."""
    if content_type == CBOR:
        parts = (b"\xa2", *map(cbor_text, ("ErrorCode", code, "ErrorMessage", message)))
        return b"".join(parts).decode("latin-1")
    return f'{{"ErrorCode":{_quote(code)},"ErrorMessage":{_quote(message)}}}'


def _quote(text: str) -> str:
    return orjson.dumps(text).decode("latin-1")


class Shard:
    """One shard. `next` is the counter of the next record; `log` is empty when only counting."""

    __slots__ = (
        "_bytes_cap",
        "_limits",
        "_records_cap",
        "_refilled",
        "adjacent_parent",
        "bytes_left",
        "children",
        "closed_at",
        "created_at",
        "end",
        "fragments",
        "id",
        "index",
        "log",
        "next",
        "parent",
        "prefix",
        "read_bytes_left",
        "read_calls_left",
        "read_refilled",
        "records_left",
        "start",
        "stored_bytes",
        "throttled",
        "throttled_fragments",
    )

    def __init__(
        self,
        index: int,
        start: int,
        end: int,
        *,
        stream: str,
        account: str,
        created_at: float,
        limits: Limits,
        now: float,
        parent: str | None = None,
        adjacent_parent: str | None = None,
    ) -> None:
        self.index: int = index
        self.id: str = f"shardId-{index:012d}"
        self.start: int = start
        self.end: int = end
        self.parent: str | None = parent
        self.adjacent_parent: str | None = adjacent_parent
        self.children: list[Shard] = []
        self.created_at: float = created_at
        self.closed_at: float | None = None
        # 36 digits: version-like 49, creation time in ms, shard index.
        self.prefix: str = f"49{int(created_at * 1000):015d}{index:019d}"
        self.next: int = _COUNTER_BASE
        self.log: list[LogEntry] = []
        self.stored_bytes: int = 0
        self.throttled: int = 0
        # The two halves of a stored entry's answer, made once per shard: of each record only its counter is written
        # between them. A bench must measure its peer and not this.
        self.fragments: dict[str, tuple[str, str]] = {
            JSON: (f'{{"SequenceNumber":"{self.prefix}', f'","ShardId":"{self.id}"}}'),
            # 0xa2: a map of two; 0x78 0x38: a text of 56 bytes, the length of every sequence number
            CBOR: (
                (b"\xa2" + cbor_text("SequenceNumber") + b"\x78\x38").decode("latin-1") + self.prefix,
                (cbor_text("ShardId") + cbor_text(self.id)).decode("latin-1"),
            ),
        }
        message = throttle_message(self.id, stream, account)
        self.throttled_fragments: dict[str, str] = {
            form: error_fragment(THROTTLED, message, form) for form in (JSON, CBOR)
        }
        self.records_left: float = 0.0
        self.bytes_left: float = 0.0
        self.set_limits(limits, now, fill=True)
        self.read_calls_left: float = float(READ_CALLS_PER_S)
        self.read_bytes_left: float = float(READ_BURST)
        self.read_refilled: float = now

    def set_limits(self, limits: Limits, now: float, *, fill: bool = False) -> None:
        if not fill:
            self.refill(now)
        self._limits = limits
        self._records_cap = max(limits.record_burst, 1.0)
        self._bytes_cap = limits.byte_burst
        self.records_left = self._records_cap if fill else min(self.records_left, self._records_cap)
        self.bytes_left = self._bytes_cap if fill else min(self.bytes_left, self._bytes_cap)
        if limits is UNLIMITED:
            self.records_left = self.bytes_left = math.inf
        # Limits are switched on: what was infinite begins with a full bucket.
        elif math.isinf(self.records_left):
            self.records_left, self.bytes_left = self._records_cap, self._bytes_cap
        self._refilled = now

    @property
    def key_range(self) -> dict[str, str]:
        """HashKeyRange, as it stands in answers."""
        return {"StartingHashKey": str(self.start), "EndingHashKey": str(self.end)}

    @property
    def bytes_cap(self) -> float:
        return self._bytes_cap

    def refill(self, now: float) -> None:
        limits = self._limits
        if limits is UNLIMITED:
            return
        passed = now - self._refilled
        self._refilled = now
        self.records_left = min(self._records_cap, self.records_left + passed * limits.records_per_s)
        self.bytes_left = min(self._bytes_cap, self.bytes_left + passed * limits.bytes_per_s)

    def may_read(self, now: float) -> bool:
        passed = now - self.read_refilled
        self.read_refilled = now
        self.read_calls_left = min(READ_CALLS_PER_S, self.read_calls_left + passed * READ_CALLS_PER_S)
        self.read_bytes_left = min(READ_BURST, self.read_bytes_left + passed * READ_BYTES_PER_S)
        # A call is let through while anything is left, and may then take 10 MiB: the debt is paid by waiting, as on
        # AWS.
        if self.read_calls_left < 1 or self.read_bytes_left <= 0:
            return False
        self.read_calls_left -= 1
        return True

    @property
    def stored(self) -> int:
        return self.next - _COUNTER_BASE

    def sequence(self, position: int) -> str:
        return f"{self.prefix}{_COUNTER_BASE + position}"

    @property
    def starting_sequence(self) -> str:
        # One below the first record's number, as on AWS: AT_SEQUENCE_NUMBER with it is the start.
        return f"{self.prefix}{_COUNTER_BASE - 1:020d}"

    @property
    def ending_sequence(self) -> str | None:
        return None if self.closed_at is None else f"{self.prefix}{10**20 - 1}"

    def position(self, sequence: str) -> int | None:
        """Where in the log a sequence number of this shard points; None for a foreign one."""
        if len(sequence) != 56 or not sequence.startswith(self.prefix):
            return None
        return max(0, min(int(sequence[36:]) - _COUNTER_BASE, len(self.log)))

    def position_at(self, when: float) -> int:
        return bisect_left(self.log, when, key=lambda entry: entry[0])


def digest_of(key: bytes) -> bytes:
    """Where a partition key goes: the MD5 of its UTF-8 bytes as a 128-bit number."""
    digest: bytes = _md5(key).digest()
    return digest


def throttle_message(shard_id: str, stream: str, account: str) -> str:
    return f"Rate exceeded for shard {shard_id} in stream {stream} under account {account}."


@dataclass(slots=True)
class Batch:
    """The records of one call, column by column, already validated."""

    keys: list[str | None]
    datas: list[bytes]
    sizes: list[int]
    digests: list[bytes]  # 16 bytes big-endian: where each record goes
    hash_keys: list[str | None] | None = None  # the explicit ones, for the ledger


@dataclass(slots=True)
class Stream:
    """A stream and its shards, open and closed."""

    name: str
    arn: str
    account: str
    created_at: float
    limits: Limits
    keep: Keep = "all"
    mode: Literal["PROVISIONED", "ON_DEMAND"] = "PROVISIONED"
    max_record_kib: int = 1024
    auto_keys: bool = False  # RecordDistributionStrategy=AUTO
    active_at: float = 0.0
    shards: list[Shard] = field(default_factory=list)
    factor: float = 1.0
    records: int = 0
    throttled: int = 0
    _open: list[Shard] = field(default_factory=list)
    _starts: list[bytes] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        name: str,
        shards: int,
        *,
        region: str,
        account: str,
        wall: float,
        now: float,
        limits: bool,
        keep: Keep,
        mode: Literal["PROVISIONED", "ON_DEMAND"] = "PROVISIONED",
        max_record_kib: int = 1024,
        auto_keys: bool = False,
        active_at: float = 0.0,
    ) -> Stream:
        burst = LARGE_RECORD_BURST if max_record_kib > 1024 else SHARD_BYTES_PER_S
        stream = cls(
            name=name,
            arn=f"arn:aws:kinesis:{region}:{account}:stream/{name}",
            account=account,
            created_at=wall,
            limits=Limits(byte_burst=burst) if limits else UNLIMITED,
            keep=keep,
            mode=mode,
            max_record_kib=max_record_kib,
            auto_keys=auto_keys,
            active_at=active_at,
        )
        width = HASH_SPACE // shards
        for index in range(shards):
            # The last shard takes what the division leaves over, so that no hash key belongs to nobody.
            end = HASH_SPACE - 1 if index == shards - 1 else (index + 1) * width - 1
            stream._add(index * width, end, wall, now)
        stream._reindex()
        return stream

    @property
    def max_record_bytes(self) -> int:
        return self.max_record_kib * 1024

    @property
    def open_shards(self) -> list[Shard]:
        return self._open

    def status(self, now: float) -> str:
        return "ACTIVE" if now >= self.active_at else "CREATING"

    def shard(self, shard_id: str | int) -> Shard | None:
        index = shard_id
        if isinstance(shard_id, str):
            digits = shard_id.removeprefix("shardId-")
            if not digits.isascii() or not digits.isdigit():
                return None
            index = int(digits)
        assert isinstance(index, int)
        return self.shards[index] if 0 <= index < len(self.shards) else None

    def set_factor(self, factor: float, now: float, shard: Shard | None = None) -> None:
        if shard is None:
            self.factor = factor
        limits = self.limits if self.limits is UNLIMITED else self.limits.scaled(factor)
        for each in [shard] if shard is not None else self._open:
            each.set_limits(limits, now)

    def limit(self, on: bool, now: float) -> None:
        burst = LARGE_RECORD_BURST if self.max_record_kib > 1024 else SHARD_BYTES_PER_S
        self.limits = Limits(byte_burst=burst) if on else UNLIMITED
        self.set_factor(self.factor, now)

    def digest(self, key: str | None) -> bytes:
        # On such a stream Kinesis chooses the shard itself: any place is as good, and none may be guessed from the
        # key.
        return os.urandom(16) if self.auto_keys or key is None else digest_of(key.encode())

    @property
    def stored_bytes(self) -> int:
        return sum(shard.stored_bytes for shard in self.shards)

    def put(
        self,
        batch: Batch,
        wall: float,
        now: float,
        content_type: str = JSON,
        fault: Callable[[Shard, str | None, bytes], tuple[str, str] | None] | None = None,
    ) -> tuple[list[str], int, int]:
        """Stores what the buckets let through. Gives the entries of the answer in request order,
        how many were throttled, and how many failed in all."""
        entries: list[str] = []
        append = entries.append
        shards, starts = self._open, self._starts
        # What does not change within a call is looked up before the loop over its records.
        heads = [(*shard.fragments[content_type], shard) for shard in shards]
        for shard in shards:
            shard.refill(now)
        keep = self.keep == "all"
        hash_keys: Sequence[str | None] = self._no_hash_keys(batch)
        throttled = failed = 0
        for key, data, size, digest, hash_key in zip(
            batch.keys, batch.datas, batch.sizes, batch.digests, hash_keys, strict=True
        ):
            # A digest and the starts of the shards are 16 bytes, big-endian: comparing bytes is comparing 128-bit
            # numbers.
            head, tail, shard = heads[bisect_right(starts, digest) - 1]
            if fault is not None and (error := fault(shard, key, data)) is not None:
                failed += 1
                append(error_fragment(*error, content_type))
                continue
            # A record larger than the whole bucket (limits scaled down, large records) passes when
            # the bucket is full and leaves a debt: otherwise it could never be stored at all.
            left = shard.bytes_left
            if shard.records_left < 1.0 or (left < size and left < shard.bytes_cap):
                shard.throttled += 1
                throttled += 1
                append(shard.throttled_fragments[content_type])
                continue
            shard.records_left -= 1.0
            shard.bytes_left = left - size
            shard.stored_bytes += size
            counter = shard.next
            shard.next = counter + 1
            append(f"{head}{counter}{tail}")
            if keep:
                shard.log.append((wall, key, data, hash_key))
        failed += throttled
        self.records += len(entries) - failed
        self.throttled += throttled
        return entries, throttled, failed

    @staticmethod
    def _no_hash_keys(batch: Batch) -> Sequence[str | None]:
        return batch.hash_keys if batch.hash_keys is not None else [None] * len(batch.keys)

    def split(self, shard: Shard, new_start: int, wall: float, now: float) -> None:
        # The parent keeps its log: readers read it to its end before they begin with the children.
        shard.closed_at = wall
        self._add(shard.start, new_start - 1, wall, now, shard)
        self._add(new_start, shard.end, wall, now, shard)
        self._reindex()

    def merge(self, shard: Shard, adjacent: Shard, wall: float, now: float) -> None:
        shard.closed_at = adjacent.closed_at = wall
        low, high = sorted((shard, adjacent), key=lambda each: each.start)
        self._add(low.start, high.end, wall, now, shard, adjacent)
        self._reindex()

    def stored(self) -> list[StoredRecord]:
        """Every stored record, by arrival; within a shard in the order of its sequence numbers."""
        records = [
            StoredRecord(shard.id, shard.sequence(at), key, data, arrival, hash_key)
            for shard in self.shards
            for at, (arrival, key, data, hash_key) in enumerate(shard.log)
        ]
        # Stable, so records of one call and shard stay in the order of their numbers.
        records.sort(key=lambda record: record.arrival)
        return records

    def _add(self, start: int, end: int, wall: float, now: float, *parents: Shard) -> None:
        limits = self.limits if self.limits is UNLIMITED else self.limits.scaled(self.factor)
        shard = Shard(
            len(self.shards),
            start,
            end,
            stream=self.name,
            account=self.account,
            created_at=wall,
            limits=limits,
            now=now,
            parent=parents[0].id if parents else None,
            adjacent_parent=parents[1].id if len(parents) > 1 else None,
        )
        for parent in parents:
            parent.children.append(shard)
        self.shards.append(shard)

    def _reindex(self) -> None:
        self._open = sorted((shard for shard in self.shards if shard.closed_at is None), key=lambda s: s.start)
        self._starts = [shard.start.to_bytes(16, "big") for shard in self._open]
