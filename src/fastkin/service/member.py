"""A worker's own side: what it answers to the process that has the workers, and what it does when that has gone."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from fastkin.service.channel import Answerer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prometheus_client import CollectorRegistry

    from fastkin.status.registry import Engine


class Post:
    """Of one worker. `serve()` runs as long as the worker works."""

    def __init__(
        self,
        end: int,
        engine: Engine,
        *,
        stop: Callable[[], Awaitable[int]],
        reload: Callable[[], Awaitable[None]],
        alone: Callable[[], object],
    ) -> None:
        """`end`: the descriptor of the channel. `stop()` stores what is held and says how many records are left.
        `alone()` is called when the process that has the workers has gone."""
        self._engine = engine
        self._stop = stop
        self._reload = reload
        self._alone = alone
        self._registry: CollectorRegistry | None = None
        self._answerer = Answerer(
            socket.socket(fileno=end),
            {
                "started": self._started,
                "health": self._health,
                "figures": self._figures,
                "reload": self._reload,
                "stop": self._stopped,
            },
        )

    async def finish(self) -> None:
        """The work is done: what was asked about it is answered."""
        await self._answerer.finish()

    async def serve(self) -> None:
        try:
            await self._answerer.serve()
        finally:
            # Its processes must not go on without it: nobody would stop them, and the next one starts its own.
            self._alone()

    async def _started(self) -> bool:
        return True

    async def _health(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "failed": engine.failed(),
            "unready": engine.unready(),
            "last_error": {name: run.last_error for name, run in engine.pipelines.items()},
            "connected": all(run.subscriber.connected.is_set() for run in engine.pipelines.values()),
        }

    async def _figures(self) -> list[Any]:
        # imported here: only who has a status port asks, and pays for it
        from prometheus_client import CollectorRegistry, ProcessCollector

        from fastkin.status.metrics import EngineCollector

        if self._registry is None:
            self._registry = CollectorRegistry()
            self._registry.register(EngineCollector(self._engine))
            ProcessCollector(registry=self._registry)
        return [
            [family.name, family.documentation, family.type, [list(sample[:3]) for sample in family.samples]]
            for family in self._registry.collect()
        ]

    async def _stopped(self) -> dict[str, Any]:
        unsettled = await self._stop()
        counts = {
            name: {key: figure for key, figure in figures.items() if isinstance(figure, int)}
            for name, figures in self._engine.stats().items()
        }
        return {"unsettled": unsettled, "stats": counts}
