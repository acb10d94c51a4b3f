"""One seed from its beginning to its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from simulation import adapt
from simulation.kinds import kind_of
from simulation.loop import Finding, running
from simulation.world import World

if TYPE_CHECKING:
    from simulation.scenario import Scenario


class Outcome(NamedTuple):
    seed: int
    finding: str | None
    digest: str
    virtual_s: float
    kind: str


class _History(logging.Handler):
    """The product's log lines, in the trace."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.say(f"  log {record.levelname} {record.getMessage()}")


def run_seed(seed: int, *, tracing: bool = False) -> Outcome:
    world = World(seed, tracing=tracing)
    log = logging.getLogger("fastkin")
    level, propagate, handlers = log.level, log.propagate, log.handlers
    log.propagate = False
    if tracing:
        log.handlers = [_History(world)]
        log.setLevel(logging.DEBUG)
    else:
        log.handlers = [logging.NullHandler()]
        log.setLevel(logging.CRITICAL + 1)
    collecting = gc.isenabled()
    gc.disable()  # when garbage goes must not depend on what ran before
    unraised: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda told: _unraisable(world, unraised, told)
    running(world.loop)
    scenario: Scenario | None = None
    finding: str | None = None
    try:
        scenario = kind_of(world)(world)
        with adapt.installed(world, scenario.open_wire, real_spool=scenario.real_spool):
            try:
                world.loop.run_until_complete(scenario.drive())
                if unraised:
                    raise Finding(f"an exception that nobody could catch: {unraised[0]}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                finding = _tell(error)
            finally:
                world.over = True
                _clear(world)
    finally:
        if scenario is not None:
            scenario.end()
        asyncio.set_event_loop(None)
        world.loop.close()
        virtual, kind = world.loop.now, scenario.kind if scenario is not None else ""
        digest = world.digest()
        del scenario
        gc.collect()
        sys.unraisablehook = hook
        if collecting:
            gc.enable()
        log.level, log.propagate, log.handlers = level, propagate, handlers
    return Outcome(seed, finding, digest, virtual, kind)


def _clear(world: World) -> None:
    for task in asyncio.all_tasks(world.loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    world.loop.bury()


def _unraisable(world: World, found: list[str], told: Any) -> None:
    if not world.over:
        found.append(f"{told.err_msg or ''} {told.exc_value!r} in {told.object!r}")


def _tell(error: BaseException) -> str:
    if isinstance(error, Finding):
        cause = error.__cause__
        text = str(error)
        if cause is not None:
            text += "\n" + "".join(traceback.format_tb(cause.__traceback__)[-3:])
        return text
    return f"{type(error).__name__}: {error}\n" + "".join(traceback.format_tb(error.__traceback__)[-4:])
