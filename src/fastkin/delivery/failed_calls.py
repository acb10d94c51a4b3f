"""What becomes of a batch whose call failed as a whole: nothing of it is known to be stored.

It goes again, and the gate closes for a while. There are two exceptions. A call that was too large, or that a slow line
did not take in time, is cut into smaller ones. And Kinesis refuses a whole call for one bad record: such a batch is
halved until the bad record stands alone, and only then is it asked whose fault it is (refusals.py).

A batch that comes in here always leaves into the retry queue or to `give_up`. None may stay in nobody's hands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkin.delivery.call_errors import HOPELESS, as_operator, maybe_stored, not_taken, too_large
from fastkin.delivery.judge import Judge
from fastkin.errors import Action

if TYPE_CHECKING:
    from fastkin._codec import Batch
    from fastkin.errors import KinesisError


class FailedCalls(Judge):
    """Judges calls that failed."""

    def failed(self, batch: Batch, error: KinesisError, now: float) -> None:
        """The call with this batch failed."""
        self.trouble.call_failed(error)
        self.counters.call_failed(error.code, batch)
        if error.action is Action.REJECTED:
            if not batch.single:
                self._refused(batch, error)
            elif self.refusals.at_fault(batch, now):
                self.give_up(batch, f"{error.code}: {error.message}")
            else:
                # Nothing is taken, or nothing any more: the fault may be not this record's but the destination's or
                # ours. So it counts as a failure that an operator must look after.
                self._again(batch, as_operator(error, untold=self.refusals.untold), now, doubted=True)
            return
        # A line that is too slow for the timeout is no outage. Only smaller calls get through it.
        if len(batch) > 1 and not_taken(error):
            self.waits.sizes.late(batch.nbytes)
        self._again(batch, error, now)

    def _again(self, batch: Batch, error: KinesisError, now: float, *, doubted: bool = False) -> None:
        """Keep the batch, and make no call for a while. `doubted`: a single record, perhaps at fault itself."""
        if error.action in HOPELESS:
            self.trouble.needs_operator(error)
        self.gate.failed()
        if error.action is Action.THROTTLE:
            # The whole call was throttled, and no shard is named: all that is spread evenly slows down.
            self.pacer.throttled(now, None, even=True)
        # An upper bound for the user. What is stored twice can only be found by who reads the stream.
        if maybe_stored(error):
            self.counters.duplicates_possible += batch.user_records
            batch.uncertain += 1
        self.counters.goes_again(error.code, batch)
        if doubted:
            # It must not share its next call. A sound record in it would be refused with it.
            self.waits.put_alone(batch).doubted = True
        else:
            self.waits.put_back(batch)
        # Calls that were open together fail together. They are one failure: the first has closed the gate, and each
        # further one would draw a longer wait.
        if self.gate.opens_at <= now:
            delay = self.gate.delay(error)
            self.trouble.say_call_failed(now, error, delay)
            self.gate.close_for(now, delay, error.retry_after)
        self.alarm.set(self.gate.opens_at)

    def _refused(self, batch: Batch, error: KinesisError) -> None:
        """Kinesis refuses a whole call for one bad record: halve it until the bad one stands alone."""
        if len(batch) > 1 and too_large(error) and self.waits.sizes.late(batch.nbytes):
            # "Too large" is about the whole body and says nothing about a record. To halve it down to one record would
            # make a thousand calls of a few.
            self.counters.goes_again(error.code, batch)
            # It is cut on its way, and so are the next ones.
            self.waits.put_back(batch)
            return
        self.waits.halve(batch)
