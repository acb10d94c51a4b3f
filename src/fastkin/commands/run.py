"""`fastkin run`: the service."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.config import Settings
    from fastkin.engine import Engine

log = logging.getLogger("fastkin.run")

_M_MMAP_THRESHOLD = -3  # malloc.h


def run(settings: Settings) -> int:
    """Until SIGTERM or SIGINT, or until the engine ends. Returns the exit code."""
    for warning in settings.warnings:
        log.warning("%s", warning)
    _return_memory()
    # what was made so far lives as long as the process: no collection needs to look at it again
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(settings))


def _return_memory() -> None:
    """Have glibc give request bodies back to the system when they are freed.

    It would learn from the first large ones to keep them all: after a throttle that was over 10 % of the budget.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # it is no dependency on Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(settings: Settings) -> int:
    printed = {pipeline.id for pipeline in settings.pipelines if pipeline.stdout}
    if not printed:
        return await _until_signalled(settings)
    from fastkin.printing import Printer

    printer = Printer()

    def on_message(pipeline: str, topic: bytes, payload: bytes) -> None:
        if pipeline in printed:
            printer(topic, payload)

    try:
        return await _until_signalled(settings, on_message, printer.flush)
    finally:
        printer.flush()


async def _until_signalled(
    settings: Settings,
    on_message: Callable[[str, bytes, bytes], None] | None = None,
    before_exit: Callable[[], None] | None = None,
) -> int:
    from fastkin.engine import Engine

    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    async with Engine(settings, on_message=on_message) as engine:
        log.info(
            "running: %s -> %s",
            settings.broker.url,
            ", ".join(f"{p.id} ({p.kinesis.stream})" for p in settings.pipelines if p.enabled),
        )
        ended = asyncio.create_task(engine.wait(), name="fastkin engine")
        asked = asyncio.create_task(signals.get(), name="fastkin first signal")
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            asked.cancel()
            ended.result()  # raises what ended it
            return _last_line(settings, engine, await engine.stop())
        limit = max((p.shutdown_timeout_s for p in settings.pipelines), default=0.0)
        log.info(
            "%s: takes no more and stores what is held, %g s at most; once more to stop at once",
            asked.result().name,
            limit,
        )
        stopping = asyncio.create_task(engine.stop(), name="fastkin stop")
        again = asyncio.create_task(signals.get(), name="fastkin second signal")
        await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not stopping.done():
            log.warning("%s: stops at once", again.result().name)
            code = _last_line(settings, engine, None)
            # no more clean-up: somebody is waiting, and what is unacknowledged is safe by protocol
            if before_exit is not None:
                before_exit()
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
        again.cancel()
        return _last_line(settings, engine, stopping.result())


def _last_line(settings: Settings, engine: Engine, unsettled: int | None) -> int:
    """Log what became of the records; the exit code is 1 when some of them are lost by stopping."""
    stats = engine.stats()
    total = {name: sum(each.get(name, 0) for each in stats.values()) for name in _COUNTS}
    lost = kept = 0
    for pipeline in settings.pipelines:
        held = int(stats.get(pipeline.id, {}).get("in_flight", 0))
        if pipeline.qos == 0 or settings.broker.clean_session:
            lost += held
        else:
            kept += held
    if unsettled is not None and unsettled > lost + kept:
        kept = unsettled - lost
    text = ", ".join(f"{name.replace('_', '-')} {count}" for name, count in total.items())
    if lost:
        log.error(
            "stopped: %s; %d records are lost: the broker does not keep them (QoS 0 or clean"
            " session)%s", text, lost, f"; it keeps {kept}" if kept else "",
        )  # fmt: skip
        return 1
    if kept:
        log.warning(
            "stopped: %s; %d records are not settled: the broker was not told and sends them again",
            text, kept,
        )  # fmt: skip
        return 0
    log.info("stopped: %s; nothing is left", text)
    return 0


_COUNTS = ("received", "stored", "dead_lettered", "filtered", "dropped", "duplicates_possible")
