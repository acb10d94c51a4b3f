"""What each worker of a service is made from: the same settings, under names of its own. Pure.

A worker is a process that does all that one process would, for its share of the messages. What belongs to one
process alone gets the worker's name: client ids (the session), spools. The dead letter file stays common, for processes
may share it.

    member        client ids of its pipelines                  spool
    None          ID, ID-PIPELINE, ...                         spool.db         one process, filters as they stand
    0             ID-w0, ID-w0-PIPELINE, ...                   spool-w0.db      shared filters
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from fastkin.config import Status, Workers

if TYPE_CHECKING:
    from fastkin.config import Pipeline, Settings

Member = int | None  # the number of a worker; None: the process that shares with nobody


def member_name(member: Member) -> str:
    """For log lines, labels and the command line."""
    return "all" if member is None else str(member)


def member_of(name: str) -> Member:
    """What `member_name` made a name of."""
    return None if name == "all" else int(name)


def members(count: int) -> tuple[Member, ...]:
    """Who does the work when so many workers are asked for."""
    return tuple(range(count)) or (None,)


def settings_of(settings: Settings, member: Member, *, left_over: bool = False) -> Settings:
    """The settings of one member. The status port is not among them: it belongs to the process that has the members.

    left_over: the member is one of an earlier start: nothing is subscribed, what it left is taken.
    """
    broker = settings.broker
    if member is not None and broker.client_id and not broker.client_id_drawn:
        broker = dataclasses.replace(broker, client_id=f"{broker.client_id}-w{member}")
    group = settings.workers.group or settings.broker.client_id
    return dataclasses.replace(
        settings,
        broker=broker,
        pipelines=tuple(_pipeline(each, member, group, left_over=left_over) for each in settings.pipelines),
        status=Status(),
        workers=Workers(),
        warnings=(),  # the process that has the members says them once
    )


def _pipeline(pipeline: Pipeline, member: Member, group: str, *, left_over: bool) -> Pipeline:
    if member is None:
        return dataclasses.replace(pipeline, left_over=left_over)
    # A group for each pipeline: two pipelines with the same filter get every message each, and in one group every
    # message would go to one of them.
    share = f"{group}-{pipeline.id}".replace("/", ":")
    return dataclasses.replace(pipeline, share=share, spool=spool_of(pipeline.spool, member), left_over=left_over)


def spool_of(spool: str | None, member: Member) -> str | None:
    """The spool of one member."""
    if spool is None or member is None:
        return spool
    path = Path(spool)
    return str(path.with_name(f"{path.stem}-w{member}{path.suffix}"))
