"""What happens in one seed: what is set, what is published, what breaks, how it heals, and what is demanded then.

Three kinds of seed: one pipeline (with kills and restarts), an engine with reloads, a producer. Which faults may happen
is drawn first, so that each seed has its own climate: with all at once the rare ones would hide behind the common.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextvars import Context
from typing import TYPE_CHECKING, Any

from simulation import check, disks
from simulation.kinesis import ANSWER_FAULTS, CALL_FAULTS, ENTRY_FAULTS, Stream
from simulation.loop import PROCESS, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from simulation.check import Books
    from simulation.world import World

RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# Faults of the tree that are known and not mended yet: left out of the seeds until they are.
KNOWN = frozenset(os.environ.get("FASTKIN_SIM_KNOWN", "").split())
QUIET_S = 150.0  # without any progress after everything has healed: more than any backoff
LIFE_S = 20.0
MOST_S = 4 * 3600.0  # to drain
STOP_SLACK_S = 15.0  # what a stop may take beyond its timeout: goodbyes and cancelled calls

SCALES = {  # steps, messages of a burst, weight
    "tiny": (6, (0, 1, 1, 2, 5), 58),
    "small": (12, (0, 1, 5, 20), 28),
    "medium": (16, (0, 3, 20, 60), 12),
    "rich": (30, (0, 5, 60, 400), 2),
}


class Scenario:
    """What all kinds share: the climate, the streams' and disks' faults."""

    kind = ""

    def __init__(self, world: World) -> None:
        self.world = world
        self.folder = tempfile.mkdtemp(prefix="fastkin-sim-", dir=RAM)
        self.serial = 0
        self.real_spool = False
        names = [name for name, (_, _, weight) in SCALES.items() for _ in range(weight)]
        self.scale = world.choose("scale", names)
        self.steps, self.bursts, _ = SCALES[self.scale]
        self.streams: list[Stream] = []
        self.disk_list: list[disks.Disk] = []
        self.stopped: list[Any] = []  # runs that stop() was called of
        self.stuck: dict[Any, float] = {}  # since when nobody seems to look at what waits in a run
        self.acts: list[Callable[[], Any]] = []
        world.job_delay = self._job_delay

    def _job_delay(self, func: Callable[..., Any]) -> tuple[float, float]:
        return self.disk_list[0].lag() if self.disk_list else (0.0, 0.0)

    def climate(self, acts: dict[str, Callable[[], Any]]) -> None:
        """Which of these may happen in this seed."""
        share = self.world.choose("climate", (0.0, 0.15, 0.3, 0.5, 0.8))
        for name, act in acts.items():
            if self.world.chance(f"it may happen: {name}", share):
                self.acts.append(act)

    async def act(self) -> None:
        for _ in range(self.world.choose("acts", (0, 1, 1, 2, 4)) if self.acts else 0):
            act = self.world.choose("it is", self.acts)
            self.world.note(act.__name__)
            result = act()
            if asyncio.iscoroutine(result):
                await result

    def pause(self) -> float:
        return self.world.choose("time passes", (0.0, 0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 40.0)) * (
            0.5 + self.world.rng.random()
        )

    # -- Kinesis -------------------------------------------------------------------------------------

    def stream(self, name: str, books: Books) -> Stream:
        world = self.world
        stream = Stream(world, name, world.choose("shards", (1, 1, 2, 4)), books)
        stream.shard_rate = world.choose("shard takes", (1000.0, 1000.0, 50.0))
        stream.latencies = world.choose("latency", ((0.005,), (0.02,), (0.005, 0.3)))
        self.streams.append(stream)
        world.streams[name] = stream
        return stream

    def any_stream(self) -> Stream:
        return self.world.choose("stream", self.streams)

    def kinesis_call_fault(self) -> None:
        stream = self.any_stream()
        stream.call_fault = self.world.choose("calls fail with", ("", *CALL_FAULTS))
        stream.call_fault_share = self.world.choose("share", (0.3, 0.8, 1.0))

    def kinesis_entry_fault(self) -> None:
        stream = self.any_stream()
        stream.entry_fault = self.world.choose("entries fail with", ("", *ENTRY_FAULTS))
        stream.entry_fault_share = self.world.choose("share", (0.1, 0.5, 1.0))

    def kinesis_answer_fault(self) -> None:
        stream = self.any_stream()
        stream.answer_fault = self.world.choose("answers are", ("", *ANSWER_FAULTS))
        stream.answer_fault_share = self.world.choose("share", (0.3, 0.7))

    def kinesis_hangs(self) -> None:
        stream = self.any_stream()
        stream.hangs = not stream.hangs

    def kinesis_slow(self) -> None:
        self.any_stream().latencies = self.world.choose("latency", ((0.005,), (0.05, 1.0), (2.0, 8.0)))

    def kinesis_limits(self) -> None:
        stream = self.any_stream()
        stream.limits = not stream.limits
        stream.first_takes = self.world.choose("the first shard takes", (1.0, 0.02, 0.2))

    def kinesis_reshard(self) -> None:
        stream = self.any_stream()
        if len(stream.open) < 8:
            stream.reshard()

    def kinesis_control_fault(self) -> None:
        self.any_stream().control_fault = self.world.choose(
            "questions fail with", ("", "AccessDeniedException", "LimitExceededException", "ServiceUnavailable")
        )

    def kinesis_acts(self) -> dict[str, Callable[[], Any]]:
        return {
            "calls fail": self.kinesis_call_fault,
            "entries fail": self.kinesis_entry_fault,
            "answers are spoilt": self.kinesis_answer_fault,
            "Kinesis hangs": self.kinesis_hangs,
            "Kinesis is slow": self.kinesis_slow,
            "shards throttle": self.kinesis_limits,
            "shards change": self.kinesis_reshard,
            "questions fail": self.kinesis_control_fault,
        }

    # -- disks -----------------------------------------------------------------------------------------

    def disk(self, path: str) -> disks.Disk:
        found = disks.DISKS[path] = disks.Disk(self.world)
        self.disk_list.append(found)
        return found

    def disk_fails(self) -> None:
        if self.disk_list:
            disk = self.world.choose("disk", self.disk_list)
            disk.failing = not disk.failing

    def disk_slow(self) -> None:
        if self.disk_list:
            self.disk_list[0].lags = self.world.choose("disk takes", ((0.0,), (0.001, 0.05), (0.5, 5.0)))

    def disk_hangs(self) -> None:
        if self.disk_list:
            self.disk_list[0].hangs = not self.disk_list[0].hangs

    def disk_acts(self) -> dict[str, Callable[[], Any]]:
        return {"a disk fails": self.disk_fails, "a disk is slow": self.disk_slow, "a disk hangs": self.disk_hangs}

    def heal(self) -> None:
        self.world.note("everything heals")
        for stream in self.streams:
            stream.heal()
        for disk in self.disk_list:
            disk.heal()

    # -- life ----------------------------------------------------------------------------------------------

    async def drive(self) -> None:
        raise NotImplementedError

    def spawn_context(self) -> Context:
        self.world.processes += 1
        context = Context()
        context.run(PROCESS.set, self.world.processes)
        return context

    def within(self, context: Context, coroutine: Any) -> asyncio.Task[Any]:
        return self.world.loop.create_task(coroutine, context=context)

    async def until(self, done: Callable[[], bool], progress: Callable[[], Any], say: Callable[[], str]) -> None:
        """Wait for what must come, as long as something moves."""
        loop = self.world.loop
        began = at = lived = loop.now
        seen: Any = None
        pause = 0.05
        while not done():
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 2.0)
            check.bugs(self.world)
            self.inspect()
            if loop.now - lived > LIFE_S and loop.now - began < 2000.0:
                lived = loop.now
                self.live_on()
            now = progress()
            if now != seen:
                seen, at = now, loop.now
            if loop.now - at > QUIET_S or loop.now - began > MOST_S:
                raise Finding(f"stuck for {loop.now - at:.0f} s after everything has healed: {say()}")

    def inspect(self) -> None:
        """What must be true at any moment."""

    def live_on(self) -> None:
        """Something new comes while the rest is waited for, if there is need of it: where nothing can tell whether a
        record or the destination is at fault, the next record that is stored tells."""

    def watch(self, run: Any, stats: dict[str, Any]) -> None:
        """Of one pipeline that is at work."""
        if run.failure.done() and not run.failure.cancelled() and (error := run.failure.exception()) is not None:
            raise Finding(f"the pipeline has failed: {error!r}") from error
        check.identity(stats)
        held = run.delivery.budget.records + (run.delivery.backlog.safe if run.delivery.backlog is not None else 0)
        if held != stats["in_flight"]:
            raise Finding(f"in_flight is {stats['in_flight']}, the budget holds {held} records")
        found = None if run in self.stopped else run.stuck()
        if found is None:
            self.stuck.pop(run, None)
        elif self.stuck.setdefault(run, self.world.loop.now) < self.world.loop.now:
            raise Finding(f"nobody will look at what waits: {found}")  # and no callback was on its way either
        check.look(self.world, run, stats)
        if run not in self.stopped and self.world.rng.random() < 0.05:
            check.memory(self.world, run)

    def threads_end(self, process: int) -> None:
        """A process ends: what its threads were at comes to its end before that, or never."""
        world, loop = self.world, self.world.loop
        for job in [job for job in loop.jobs if job.process == process]:
            if job in loop.jobs and world.chance("a thread came to its end first", 0.5):
                world.mark("ended between a write and the word of it")
                job.then = job.future = None
                job.work()
        loop.jobs[:] = [job for job in loop.jobs if job.process != process]

    def kill_process(self, process: int, spools: Sequence[str], letters: Sequence[str], links: list[Any]) -> None:
        """SIGKILL: nothing of it runs any more, and its files are as they are."""
        world = self.world
        world.note("SIGKILL")
        world.mark("killed")
        self.threads_end(process)
        world.loop.kill(process)
        for path in spools:
            disks.kill_spool(path, world)
        for path in letters:
            disks.kill_letters(path, world)
        for link in list(links):
            if not link.closed and link.wire.process == process:
                if world.chance("the broker does not notice", 0.3):
                    link.wire.frozen = True
                else:
                    link.wire.cut(None)

    @property
    def open_wire(self) -> Any:
        return None

    def end(self) -> None:
        disks.forget()
        disks.tidy(self.folder)

    def filler(self) -> bytes:
        return b"." * self.world.choose("size", (0, 8, 60, 200, 200, 1500))
