"""Where reading begins. Pure: what is wrong is told before anything is asked of Kinesis."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastkin.errors import LibraryError, printable

_DIGITS = re.compile(r"0|[1-9]\d{0,128}")  # SequenceNumber in the API's model


class ShardIteratorType(enum.StrEnum):
    """The five kinds of GetShardIterator."""

    AT_SEQUENCE_NUMBER = "AT_SEQUENCE_NUMBER"
    AFTER_SEQUENCE_NUMBER = "AFTER_SEQUENCE_NUMBER"
    AT_TIMESTAMP = "AT_TIMESTAMP"
    TRIM_HORIZON = "TRIM_HORIZON"
    LATEST = "LATEST"


_BY_SEQUENCE = frozenset({ShardIteratorType.AT_SEQUENCE_NUMBER, ShardIteratorType.AFTER_SEQUENCE_NUMBER})


@dataclass(frozen=True, slots=True)
class Position:
    """A kind of iterator with what belongs to it; LibraryError when that is missing, wrong or of another kind.

    starting_sequence_number: decimal digits, for AT_SEQUENCE_NUMBER and AFTER_SEQUENCE_NUMBER
    timestamp: seconds since 1970, or a datetime (without a zone it is UTC), for AT_TIMESTAMP
    """

    kind: ShardIteratorType
    starting_sequence_number: str | None = None
    timestamp: float | datetime | None = None

    def __post_init__(self) -> None:
        try:
            kind = ShardIteratorType(self.kind)
        except (ValueError, TypeError):
            names = ", ".join(ShardIteratorType)
            raise LibraryError(
                f"type: {printable(repr(self.kind), 100)} is no kind of iterator: give {names}"
            ) from None
        object.__setattr__(self, "kind", kind)
        number, stamp = self.starting_sequence_number, self.timestamp
        if kind in _BY_SEQUENCE:
            if not isinstance(number, str) or not _DIGITS.fullmatch(number):
                raise LibraryError(f"starting_sequence_number: {kind} needs one, a str of decimal digits")
        elif number is not None:
            raise LibraryError(f"starting_sequence_number: {kind} takes none, leave it out")
        if kind is not ShardIteratorType.AT_TIMESTAMP:
            if stamp is not None:
                raise LibraryError(f"timestamp: {kind} takes none, leave it out")
            return
        if isinstance(stamp, datetime):
            stamp = (stamp if stamp.tzinfo is not None else stamp.replace(tzinfo=UTC)).timestamp()
            object.__setattr__(self, "timestamp", stamp)
        # True is an int, and no time
        if isinstance(stamp, bool) or not isinstance(stamp, int | float) or not 0 <= stamp < 2**40:
            raise LibraryError(f"timestamp: {kind} needs one, seconds since 1970 or a datetime")

    @classmethod
    def parse(cls, text: str) -> Position:
        """`trim_horizon`, `latest`, seconds since 1970, or an RFC 3339 time. LibraryError for anything else."""
        word = text.strip().lower().replace("-", "_")
        if word in ("trim_horizon", "latest"):
            return cls(ShardIteratorType(word.upper()))
        moment: float | datetime
        try:
            moment = float(word)
        except ValueError:
            try:
                moment = datetime.fromisoformat(text.strip())
            except ValueError:
                raise LibraryError(
                    f"{text!r} is neither trim_horizon nor latest nor a time such as 2026-11-21T04:00:00Z"
                ) from None
        return cls(ShardIteratorType.AT_TIMESTAMP, timestamp=moment)

    def members(self) -> dict[str, Any]:
        """What GetShardIterator is told."""
        told: dict[str, Any] = {"ShardIteratorType": str(self.kind)}
        if self.starting_sequence_number is not None:
            told["StartingSequenceNumber"] = self.starting_sequence_number
        if self.timestamp is not None:
            told["Timestamp"] = self.timestamp
        return told


TRIM_HORIZON = Position(ShardIteratorType.TRIM_HORIZON)


def after(sequence_number: str) -> Position:
    """Behind a record that was read."""
    return Position(ShardIteratorType.AFTER_SEQUENCE_NUMBER, sequence_number)
