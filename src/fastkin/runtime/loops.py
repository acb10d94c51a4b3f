"""Which event loop a command runs on: uvloop's where there is uvloop, else asyncio's own.

Only commands choose: a program that embeds fastkin has a loop already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """For asyncio.Runner: uvloop's loop where there is uvloop, else None, which is asyncio's own."""
    try:
        import uvloop
    except ImportError:  # it is no dependency on Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
