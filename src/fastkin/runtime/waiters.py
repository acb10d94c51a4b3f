"""Ends futures with an error when nothing will happen any more: whoever awaits them would else wait for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable


def fail_all(waiters: Iterable[asyncio.Future[Any]], error: Exception) -> None:
    """Whoever awaits one of them raises `error`."""
    for waiter in waiters:
        # Done: it was cancelled, or called a moment ago, and has not run since.
        if not waiter.done():
            waiter.set_exception(error)
