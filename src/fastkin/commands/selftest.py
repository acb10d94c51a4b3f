"""`fastkin selftest`: does it work from here? Messages are published, stored and read back, and each step says so.

Without settings all of it happens on this machine: an emulated stream, and mosquitto where it is installed, else the
stand-in of the benches. With settings the broker and the stream are those of the settings. The messages then have a
topic of their own, so that nothing of production is taken, and the stream gets as many records as there are messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from fastkin import __version__, decode_frame, encode_frame
from fastkin.bench.children import find_mosquitto
from fastkin.commands import trial
from fastkin.commands.check import stream_says
from fastkin.commands.demo import HOST, broker
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.errors import Action, ConfigError, FastkinError, KinesisError, printable
from fastkin.runtime.loops import loop_factory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from fastkin.service.engine import Engine

_STREAM = "selftest"
_KEY = "selftest"  # of the emulated stream: both halves of the pair
_LOOK_S = 0.02  # between two looks at the engine
_READ_S = 0.25  # between two rounds over all shards: each answers five calls a second (the API's page)
_STOP_S = 5.0
READ_CURE = (
    "allow kinesis:ListShards, kinesis:GetShardIterator and kinesis:GetRecords on the stream (deploy/iam-tail.json), or"
    " leave this out with --no-read"
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for: how many messages, how long each step may take, where to publish, whether to read back."""

    messages: int
    timeout_s: float
    topic: str | None
    read: bool


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Who is talked to. `publish` gets topic and payloads, and says what became of them."""

    broker: Broker
    kinesis: Kinesis
    publish: Callable[[str, list[bytes]], Awaitable[str]]


def selftest(settings: Settings | None, wanted: Wanted, *, only: str | None = None) -> int:
    """0: every step went well; 1: one did not. `only`: the id of the pipeline that is tried, else all are.

    ConfigError: no enabled pipeline has this id.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return 0 if runner.run(_selftest(settings, wanted, only)) else 1


async def _selftest(settings: Settings | None, wanted: Wanted, only: str | None) -> bool:
    good = await _step("install", _install, "install fastkin anew", wanted.timeout_s)
    if settings is None:
        async with contextlib.AsyncExitStack() as stack:
            mark = os.urandom(4).hex()
            topic, payloads = _messages(wanted, mark)
            peers: Peers | None = None

            async def start() -> str:
                nonlocal peers
                peers, says = await stack.enter_async_context(_loopback(topic, payloads))
                return says

            cure = "let this user listen on 127.0.0.1, or give CONFIG.toml to try your own broker and stream"
            good &= await _step("loopback", start, cure, wanted.timeout_s)
            return good and peers is not None and await _end_to_end(peers, topic, payloads, wanted)
    found = [each for each in settings.pipelines if each.enabled and only in (None, each.id)]
    if not found:
        ids = ", ".join(each.id for each in settings.pipelines if each.enabled)
        raise ConfigError("--pipeline", f"no enabled pipeline is called {only!r}", f"use one of {ids}")
    for pipeline in found:
        if pipeline.file or pipeline.kinesis.firehose:
            where = (
                f"Firehose {pipeline.kinesis.firehose}" if pipeline.kinesis.firehose else f"files in {pipeline.file}"
            )
            raise ConfigError(
                f"pipeline {pipeline.id!r}", f"writes to {where}, from where nothing can be read back",
                "name a pipeline with a stream by --pipeline; `fastkin check --connect` tries the others",
            )  # fmt: skip
    # Pipelines may share a stream: it is tried once.
    for pipeline in {each.kinesis: each for each in reversed(found)}.values():
        mark = os.urandom(4).hex()
        topic, payloads = _messages(wanted, mark)
        own = dataclasses.replace(settings.broker, client_id=f"fastkin-selftest-{mark}", clean_session=True)
        peers = Peers(broker=own, kinesis=pipeline.kinesis, publish=_publisher(own))
        good &= await _configured(peers, pipeline.id, topic, wanted) and await _end_to_end(
            peers, topic, payloads, wanted
        )
    return good


def _messages(wanted: Wanted, mark: str) -> tuple[str, list[bytes]]:
    topic = wanted.topic or f"fastkin/selftest/{mark}"
    return topic, [orjson.dumps({"message": "Hello, world!", "selftest": mark, "n": n}) for n in range(wanted.messages)]


async def _install() -> str:
    record = b'{"message":"Hello, world!"}'
    if decode_frame(encode_frame([record])) != [record]:
        raise FastkinError("the compiled part does not read what it has written")
    return f"fastkin {__version__}, Python {platform.python_version()}, {type(asyncio.get_running_loop()).__module__}"


# --- the peers ---


@contextlib.asynccontextmanager
async def _loopback(topic: str, payloads: list[bytes]) -> AsyncIterator[tuple[Peers, str]]:
    # imported here: who has a broker and a stream of his own needs neither
    from fastkin.bench.source import Source
    from fastkin.emulator import Emulator

    async with contextlib.AsyncExitStack() as stack:
        emulator = await stack.enter_async_context(Emulator({_STREAM: 2}, credentials={_KEY: _KEY}))
        # All of it is given: what this machine says of AWS or of proxies must not lead elsewhere.
        kinesis = Kinesis(
            stream=_STREAM, region="us-east-1", endpoint_url=emulator.url, access_key=_KEY, secret_key=_KEY,
            transport="native",
        )  # fmt: skip
        if find_mosquitto() is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastkin-selftest-")))
            name, port = await stack.enter_async_context(broker(folder))
            own = Broker(host=HOST, port=port, client_id="fastkin-selftest", clean_session=True)
            publish = _publisher(own)
        else:
            name = "a stand-in for a broker (mosquitto is not installed)"
            source = await stack.enter_async_context(Source(len(payloads), payloads=payloads, topics=(topic,)))
            own = Broker(host=HOST, port=source.port, client_id="fastkin-selftest", clean_session=True)
            publish = _played(source.done)
        says = f"{name} on port {own.port}, an emulated stream on port {emulator.port}"
        yield Peers(broker=own, kinesis=kinesis, publish=publish), says


def _publisher(broker: Broker) -> Callable[[str, list[bytes]], Awaitable[str]]:
    from fastkin.mqtt.publisher import Publisher

    async def publish(topic: str, payloads: list[bytes]) -> str:
        # An id of its own: the broker lets in one connection for each.
        own = dataclasses.replace(broker, client_id=f"{broker.client_id}-pub")
        async with Publisher(own) as publisher:
            for payload in payloads:
                await publisher.publish(topic, payload, 1)
            await publisher.drain()
            if publisher.refused:
                raise FastkinError(f"the broker refused {publisher.refused} of {len(payloads)} messages")
        return f"{len(payloads)} messages with QoS 1 on topic {printable(topic)}, all acknowledged by the broker"

    return publish


def _played(done: asyncio.Event) -> Callable[[str, list[bytes]], Awaitable[str]]:
    async def publish(topic: str, payloads: list[bytes]) -> str:
        await done.wait()
        return f"{len(payloads)} messages with QoS 1 on topic {printable(topic)}, all acknowledged by fastkin"

    return publish


async def _configured(peers: Peers, pipeline: str, topic: str, wanted: Wanted) -> bool:
    """Both peers by themselves, for whom the words of `fastkin check --connect` tell what is wrong."""

    async def subscribe() -> str:
        asked = Pipeline(id=pipeline, topics=(topic,), kinesis=peers.kinesis)
        tried = await trial.subscribe(peers.broker, asked, own_id=None)
        fine, says = trial.words(tried, topic, 1)
        if not fine:
            raise FastkinError(says)
        return f"connected; filter {topic}: {says}"

    url = f"broker {peers.broker.url}"
    cure = "start it, or correct [broker]; a broker with permissions must allow the topic, or name one with --topic"
    good = await _step(url, subscribe, cure, wanted.timeout_s)
    name = f"stream {peers.kinesis.stream_arn or peers.kinesis.stream}"
    cure = f"correct stream, region or credentials of pipeline {pipeline}, or allow kinesis:PutRecords"
    return await _step(name, lambda: stream_says(peers.kinesis), cure, wanted.timeout_s) and good


# --- from the broker into the stream and back ---


async def _end_to_end(peers: Peers, topic: str, payloads: list[bytes], wanted: Wanted) -> bool:
    # imported here: with all that a service is made of, and not before the first line is out
    from fastkin.service.engine import Engine

    stream = f"stream {peers.kinesis.stream_arn or peers.kinesis.stream}"
    pipeline = Pipeline(
        id="selftest", topics=(topic,), kinesis=peers.kinesis, dead_letter="none", linger_ms=10.0,
        shutdown_timeout_s=_STOP_S,
    )  # fmt: skip
    reading = ReadBack(peers.kinesis, payloads)
    good, limit = True, wanted.timeout_s
    try:
        # Where reading begins is asked for before anything is stored: no clock has to be right for that.
        read = wanted.read and await _step(f"{stream} for reading", reading.begin, READ_CURE, limit)
        good = read or not wanted.read
        engine = Engine(Settings(broker=peers.broker, pipelines=(pipeline,)))
        async with engine:
            cure = "what is said above and in the log tells why"
            if not await _step("pipeline", lambda: _ready(engine, limit), cure, limit + _STOP_S):
                return False
            cure = f"allow this client to publish to {topic}, or name another topic with --topic"
            if not await _step("publish", lambda: peers.publish(topic, payloads), cure, limit):
                return False
            cure = "-v logs each call"
            if not await _step("store", lambda: _stored(engine, len(payloads), limit), cure, limit + _STOP_S):
                return False
        if read:
            cure = "another reader may use up the calls of the shards: give it more time with --timeout"
            good &= await _step("read back", lambda: reading.collect(limit), cure, limit + _STOP_S)
    finally:
        await reading.close()
    return good


async def _ready(engine: Engine, limit_s: float) -> str:
    begin = time.monotonic()
    while reason := engine.unready()["selftest"]:
        if time.monotonic() - begin > limit_s:
            raise FastkinError(f"not ready within {limit_s:g} s: {reason}")
        await asyncio.sleep(_LOOK_S)
    return f"subscribed, and the stream was reached, after {time.monotonic() - begin:.2f} s"


async def _stored(engine: Engine, count: int, limit_s: float) -> str:
    begin = time.monotonic()
    while True:
        stats = engine.stats()["selftest"]
        if stats["dropped"] or stats["dead_lettered"]:
            raise FastkinError(f"Kinesis takes {stats['dropped'] + stats['dead_lettered']} of {count} records never")
        if stats["stored"] >= count:
            more = stats["stored"] - count
            return f"{count} of {count} records confirmed by Kinesis" + (f", {more} more came again" if more else "")
        if time.monotonic() - begin > limit_s:
            why = engine.unready()["selftest"] or stats["last_error"] or "nothing else is wrong"
            raise FastkinError(
                f"{stats['stored']} of {count} records stored within {limit_s:g} s, {stats['received']} were received"
                f" from the broker: {why}"
            )
        await asyncio.sleep(_LOOK_S)


class ReadBack:
    """Looks for the payloads in every shard, from where the shards were at `begin`."""

    def __init__(self, kinesis: Kinesis, payloads: list[bytes]) -> None:
        from fastkin.consumer import Consumer

        self._missing = set(payloads)
        self._count = len(payloads)
        self._iterators: dict[str, str | None] = {}
        names = (
            "stream", "region", "endpoint_url", "access_key", "secret_key", "session_token", "profile", "role_arn",
            "external_id", "session_name", "transport", "max_connections", "request_timeout_s",
        )  # fmt: skip
        told = {name: getattr(kinesis, name) for name in names}
        self._consumer = Consumer(stream_arn=kinesis.stream_arn, raw=True, **told)

    async def begin(self) -> str:
        shards = [shard for shard in await self._consumer.list_shards() if not shard.closed]
        for shard in shards:
            self._iterators[shard.id] = await self._consumer.get_shard_iterator(shard.id, "LATEST")
        return f"{len(shards)} shards"

    async def collect(self, limit_s: float) -> str:
        begin = time.monotonic()
        while True:
            for shard, iterator in self._iterators.items():
                if iterator is not None:
                    await self._look(shard, iterator)
            if not self._missing:
                return f"{self._count} of {self._count} messages, byte for byte"
            if time.monotonic() - begin > limit_s:
                have = self._count - len(self._missing)
                raise FastkinError(f"{have} of {self._count} messages found within {limit_s:g} s")
            await asyncio.sleep(_READ_S)

    async def _look(self, shard: str, iterator: str) -> None:
        try:
            batch = await self._consumer.get_records(iterator)
        except KinesisError as error:
            # Others read too: where the shard has no call left now, the next round finds one.
            if error.action is Action.OPERATOR:
                raise
            return
        self._iterators[shard] = batch.next_iterator
        self._missing.difference_update(record.raw for record in batch.records)

    async def close(self) -> None:
        await self._consumer.close()


async def _step(what: str, work: Callable[[], Awaitable[str]], cure: str, limit_s: float) -> bool:
    """Does one step and says in one line how it went; with the cure when it went wrong."""
    try:
        async with asyncio.timeout(limit_s):
            says = await work()
    except TimeoutError:
        why = f"nothing happened within {limit_s:g} s"
    except ConfigError as error:
        why, cure = str(error), ""  # names its own
    except (FastkinError, OSError) as error:
        why = str(error) or type(error).__name__
    else:
        click.echo(f"ok: {what}: {says}")
        return True
    click.echo(f"failed: {what}: {printable(why)}{f'; {cure}' if cure else ''}", err=True)
    return False
