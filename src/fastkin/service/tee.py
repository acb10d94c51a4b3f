"""Each message as it came, into files beside those of its records: also what is filtered, or is no record.

A message is acknowledged when its records have ended and its payload is synced here. So it counts as one settlement
more, which is told from here. This is Python for each message: some microseconds, for who wants it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fastkin.deadletter.files import one
from fastkin.errors import KinesisError
from fastkin.mqtt._core import CallbackSink

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from fastkin._codec import Batcher, FormatSink, Sink, StraySink
    from fastkin.files.files import Stream
    from fastkin.mqtt._core import AckTracker

_LOG = logging.getLogger("fastkin.pipeline")

_AGAIN_S = 1.0
_COST = 256  # of a message besides its payload


class Tee:
    """Of one pipeline."""

    def __init__(
        self,
        stream: Stream,
        acks: AckTracker,
        *,
        name: str,
        separator: str,
        most_bytes: int,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        on_settled: Callable[[], None],
    ) -> None:
        """`most_bytes` may wait for the disk; one message may always. `on_settled()` runs after each write."""
        self._stream = stream
        self._acks = acks
        self._name = name
        self._separator = separator.encode()
        self._most_bytes = most_bytes
        self._spawn = spawn
        self._on_settled = on_settled
        self._waiting: list[tuple[bytes, int]] = []
        self._bytes = 0  # waiting or being written
        self._writing: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> bool:
        """Something is not synced yet."""
        return self._bytes > 0

    def into(self, sink: Batcher | FormatSink | StraySink, heard: Callable[[bytes, bytes], None]) -> Sink:
        """The sink, with each message that it takes written here too; `heard(topic, payload)` is told of it."""

        def tap(topic: bytes, payload: bytes, token: int) -> int:
            cost = len(payload) + _COST
            # Asked first: what the sink has taken cannot be given back.
            if self._bytes and self._bytes + cost > self._most_bytes:
                return -1
            taken: int = sink.offer(topic, payload, token)
            if taken < 0:
                return taken
            self._bytes += cost
            self._waiting.append((payload, token))
            heard(topic, payload)
            if self._writing is None:
                self._writing = self._spawn(self._write(), "tee")
            return taken + 1

        return CallbackSink(tap)

    async def _write(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            data = b"".join(payload + self._separator for payload, _ in group)
            while True:
                try:
                    await self._stream.put(data, one)
                    break
                except KinesisError as error:
                    # Its records go to the same directory, and an ERROR says why they wait.
                    _LOG.debug("pipeline=%s stage=settle %d raw messages wait: %s", self._name, len(group), error)
                    await asyncio.sleep(_AGAIN_S)
            for payload, token in group:
                self._bytes -= len(payload) + _COST
                self._acks.settled(token)
            self._on_settled()
        self._writing = None
