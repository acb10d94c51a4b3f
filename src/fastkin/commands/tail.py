"""`fastkin tail`: prints what a stream holds, or what arrives.

One task per shard: an iterator, then GetRecords at the pace AWS allows (5 calls a second per shard).
Of shards that were split or merged the parents are read to their end before the children begin, so
records of one key come in the order in which they were stored.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import click

from fastkin.aws.client import MOST_PAGES, MOST_SHARDS
from fastkin.aws.error_table import REQUEST_ACTIONS
from fastkin.errors import Action, ConfigError, FastkinError, escaped
from fastkin.lambdas import deaggregate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Form = Literal["text", "json", "raw"]

POLL_S = 0.25  # 4 calls a second and shard, of the 5 that a shard allows to all its readers
BACKOFF_MAX_S = 10.0
_EXPIRED = frozenset({"ExpiredIteratorException", "ExpiredNextTokenException"})


class TailError(FastkinError):
    """Reading cannot go on; the message ends with the cure."""


@dataclass(slots=True)
class Start:
    """Where reading begins, as GetShardIterator says it."""

    kind: Literal["TRIM_HORIZON", "LATEST", "AT_TIMESTAMP"]
    timestamp: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"ShardIteratorType": self.kind}
        if self.timestamp is not None:
            arguments["Timestamp"] = self.timestamp
        return arguments


def parse_start(text: str) -> Start:
    """`trim_horizon`, `latest`, seconds since 1970, or an RFC 3339 time. ValueError when neither."""
    word = text.strip().lower().replace("-", "_")
    if word == "trim_horizon":
        return Start("TRIM_HORIZON")
    if word == "latest":
        return Start("LATEST")
    try:
        return Start("AT_TIMESTAMP", float(word))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"{text!r} is neither trim_horizon nor latest nor a time such as 2026-11-21T04:00:00Z"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return Start("AT_TIMESTAMP", moment.timestamp())


def render(record: Mapping[str, Any], shard: str, form: Form) -> bytes:
    """One record as a line. Data comes from strangers: `text` escapes what could steer a terminal."""
    data: bytes = record["Data"]
    if form == "raw":
        return data + b"\n"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    arrival = record.get("ApproximateArrivalTimestamp")
    stamp = ""
    if arrival is not None:
        stamp = arrival.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    key = record.get("PartitionKey")
    if form == "json":
        line = {
            "arrival": stamp or None,
            "shard_id": shard,
            "sequence_number": record["SequenceNumber"],
            "partition_key": key,
        }
        if (place := record.get("SubSequenceNumber")) is not None:
            line["subsequence_number"] = place
        if text is None:
            # Another name for another form: who reads `data` must never get base64 by surprise.
            line["data_base64"] = base64.b64encode(data).decode("ascii")
        else:
            line["data"] = text
        return json.dumps(line).encode("ascii") + b"\n"
    shown = f"base64:{base64.b64encode(data).decode()}" if text is None else escaped(text)
    # shardId-000000000003 -> 3
    number = shard.rpartition("-")[2].lstrip("0") or "0"
    return f"{stamp} {number} {escaped(key or '-')} {shown}\n".encode()


def apart(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of a KPL aggregate, each with its own key and `SubSequenceNumber`; what is none is itself."""
    inner = deaggregate(record["Data"])
    if len(inner) == 1 and inner[0][0] is None:
        return [record]
    return [
        {**record, "Data": data, "PartitionKey": key, "SubSequenceNumber": place}
        for place, (key, data) in enumerate(inner)
    ]


@dataclass(slots=True, kw_only=True)
class Tail:
    """Reads every shard of a stream and hands each record to `take(record, shard_id)`."""

    client: Any  # aiobotocore's Kinesis client
    stream: Mapping[str, str]  # StreamName or StreamARN
    start: Start
    take: Callable[[Mapping[str, Any], str], None]
    limit: int | None = None
    as_stored: bool = False  # KPL aggregates are not taken apart
    poll_s: float = POLL_S
    count: int = 0
    _shards: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)
    _done: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Until `limit` records were taken; without a limit, until it is cancelled."""
        try:
            await self._open(first=True)
            if not self._shards:
                raise TailError("the stream has no shard that can be read")
            while not self._done.is_set():
                done = asyncio.create_task(self._done.wait())
                pending = {task for task in self._shards.values() if not task.done()}
                await asyncio.wait({done, *pending}, return_when=asyncio.FIRST_COMPLETED)
                done.cancel()
                for task in self._shards.values():
                    if task.done():
                        # Raises what ended a shard's task: reading the others alone would show a part as if it were
                        # all.
                        task.result()
                if not self._done.is_set():
                    await self._open(first=False)
                    if all(task.done() for task in self._shards.values()):
                        return  # every shard is closed and has no children: nothing can follow
        finally:
            for task in self._shards.values():
                task.cancel()
            await asyncio.gather(*self._shards.values(), return_exceptions=True)

    async def _open(self, *, first: bool) -> None:
        """Start the shards whose turn it is."""
        shards = await self._list()
        there = {shard["ShardId"] for shard in shards}
        for shard in shards:
            name = shard["ShardId"]
            closed = "EndingSequenceNumber" in shard.get("SequenceNumberRange", {})
            if name in self._shards or name in self._ended:
                continue
            if first and self.start.kind == "LATEST":
                if closed:
                    self._ended.add(name)  # what it holds is older than now
                else:
                    self._read_shard(name, self.start)
                continue
            parents = {shard.get("ParentShardId"), shard.get("AdjacentParentShardId")} & there
            # Parents that are no longer listed are older than what the stream keeps: nobody waits for them.
            if parents <= self._ended:
                # A child that appears while we read is read from its beginning, else what came between two looks
                # would be missing.
                start = self.start if first or self.start.kind == "AT_TIMESTAMP" else None
                self._read_shard(name, start or Start("TRIM_HORIZON"))

    def _read_shard(self, name: str, start: Start) -> None:
        self._shards[name] = asyncio.create_task(self._read(name, start), name=f"tail {name}")

    async def _list(self) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = []
        arguments: dict[str, Any] = dict(self.stream)
        seen: set[int] = set()  # pages: a peer may lead round in a circle, or on for ever
        while True:
            answer = await self._call("list_shards", **arguments)
            if answer is None:  # a token lives for five minutes, and a throttle may have been waited out for longer
                shards, arguments = [], dict(self.stream)
                seen.clear()
                continue
            shards += answer["Shards"]
            if not answer.get("NextToken"):
                return shards
            page = hash(answer["NextToken"])
            if page in seen or len(seen) >= MOST_PAGES or len(shards) > MOST_SHARDS:
                raise TailError("the endpoint lists shards without end: is it Kinesis?")
            seen.add(page)
            arguments = {"NextToken": answer["NextToken"]}

    async def _read(self, shard: str, start: Start) -> None:
        iterator = await self._iterator(shard, start.arguments)
        last: str | None = None
        while iterator is not None:
            answer = await self._call("get_records", ShardIterator=iterator, Limit=1000)
            if answer is None:  # the iterator was more than five minutes old
                after = {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER"}
                again = start.arguments if last is None else after | {"StartingSequenceNumber": last}
                iterator = await self._iterator(shard, again)
                continue
            for record in answer["Records"]:
                if self._done.is_set():
                    return
                last = record["SequenceNumber"]
                for one in (record,) if self.as_stored else apart(record):
                    self.take(one, shard)
                    self.count += 1
                    if self.limit is not None and self.count >= self.limit:
                        self._done.set()
                        return
            iterator = answer.get("NextShardIterator")
            if iterator is not None:
                await asyncio.sleep(self.poll_s)
        self._ended.add(shard)

    async def _iterator(self, shard: str, arguments: Mapping[str, Any]) -> str | None:
        answer = await self._call("get_shard_iterator", ShardId=shard, **self.stream, **arguments)
        return str(answer["ShardIterator"])

    async def _call(self, name: str, **arguments: Any) -> Any:
        """One answer; None for an expired iterator or page token. Throttles and passing trouble are waited out."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            HTTPClientError,
            NoCredentialsError,
        )

        wait = 0.1
        for attempt in range(1, 1_000_000):
            try:
                return await getattr(self.client, name)(**arguments)
            except NoCredentialsError:
                raise TailError(
                    "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or"
                    " AWS_PROFILE (for an emulator, anything)"
                ) from None
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code", "")
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if code in _EXPIRED:
                    return None
                if REQUEST_ACTIONS.get(code) is not Action.THROTTLE and status < 500:
                    raise TailError(_cure(code, error.response["Error"].get("Message", ""))) from None
            except HTTPClientError as error:
                if attempt >= 8:
                    raise TailError(f"Kinesis cannot be reached: {error}") from None
            except BotoCoreError as error:
                raise TailError(str(error)) from None
            # decorrelated jitter, as the sender has it
            wait = min(BACKOFF_MAX_S, random.uniform(0.1, 3 * wait))  # noqa: S311
            await asyncio.sleep(wait)
        raise AssertionError


def _cure(code: str, message: str) -> str:
    text = f"{code}: {message}" if message else code
    match code:
        case "ResourceNotFoundException":
            return f"{text}; check stream name, region and account"
        case "AccessDeniedException":
            return f"{text}; allow kinesis:ListShards, kinesis:GetShardIterator, kinesis:GetRecords"
        case _:
            return text


def tail(
    stream: str,
    *,
    start: Start,
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

    def take(record: Mapping[str, Any], shard: str) -> None:
        out.write(render(record, shard, form))
        out.flush()

    asyncio.run(_tail(stream, start, limit, region, endpoint_url, profile, take, as_stored=as_stored))
    return 0


async def _tail(
    stream: str,
    start: Start,
    limit: int | None,
    region: str | None,
    endpoint_url: str | None,
    profile: str | None,
    take: Callable[[Mapping[str, Any], str], None],
    *,
    as_stored: bool,
) -> None:
    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession
    from botocore.exceptions import BotoCoreError, NoRegionError

    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT") or None
    arn = stream.startswith("arn:")
    where = {"StreamARN": stream} if arn else {"StreamName": stream}
    if arn and region is None:
        region = stream.split(":")[3]
    keys: dict[str, str] = {}
    local = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_KINESIS") or os.environ.get("AWS_ENDPOINT_URL")
    if local and urlsplit(local).hostname in {"localhost", "127.0.0.1", "::1"}:
        # an emulator believes any keys, and asking the machine's metadata for some takes seconds
        region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        if not ({"AWS_ACCESS_KEY_ID", "AWS_PROFILE"} & os.environ.keys() or profile):
            keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local"}
    session = AioSession(profile=profile)
    async with AsyncExitStack() as stack:
        try:
            client = await stack.enter_async_context(
                session.create_client(
                    "kinesis",
                    region_name=region or os.environ.get("AWS_REGION") or None,
                    endpoint_url=endpoint_url,
                    # the loop below retries; the SDK's own retries would multiply the waits
                    config=AioConfig(retries={"total_max_attempts": 1}, connect_timeout=6),
                    **keys,
                )
            )
        except NoRegionError:
            raise ConfigError("region", "is missing", "give --region, or set AWS_REGION") from None
        except BotoCoreError as error:
            raise TailError(str(error)) from None
        await Tail(client=client, stream=where, start=start, take=take, limit=limit, as_stored=as_stored).run()
