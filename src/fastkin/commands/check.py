"""`fastkin check`: what is in effect, and with --connect whether it works."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
from typing import TYPE_CHECKING

import click

from fastkin.endpoint import region_of
from fastkin.errors import FastkinError
from fastkin.settings.show import effective

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastkin.config import Broker, Kinesis, Settings


def check(settings: Settings, *, connect: bool, quiet: bool) -> int:
    if not quiet:
        click.echo(effective(settings), nl=False)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    for pipeline in settings.pipelines:
        if pipeline.enabled:
            region_of(pipeline.kinesis)  # raises when there is none: `fastkin run` would not start
    if not connect:
        return 0
    return asyncio.run(_connect(settings))


async def _connect(settings: Settings) -> int:
    good = await _try(f"broker {settings.broker.url}", functools.partial(_broker, settings.broker))
    seen: set[Kinesis] = set()
    for pipeline in settings.pipelines:
        if pipeline.enabled and pipeline.kinesis not in seen:
            seen.add(pipeline.kinesis)
            name = f"stream {pipeline.kinesis.stream_arn or pipeline.kinesis.stream}"
            good &= await _try(name, functools.partial(_stream, pipeline.kinesis))
    return 0 if good else 1


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
    from fastkin.kinesis import KinesisClient

    client = KinesisClient(kinesis)
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
