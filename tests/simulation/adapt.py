"""Where the simulation touches the product: every seam is in this file, so that a change there is a change here.

`installed(world)` puts the stand-ins in place of sockets, Kinesis, disks, clock and chance for one seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import TYPE_CHECKING, Any

import fastkin.deadletter.handler
import fastkin.deadletter.stream
import fastkin.delivery.sender
import fastkin.delivery.spool_disk
import fastkin.files.client
import fastkin.mqtt.connection
import fastkin.producer
from fastkin import _codec
from fastkin.delivery.watchdog import on_stall
from simulation import disks
from simulation.kinesis import SimClient
from simulation.loop import EPOCH, START, SimWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulation.world import World

real_monotonic = time.monotonic


@contextlib.contextmanager
def installed(world: World, open_wire: Any, *, real_spool: bool) -> Iterator[None]:
    rng = world.rng
    loop = world.loop

    def client(settings: Any, *_: Any, **__: Any) -> SimClient:
        return SimClient(world, settings)

    class Seeded(random.Random):
        """What the product makes with no seed of its own."""

        def __init__(self, seed: Any = None) -> None:
            super().__init__(rng.random() if seed is None else seed)

    replaced: list[tuple[Any, str, Any]] = [
        (fastkin.files.client, "make_client", client),
        (fastkin.producer, "make_client", client),
        (fastkin.deadletter.stream, "make_client", client),
        (fastkin.mqtt.connection, "open_wire", open_wire),
        (fastkin.delivery.sender, "Random", Seeded),
        (fastkin.delivery.spool_disk, "Spool", disks.RealSpool if real_spool else disks.MemorySpool),
        (fastkin.deadletter.handler, "DeadLetters", disks.SimLetters),
        (fastkin.deadletter.handler, "Worker", SimWorker),
        (fastkin.delivery.spool_disk, "Worker", SimWorker),
        (time, "time", lambda: EPOCH - START + loop.now),
        (time, "monotonic", lambda: loop.now),
        (os, "urandom", rng.randbytes),
    ]
    stalls: list[str] = world.stalls
    before = [(where, name, getattr(where, name)) for where, name, _ in replaced]
    random.seed(world.seed)
    _codec._seed_keys(world.seed)
    on_stall[:] = [lambda name, found: stalls.append(f"{name}: {found}")]
    try:
        for where, name, stand_in in replaced:
            setattr(where, name, stand_in)
        yield
    finally:
        on_stall.clear()
        for where, name, was in before:
            setattr(where, name, was)
        _codec._seed_keys(None)
