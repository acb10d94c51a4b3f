"""Hands messages that can never be a record from the session to who sets them aside, piece by piece.

Such a message may be larger than memory allows, so nobody here waits for the whole of it. And its taker may be a disk
that is slow or full. So reading pauses until a piece is taken. A task of its own carries the pieces: keep-alive and
acknowledgements go on meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from fastkin.mqtt.reading import PIECE

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.mqtt._core import Apart, Session
    from fastkin.mqtt.reading import Reading


class Carrier(Protocol):
    """Takes one message aside. Whoever has it lets go of it when the connection ends before whole()."""

    async def take(self, piece: bytes) -> None:
        """Return when there is room for the next."""

    async def whole(self) -> None:
        """All of it was taken: settle its token once, when it is safe. Return when there is room for the next one.

        It may be cancelled while it waits, and must not have to be asked again: the token is held for this.
        """


class SetApart:
    """Of one connection. Nothing is read while a piece waits."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        session: Session,
        reading: Reading,
        carrier: Callable[[Apart], Carrier],
        walk_on: Callable[[int], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """`walk_on(taken)` goes on behind a piece, `taken` messages were taken with it; `failed(error)`: a bug."""
        self._loop = loop
        self._session = session
        self._reading = reading
        self._carrier = carrier
        self._walk_on = walk_on
        self._failed = failed
        self._carrying: asyncio.Task[None] | None = None
        self._piece = asyncio.Event()  # one waits in the session

    def take(self) -> None:
        """A piece waits. Nothing is read until it is taken."""
        self._reading.pause(PIECE)
        self._piece.set()
        if self._carrying is None and not self._reading.deaf:
            self._carrying = self._loop.create_task(self._carry(), name="fastkin[intake].apart")
            self._carrying.add_done_callback(self._carried)

    @property
    def forgotten(self) -> bool:
        """A piece waits, reading with it, and no task is there to take it."""
        reading = self._reading
        if not reading.paused & PIECE or reading.stopped or reading.deaf:
            return False
        return self._carrying is None or self._carrying.done()

    def carry_on(self) -> None:
        """Take up what is forgotten."""
        if self.forgotten:
            self.take()

    def end(self) -> None:
        if self._carrying is not None:
            self._carrying.cancel()

    async def rescue(self, message: Apart, pieces: list[bytes]) -> None:
        """The connection ends for a message that nobody will send again."""
        carrier = self._carrier(message)
        for piece in pieces:
            await carrier.take(piece)
        await carrier.whole()

    async def _carry(self) -> None:
        session = self._session
        while (message := session.apart) is not None:
            carrier = self._carrier(message)
            while True:
                await self._piece.wait()
                self._piece.clear()
                # A disk may take as long as it likes: nothing is read meanwhile, and keep-alive goes on by itself.
                await carrier.take(session.take_piece())
                if not session.apart_left:
                    break
                self._behind_piece(0)
            # Not whole and not settled: it stays the broker's, which sends it to the next connection.
            if self._reading.stopped:
                return
            # From here on the token waits for one settlement, and the carrier gives it.
            session.finish_apart()
            await carrier.whole()
            self._behind_piece(1)
        # here and not when the task is over: reading goes on already, and the next message needs a task of its own
        self._carrying = None

    def _behind_piece(self, taken: int) -> None:
        if not (self._reading.deaf or self._reading.stopped):
            self._walk_on(taken)

    def _carried(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error if isinstance(error, Exception) else RuntimeError(str(error)))
