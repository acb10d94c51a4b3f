"""Answers GetShardIterator and GetRecords: how a consumer reads the emulated stream.

An iterator is text that says everything, so nothing is kept for it; a reader that never comes back costs no memory.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from .rules import ApiError
from .state import refuse_dry_run
from .streams import MIB, THROTTLED, throttle_message
from .tokens import pack, unpack
from .wire import Millis

if TYPE_CHECKING:
    from .state import State
    from .streams import Shard, Stream

ITERATOR_LIFE_S: Final = 300  # GetRecords: "An iterator expires 5 minutes after it is returned"
GET_RECORDS_MAX: Final = 10_000
GET_BYTES_MAX: Final = 10 * MIB
_WHICH: Final = (
    "Must either specify (1) AT_SEQUENCE_NUMBER or AFTER_SEQUENCE_NUMBER and "
    "StartingSequenceNumber or (2) TRIM_HORIZON or LATEST and no StartingSequenceNumber. "
    "Request specified {} and {} StartingSequenceNumber."
)


class Reading:
    """What gives records out."""

    def __init__(self, state: State) -> None:
        self._state = state

    def get_shard_iterator(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._state.stream(body)
        shard = self._state.shard(stream, body["ShardId"])
        kind = body["ShardIteratorType"]
        sequence = body.get("StartingSequenceNumber")
        if kind in ("AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER"):
            if sequence is None:
                raise ApiError("InvalidArgumentException", _WHICH.format(kind, "no"))
            position = shard.position(sequence)
            if position is None:
                raise ApiError(
                    "InvalidArgumentException",
                    f"StartingSequenceNumber {sequence} used in GetShardIterator on shard "
                    f"{shard.id} in stream {stream.name} under account {self._state.account} is invalid.",
                )
            # The shard's own starting number lies before every record.
            if kind == "AFTER_SEQUENCE_NUMBER" and sequence != shard.starting_sequence:
                position = min(position + 1, len(shard.log))
        elif kind == "AT_TIMESTAMP":
            when = body.get("Timestamp")
            if when is None:
                raise ApiError(
                    "InvalidArgumentException",
                    "Must specify timestampInMillis parameter for iterator of type AT_TIMESTAMP. "
                    "Current request has no timestamp parameter.",
                )
            position = shard.position_at(when / 1000 if isinstance(when, Millis) else when)
        elif sequence is not None:
            raise ApiError("InvalidArgumentException", _WHICH.format(kind, "also a"))
        else:
            position = 0 if kind == "TRIM_HORIZON" else len(shard.log)
        refuse_dry_run(body)
        return {"ShardIterator": self._iterator(stream, shard, position)}

    def get_records(self, body: dict[str, Any]) -> dict[str, Any]:
        text = "Invalid ShardIterator."
        kind, name, shard_id, at, issued = unpack(body["ShardIterator"], 5, text)
        if kind != "it" or not at.isdigit():
            raise ApiError("InvalidArgumentException", text)
        now, wall = self._state.clock(), self._state.wall()
        age = now - float(issued)
        if age > ITERATOR_LIFE_S:
            raise ApiError(
                "ExpiredIteratorException",
                f"Iterator expired. The iterator was created at time {_utc(wall - age)} while "
                f"right now it is {_utc(wall)} which is further in the future than the tolerated "
                f"delay of {ITERATOR_LIFE_S * 1000} milliseconds.",
            )
        stream = self._state.stream({"StreamName": name})
        shard = self._state.shard(stream, shard_id)
        refuse_dry_run(body)
        if self._state.read_limits and not shard.may_read(now):
            raise ApiError(THROTTLED, throttle_message(shard.id, name, self._state.account))
        position = int(at)
        last = min(len(shard.log), position + (body.get("Limit") or GET_RECORDS_MAX))
        records: list[dict[str, Any]] = []
        taken = 0
        while position < last:
            arrival, key, data, _ = shard.log[position]
            size = len(data) + len((key or "").encode())
            # The first record is given out whatever its size: a reader that could not pass it would stand still.
            if taken + size > GET_BYTES_MAX and records:
                break
            taken += size
            record = {
                "SequenceNumber": shard.sequence(position),
                "ApproximateArrivalTimestamp": Millis(arrival * 1000),
                "Data": data,
            }
            if not stream.auto_keys:
                record["PartitionKey"] = key
            records.append(record)
            position += 1
        shard.read_bytes_left -= taken
        behind = 0
        if position < len(shard.log):
            behind = max(0, int((wall - shard.log[position][0]) * 1000))
        answer: dict[str, Any] = {"Records": records, "MillisBehindLatest": behind}
        # No next iterator: that is how a reader learns that the shard has ended, and which ones follow.
        if shard.closed_at is not None and position >= len(shard.log):
            answer["ChildShards"] = [
                {
                    "ShardId": child.id,
                    "ParentShards": [parent for parent in (child.parent, child.adjacent_parent) if parent is not None],
                    "HashKeyRange": child.key_range,
                }
                for child in shard.children
            ]
        else:
            answer["NextShardIterator"] = self._iterator(stream, shard, position)
        return answer

    def _iterator(self, stream: Stream, shard: Shard, position: int) -> str:
        # The iterator says when it was made, so that nothing is kept here for readers that never come back.
        return pack("it", stream.name, shard.id, str(position), repr(self._state.clock()))


def _utc(wall: float) -> str:
    return time.strftime("%a %b %d %H:%M:%S UTC %Y", time.gmtime(wall))
