"""Subscribes what a pipeline would, and tells what the broker says to each filter.

It takes no message from production. Under a client id of its own it has its own copies of everything, in a session
that ends with the connection; `$share/GROUP/F` is asked for under a group of its own, for a member of the real one
would be given a part of what belongs to the service. Under the service's own id nothing is acknowledged, so that
what the broker hands out comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastkin.errors import MqttError
from fastkin.mqtt._core import AckTracker, CountSink, Router
from fastkin.mqtt.subscriber import Subscriber
from fastkin.mqtt.subscriptions import SHARED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastkin.config import Broker, Pipeline
    from fastkin.mqtt._core import Connack
    from fastkin.mqtt.handshake import Handshake
    from fastkin.mqtt.subscriptions import Refusal

_ATTEMPTS = 3  # a broker that knows no 5.0 may close twice without a word
_AGAIN_S = 0.1
_LEAVE_S = 3.0


@dataclass(slots=True)
class Tried:
    """What the broker said."""

    client_id: str
    version: int = 0
    granted: dict[str, int] = field(default_factory=dict)  # filters as they stand in the settings
    refused: dict[str, Refusal] = field(default_factory=dict)


class _Trial(Subscriber):
    """One connection that learns what is granted, and takes nothing over."""

    tried: Tried
    answered: asyncio.Event
    new_session = False

    def opened(self, handshake: Handshake, connack: Connack) -> None:
        super().opened(handshake, connack)
        self.new_session = not connack.session_present
        if not self.subscriptions:
            self.answered.set()

    def subscribed(self, handshake: Handshake) -> None:
        granted, refused = handshake.subscriptions.outcome()
        self.tried.version = handshake.version
        self.tried.granted |= dict(granted)
        self.tried.refused |= {told.topic_filter: told for told in refused}
        self.answered.set()


class _Left:
    """Of a message that can be no record: it stays the broker's, like every other."""

    async def take(self, piece: bytes) -> None: ...

    async def whole(self) -> None: ...


async def subscribe(broker: Broker, pipeline: Pipeline, *, own_id: str | None) -> Tried:
    """`own_id`: the client id that the service has for this pipeline, to be used. MqttError: there is no connection."""
    mark = os.urandom(4).hex()
    name = own_id or f"fastkin-check-{mark}"
    # a group that nobody else is in; under the service's own id the filters are its own, too
    asked = {topic if own_id else _apart(topic, f"fastkin-check-{mark}"): topic for topic in pipeline.topics}
    broker = dataclasses.replace(
        broker,
        client_id=name,
        # A session under a name that nobody uses again would collect messages at the broker until it expires.
        clean_session=broker.clean_session if own_id else True,
        # Retained messages would be handed out to the trial, and a filter with many of them takes long.
        retain_handling="never",
        reconnect_min_s=_AGAIN_S,
        reconnect_max_s=_AGAIN_S,
    )
    with _quiet():
        tried, new_session = await _run(broker, pipeline, asked)
        if own_id and new_session and not broker.clean_session:
            # It came to be by this trial: without it the service's own first subscription gets what is retained.
            with contextlib.suppress(MqttError):
                await _run(dataclasses.replace(broker, clean_session=True), pipeline, {})
    tried.granted = {asked[topic]: qos for topic, qos in tried.granted.items()}
    tried.refused = {asked[topic]: told for topic, told in tried.refused.items()}
    return tried


async def _run(broker: Broker, pipeline: Pipeline, asked: dict[str, str]) -> tuple[Tried, bool]:
    acks, router = AckTracker(), Router()
    sink = CountSink(acks)  # never released: nothing is acknowledged
    for topic in asked:
        router.add(topic, sink)
    failed: asyncio.Queue[str] = asyncio.Queue()

    def on_state(state: str) -> None:
        if state == "waiting":
            failed.put_nowait(trial.last_error or "no connection")

    trial = _Trial(
        broker, [(topic, pipeline.qos) for topic in asked], router=router, acks=acks, on_read=_nothing,
        on_state=on_state, set_apart=lambda _: _Left(), name=pipeline.id,
    )  # fmt: skip
    trial.tried, trial.answered = Tried(broker.client_id), asyncio.Event()
    work = asyncio.create_task(trial.run())
    answered = asyncio.create_task(trial.answered.wait())
    try:
        async with asyncio.timeout(broker.connect_timeout_s * 2):
            for attempt in range(_ATTEMPTS):
                failure = asyncio.create_task(failed.get())
                await asyncio.wait({answered, failure, work}, return_when=asyncio.FIRST_COMPLETED)
                if answered.done():
                    failure.cancel()
                    break
                if work.done():
                    failure.cancel()
                    work.result()
                if attempt == _ATTEMPTS - 1:
                    raise MqttError(failure.result())
    except TimeoutError:
        raise MqttError(trial.last_error or f"no answer within {broker.connect_timeout_s * 2:g} s") from None
    finally:
        answered.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await trial.close()
        work.cancel()
        await asyncio.gather(work, answered, return_exceptions=True)
    return trial.tried, trial.new_session


def words(tried: Tried, topic: str, qos: int) -> tuple[bool, str]:
    """Whether `fastkin run` would receive what the filter takes, and what to say about it."""
    refusal = tried.refused.get(topic)
    if refusal is not None:
        return False, f"refused to {tried.client_id}: {refusal.why}{f'; {refusal.cure}' if refusal.cure else ''}"
    granted = tried.granted.get(topic)
    if granted is None:
        return False, f"not answered to {tried.client_id}"
    text = f"granted with QoS {granted} (code 0x{granted:02x}) to {tried.client_id}"
    if granted < qos:
        text += f"; QoS {qos} was asked for" + (": messages may be lost" if granted == 0 else "")
    if topic.startswith(SHARED) and tried.version == 4:
        text += "; MQTT 3.1.1 cannot tell whether the broker knows $share"
    return True, text


def _apart(topic: str, group: str) -> str:
    if not topic.startswith(SHARED):
        return topic
    return f"{SHARED}{group}/{topic.removeprefix(SHARED).partition('/')[2]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a connection says while it tries is the caller's to tell, unless everything is wanted."""
    log = logging.getLogger("fastkin.subscriber")
    before = log.level
    if not log.isEnabledFor(logging.DEBUG):
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


def _nothing() -> None:
    pass
