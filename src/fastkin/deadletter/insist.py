"""Tries again until it is done. A dead letter is never given up, however long its file or stream refuses it.

Its message waits unacknowledged meanwhile. So an operator must hear of it, but not with each attempt.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_RETRY_S = 5.0  # between attempts at what an operator must mend
_ERROR_EVERY_S = 60.0  # how often to say that they still wait


async def insist(attempt: Callable[[], Awaitable[str | None]], say: Callable[[str, float], None]) -> float | None:
    """Call `attempt` until it gives None; anything else is why it failed.

    `say(why, seconds)` runs at the first failure and then once in a while, with the time to the next attempt. Returns
    how many seconds it took; None: it was done at once.
    """
    began = time.monotonic()
    said: float | None = None
    while (why := await attempt()) is not None:
        now = time.monotonic()
        if said is None or now - said >= _ERROR_EVERY_S:
            said = now
            say(why, _RETRY_S)
        await asyncio.sleep(_RETRY_S)
    return None if said is None else time.monotonic() - began
