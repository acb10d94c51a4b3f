"""Who waits for room in a budget: first come, first served.

Without a line all who wait would try again when there is room, and who came last could take it each time. A `put`
might then wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from typing import TYPE_CHECKING

from fastkin.runtime.waiters import fail_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from fastkin._codec import Budget

_CALLED_AT_ONCE = 16


class Turns:
    """A line of waiters. Who is called and finds the room gone keeps the place; nobody passes who came earlier.

    A few are called at once, for a task runs only later: one by one, each batch that ends would let in one record
    a turn of the loop.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        # Whatever made room calls, also when no record has ended: a closed aggregate costs less than an open one.
        budget.on_room = self.call
        self._tickets = itertools.count()
        self._line: list[tuple[int, asyncio.Future[None]]] = []  # a heap, by when they came
        self._called: list[int] = []  # have been called, and have not run since

    @contextlib.asynccontextmanager
    async def turn(self, make_room: Callable[[], None]) -> AsyncIterator[None]:
        """Waits for its turn and for room; `make_room` is called each time there is none."""
        # Tickets and not places in a list: who is called and finds no room comes back with the same one.
        ticket = next(self._tickets)
        # In the line, or called from it and not served yet. Kept in the budget, where a put asks without a Python call.
        self._budget.waiting += 1
        try:
            # Again and again: room that is seen when it is called may be gone when it runs.
            while not self._is_turn(ticket):
                make_room()
                if not self._is_turn(ticket):
                    await self._stand(ticket)
            yield
        finally:
            self._budget.waiting -= 1
            # Whatever became of this one: the next one would else wait for a room that is there.
            self.call()

    async def _stand(self, ticket: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (ticket, waiter)
        heapq.heappush(self._line, place)
        try:
            await waiter
        finally:
            # Here also when it was cancelled after it was called. Its turn would block all later ones.
            if ticket in self._called:
                self._called.remove(ticket)
            # It was cancelled while it stood in the line.
            elif place in self._line:
                self._line.remove(place)
                heapq.heapify(self._line)

    def _is_turn(self, ticket: int) -> bool:
        # Who was called before it has not run yet. The room that is seen now is meant for that one.
        if self._budget.full or (self._called and self._called[0] < ticket):
            return False
        return not self._line or ticket < self._line[0][0]

    def call(self) -> None:
        """There may be room: call who came first, each who is served calls the next."""
        # Nobody is called into a full budget. It would come back, and the next one after it.
        while self._line and len(self._called) < _CALLED_AT_ONCE and not self._budget.full:
            ticket, waiter = heapq.heappop(self._line)
            # What is dropped with a loop that has closed makes room too, and then nobody is there to be called.
            if not waiter.done() and not waiter.get_loop().is_closed():
                waiter.set_result(None)
                self._called.append(ticket)

    def close(self, error: Exception) -> None:
        """There will be no room: who stands in the line raises `error`."""
        fail_all((waiter for _, waiter in self._line), error)
        self._line.clear()

    def stuck(self, in_flight: int) -> str | None:
        """Somebody waits and nothing will call; `in_flight` records have yet to end. None: all is well."""
        # Who was called is on the way, and calls the next when it is served: also with more in the line than are called
        # at once, and nothing in flight by then.
        if not self._line or self._called:
            return None
        if not self._budget.full:
            return f"{len(self._line)} who put wait for room and there is some"  # whoever made it did not call
        if not in_flight:
            return f"{len(self._line)} who put wait for room and nothing is in flight"
        return None
