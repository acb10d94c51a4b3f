"""`fastkin check`: what is in effect, and with --connect whether it works."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import functools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastkin.endpoint import region_of
from fastkin.errors import ConfigError, FastkinError
from fastkin.letterplace import PREFIX, destination
from fastkin.settings import SettingsError
from fastkin.settings.show import effective
from fastkin.wire import tls_context
from fastkin.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastkin.config import Broker, Kinesis, Settings


def check(settings: Settings, *, connect: bool, quiet: bool) -> int:
    if not quiet:
        click.echo(effective(settings), nl=False)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    problems: dict[str, ConfigError] = {}  # what keeps `fastkin run` from starting, each told once
    # do certificate and key belong together, and is there a region?
    tests: list[Callable[[], object]] = [functools.partial(tls_context, settings.broker)]
    tests += [functools.partial(region_of, pipeline.kinesis) for pipeline in settings.pipelines if pipeline.enabled]
    for test in tests:
        try:
            test()
        except ConfigError as error:
            problems[str(error)] = error
    if problems:
        raise SettingsError(tuple(problems.values()))
    if not connect:
        return 0
    return asyncio.run(_connect(settings))


async def _connect(settings: Settings) -> int:
    good = await _try(f"broker {settings.broker.url}", functools.partial(_broker, settings.broker))
    seen: set[Kinesis] = set()
    for pipeline in settings.pipelines:
        for kinesis in (pipeline.kinesis, destination(pipeline)):
            if pipeline.enabled and kinesis is not None and kinesis not in seen:
                seen.add(kinesis)
                name = f"stream {kinesis.stream_arn or kinesis.stream}"
                good &= await _try(name, functools.partial(_stream, kinesis))
    for pipeline in settings.pipelines:
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


async def _broker(broker: Broker) -> str:
    from fastkin.publisher import Publisher

    # under the service's own client id we would push a running service off the broker
    name = f"fastkin-check-{os.urandom(4).hex()}"
    publisher = Publisher(dataclasses.replace(broker, client_id=name, clean_session=True))
    try:
        await asyncio.wait_for(publisher.connect(), broker.connect_timeout_s)
    finally:
        await publisher.close()
    return f"connected as {name}"


async def _stream(kinesis: Kinesis) -> str:
    from fastkin.errors import Action, KinesisError
    from fastkin.kinesis import make_client

    client = make_client(kinesis)
    await client.start()
    try:
        try:
            summary = await client.describe()
        except KinesisError as error:
            if error.action is not Action.OPERATOR or "AccessDenied" not in error.code:
                raise
            # PutRecords alone is enough to run: try just that, without writing
            await client.dry_run()
            return "may be written to (not described: kinesis:DescribeStreamSummary is denied)"
        return f"{summary.status}, {summary.shard_count} shards, {summary.mode}"
    finally:
        await client.close()
