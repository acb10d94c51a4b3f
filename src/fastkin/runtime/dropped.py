"""What happens when an event loop ends before its owner closed what runs in it: one clear line, and no tracebacks."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def outlive(ended: Callable[[], None]) -> None:
    """A task that ends when it is cancelled, as every task is at the end of asyncio.run(), or when it is destroyed with
    a loop that was closed early; `ended()` is called then."""
    try:
        # Nobody ever sets it. The task ends with the loop and in no other way, and that is the sign.
        await asyncio.get_running_loop().create_future()
    finally:
        with contextlib.suppress(Exception):  # at the end of the interpreter anything may be gone
            ended()


def quiet(task: asyncio.Task[T]) -> asyncio.Task[T]:
    """asyncio need not tell of each task that was destroyed with a closed loop: the guard says it once for all."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task
