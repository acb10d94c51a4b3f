"""An asyncio loop with virtual time: when nothing is ready, the clock jumps to the next timer.

Everything in it is of one thread, and of one seed: executors run their work inline after a delay that the world
draws, tasks and futures hash by their serial number (sets of them are walked in the same order in every process),
and what reaches the loop's exception handler is kept as a finding.

A simulated process is a context: `PROCESS` holds its number in every task and timer that it makes. Killing it takes
these out of the loop; nothing of it runs again, not even a `finally`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from asyncio import base_events, events
from collections import deque
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any

from fastkin.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

PROCESS: ContextVar[int] = ContextVar("process", default=0)  # 0: the world itself
START = 1000.0  # of the virtual clock; seconds
EPOCH = 1_800_000_000.0  # what time.time() says then

_TURN_S = 1e-5  # what a turn of the loop takes where time passes while code runs
_SPIN_MOST = 20_000  # turns without time passing: something wakes itself


class Finding(Exception):  # noqa: N818 - it is not an error of the simulation
    """What must not happen has happened."""


class Task(asyncio.Task[Any]):
    """A task whose place in a set is the same in every run."""

    def __init__(self, coroutine: Any, *, serial: int, **options: Any) -> None:
        self.serial = serial  # first of all: asyncio puts it into a set while it is made
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self.serial


class Future(asyncio.Future[Any]):
    serial = 0

    def __hash__(self) -> int:
        return self.serial


class _Jump:
    """Stands in for the selector: to wait is to move the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> tuple[()]:
        loop = self._loop
        if timeout is None:
            raise Finding("nothing is ready and no timer is armed: whoever waits now waits for ever")
        if timeout > 0:
            loop.now = max(loop.now, loop._scheduled[0].when())
            loop.spins = 0
        else:
            if loop.coarse:
                loop.now += _TURN_S
            loop.spins += 1
            if loop.spins > _SPIN_MOST:
                raise Finding(f"the loop goes round {_SPIN_MOST} times without time passing: {loop.busy_with()}")
        loop.turns += 1
        if loop.turns > loop.most_turns:
            raise Finding(f"{loop.turns} turns of the loop: {loop.busy_with()}")
        return ()

    def close(self) -> None:
        pass


class VirtualLoop(base_events.BaseEventLoop):
    """`delay(kind)` says how long a job of an executor takes until it is done, and until that is told."""

    def __init__(self, delay: Callable[[Callable[..., Any]], tuple[float, float]], *, coarse: bool = False) -> None:
        super().__init__()
        self.now = START
        self.coarse = coarse  # timers and clock in milliseconds, rounded down, as uvloop has them
        self.spins = self.turns = 0
        self.most_turns = 1_000_000
        self.bugs: list[dict[str, Any]] = []
        self.dead: set[int] = set()
        self.jobs: list[_Job] = []
        self.tasks: dict[int, list[Task]] = {}
        self.delay = delay
        self._selector = _Jump(self)
        self._serial = 0
        self._tasks_most = 100
        self.telling = 0, 0.0  # which process a thread is at work for, and how long its word takes
        self._outside: Context | None = None
        self.set_exception_handler(self._keep)
        self.set_task_factory(self._make_task)

    # -- the clock ---------------------------------------------------------------------------------

    def time(self) -> float:
        return _coarse(self.now) if self.coarse else self.now

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        if self.coarse:
            when = _coarse(when)
        return super().call_at(when, callback, *args, context=context)

    def busy_with(self) -> str:
        handles = [*list(self._ready)[:3], *sorted(self._scheduled)[:3]]
        return f"at {self.now - START:.6f} " + ", ".join(str(handle) for handle in handles)[:900]

    # -- what asyncio asks of a loop ------------------------------------------------------------------

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def create_future(self) -> Future:
        future = Future(loop=self)
        self._serial += 1
        future.serial = self._serial
        return future

    def _make_task(self, loop: object, coroutine: Coroutine[Any, Any, Any], **options: Any) -> Task:
        self._serial += 1
        task = Task(coroutine, serial=self._serial, loop=self, **options)
        # the context is not told by the task: it is the one it was made in, or the one that was given
        context = options.get("context")
        process = PROCESS.get() if context is None else context.get(PROCESS, 0)
        if process:
            tasks = self.tasks.setdefault(process, [])
            tasks.append(task)
            if len(tasks) > self._tasks_most:
                tasks[:] = [each for each in tasks if not each.done()]
                self._tasks_most = 2 * len(tasks) + 100
        return task

    def _keep(self, loop: object, context: dict[str, Any]) -> None:
        self.bugs.append(context)

    # -- threads -----------------------------------------------------------------------------------

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> Future:  # type: ignore[override]
        future = self.create_future()
        job = _Job(self, PROCESS.get(), future, func, args)
        self.jobs.append(job)
        done, told = self.delay(func)
        job.told_after = told
        self.outside(done, job.work)
        return future

    def outside(self, delay: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        """call_later() of the world itself: no kill of a process takes it away."""
        if self._outside is None:
            self._outside = Context()
        return self.call_later(delay, callback, *args, context=self._outside)

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """What a thread tells the loop, a while after it was done."""
        process, after = self.telling
        return self.outside(after, self._told, process, callback, args)

    def _told(self, process: int, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if process not in self.dead:
            callback(*args)

    # -- processes -----------------------------------------------------------------------------------

    def alive(self, process: int) -> bool:
        return process not in self.dead

    def kill(self, process: int) -> None:
        """Nothing of it runs any more. Jobs that its threads were at are carried out or not: the world says."""
        self.dead.add(process)
        for handle in (*self._ready, *self._scheduled):
            context = getattr(handle, "_context", None)
            if context is not None and context.get(PROCESS, 0) == process:
                handle.cancel()
        for task in self.tasks.get(process, ()):
            task._log_destroy_pending = False  # type: ignore[attr-defined]

    def left_over(self, process: int) -> list[Task]:
        return [task for task in self.tasks.get(process, ()) if not task.done()]

    def bury(self) -> None:
        """At the end of a seed: close what the killed processes left."""
        for tasks in self.tasks.values():
            for task in tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()  # type: ignore[union-attr]
        self.tasks.clear()
        self.jobs.clear()
        self._ready.clear()
        self._scheduled.clear()


class _Job:
    """Work of a thread: done at one moment, told at a later one."""

    __slots__ = ("args", "func", "future", "loop", "process", "then", "told_after")

    def __init__(
        self, loop: VirtualLoop, process: int, future: Future | None, func: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        self.loop = loop
        self.process = process
        self.future = future
        self.func = func
        self.args = args
        self.told_after = 0.0
        self.then: Callable[[], None] | None = None  # the thread's next job

    def work(self) -> None:
        if self not in self.loop.jobs:
            return
        self.loop.jobs.remove(self)
        if self.process in self.loop.dead:
            return
        if self.future is None or not self.future.cancelled():
            # what has not begun is not made when nobody waits for it
            self.loop.telling = self.process, self.told_after
            try:
                result = self.func(*self.args)
            except BaseException as error:  # noqa: BLE001 - as an executor does
                self._tell(error, None)
            else:
                self._tell(None, result)
        self.loop.telling = 0, 0.0
        if self.then is not None:
            self.then()

    def _tell(self, error: BaseException | None, result: object) -> None:
        if self.future is None:
            return
        if self.told_after > 0:
            self.loop.outside(self.told_after, self._resolve, error, result)
        else:
            self._resolve(error, result)

    def _resolve(self, error: BaseException | None, result: object) -> None:
        assert self.future is not None
        if self.process in self.loop.dead or self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class SimWorker(Worker):
    """The product's thread for disks, without the thread: one call after the other, as slow as the disk."""

    def __init__(self, *told: Any, **more: Any) -> None:
        super().__init__(*told, **more)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        self._process = PROCESS.get()
        self._queue: deque[_Job] = deque()
        self._busy = False

    def _put(self, job: Any) -> None:
        mine = _Job(self._loop, self._process, None, job, ())
        mine.then = self._next
        self._queue.append(mine)
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._queue)
        if self._busy:
            job = self._queue.popleft()
            self._loop.jobs.append(job)
            done, job.told_after = self._loop.delay(job.func)
            self._loop.outside(done, job.work)


def running(loop: VirtualLoop) -> None:
    events.set_event_loop(loop)


def _coarse(seconds: float) -> float:
    return math.floor(seconds * 1000.0 + 1e-6) / 1000.0
