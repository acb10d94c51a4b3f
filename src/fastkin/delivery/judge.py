"""What those who judge how a call ended have in common: the places where a batch may go, and those who hear of it.

Both an entry that failed (answers.py) and a call that failed as a whole (failed_calls.py) end in the same retry queue,
lower the same rates and are told by the same lines. Each of these things exists once for a sender, so that what one of
the two has learned holds for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin._codec import Batch
    from fastkin.delivery.alarm import Alarm
    from fastkin.delivery.gate import Gate
    from fastkin.delivery.pacing import Pacer
    from fastkin.delivery.refusals import Refusals
    from fastkin.delivery.retry_queue import RetryQueue
    from fastkin.delivery.send_counters import SendCounters
    from fastkin.delivery.trouble import Trouble
    from fastkin.errors import Action


@dataclass(eq=False)
class Judge:
    """Times are the event loop's, in seconds."""

    waits: RetryQueue
    refusals: Refusals
    pacer: Pacer
    gate: Gate
    alarm: Alarm
    trouble: Trouble
    counters: SendCounters
    classify: Callable[[str], Action]  # what to do about a record's own code, at this destination
    give_up: Callable[[Batch, str], None]  # takes over what can never be stored, with the reason
