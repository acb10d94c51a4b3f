"""Several processes that share the work: started, started again when they die, reloaded and stopped as one.

    parent (this)  --socket pair-->  worker 0   ID-w0   $share/GROUP/FILTER
                   --socket pair-->  worker 1   ID-w1   $share/GROUP/FILTER

Each worker is `fastkin run` with a number: an engine of its own under names of its own (members.py). This process takes
no message. It has the face of an engine, so that signals and reloads of `fastkin run` are the same with one process and
with many.

Plain processes, and neither fork() nor multiprocessing: a worker shall share nothing that another one's death could
leave locked, and its command line says in `ps` what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from fastkin.errors import ClosedError, ConfigError, FastkinError, MqttError
from fastkin.mqtt.visit import knows_shared
from fastkin.service import leftovers
from fastkin.service.channel import Asker, GoneError
from fastkin.service.members import member_name, members
from fastkin.service.reload import Changes

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from fastkin.config import Settings
    from fastkin.service.members import Member
    from fastkin.status.server import StatusServer

_LOG = logging.getLogger("fastkin.workers")

LEFT_OVER = "left-over"  # the name of the process that empties what others left
_START_S = 60.0  # to load, and to open what it has
_AGAIN_S = 1.0  # before a worker that died is started again; doubles
_AGAIN_MOST_S = 30.0
_STEADY_S = 60.0  # one that lived so long did not die of what it died of before
_ASK_BROKER_S = 5.0  # between questions to a broker that is away
_ANSWER_S = 20.0  # for one of them
_LOOK_S = 0.5
_STOP_S = 1.6  # after the shutdown timeout: a worker ends 1.4 s after it in any case
_AT_ONCE_S = 0.8
_WRONG = 2  # the exit code that says: somebody must mend it


class RefusedError(FastkinError):
    """A worker ended at its start because of what somebody must mend. It has said what."""


class _Place:
    """One worker: a process, and after its death the next."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], *, once: bool = False) -> None:
        """`once`: it ends by itself when its work is done."""
        self.name = name
        self.restarts = 0
        self.trouble: str | None = "is starting"
        self.asker = Asker()
        self.process: subprocess.Popen[bytes] | None = None
        self.stats: dict[str, dict[str, int]] = {}
        self.started = asyncio.Event()  # for the first time
        self.over = asyncio.Event()  # no more processes will come
        self.code = 0
        self._command = command
        self._env = env
        self._once = once
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return None if self.process is None or self.process.returncode is not None else self.process.pid

    async def run(self) -> None:
        """Until stop(). RefusedError: the first process ended with what somebody must mend."""
        delay = _AGAIN_S
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    self.code = code = await self._live()
                    ended = _ending(code)
                except OSError as error:
                    # No process, or no socket for it, is to be had now. The others work, and must not end with it.
                    self.code = code = 1
                    ended = f"cannot be started ({error.strerror or error})"
                lived = time.monotonic() - began
                if self._stopping.is_set() or (self._once and code == 0):
                    return
                if code == _WRONG and self.restarts == 0 and not self._once:
                    raise RefusedError(f"worker {self.name} cannot start")
                delay = _AGAIN_S if lived >= _STEADY_S else delay
                self.restarts += 1
                self.trouble = f"{ended} after {lived:.1f} s: starts again"
                _LOG.error("stage=workers worker %s %s in %.1f s", self.name, self.trouble, delay)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), delay)
                delay = min(delay * 2, _AGAIN_MOST_S)
        finally:
            self.trouble = self.trouble or "has ended"
            self.over.set()

    async def _live(self) -> int:
        """One process, to its end."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            # a fork takes a moment, and it is our own command
            self.process = subprocess.Popen(  # noqa: ASYNC220, S603
                [*self._command, "--channel", str(theirs.fileno())],
                env=self._env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C at the terminal is for the parent, which tells its workers
            )  # fmt: skip
            undo.pop_all()
        ended = _ending_of(self.process)
        self.asker = Asker()
        await self.asker.open(ours)
        starting = asyncio.create_task(self._await_start())
        try:
            return await asyncio.shield(ended)
        finally:
            starting.cancel()
            self.asker.close()

    async def _await_start(self) -> None:
        with contextlib.suppress(GoneError):
            await self.asker.ask("started", None)
            self.trouble = None
            self.started.set()
            # stop() came while it had no ears yet
            if self._stopping.is_set():
                await self.asker.ask("stop", None)

    async def stop(self, within_s: float) -> int:
        """Have it store what it holds. Returns how many records did not end, as far as it said."""
        self._stopping.set()
        limit = asyncio.get_running_loop().time() + within_s
        told: dict[str, Any] = {}
        with contextlib.suppress(GoneError):
            told = await self.asker.ask("stop", within_s) or {}
        self.stats = told.get("stats", {})
        try:
            async with asyncio.timeout_at(limit):
                await self.over.wait()
        except TimeoutError:
            _LOG.error("stage=workers worker %s did not stop in time: ended at once", self.name)
            self.kill()
            await self.over.wait()
        return int(told.get("unsettled", 0))

    def signal(self, *numbers: signal.Signals) -> None:
        """From any thread."""
        if (process := self.process) is not None:
            for number in numbers:
                with contextlib.suppress(OSError):
                    process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)


class Workers:
    """The processes of one service, with the face of an engine."""

    def __init__(self, settings: Settings, command: Sequence[str], env: Mapping[str, str]) -> None:
        """`command` starts one process, and `env` is its environment; what makes it a worker is appended."""
        self.settings: Settings = settings
        self.status: StatusServer | None = None
        self._command = command
        # systemd hears of one process, which is this one
        self._env = {name: value for name, value in env.items() if name != "NOTIFY_SOCKET"}
        self._places: dict[str, _Place] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[int] | None = None
        self._turn = asyncio.Lock()
        self._left: asyncio.Task[None] | None = None

    # -- the face of an engine ---------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start every worker. ConfigError: the broker has no shared subscriptions. RefusedError: a worker has said
        what must be mended."""
        self._failure = asyncio.get_running_loop().create_future()
        self._failure.add_done_callback(lambda failure: failure.cancelled() or failure.exception())
        if self.settings.status.port:
            from fastkin.service.workers_page import WorkersPage
            from fastkin.status.server import StatusServer

            self.status = StatusServer(WorkersPage(self))
            await self.status.start(self.settings.status)
        if self._count and not await self._ask_broker():
            self._spawn(self._ask_again(), "broker")
        # One at first: what is wrong with it is wrong with all, and is told once.
        first, *others = members(self._count)
        await self._begun(self._add(first))
        await asyncio.gather(*(self._begun(self._add(member)) for member in others))
        self._look_for_leftovers()

    async def wait(self) -> None:
        """Until stop() was called; raises what makes all workers useless."""
        assert self._failure is not None
        await asyncio.shield(self._failure)

    async def reload(self, settings: Settings, *, everything: bool = False) -> Changes:  # noqa: ARG002 - each sees it
        """Have every worker read its settings again; more or fewer of them when their number has changed."""
        async with self._turn:
            if self._stopping is not None:
                raise ClosedError("the workers are stopping: the settings were not taken up")
            before, self.settings = self.settings, settings
            wanted = {member_name(member): member for member in members(self._count)}
            gone = [name for name in self._places if name not in wanted and name != LEFT_OVER]
            stay = [name for name in self._places if name in wanted]
            others = before.workers != settings.workers
            if others:
                await self._end_leftovers()  # it does not know who is nobody's now
            if self._count and not (before.workers.count or 0):
                await self._ask_broker()
            new = [self._add(member) for name, member in wanted.items() if name not in self._places]
            # First those that come: what is published meanwhile must have somebody to go to.
            await asyncio.gather(*(self._begun(place) for place in new), *(self._reloaded(name) for name in stay))
            unsettled = sum(await asyncio.gather(*(self._remove(name) for name in gone)))
            if others:
                self._look_for_leftovers()
            _LOG.info("stage=workers settings taken up by %d workers", len(wanted))
            if before.status != settings.status:
                _LOG.warning("stage=workers [status] has changed: that needs a restart of the process")
            return Changes(unsettled=unsettled)

    async def stop(self) -> int:
        """Have every worker store what it holds and end. Returns how many records did not end in time."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="fastkin workers stop")
        return await asyncio.shield(self._stopping)

    async def _stop(self) -> int:
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(None)
        for task in self._tasks:
            if task.get_name() != "fastkin workers run":
                task.cancel()
        limit = max((each.shutdown_timeout_s for each in self.settings.pipelines), default=0.0) + _STOP_S
        unsettled = sum(await asyncio.gather(*(place.stop(limit) for place in self._places.values())))
        if self.status is not None:
            await self.status.close()  # last: a drain can be watched
        return unsettled

    def stats(self) -> dict[str, dict[str, int]]:
        """What the workers said when they stopped."""
        return {f"{name}:{pipe}": told for name, place in self._places.items() for pipe, told in place.stats.items()}

    @property
    def pipelines(self) -> list[str]:
        """Which pipelines there should be."""
        return [each.id for each in self.settings.pipelines if each.enabled]

    def at_once(self) -> int:
        """End every worker now, from any thread: each says what it leaves. Returns the exit code."""
        places = list(self._places.values())
        for place in places:
            # Two of them, as from somebody who does not want to wait: the first may have been heard already.
            place.signal(signal.SIGTERM, signal.SIGINT)
        limit = time.monotonic() + _AT_ONCE_S
        while any(place.pid is not None for place in places) and time.monotonic() < limit:
            time.sleep(0.01)
        for place in places:
            place.kill()
        _LOG.warning("stopped: %d workers were ended at once", len(places))
        codes = (place.process.returncode for place in places if place.process is not None)
        return 1 if 1 in codes else 0

    # -- seen from outside ---------------------------------------------------------------------------

    def places(self) -> list[tuple[str, int | None]]:
        """Each worker with its process id, None when it has no process now."""
        return [(name, place.pid) for name, place in self._places.items()]

    def trouble(self, name: str) -> str | None:
        """Why a worker does not work now."""
        return self._places[name].trouble if name in self._places else "has ended"

    def restarts(self, name: str) -> int:
        return self._places[name].restarts if name in self._places else 0

    async def ask(self, name: str, what: str, timeout_s: float) -> Any:
        """GoneError: it does not answer."""
        if name not in self._places:
            raise GoneError("it has ended")
        return await self._places[name].asker.ask(what, timeout_s)

    # -- workers that come and go ----------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return self.settings.workers.count or 0

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"fastkin workers {name}")
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        assert self._failure is not None
        if not self._failure.done():
            self._failure.set_exception(error)

    def _add(self, member: Member) -> _Place:
        name = member_name(member)
        place = self._places[name] = _Place(name, [*self._command, "--worker", name], self._env)
        self._spawn(place.run(), "run")
        return place

    async def _begun(self, place: _Place) -> None:
        """Wait until it has an engine at work, or for what `wait()` would raise."""
        assert self._failure is not None
        started = asyncio.ensure_future(place.started.wait())
        over = asyncio.ensure_future(place.over.wait())
        waits: list[asyncio.Future[Any]] = [started, over, self._failure]
        try:
            await asyncio.wait(waits, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # its task ends behind the word of it
            if self._failure.done():
                self._failure.result()
        finally:
            started.cancel()
            over.cancel()

    async def _remove(self, name: str) -> int:
        place = self._places[name]
        unsettled = await place.stop(self._limit_s)
        self._places.pop(name, None)
        return unsettled

    @property
    def _limit_s(self) -> float:
        return max((each.shutdown_timeout_s for each in self.settings.pipelines), default=0.0) + _STOP_S

    async def _reloaded(self, name: str) -> None:
        # A worker that is being started reads the new settings anyway.
        with contextlib.suppress(GoneError):
            await self._places[name].asker.ask("reload", None)

    # -- the broker ------------------------------------------------------------------------------------

    async def _ask_broker(self, *, first: bool = True) -> bool:
        """Whether the question is settled. ConfigError: the broker has no shared subscriptions."""
        broker = self.settings.broker
        try:
            async with asyncio.timeout(_ANSWER_S):
                knows = await knows_shared(broker)
        except (MqttError, TimeoutError) as error:
            why = str(error) or f"no answer within {_ANSWER_S:g} s"
            _LOG.log(
                logging.WARNING if first else logging.DEBUG,
                "stage=workers broker=%s cannot be asked for shared subscriptions now: %s", broker.url, why,
            )  # fmt: skip
            return False
        if knows is False:
            raise ConfigError(
                "workers",
                f"the broker {broker.url} has no shared subscriptions ($share), by which workers share messages",
                "run without workers (--workers 0), or use a broker that has them; where it has them, let this user"
                " publish and subscribe fastkin/check/#, which is how one that speaks MQTT 3.1.1 is tried",
            )
        return True

    async def _ask_again(self) -> None:
        settled = False
        while not settled:
            await asyncio.sleep(_ASK_BROKER_S)
            settled = await self._ask_broker(first=False)

    # -- what others left ------------------------------------------------------------------------------

    def _look_for_leftovers(self) -> None:
        self._left = self._spawn(self._empty_leftovers(), "leftovers")

    async def _end_leftovers(self) -> None:
        if self._left is not None:
            self._left.cancel()
            await asyncio.gather(self._left, return_exceptions=True)
        if LEFT_OVER in self._places:
            await self._remove(LEFT_OVER)

    async def _empty_leftovers(self) -> None:
        """When all workers are subscribed: until then nobody else would get what a session is to get no more."""
        while not all([await self._connected(name) for name in list(self._places)]):  # noqa: ASYNC110 - others' state
            await asyncio.sleep(_LOOK_S)
        while True:
            try:
                left = await leftovers.find(self.settings, self._count)
                break
            except MqttError as error:
                _LOG.debug("stage=workers cannot look for sessions of earlier workers: %s", error)
                await asyncio.sleep(_ASK_BROKER_S)
        if not left:
            return
        names = [member_name(member) for member in left]
        _LOG.info(
            "stage=workers workers of an earlier start left sessions or spools, emptying them: %s", ", ".join(names)
        )
        place = _Place(LEFT_OVER, [*self._command, "--left-over", ",".join(names)], self._env, once=True)
        self._places[LEFT_OVER] = place
        self._spawn(place.run(), "run")
        await place.over.wait()
        if not place.code and self._stopping is None:
            self._places.pop(LEFT_OVER, None)

    async def _connected(self, name: str) -> bool:
        try:
            told = await self.ask(name, "health", _START_S)
        except GoneError:
            return False
        return bool(told and told["connected"])


def _ending_of(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Its exit code, when it has ended. A thread waits: the signals of this process are read by another one."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def tell(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(tell, code)

    threading.Thread(target=wait, name="fastkin worker", daemon=True).start()
    return ended


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
