"""One short connection that learns something of a broker and takes no message over: nothing is acknowledged, so what
the broker hands out meanwhile comes again to whom it belongs.
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
from fastkin.mqtt._core import AckTracker, CountSink, Router, reason_text
from fastkin.mqtt.publisher import Publisher
from fastkin.mqtt.subscriber import Subscriber

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from fastkin.config import Broker
    from fastkin.mqtt._core import Connack
    from fastkin.mqtt.handshake import Handshake
    from fastkin.mqtt.subscriptions import Refusal

_ATTEMPTS = 3  # a broker that knows no 5.0 may close twice without a word
_AGAIN_S = 0.1
_LEAVE_S = 3.0
_SHARED_S = 3.0  # for a message to come back through a shared subscription
_NO_SHARED = 0x9E


@dataclass(slots=True)
class Visit:
    """What the broker said."""

    client_id: str
    version: int = 0
    had_session: bool = False  # the broker had a session under this client id
    granted: dict[str, int] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    came: asyncio.Event = field(default_factory=asyncio.Event)  # a message has come


class _Visitor(Subscriber):
    visit: Visit
    answered: asyncio.Event

    def opened(self, handshake: Handshake, connack: Connack) -> None:
        super().opened(handshake, connack)
        self.visit.version = handshake.version
        self.visit.had_session = connack.session_present
        if not self.subscriptions:
            self.answered.set()

    def subscribed(self, handshake: Handshake) -> None:
        granted, refused = handshake.subscriptions.outcome()
        self.visit.granted |= dict(granted)
        self.visit.refused |= {told.topic_filter: told for told in refused}
        self.answered.set()


class _Left:
    """Of a message that can be no record: it stays the broker's, like every other."""

    async def take(self, piece: bytes) -> None: ...

    async def whole(self) -> None: ...


async def visit(
    broker: Broker,
    asked: Sequence[tuple[str, int]] = (),
    *,
    name: str | None = None,
    meanwhile: Callable[[Visit], Awaitable[None]] | None = None,
) -> Visit:
    """Connect as `broker` says, subscribe what is asked, leave. MqttError: there is no connection.

    asked: filters, each with its QoS.
    name: of the pipeline, for DEBUG lines; nothing else is logged.
    meanwhile: is awaited before the broker is left, once it has answered.
    """
    acks, router = AckTracker(), Router()
    sink = CountSink(acks)  # never released: nothing is acknowledged
    # Without a filter nobody would take what a session holds, and what nobody takes is acknowledged.
    for topic, _ in asked or [("#", 0)]:
        router.add(topic, sink)
    failed: asyncio.Queue[str] = asyncio.Queue()

    def on_state(state: str) -> None:
        if state == "waiting":
            failed.put_nowait(visitor.last_error or "no connection")

    broker = dataclasses.replace(broker, reconnect_min_s=_AGAIN_S, reconnect_max_s=_AGAIN_S)
    found = Visit(broker.client_id)
    with _quiet():
        visitor = _Visitor(
            broker, asked, router=router, acks=acks, on_read=found.came.set, on_state=on_state,
            set_apart=lambda _: _Left(), name=name,
        )  # fmt: skip
        visitor.visit, visitor.answered = found, asyncio.Event()
        work = asyncio.create_task(visitor.run())
        answered = asyncio.create_task(visitor.answered.wait())
        try:
            async with asyncio.timeout(broker.connect_timeout_s * 2):
                await _until_answered(answered, work, failed)
                if meanwhile is not None:
                    await meanwhile(found)
        except TimeoutError:
            limit = broker.connect_timeout_s * 2
            raise MqttError(visitor.last_error or f"no answer within {limit:g} s") from None
        finally:
            answered.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_S):
                    await visitor.close()
            work.cancel()
            await asyncio.gather(work, answered, return_exceptions=True)
        return found


async def _until_answered(answered: asyncio.Task[bool], work: asyncio.Task[None], failed: asyncio.Queue[str]) -> None:
    """MqttError: no attempt came to an answer."""
    for attempt in range(_ATTEMPTS):
        failure = asyncio.create_task(failed.get())
        await asyncio.wait({answered, failure, work}, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            failure.cancel()
            return
        if work.done():
            failure.cancel()
            work.result()
        if attempt == _ATTEMPTS - 1:
            raise MqttError(failure.result())


async def has_session(broker: Broker) -> bool:
    """Does the broker keep a session under this client id? It is as it was afterwards. MqttError: no connection."""
    found = await visit(dataclasses.replace(broker, clean_session=False))
    if not found.had_session:
        await end_session(broker)  # it came to be by this question
    return found.had_session


async def end_session(broker: Broker) -> None:
    """The broker forgets the session of this client id and what it holds for it. MqttError: no connection."""
    await visit(dataclasses.replace(broker, clean_session=True))


async def knows_shared(broker: Broker) -> bool | None:
    """Has the broker shared subscriptions? None: nobody can tell. MqttError: no connection.

    A 5.0 broker says it. One of 3.1.1 grants `$share/...` all the same when it takes it for a plain topic, so a message
    is published to a topic of our own, and must come back through a shared subscription.
    """
    mark = os.urandom(4).hex()
    topic = f"fastkin/check/{mark}"
    shared = f"$share/fastkin-check-{mark}/{topic}"
    came = False
    broker = dataclasses.replace(broker, client_id=f"fastkin-check-{mark}", clean_session=True)

    async def publish(found: Visit) -> None:
        nonlocal came
        if found.version == 5 or shared not in found.granted:
            return
        at = dataclasses.replace(broker, client_id=f"fastkin-check-{mark}-p", protocol="3.1.1")
        async with Publisher(at) as publisher:
            await publisher.publish(topic, b"is it shared?", 0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHARED_S):
                    await found.came.wait()
        came = found.came.is_set()

    found = await visit(broker, [(shared, 0)], meanwhile=publish)
    if (told := found.refused.get(shared)) is not None:
        return False if told.why == reason_text(_NO_SHARED) else None
    return found.version == 5 or came


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
