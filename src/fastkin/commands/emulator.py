"""`fastkin emulator`: an emulated Kinesis on a local port."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

import click

from fastkin.emulator import serve
from fastkin.errors import FastkinError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.emulator import Emulator


def emulator(
    *,
    port: int,
    host: str,
    streams: Sequence[str],
    limits: bool,
    latency_ms: float,
    faults: str | None,
    quiet: bool,
) -> int:
    def ready(running: Emulator) -> None:
        if not quiet:
            click.echo(f"Kinesis is emulated at {running.url}: {', '.join(streams)}", err=True)
            click.echo(
                f"use it with AWS_ENDPOINT_URL_KINESIS={running.url} AWS_REGION=us-east-1"
                " AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any",
                err=True,
            )

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await serve(
                port=port,
                host=host,
                streams=streams,
                limits=limits,
                latency_ms=latency_ms,
                faults_path=faults,
                ready=ready,
            )

    try:
        asyncio.run(run())
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise FastkinError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return 0
