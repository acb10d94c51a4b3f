"""What an answer makes of a batch, entry by entry: stored, failed for now, or refused for good.

An entry that failed goes again as the same bytes with the same key, so a duplicate can be recognised; a key that was
drawn may change when the shard was full, for then it is surely not stored (spreading.py). Three kinds of failure are
kept apart. An entry that was throttled says something about its shard: it goes back to the head of the shard's line.
One that failed for another passing reason waits for its time and holds back nobody. One that can never be stored is
given up, alone: of an aggregate the others go on.

Here nothing is dropped and no call is made. What failed is put where it waits, and the sender's next look sends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkin.aws.shards import shard_in_message
from fastkin.delivery.call_errors import HOPELESS
from fastkin.delivery.judge import Judge
from fastkin.delivery.retry_queue import EVEN, apart
from fastkin.errors import Action, KinesisError, printable

if TYPE_CHECKING:
    from random import Random

    from fastkin._codec import Batch, Failure
    from fastkin.aws.shards import ShardMap
    from fastkin.delivery.generations import Generations
    from fastkin.delivery.spreading import Spreading

# Attempts for an entry whose error code nobody documented, before it is given up: with the waits in between some ten
# minutes, in which something else must have been stored. A destination in trouble of a new kind costs no data so, and
# one bad record does not hold back for ever what comes after it.
_STRANGE_ATTEMPTS = 36
_STRANGE_CAP_S = 30.0
_STORED_LATELY_S = 60.0
_ENTRY_BASE_S = 0.03
_THROTTLE_CAP_S = 0.3  # the pacer keeps the rate: the wait only needs to spread the retries
_ENTRY_CAP_S = 5.0
# A throttled record whose shard is not known cannot stand in a line of its shard. When it is this old, all that is
# spread evenly stands behind it for a moment, in which a shard's bucket fills; not again for a while, for the others.
CLAIM_AFTER_S = 3.0
CLAIM_S = 1.0
CLAIM_EVERY_S = 5.0

Load = dict[int, tuple[int, int]]  # shard ordinal (-1: spread evenly, or unknown) -> (records, bytes)


@dataclass(eq=False)
class Answers(Judge):
    """Judges the entries of answers."""

    generations: Generations
    spreading: Spreading
    random: Random
    stored_at: float  # when Kinesis last took something; at first: when we began
    shards: ShardMap | None = None
    _claim_at: float = 0.0  # not before this one more for whose shard is not known

    def answered(self, batch: Batch, count: int, load: Load, failures: list[Failure], now: float) -> None:
        """The call with this batch was answered. `count` and `load` are what they were before it was settled."""
        # An answer with one failure for all says nothing good about the destination, though it is an answer.
        took_some = len(failures) != 1 or len(failures[0].batch) < count
        # An answer is proof of the way to Kinesis, also when it says no to every entry.
        self.gate.answered()
        self.trouble.answered(self.waits.why)
        if took_some:
            self.stored_at = now
            self.refusals.stored()
        if not failures:
            # The plain case, and nearly every call: no entry is looked at by itself.
            self.pacer.stored(now, load)
            self.trouble.stored_all()
            self.generations.ended(batch.flush_generation, count)
            return
        failed = sum(len(failure.batch) for failure in failures)
        if failed < count:
            self.pacer.stored(now, _less(load, failures))
        # What failed has not ended. A flush waits for it as well.
        self.generations.ended(batch.flush_generation, count - failed)
        waits = [self._entry_failed(failure, now) for failure in failures]
        if failed == count and (delay := min(waits)) > 0.0:
            # The same for every record: it is the destination's trouble, and what is new would only share it.
            self.gate.close_for(now, delay)
            self.alarm.set(self.gate.opens_at)

    def _entry_failed(self, failure: Failure, now: float) -> float:
        """One kind of failure in an answer. Returns how long to wait when only an operator can mend it, else 0.0."""
        batch = failure.batch
        code, message = printable(failure.code, 128), printable(failure.message)
        self.counters.failed_by_code.add(code, len(batch))
        action = self.classify(code)
        # A throttle says nothing about the record. It must not count towards giving it up.
        if action is not Action.THROTTLE:
            batch.attempts += 1
        if action is Action.REJECTED or (action is Action.STRANGE and self._strange_for_long(batch, now)):
            if batch.user_records > len(batch) and not batch.single:
                # The others of an aggregate are not lost with the one that is at fault.
                self.waits.halve(batch)
            else:
                self.give_up(batch, f"{code}: {message}")
            return 0.0
        self.counters.goes_again(code, batch)
        if action in HOPELESS:
            return self._waits_for_operator(batch, KinesisError(code, message, action=action), now)
        shard_id = shard_in_message(message) or ""
        if action is Action.THROTTLE:
            self._throttled(batch, shard_id, now)
        elif action is Action.STRANGE:
            most = min(_STRANGE_CAP_S, _ENTRY_BASE_S * 2.0 ** min(batch.attempts, 20))
            # A longer wait than for known codes, and never a short one: nobody knows what the attempts do there.
            self.trouble.say_strange(len(batch), code, message)
            self.waits.put_by(f"{action.value} {code}", batch, now, now + self.random.uniform(most / 2, most))
        else:
            most = min(_ENTRY_CAP_S, _ENTRY_BASE_S * 2.0 ** min(batch.attempts, 10))
            self.trouble.say_records_again(len(batch), code, message)
            until = now + self.random.uniform(_ENTRY_BASE_S, most)
            self.waits.put_by(f"{action.value} {shard_id}", batch, now, until)
        return 0.0

    def _throttled(self, batch: Batch, shard_id: str, now: float) -> None:
        """Its shard, or the stream, took less than was sent: it waits in front of what comes for the same shard."""
        # The first throttle after a time without one is often a single full second: look again soon.
        most = _THROTTLE_CAP_S if self.trouble.throttled else _ENTRY_BASE_S * 2
        self.counters.throttled.add(shard_id, batch.user_records)
        ordinal = self.shards.ordinal(shard_id) if self.shards is not None else None
        if ordinal is not None and batch.drawn and self.spreading.refused(ordinal, now):
            # What waits for the bucket of evenly spread keys has one of its own from now on.
            self.waits.leave_lines()
        self.spreading.look(now, self.waits.lines)
        moves = self.spreading.active and ordinal is not None and batch.drawn
        if moves:
            # Records whose keys were drawn may go to shards that have room, which this one has not.
            self.pacer.throttled(now, ordinal, even=False)
            self.spreading.place(batch, again=True)
        load = batch.shard_load()
        if -1 in load or not moves:
            self.pacer.throttled(now, ordinal, even=-1 in load)
        self.trouble.say_throttled(now, shard_id, len(batch))
        until = now + self.random.uniform(_ENTRY_BASE_S, most)
        for shard, part in apart(batch, list(load)):
            if moves and shard != ordinal and self.pacer.knows(shard) and part.drawn:
                self.waits.put_back(part)  # that one has not refused it
            elif self.pacer.knows(shard):
                self.waits.put_by(shard, part, now, until)
            elif now - part.taken_at > CLAIM_AFTER_S and now >= self._claim_at:
                # Nobody knows whose line it belongs to, and it has lost against newer ones for a while. So all that is
                # spread evenly waits for it once.
                self._claim_at = now + CLAIM_EVERY_S
                self.waits.put_by(EVEN, part, now, now + CLAIM_S)
            else:
                self.waits.put_by(f"throttled {shard_id}", part, now, until)

    def _strange_for_long(self, batch: Batch, now: float) -> bool:
        """A record failed with a code that nobody documented: has it failed for long enough to be given up?"""
        if batch.attempts < _STRANGE_ATTEMPTS:
            return False
        # An aggregate is taken apart at once: its records are judged by themselves, each with all these attempts.
        if batch.user_records > len(batch) and not batch.single:
            return True  # its parts are judged
        if now - self.stored_at <= _STORED_LATELY_S:
            return True
        # Nothing else is stored, perhaps because nothing else can come before this one has ended.
        self.refusals.ask()
        return len(batch) == 1 and self.refusals.may_give_up(now)

    def _waits_for_operator(self, batch: Batch, error: KinesisError, now: float) -> float:
        """An entry failed with what a call may fail with as well: it is kept and tried again as a call would be."""
        queue = self.waits.line(f"operator {error.code}")
        queue.put(batch)
        # Others wait for the same already: their time is the time of this one, or each answer would put it off.
        if queue.not_before <= now:
            delay = self.gate.delay(error)
            self.waits.wait_until(queue, now + delay)
            self.trouble.say_records_wait(len(batch), error, delay)
        # As long as it waits here, other answers do not make it well.
        queue.why = str(error)
        self.trouble.records_need_operator(queue.why)
        return queue.not_before - now


def _less(load: Load, failures: list[Failure]) -> Load:
    """What of the load was stored."""
    rest = dict(load)
    for failure in failures:
        for shard, (records, nbytes) in failure.batch.shard_load().items():
            have = rest.get(shard)
            if have is not None:
                rest[shard] = (have[0] - records, have[1] - nbytes)
    return rest
