"""`fastkin run`: the engine on its event loop, the signals that reload and stop it, and its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from fastkin.commands.watch import Watch
from fastkin.errors import ClosedError, ConfigError
from fastkin.runtime.loops import loop_factory
from fastkin.runtime.worker import Worker
from fastkin.service.systemd import notify

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.commands.printing import Printer
    from fastkin.config import Settings
    from fastkin.service.engine import Engine

log: logging.Logger = logging.getLogger("fastkin.run")

_M_MMAP_THRESHOLD = -3  # malloc.h
_LEAVE_S = 10.0  # for what comes after the drain: last acknowledgements, goodbyes


def run(settings: Settings, read_again: Callable[[], tuple[Settings, bool]] | None = None) -> int:
    """Until SIGTERM or SIGINT, or until the engine ends. Returns the exit code.

    `read_again` gives the settings at SIGHUP, and whether the environment of the AWS SDK is another now; ConfigError.
    """
    for warning in settings.warnings:
        log.warning("%s", warning)
    _return_memory()
    # what was made so far lives as long as the process: no collection needs to look at it again
    gc.collect()
    gc.freeze()
    with Watch() as watch, asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            return runner.run(_serve(settings, read_again, watch))
        finally:
            watch.stop_within(0.0)  # to close the loop, which waits for threads


def _return_memory() -> None:
    """Have glibc give request bodies back to the system when they are freed.

    It would learn from the first large ones to keep them all: after a throttle that was over 10 % of the budget.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


async def _serve(settings: Settings, read_again: Callable[[], tuple[Settings, bool]] | None, watch: Watch) -> int:
    if not any(pipeline.stdout for pipeline in settings.pipelines):
        return await _Service(settings, read_again, watch).run()
    from fastkin.commands.printing import Printer

    printer = Printer()
    service = _Service(settings, read_again, watch, printer)
    try:
        return await service.run()
    finally:
        printer.flush()


class _Service:
    """The engine and the signals that steer it."""

    def __init__(
        self,
        settings: Settings,
        read_again: Callable[[], tuple[Settings, bool]] | None,
        watch: Watch,
        printer: Printer | None = None,
    ) -> None:
        from fastkin.service.engine import Engine

        self._read_again = read_again
        self._reader = Worker("fastkin settings")
        self._watch = watch
        self._printer = printer
        self._printed: set[str] = set()
        self._print(settings)
        self._engine = Engine(settings, on_message=None if printer is None else self._on_message)
        # A queue, for signals come from another thread and may come faster than they are acted on. None is lost, and
        # they are looked at in their order.
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        # SIGHUP means two things: "read your settings again" from a supervisor, and "your terminal is gone" from the
        # kernel. Which one it was is seen by whether the terminal that we had still answers.
        self._terminal = next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)
        self._reload_asked = False
        self._reloading: asyncio.Task[None] | None = None

    def _print(self, settings: Settings) -> None:
        self._printed = {pipeline.id for pipeline in settings.pipelines if pipeline.stdout}

    def _on_message(self, pipeline: str, topic: bytes, payload: bytes) -> None:
        if pipeline in self._printed and self._printer is not None:
            self._printer(topic, payload)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._watch.start(
            lambda number: loop.call_soon_threadsafe(self._signals.put_nowait, number), self._limit, self._at_once
        )  # fmt: skip
        async with self._engine as engine:
            settings = engine.settings
            log.info(
                "running: %s -> %s",
                settings.broker.url,
                ", ".join(f"{p.id} ({p.kinesis.stream})" for p in settings.pipelines if p.enabled),
            )
            notify("READY=1")
            ended = asyncio.create_task(engine.wait(), name="fastkin engine")
            while (asked := await self._signal_before(ended)) is signal.SIGHUP and not self._terminal_gone():
                self._hangup()
            if asked is None:
                ended.result()  # raises what ended it
                return self._finished(await engine.stop())
            ended.cancel()
            return await self._stop(asked)

    async def _signal_before(self, end: asyncio.Task[Any]) -> signal.Signals | None:
        """The next signal, or None when `end` has come first."""
        asked = asyncio.create_task(self._signals.get(), name="fastkin signal")
        await asyncio.wait({end, asked}, return_when=asyncio.FIRST_COMPLETED)
        if end.done():
            asked.cancel()
            return None
        return asked.result()

    async def _stop(self, first: signal.Signals) -> int:
        engine = self._engine
        limit = self._limit()
        self._watch.stop_within(limit)
        notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int((limit + _LEAVE_S) * 1e6)}")
        log.info(
            "%s: takes no more and stores what is held, %g s at most; once more to stop at once", first.name, limit
        )
        stopping = asyncio.create_task(engine.stop(), name="fastkin stop")
        while (again := await self._signal_before(stopping)) is not None:
            if again is signal.SIGHUP:
                log.info("SIGHUP: the settings are not read again, we are stopping")
                continue
            # no more clean-up: somebody is waiting, and what is unacknowledged is safe by protocol
            self._watch.end(f"{again.name}: stops at once")
        return self._finished(stopping.result())

    def _limit(self) -> float:
        return max((p.shutdown_timeout_s for p in self._engine.settings.pipelines), default=0.0)

    def _at_once(self) -> int:
        """The last words when nothing is waited for any more; from any thread."""
        code = _last_line(self._engine, None)
        if self._printer is not None:
            self._printer.flush()
        return code

    def _finished(self, unsettled: int) -> int:
        code = _last_line(self._engine, unsettled)
        self._watch.finished(code)
        return code

    def _terminal_gone(self) -> bool:
        """We ran in a terminal, and it was closed: that is meant by this SIGHUP."""
        return self._terminal is not None and not os.isatty(self._terminal)

    # -- SIGHUP ----------------------------------------------------------------------------------

    def _hangup(self) -> None:
        """Read the settings again; while that is at work, once more when it is done, however often we are asked."""
        if self._read_again is None:
            log.info("SIGHUP: there is nothing to read again")
            return
        self._reload_asked = True
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._reload_all(), name="fastkin reload")

    async def _reload_all(self) -> None:
        # SIGHUPs that come during a reload are one more reload, however many they are: the file is read as it is
        # then.
        while self._reload_asked:
            self._reload_asked = False
            # systemd counts the time of a reload from this moment, and it must be its own clock.
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
            try:
                await self._reload()
            except ClosedError:
                return
            except Exception:
                log.exception("SIGHUP: the reload failed; going on as it stands")
            notify("READY=1")

    async def _reload(self) -> None:
        assert self._read_again is not None
        log.info("SIGHUP: reading the settings again")
        try:
            # In a thread: the file may lie on a disk that hangs, and the pipelines must not stand still for it.
            settings, everything = await self._reader.run(self._read_again)
            changes = await self._engine.reload(settings, everything=everything)
        except ConfigError as error:
            for problem in getattr(error, "problems", (error,)):
                log.error("SIGHUP: %s", problem)  # noqa: TRY400 - it names file, line and cure
            log.warning("SIGHUP: the settings were not taken up: going on with the former ones")
            return
        for warning in settings.warnings:
            log.warning("%s", warning)
        self._print(settings)
        if self._printed and self._printer is None:
            log.warning("stdout = true needs a restart of the process: nothing was printed so far")
        if changes.unsettled:
            log.warning("SIGHUP: %d records did not end in time: the broker sends them again", changes.unsettled)


def _last_line(engine: Engine, unsettled: int | None) -> int:
    """Log what became of the records; the exit code is 1 when some of them are lost by stopping."""
    stats = engine.stats()
    total = {name: sum(each.get(name, 0) for each in stats.values()) for name in _COUNTS}
    lost = sum(each.get("volatile", 0) for each in stats.values())
    kept = sum(each.get("in_flight", 0) for each in stats.values()) - lost
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


_COUNTS = ("received", "stored", "dead_lettered", "filtered", "dropped", "spooled", "duplicates_possible")
