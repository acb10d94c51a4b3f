"""When the next call may be made after failed ones, and how many may be open. Pure: times and chance are passed in.

A call that fails as a whole says something about the way to Kinesis. Then the gate closes for all calls, for a while
that grows with each failure, and fewer calls are kept open. There is one gate and not a timer per batch: with sixteen
calls open, sixteen timers would be a retry storm.

The gate decides when, and never what: it knows no batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkin.delivery.call_errors import HOPELESS, for_keys
from fastkin.delivery.pacing import Backoff, Concurrency

if TYPE_CHECKING:
    from random import Random

    from fastkin.errors import KinesisError

_CALL_BASE_S = 0.05
_CALL_CAP_S = 5.0
# When somebody must act, ask again slowly and keep the data.
_OPERATOR_BASE_S = 5.0
_OPERATOR_CAP_S = 30.0
# Keys come back without anybody telling us. A look costs one call at most, and what is held waits no longer than this.
_CREDENTIALS_BASE_S = 1.0
_CREDENTIALS_CAP_S = 10.0


class Gate:
    """No call is made before `opens_at` (the event loop's time), and no more than `limit` are open."""

    __slots__ = ("_calls", "_concurrency", "_credentials", "_drawn", "_operator", "opens_at")

    def __init__(self, max_calls: int, random: Random) -> None:
        self.opens_at: float = 0.0
        self._concurrency = Concurrency(max_calls)
        # Three, for each grows by itself: an outage must not make the wait for new keys longer.
        self._calls = Backoff(_CALL_BASE_S, _CALL_CAP_S, random)
        self._operator = Backoff(_OPERATOR_BASE_S, _OPERATOR_CAP_S, random)
        self._credentials = Backoff(_CREDENTIALS_BASE_S, _CREDENTIALS_CAP_S, random)
        self._drawn = False  # a delay was, since the last answer

    @property
    def limit(self) -> int:
        """Calls that may be open."""
        return self._concurrency.limit

    def answered(self) -> None:
        """A call was answered, whatever became of its entries: the way to Kinesis is fine."""
        self._concurrency.succeeded()
        # This runs once per call, and most of the time there is nothing to reset.
        if self._drawn:
            self._drawn = False
            self._calls.reset()
            self._operator.reset()
            self._credentials.reset()

    def failed(self) -> None:
        """A call failed as a whole: keep fewer open."""
        self._concurrency.failed()

    def delay(self, error: KinesisError) -> float:
        """Seconds until the next attempt after such an error. Each one drawn is longer on average than the last."""
        self._drawn = True
        if error.action not in HOPELESS:
            return self._calls.next()
        # Keys come back by themselves and soon. What an operator mends takes minutes.
        return (self._credentials if for_keys(error) else self._operator).next()

    def close_for(self, now: float, delay: float, asked: float | None = None) -> None:
        """Make no call for `delay` seconds, or for as long as the server `asked` for."""
        # A server may ask for an hour, by mistake or for others. It is believed as far as an operator's wait goes.
        self.opens_at = max(self.opens_at, now + max(delay, min(asked or 0.0, _OPERATOR_CAP_S)))
