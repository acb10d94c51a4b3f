"""What the sender says about trouble, and what it knows of it: the last error, since when Kinesis throttles, what waits
for an operator.

A peer can make us say the same line a thousand times a second. So every kind of line is said once in a while, with the
number of the others. A line that is held back changes nothing of what is known.

Nothing here decides what becomes of a record. Those who decide it say here what happened, and may ask for `throttled`
and `last_error`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fastkin.delivery.call_errors import HOPELESS, cure
from fastkin.errors import Action
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    import asyncio

    from fastkin._codec import Batcher
    from fastkin.errors import KinesisError

_LOG = logging.getLogger("fastkin.send")

_WARN_EVERY_S = 5.0
_ERROR_EVERY_S = 30.0
_PATIENCE = 2  # calls in a row that failed for keys or clock, before it shows as not ready


class Trouble:
    """The state of what was said, and when. Times are the event loop's, in seconds."""

    def __init__(
        self,
        batcher: Batcher,
        loop: asyncio.AbstractEventLoop,
        *,
        name: str,
        stream: str,
        permission: str,
        throttle_error_after_s: float,
    ) -> None:
        """`name` is that of the log lines, `permission` what IAM calls the call (`kinesis:PutRecords`).
        `throttle_error_after_s`: after so long a throttle is an ERROR."""
        self._batcher = batcher
        self._name = name
        self._stream = stream
        self._permission = permission
        self._throttle_error_after_s = throttle_error_after_s
        self._warnings = Repeats(_LOG, loop.call_later, most=1, per_s=_WARN_EVERY_S)
        self._errors = Repeats(_LOG, loop.call_later, most=1, per_s=_ERROR_EVERY_S)
        self._throttled_since: float | None = None
        self._throttled_stored = 0  # what the batcher had stored then
        self._auth_failures_in_row = 0  # calls in a row that only an operator, or new keys, can mend
        self.operator_error: str | None = None  # what only an operator can mend, since something was stored
        self.last_error: str | None = None

    def close(self) -> None:
        """Say what was held back."""
        self._warnings.close()
        self._errors.close()

    # -- what is noted -------------------------------------------------------------------------

    def answered(self, why: str | None) -> None:
        """A call was answered. `why`: what still waits for an operator, if anything does."""
        # Something may still wait for an operator while other records are stored. Then it is not well yet.
        self.last_error = self.operator_error = why
        self._auth_failures_in_row = 0

    def stored_all(self) -> None:
        """A call went through whole: what comes later is a throttle of its own."""
        self._throttled_since = None

    @property
    def throttled(self) -> bool:
        """Kinesis throttles, and no call went through whole since."""
        return self._throttled_since is not None

    def call_failed(self, error: KinesisError) -> None:
        self.last_error = str(error)

    def needs_operator(self, error: KinesisError) -> None:
        """A call failed with what only an operator, or new keys, can mend."""
        self._auth_failures_in_row += 1
        # Keys and clock may be right again with the next attempt. So a single such failure does not show as not ready.
        if error.action is Action.OPERATOR or self._auth_failures_in_row > _PATIENCE:
            self.operator_error = str(error)

    def records_need_operator(self, why: str) -> None:
        """Entries failed with it, and their call was answered."""
        self.last_error = self.operator_error = why

    # -- what is said --------------------------------------------------------------------------

    def say_call_failed(self, now: float, error: KinesisError, delay: float) -> None:
        """A call failed, and the next is made in `delay` seconds."""
        if error.action in HOPELESS:
            self._errors.say(
                logging.ERROR, error.code,
                "pipeline=%s stage=send %s; the data is kept and tried again in %.0f s%s",
                self._name, error, delay, cure(error, self._permission),
            )  # fmt: skip
        # A throttle that lasts was said as an error just now, and the warning would add nothing.
        elif error.action is not Action.THROTTLE or not self._throttled_for_long(now, ""):
            self._warn("call failed: %s; again in %.2f s", error, delay)

    def say_records_wait(self, records: int, error: KinesisError, delay: float) -> None:
        """So many entries failed with what an operator must mend."""
        self._errors.say(
            logging.ERROR, error.code,
            "pipeline=%s stage=send %d records failed with %s; the data is kept and tried again in %.0f s%s",
            self._name, records, error, delay, cure(error, self._permission),
        )  # fmt: skip

    def say_strange(self, records: int, code: str, message: str) -> None:
        """So many entries failed with a code that nobody documented."""
        self._errors.say(
            logging.ERROR, code,
            "pipeline=%s stage=send %d records failed with %s, which is no code of Kinesis: %s; they go again, and"
            " after some ten minutes in which others are stored they become dead letters",
            self._name, records, code, message,
        )  # fmt: skip

    def say_records_again(self, records: int, code: str, message: str) -> None:
        """So many entries failed for a passing reason."""
        self._warn("%d records failed with %s: %s; they go again", records, code, message)

    def say_throttled(self, now: float, shard_id: str, records: int) -> None:
        """So many entries were throttled. `shard_id` is empty when Kinesis did not name it."""
        # Either the error or the warning: both would say the same twice.
        if not self._throttled_for_long(now, shard_id):
            self._warn("throttled at %s: %d records go again, slower", shard_id or "the stream", records)

    def _warn(self, message: str, *args: object) -> None:
        self._warnings.say(logging.WARNING, message, "pipeline=%s stage=send " + message, self._name, *args)

    def _throttled_for_long(self, now: float, shard_id: str) -> bool:
        """Say so as an error, once per `throttle_error_after_s` without a call that went through whole."""
        # How much is stored meanwhile tells an operator whether to add shards or to look for something broken.
        if self._throttled_since is None:
            self._throttled_since, self._throttled_stored = now, self._batcher.stored
        lasted = now - self._throttled_since
        if lasted <= self._throttle_error_after_s:
            return False
        rate = (self._batcher.stored - self._throttled_stored) / lasted
        self._throttled_since, self._throttled_stored = now, self._batcher.stored
        _LOG.error(
            "pipeline=%s stage=send throttled for %.0f s at %s, %.0f records/s are stored;"
            " data is kept: add shards, use keys that spread, or send less",
            self._name, lasted, f"{shard_id} of {self._stream}" if shard_id else f"stream {self._stream}", rate,
        )  # fmt: skip
        return True
