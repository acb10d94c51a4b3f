"""`fastkin check`: what is in effect, and with --connect whether it works."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastkin.aws.endpoint import region_of
from fastkin.config import client_id_of
from fastkin.deadletter.destination import PREFIX, destination
from fastkin.errors import ConfigError, FastkinError, printable
from fastkin.mqtt.transport import tls_context
from fastkin.runtime.worker import Worker
from fastkin.settings import SettingsError
from fastkin.settings.show import effective

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastkin.config import Kinesis, Pipeline, Settings
    from fastkin.mqtt.visit import Visit


def check(settings: Settings, *, connect: bool, quiet: bool, own_id: bool = False) -> int:
    if not quiet:
        click.echo(effective(settings), nl=False)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    problems: dict[str, ConfigError] = {}  # what keeps `fastkin run` from starting, each told once
    # do certificate and key belong together, and is there a region?
    # These need no network, so they are part of the plain check; settings/ cannot ask them, for it knows neither TLS
    # nor the SDK's files.
    tests: list[Callable[[], object]] = [functools.partial(tls_context, settings.broker)]
    tests += [
        functools.partial(region_of, pipeline.kinesis)
        for pipeline in settings.pipelines
        if pipeline.enabled and (pipeline.s3 or not pipeline.file)
    ]
    for test in tests:
        try:
            test()
        except ConfigError as error:
            problems[str(error)] = error
    if problems:
        raise SettingsError(tuple(problems.values()))
    if not connect:
        return 0
    return asyncio.run(_connect(settings, own_id=own_id))


async def _connect(settings: Settings, *, own_id: bool) -> int:
    good = True
    for pipeline in settings.pipelines:
        if pipeline.enabled:
            # All are tried, also when one fails: who mends settings wants to see every fault at once.
            good &= await _filters(settings, pipeline, own_id=own_id)
    # Pipelines may share a stream, and dead letters may go to one that is checked already.
    seen: set[Kinesis] = set()
    for pipeline in settings.pipelines:
        for kinesis in (pipeline.kinesis, destination(pipeline)):
            if pipeline.enabled and kinesis is not None and kinesis.target and kinesis not in seen:
                seen.add(kinesis)
                name = f"{'delivery ' if kinesis.firehose else ''}stream {kinesis.target}"
                good &= await _try(name, functools.partial(stream_says, kinesis))
    for pipeline in settings.pipelines:
        if pipeline.enabled and pipeline.file:
            good &= await _try(f"files {pipeline.target}", functools.partial(_files, pipeline))
        letters = pipeline.dead_letter
        if pipeline.enabled and letters is not None and letters != "none" and not letters.startswith(PREFIX):
            good &= await _try(f"dead letter file {letters}", functools.partial(_writable, letters, "dead_letter"))
        if pipeline.enabled and pipeline.on_full == "spool" and pipeline.spool is not None:
            good &= await _try(f"spool {pipeline.spool}", functools.partial(_writable, pipeline.spool, "spool"))
    return 0 if good else 1


async def _writable(path: str, key: str) -> str:
    # not asyncio's own threads: a disk that hangs would keep the process from ending
    return await Worker("fastkin check").run(_try_to_write, Path(path), key)


def _try_to_write(path: Path, key: str) -> str:
    """Write beside the file what can be thrown away: the file itself is left alone, a service may have it open."""
    try:
        if path.exists() and not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=path.absolute().parent) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        cure = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "let this user write there"
        raise ConfigError(key, f"cannot be written: {error.strerror}", f"{cure}, or set another {key}") from None
    return "can be written"


async def _try(what: str, attempt: Callable[[], Awaitable[str]]) -> bool:
    try:
        says = await attempt()
    except (FastkinError, OSError) as error:
        click.echo(f"failed: {what}: {error or type(error).__name__}", err=True)
        return False
    click.echo(f"ok: {what}: {says}")
    return True


async def _filters(settings: Settings, pipeline: Pipeline, *, own_id: bool) -> bool:
    """Connect as the pipeline would, and subscribe its filters."""
    from fastkin.commands import trial

    broker = settings.broker
    # under the service's own client id a running service would be pushed off the broker
    own = client_id_of(settings, pipeline.id) or None if own_id else None
    if own:
        click.echo(
            f"warning: connecting as {printable(own)}: a service that runs with this id is pushed off the broker, and"
            " what the broker hands out meanwhile comes again, but for QoS 0",
            err=True,
        )
    tried: Visit | None = None

    async def connect() -> str:
        nonlocal tried
        tried = await trial.subscribe(broker, pipeline, own_id=own)
        version = "5.0" if tried.version == 5 else "3.1.1"
        return f"connected as {printable(tried.client_id)} for pipeline {pipeline.id} (MQTT {version})"

    if not await _try(f"broker {broker.url}", connect) or tried is None:
        return False
    good = True
    for topic in pipeline.topics:
        fine, says = trial.words(tried, topic, pipeline.qos)
        line = printable(f"filter {topic!a} of pipeline {pipeline.id}: {says}")
        click.echo(f"ok: {line}" if fine else f"failed: {line}", err=not fine)
        good &= fine
    return good


async def _files(pipeline: Pipeline) -> str:
    """Write beside the files what can be thrown away, and ask for the bucket. Nothing is taken over or uploaded."""
    from fastkin.errors import KinesisError
    from fastkin.files.client import client_of

    client = client_of(pipeline)
    try:
        await client.describe()
    except KinesisError as error:
        if not client.only_the_question(error):
            raise
        return (
            f"directory {pipeline.file} can be written (s3:ListBucket is denied; s3:PutObject alone is enough to run)"
        )
    finally:
        await client.close()
    return f"directory {pipeline.file} can be written{', and the bucket is there' if pipeline.s3 else ''}"


async def stream_says(kinesis: Kinesis) -> str:
    """What the stream says of itself, or that it may be written to. KinesisError, ConfigError."""
    from fastkin.aws.transports import make_client
    from fastkin.errors import Action, KinesisError

    client = make_client(kinesis)
    await client.start()
    try:
        try:
            summary = await client.describe()
        except KinesisError as error:
            if error.action is not Action.OPERATOR or "AccessDenied" not in error.code:
                raise
            to = client.destination
            if not to.dry_run:
                return f"not described: {to.service}:{to.describe} is denied; {to.permission} alone is enough to run"
            # PutRecords alone is enough to run: try just that, without writing
            await client.dry_run()
            return "may be written to (not described: kinesis:DescribeStreamSummary is denied)"
        shards = f"{summary.shard_count} shards, " if client.destination.shards else ""
        return f"{summary.status}, {shards}{summary.mode}"
    finally:
        await client.close()
