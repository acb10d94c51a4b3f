"""Whose fault is it that Kinesis refuses a single record: the record's, or the destination's?

A call that is refused for one bad record is halved until the bad one stands alone. Refused alone, it is at fault itself
as long as others are stored now and then. When one after the other is refused and none is stored, the fault may be the
destination's or our settings', and to give records up would lose all that comes: then they wait, in doubt, until
something tells. What tells: another record that is stored; or a harmless one that the destination says it would take.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from fastkin.errors import KinesisError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastkin._codec import Batch, Budget

# So many single records refused in a row, none stored in between, and the fault is no longer looked for in the record.
REFUSED_IN_A_ROW = 10
# Nor is a record that comes first, or alone, held for ever: refused again and again for so long, it is given up once it
# is known that the destination takes others. One in such a time: what is wrong may be the destination all the same.
REFUSED_FOR_S = 60.0


class Refusals:
    """Judges single records that were refused. Times are the event loop's, in seconds."""

    def __init__(
        self, budget: Budget, *, trusted: bool, harmless: Callable[[], Awaitable[bool | None]] | None, name: str
    ) -> None:
        """`trusted`: a refusal is always the record's fault. `harmless()`: would the stream take a record that nobody
        can object to? None: that cannot be known."""
        self._budget = budget
        self._trusted = trusted
        self._harmless = harmless
        self._name = name
        self._harmless_said: bool | None = None
        self._asking: asyncio.Task[None] | None = None
        self._in_a_row = REFUSED_IN_A_ROW  # since one was stored; before the first: no trust
        self._stored_ever = False
        self._doubted: dict[Batch, float] = {}  # single records in doubt -> since when
        self._gave_up_at = -math.inf  # the last of them
        self.takes: int | None = None  # bytes: the stream's own limit of a record, when it is known
        self.probe: bool = False  # a record is in doubt: something new shall go before what was refused, once

    @property
    def doubting(self) -> bool:
        """The destination is in doubt: what is new goes before what was refused."""
        return self._in_a_row >= REFUSED_IN_A_ROW

    @property
    def untold(self) -> bool:
        """Nothing has told yet that the destination takes anything, and it cannot be asked."""
        return self._harmless_said is None and not self._stored_ever

    def at_fault(self, batch: Batch, now: float) -> bool:
        """This single record was refused. True: give it up. False: it is in doubt, keep it."""
        # Larger than the stream takes at all: no other record could tell more.
        if self._trusted or (self.takes is not None and batch.size > self.takes):
            self.forget(batch)
            return True
        # Others were stored lately, so the destination is fine and the record is not.
        if self._in_a_row < REFUSED_IN_A_ROW:
            self._in_a_row += 1
            self.forget(batch)
            return True
        # The first time counts. Each attempt would else begin the wait anew.
        since = self._doubted.setdefault(batch, now)
        self.ask()
        # The harmless record was asked about with the refusals before this one.
        takes_others = self._stored_ever if self._harmless_said is None else self._harmless_said
        if now - max(since, self._gave_up_at) < REFUSED_FOR_S or not takes_others:
            # If something new is stored, it was the records that were refused, and not the destination that refuses
            # everything. Without it nothing but the refused would be sent, and nothing would ever tell.
            self.probe = True
            self._tell()
            return False
        # From here the next one in doubt has to wait as long: the destination may be at fault all the same.
        self._gave_up_at = now
        self.forget(batch)
        return True

    def may_give_up(self, now: float) -> bool:
        """For a record with an error nobody documented: the destination takes others, and none was given up lately."""
        if not self._harmless_said or now - self._gave_up_at < REFUSED_FOR_S:
            return False
        self._gave_up_at = now
        return True

    def stored(self) -> None:
        """Another record was stored: the next refusal is the record's own fault again."""
        self._in_a_row = 0
        self._stored_ever = True
        self.probe = False
        # The next refusal of each is judged by itself again.
        if self._doubted:
            self._doubted.clear()
            self._tell()

    def forget(self, batch: Batch) -> None:
        """Somebody else has it now, or it has ended."""
        if self._doubted.pop(batch, None) is not None:
            self._tell()

    def ask(self) -> None:
        """About the harmless record, in a task of its own."""
        # One question at a time. Refusals come by the dozen, and each would be a call.
        if self._harmless is not None and self._asking is None:
            loop = asyncio.get_running_loop()
            self._asking = loop.create_task(self._ask(self._harmless), name=f"fastkin[{self._name}].harmless")

    def tasks(self) -> list[asyncio.Task[None]]:
        """What is under way: to be cancelled at the end."""
        return [self._asking] if self._asking is not None else []

    async def _ask(self, harmless: Callable[[], Awaitable[bool | None]]) -> None:
        try:
            self._harmless_said = await harmless()
        except KinesisError:
            # It was refused, or nobody answered. Neither shows that the destination takes anything.
            self._harmless_said = False
        finally:
            self._asking = None

    def _tell(self) -> None:
        """Records in doubt alone do not fill the budget: what comes next may tell."""
        self._budget.doubt(sum(batch.user_records for batch in self._doubted if not batch.restored))
