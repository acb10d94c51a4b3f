"""`fastkin tail`: prints what a stream holds, or what arrives, as a consumer reads it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import click

from fastkin.consumer import Consumer
from fastkin.errors import ConfigError, FastkinError, KinesisError, LibraryError, escaped

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin._codec import ConsumerRecord
    from fastkin.consumer import Position

Form = Literal["text", "json", "raw"]

PATIENCE_S = 30.0  # for an endpoint that cannot be reached: somebody waits at the terminal


class TailError(FastkinError):
    """Reading cannot go on; the message ends with the cure."""


def render(record: ConsumerRecord, form: Form) -> bytes:
    """One record as a line. Data comes from strangers: `text` escapes what could steer a terminal."""
    data = record.raw
    if form == "raw":
        return data + b"\n"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    stamp = ""
    if record.timestamp is not None:
        arrival = datetime.fromtimestamp(record.timestamp, UTC)
        stamp = arrival.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    key = record.partition_key
    if form == "json":
        line: dict[str, object] = {
            "arrival": stamp or None,
            "shard_id": record.shard_id,
            "sequence_number": record.sequence_number,
            "partition_key": key,
        }
        if record.subsequence_number is not None:
            line["subsequence_number"] = record.subsequence_number
        if text is None:
            # Another name for another form: who reads `data` must never get base64 by surprise.
            line["data_base64"] = base64.b64encode(data).decode("ascii")
        else:
            line["data"] = text
        return json.dumps(line).encode("ascii") + b"\n"
    shown = f"base64:{base64.b64encode(data).decode()}" if text is None else escaped(text)
    # shardId-000000000003 -> 3
    number = (record.shard_id or "").rpartition("-")[2].lstrip("0") or "0"
    return f"{stamp} {number} {escaped(key or '-')} {shown}\n".encode()


def tail(
    stream: str,
    *,
    start: Position,
    form: Form,
    limit: int | None,
    region: str | None,
    endpoint_url: str | None,
    profile: str | None,
    as_stored: bool = False,
) -> int:
    # Payloads come from strangers, and a terminal obeys what is in them.
    if form == "raw" and sys.stdout.isatty():
        raise click.UsageError("--raw writes the bytes as they are: not to a terminal; send it into a file or a pipe")
    out = sys.stdout.buffer

    def take(record: ConsumerRecord) -> None:
        out.write(render(record, form))
        out.flush()

    asyncio.run(_tail(stream, start, limit, region, endpoint_url, profile, take, as_stored=as_stored))
    return 0


async def _tail(
    stream: str,
    start: Position,
    limit: int | None,
    region: str | None,
    endpoint_url: str | None,
    profile: str | None,
    take: Callable[[ConsumerRecord], None],
    *,
    as_stored: bool,
) -> None:
    """Hand each record to `take` until there were `limit`; without a limit, until it is cancelled."""
    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT") or None
    arn = stream.startswith("arn:")
    any_key: str | None = None
    local = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_KINESIS") or os.environ.get("AWS_ENDPOINT_URL")
    if local and urlsplit(local).hostname in {"localhost", "127.0.0.1", "::1"}:
        # an emulator believes any keys, and asking the machine's metadata for some takes seconds
        region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        if not ({"AWS_ACCESS_KEY_ID", "AWS_PROFILE"} & os.environ.keys() or profile):
            any_key = "local"
    if not arn:
        region = region or _region(profile)
    try:
        consumer = Consumer(
            None if arn else stream, stream_arn=stream if arn else None, region=region, endpoint_url=endpoint_url,
            profile=profile, raw=True, as_stored=as_stored, patience_s=PATIENCE_S,
            access_key=any_key, secret_key=any_key,
        )  # fmt: skip
    except LibraryError as error:
        raise click.UsageError(str(error)) from None
    count = 0
    try:
        async with consumer, aclosing(consumer.stream(start)) as records:
            async for record in records:
                take(record)
                count += 1
                if limit is not None and count >= limit:
                    return
    except KinesisError as error:
        raise TailError(_cure(error)) from None


def _region(profile: str | None) -> str:
    """Asked for before the keys: to look for those takes seconds where there are none."""
    from aiobotocore.session import AioSession
    from botocore.exceptions import BotoCoreError

    from fastkin.aws.endpoint import session_region
    from fastkin.config import Kinesis

    try:
        return session_region(Kinesis(profile=profile), AioSession(profile=profile))
    except ConfigError:
        raise ConfigError("region", "is missing", "give --region, or set AWS_REGION") from None
    except BotoCoreError as error:
        raise TailError(str(error)) from None


def _cure(error: KinesisError) -> str:
    text = f"{error.code}: {error.message}" if error.message else error.code
    match error.code:
        case "ResourceNotFoundException":
            return f"{text}; check stream name, region and account"
        case "AccessDeniedException":
            return f"{text}; allow kinesis:ListShards, kinesis:GetShardIterator, kinesis:GetRecords"
        case "NoCredentials":
            return f"{text}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (for an emulator, anything)"
        case _:
            return text
