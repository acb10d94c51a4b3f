"""What each pipeline of the settings is to be made from.

A reload compares this with what the present run was made from, and leaves the run alone when both are equal. So
everything that needs a new run must be in it: settings, client id, and the state of certificate files.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkin.config import client_id_of

if TYPE_CHECKING:
    from fastkin.config import Broker, Pipeline, Settings

# what a run needs not be replaced for
_LIVE: dict[str, Any] = {"description": "", "shutdown_timeout_s": 0.0, "stdout": False}


# Compared with what the present run was made from: equal means that a new run would do nothing else.
class Wanted(NamedTuple):
    """All that a run is made from: runs are replaced when it differs."""

    pipeline: Pipeline  # without what needs no new run
    broker: Broker
    files: tuple[tuple[str, int, int], ...]  # certificates: path, time of change, size


class Planner:
    """Lives as long as the process, for a client id that a pipeline had stays its own."""

    def __init__(self) -> None:
        self.plain: dict[str, str] = {}  # client id as it stands -> the pipeline that has it

    def plan(self, settings: Settings) -> dict[str, Wanted]:
        """What every enabled pipeline is to be made from."""
        wanted = {}
        for pipeline in settings.pipelines:
            if not pipeline.enabled:
                continue
            broker = self._broker_of(settings, pipeline.id)
            # A certificate that was renewed under the same name is a change, though no setting says so.
            paths = (broker.tls.ca, broker.tls.cert, broker.tls.key, pipeline.kinesis.ca_bundle)
            wanted[pipeline.id] = Wanted(
                dataclasses.replace(pipeline, **_LIVE), broker, tuple(_stamp(path) for path in paths if path)
            )
        return wanted

    def _broker_of(self, settings: Settings, name: str) -> Broker:
        """The first pipeline has the client id as it stands, so that adding one does not orphan its session.

        Whoever has it keeps it as long as this process lives, and the others theirs, in whatever order they come:
        a session belongs to its client id.
        """
        broker = settings.broker
        if not broker.client_id:
            return broker
        owner = self.plain.setdefault(broker.client_id, settings.pipelines[0].id)
        return dataclasses.replace(broker, client_id=client_id_of(settings, name, owner))


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return path, 0, 0
    return path, found.st_mtime_ns, found.st_size
