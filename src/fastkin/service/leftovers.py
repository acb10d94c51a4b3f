"""What an earlier start with other workers left: messages in sessions of client ids that nobody has any more, and
records in their spools. It is taken, stored, and then the sessions are ended.

A session that is merely forgotten goes on collecting: all that is published, if its filters are plain, or a share of
it. So the filters are let go as soon as what was queued for them has come. They are kept until then, for a broker may
throw away what it has queued when a filter goes (MQTT 5.0, section 3.10.4), though none that we know does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fastkin.config import client_id_of
from fastkin.errors import MqttError
from fastkin.mqtt.visit import end_session, has_session
from fastkin.service.counters import merged
from fastkin.service.engine import Engine
from fastkin.service.members import member_name, members, settings_of, spool_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.config import Broker, Settings
    from fastkin.service.members import Member
    from fastkin.service.pipeline import PipelineRun
    from fastkin.service.reload import Changes

_LOG = logging.getLogger("fastkin.workers")

_MISSES = 2  # so many numbers in a row without anything: there are no more. An earlier search may have ended half-way
_LOOK_S = 0.1
_QUIET_S = 2.0  # nothing came for so long, and all of it is stored: there is no more
_KEPT_S = 30.0  # traffic may never be quiet: then what was queued has come by now
_SPOOL_FILES = ("", "-wal", "-shm", "-reserve")


def _brokers(settings: Settings, member: Member) -> list[Broker]:
    """With the client ids of a member's sessions; none when the broker keeps nothing for it."""
    made = settings_of(settings, member)
    broker = made.broker
    if not broker.client_id or broker.client_id_drawn or broker.clean_session:
        return []
    ids = [client_id_of(made, each.id) for each in made.pipelines if each.enabled]
    return [dataclasses.replace(broker, client_id=each) for each in ids]


def _spools(settings: Settings, member: Member) -> list[Path]:
    names = [spool_of(each.spool, member) for each in settings.pipelines if each.enabled and each.on_full == "spool"]
    return [Path(name) for name in names if name]


async def _left_anything(settings: Settings, member: Member) -> bool:
    """MqttError: the broker cannot be asked."""
    if any(path.exists() for path in _spools(settings, member)):
        return True
    return any([await has_session(broker) for broker in _brokers(settings, member)])


async def find(settings: Settings, count: int) -> list[Member]:
    """Who left something and is none of `count` workers. MqttError: the broker cannot be asked.

    In the order in which they are to be emptied: the highest number first, so that one who breaks off leaves no gap
    that the next search would stop at.
    """
    found: list[Member] = []
    number, misses = count, 0
    while misses < _MISSES:
        if await _left_anything(settings, number):
            found.insert(0, number)
            misses = 0
        else:
            misses += 1
        number += 1
    if None not in members(count) and await _left_anything(settings, None):
        found.append(None)
    return found


class Leftovers:
    """Empties one member after the other. It has the face of an engine, for it is one that ends by itself."""

    def __init__(self, settings: Settings, left: Sequence[Member]) -> None:
        """`left`: who left something, in the order in which they are emptied."""
        self.settings = settings
        self._left = list(left)
        self._engine: Engine | None = None
        self._before: list[dict[str, dict[str, Any]]] = []  # the last figures of those that are done
        self._work: asyncio.Task[None] | None = None
        self._unsettled = 0

    async def __aenter__(self) -> Self:
        self._work = asyncio.create_task(self._all(), name="fastkin leftovers")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def wait(self) -> None:
        """Until all is taken, or stop() was called."""
        assert self._work is not None
        await asyncio.wait([self._work])
        if not self._work.cancelled():
            self._work.result()

    async def stop(self) -> int:
        """Returns how many records did not end. What is left is there at the next start."""
        assert self._work is not None
        self._work.cancel()
        await asyncio.wait([self._work])
        return self._unsettled

    async def reload(self, _settings: Settings, *, everything: bool = False) -> Changes:  # noqa: ARG002
        """What was left is emptied with the settings that it was begun with."""
        from fastkin.service.reload import Changes

        return Changes(unchanged=tuple(self.pipelines))

    async def _all(self) -> None:
        for member in self._left:
            await self._empty(settings_of(self.settings, member, left_over=True), member)

    async def _empty(self, settings: Settings, member: Member) -> None:
        engine = self._engine = Engine(settings)
        await engine.start()
        done = False
        try:
            await _or_failure(engine, asyncio.gather(*map(_emptied, engine.pipelines.values())))
            done = True
        finally:
            # Cancelled or not: what is in memory is stored and acknowledged.
            unsettled = await engine.stop()
            self._unsettled += unsettled
        stats = engine.stats()
        self._before.append(stats)
        self._engine = None
        if not done or unsettled:
            return
        for broker in _brokers(settings_of(self.settings, member), None):
            await _ended(broker)
        for path in _spools(self.settings, member):
            for suffix in _SPOOL_FILES:
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        _LOG.info(
            "stage=workers what worker %s of an earlier start left is stored: %d records; its sessions are ended",
            member_name(member), sum(each["received"] for each in stats.values()),
        )  # fmt: skip

    # -- the face of an engine ---------------------------------------------------------------------

    @property
    def pipelines(self) -> dict[str, PipelineRun]:
        return {} if self._engine is None else self._engine.pipelines

    def failed(self) -> dict[str, str | None]:
        return {} if self._engine is None else self._engine.failed()

    def unready(self) -> dict[str, str | None]:
        return {} if self._engine is None else self._engine.unready()

    def stats(self) -> dict[str, dict[str, Any]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for stats in (*self._before, *([] if self._engine is None else [self._engine.stats()])):
            for name, figures in stats.items():
                found.setdefault(name, []).append(figures)
        return {name: merged(None, figures) for name, figures in found.items()}


async def _or_failure(engine: Engine, work: asyncio.Future[Any]) -> None:
    """Await the work, unless the engine fails before."""
    failure = asyncio.ensure_future(engine.wait())
    try:
        await asyncio.wait([work, failure], return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            failure.result()
    finally:
        work.cancel()
        failure.cancel()
        await asyncio.gather(work, failure, return_exceptions=True)


async def _emptied(run: PipelineRun) -> None:
    subscriber = run.subscriber
    await subscriber.connected.wait()
    await _quiet(run, _KEPT_S)
    subscriber.let_go(run.pipeline.filters)
    await _quiet(run, None)


async def _quiet(run: PipelineRun, most_s: float | None) -> None:
    """Until nothing comes and nothing is held, or for `most_s`."""
    subscriber, batcher = run.subscriber, run.delivery.batcher
    loop = asyncio.get_running_loop()
    began = since = loop.time()
    seen = -1
    while loop.time() - since < _QUIET_S and (most_s is None or loop.time() - began < most_s):
        await asyncio.sleep(_LOOK_S)
        open_ = run.acks.unacked or batcher.in_flight or batcher.spooled
        if open_ or not subscriber.connected.is_set() or subscriber.traffic.messages != seen:
            seen, since = subscriber.traffic.messages, loop.time()


async def _ended(broker: Broker) -> None:
    try:
        await end_session(broker)
    except MqttError as error:
        # It is empty and subscribes nothing: the next start with workers looks for it again, or it expires.
        _LOG.info("stage=workers the empty session of client %s was not ended: %s", ascii(broker.client_id), error)
