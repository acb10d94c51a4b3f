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
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from fastkin.commands.watch import Watch
from fastkin.errors import ClosedError, ConfigError
from fastkin.runtime.loops import loop_factory
from fastkin.runtime.worker import Worker
from fastkin.service.systemd import notify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastkin.commands.printing import Printer
    from fastkin.config import Settings
    from fastkin.service.member import Post
    from fastkin.service.members import Member
    from fastkin.service.reload import Changes
    from fastkin.status.registry import Engine as Seen

log: logging.Logger = logging.getLogger("fastkin.run")

_M_MMAP_THRESHOLD = -3  # malloc.h
_LEAVE_S = 10.0  # for what comes after the drain: last acknowledgements, goodbyes


class Work(Protocol):
    """What is run: an engine, several workers, or what former workers left."""

    @property
    def settings(self) -> Settings: ...

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...
    async def wait(self) -> None: ...
    async def stop(self) -> int: ...
    async def reload(self, settings: Settings, /, *, everything: bool = False) -> Changes: ...
    def stats(self) -> Mapping[str, Mapping[str, Any]]: ...


class Role(NamedTuple):
    """What this process is among several; the default: it is alone."""

    worker: Member = None
    left_over: tuple[Member, ...] = ()  # it empties what these left
    channel: int | None = None  # descriptor to the process that has the workers; None: this may be that process

    def settings_of(self, settings: Settings) -> Settings:
        """What of the settings is for this process."""
        if self.channel is None or self.left_over:
            return settings
        from fastkin.service.members import settings_of

        return settings_of(settings, self.worker)


def run(
    settings: Settings,
    read_again: Callable[[], tuple[Settings, bool]] | None = None,
    *,
    role: Role | None = None,
    command: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> int:
    """Until SIGTERM or SIGINT, or until the work ends. Returns the exit code.

    `read_again` gives the settings at SIGHUP, and whether the environment of the AWS SDK is another now; ConfigError.
    `command` and `env` are those of a worker, when the settings want several.
    """
    role = role or Role()
    settings = role.settings_of(settings)
    if role.channel is None:
        for warning in settings.warnings:
            log.warning("%s", warning)
    _return_memory()
    # what was made so far lives as long as the process: no collection needs to look at it again
    gc.collect()
    gc.freeze()
    with Watch() as watch, asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            return runner.run(_serve(settings, read_again, watch, role, command, env or {}))
        finally:
            watch.stop_within(0.0)  # to close the loop, which waits for threads


def _return_memory() -> None:
    """Have glibc give request bodies back to the system when they are freed.

    It would learn from the first large ones to keep them all: after a throttle that was over 10 % of the budget.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


async def _serve(
    settings: Settings,
    read_again: Callable[[], tuple[Settings, bool]] | None,
    watch: Watch,
    role: Role,
    command: Sequence[str],
    env: Mapping[str, str],
) -> int:
    if role.channel is None and settings.workers.count is not None:
        return await _supervise(settings, read_again, watch, command, env)
    if role.left_over:
        from fastkin.service.leftovers import Leftovers

        left = Leftovers(settings, role.left_over)
        return await _Service(left, read_again, watch, role, left).run()
    from fastkin.service.engine import Engine

    if not any(pipeline.stdout for pipeline in settings.pipelines):
        engine = Engine(settings)
        return await _Service(engine, read_again, watch, role, engine).run()
    from fastkin.commands.printing import Printer

    printer = Printer()
    printed = _Printed(printer, settings)
    engine = Engine(settings, on_message=printed.on_message)
    service = _Service(engine, read_again, watch, role, engine, printed)
    try:
        return await service.run()
    finally:
        printer.flush()


async def _supervise(
    settings: Settings,
    read_again: Callable[[], tuple[Settings, bool]] | None,
    watch: Watch,
    command: Sequence[str],
    env: Mapping[str, str],
) -> int:
    from fastkin.service.workers import RefusedError, Workers

    workers = Workers(settings, command, env)
    try:
        return await _Service(workers, read_again, watch, Role(), at_once=workers.at_once).run()
    except RefusedError:
        return 2  # the worker has said why


class _Printed:
    """Prints the messages of the pipelines that want it."""

    def __init__(self, printer: Printer, settings: Settings) -> None:
        self.printer = printer
        self._names: set[str] = set()
        self.take_up(settings)

    def take_up(self, settings: Settings) -> None:
        self._names = {pipeline.id for pipeline in settings.pipelines if pipeline.stdout}

    def on_message(self, pipeline: str, topic: bytes, payload: bytes) -> None:
        if pipeline in self._names:
            self.printer(topic, payload)


class _Service:
    """What is run, and the signals that steer it."""

    def __init__(
        self,
        work: Work,
        read_again: Callable[[], tuple[Settings, bool]] | None,
        watch: Watch,
        role: Role,
        seen: Seen | None = None,
        printed: _Printed | None = None,
        at_once: Callable[[], int] | None = None,
    ) -> None:
        """`seen`: the work, when another process is to see how it stands. `at_once()` ends the work from any thread and
        gives the exit code; None: there is nothing to end."""
        self._read_again = read_again
        self._reader = Worker("fastkin settings")
        self._watch = watch
        self._role = role
        self._seen = seen
        self._printed = printed
        self._work = work
        self._end_work = at_once
        # A queue, for signals come from another thread and may come faster than they are acted on. None is lost, and
        # they are looked at in their order. None in it: the process that has the workers wants us to stop.
        self._signals: asyncio.Queue[signal.Signals | None] = asyncio.Queue()
        # SIGHUP means two things: "read your settings again" from a supervisor, and "your terminal is gone" from the
        # kernel. Which one it was is seen by whether the terminal that we had still answers.
        self._terminal = next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)
        self._reload_asked = False
        self._reloading: asyncio.Task[None] | None = None
        self._stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._watch.start(
            lambda number: loop.call_soon_threadsafe(self._signals.put_nowait, number), self._limit, self._at_once
        )  # fmt: skip
        async with self._work as work:
            settings = work.settings
            if self._role.channel is None:
                count = settings.workers.count
                log.info(
                    "running: %s -> %s%s", settings.broker.url,
                    ", ".join(f"{p.id} ({p.target})" for p in settings.pipelines if p.enabled),
                    f", {count} workers" if count else "",
                )  # fmt: skip
            notify("READY=1")
            post = self._post()
            serving = None if post is None else asyncio.create_task(post.serve(), name="fastkin worker")
            ended = asyncio.create_task(work.wait(), name="fastkin engine")
            while True:
                over, asked = await self._signal_before(ended)
                if over or asked is not signal.SIGHUP or self._terminal_gone():
                    break
                self._hangup()
            try:
                if over:
                    ended.result()  # raises what ended it
                    return self._finished(await work.stop())
                ended.cancel()
                return await self._stop(asked)
            finally:
                if not self._stopped.done():
                    self._stopped.set_result(0)  # it failed: nobody will say more
                if post is not None and serving is not None:
                    await post.finish()  # whoever asked us to stop hears what became of the records
                    serving.cancel()

    def _post(self) -> Post | None:
        """Who answers the process that has the workers, when this is one of them."""
        if self._role.channel is None or self._seen is None:
            return None
        from fastkin.service.member import Post

        return Post(
            self._role.channel, self._seen, stop=self._asked_to_stop, reload=self._asked_to_reload,
            alone=lambda: self._signals.put_nowait(None),
        )  # fmt: skip

    async def _asked_to_stop(self) -> int:
        self._signals.put_nowait(None)
        return await asyncio.shield(self._stopped)

    async def _asked_to_reload(self) -> None:
        self._hangup()
        if self._reloading is not None:
            await asyncio.shield(self._reloading)

    async def _signal_before(self, end: asyncio.Task[Any]) -> tuple[bool, signal.Signals | None]:
        """Whether `end` has come first, else the next signal."""
        asked = asyncio.create_task(self._signals.get(), name="fastkin signal")
        await asyncio.wait({end, asked}, return_when=asyncio.FIRST_COMPLETED)
        if end.done():
            asked.cancel()
            return True, None
        return False, asked.result()

    async def _stop(self, first: signal.Signals | None) -> int:
        limit = self._limit()
        self._watch.stop_within(limit)
        notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int((limit + _LEAVE_S) * 1e6)}")
        if first is not None:
            log.info(
                "%s: takes no more and stores what is held, %g s at most; once more to stop at once", first.name, limit
            )
        stopping = asyncio.create_task(self._work.stop(), name="fastkin stop")
        while True:
            over, again = await self._signal_before(stopping)
            if over:
                break
            if again is signal.SIGHUP:
                log.info("SIGHUP: the settings are not read again, we are stopping")
                continue
            # One wish to stop may come twice, from the process that has the workers and from whoever ends all
            # processes of a service: it is one.
            if again is None or first is None:
                first = first or again
                continue
            # no more clean-up: somebody is waiting, and what is unacknowledged is safe by protocol
            self._watch.end(f"{again.name}: stops at once")
        return self._finished(stopping.result())

    def _limit(self) -> float:
        return max((p.shutdown_timeout_s for p in self._work.settings.pipelines), default=0.0)

    def _at_once(self) -> int:
        """The last words when nothing is waited for any more; from any thread."""
        if self._end_work is not None:
            return self._end_work()
        code = _last_line(self._work, None)
        if self._printed is not None:
            self._printed.printer.flush()
        return code

    def _finished(self, unsettled: int) -> int:
        code = _last_line(self._work, unsettled)
        self._watch.finished(code)
        if not self._stopped.done():
            self._stopped.set_result(unsettled)
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
            settings = self._role.settings_of(settings)
            changes = await self._work.reload(settings, everything=everything)
        except ConfigError as error:
            for problem in getattr(error, "problems", (error,)):
                log.error("SIGHUP: %s", problem)  # noqa: TRY400 - it names file, line and cure
            log.warning("SIGHUP: the settings were not taken up: going on with the former ones")
            return
        if self._role.channel is None:
            for warning in settings.warnings:
                log.warning("%s", warning)
        if self._printed is not None:
            self._printed.take_up(settings)
        elif settings.workers.count is None and any(pipeline.stdout for pipeline in settings.pipelines):
            log.warning("stdout = true needs a restart of the process: nothing was printed so far")
        if changes.unsettled:
            log.warning("SIGHUP: %d records did not end in time: the broker sends them again", changes.unsettled)


def _last_line(work: Work, unsettled: int | None) -> int:
    """Log what became of the records; the exit code is 1 when some of them are lost by stopping."""
    stats = work.stats()
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
