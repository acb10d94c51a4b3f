"""An emulated Kinesis in a thread of its own: for tests that have no loop, and for those whose loop is busy."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Self, TypeVar

from fastkin.testing.emulated import EmulatedKinesis

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future
    from typing import Any

T = TypeVar("T")

_JOIN_S = 10.0


class ThreadEmulator(EmulatedKinesis):
    """An emulated Kinesis in a thread: may be used from any thread, with a loop or without one.

    with ThreadEmulator({"welders": 4}) as kinesis:
        report(21.5)
        assert kinesis.stored_json("welders") == [{"celsius": 21.5}]
    """

    _loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        # A daemon: a test run that is broken off must not wait for it.
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastkin emulator", daemon=True)
        self._thread.start()
        try:
            self._submit(self.emulator.start()).result()
            self._enter()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()
        try:
            self._submit(self.emulator.close()).result()
        finally:
            self._end()

    def wait_stored(self, count: int, stream: str | None = None, timeout: float = 10.0) -> None:
        """Blocks until the stream holds so many records, KPL aggregates taken apart.

        TimeoutError says how many it holds after `timeout` seconds; LookupError as `stored`; RuntimeError where it
        would stop a loop.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._submit(super().until_stored(count, stream, timeout)).result()
        else:
            raise RuntimeError(
                f"wait_stored() would stop the event loop that shall store them: use await until_stored({count})"
            )

    async def until_stored(self, count: int, stream: str | None = None, timeout: float = 10.0) -> None:
        """As `wait_stored`, and the running loop goes on meanwhile."""
        await asyncio.wrap_future(self._submit(super().until_stored(count, stream, timeout)))

    def _run(self, what: Callable[[], T]) -> T:
        # What changes the emulator is done in its thread, between two calls: when this returns it is in effect.
        if self._loop is None or threading.current_thread() is self._thread:
            return what()
        return self._submit(_call(what)).result()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        assert self._loop is not None, "enter the emulator first: with ThreadEmulator(...) as kinesis"
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        assert loop is not None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive():
            loop.close()


async def _call(what: Callable[[], T]) -> T:
    return what()
