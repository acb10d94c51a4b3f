"""Subscribes what a pipeline would, and tells what the broker says to each filter.

It takes no message from production. Under a client id of its own it has its own copies of everything, in a session
that ends with the connection; `$share/GROUP/F` is asked for under a group of its own, for a member of the real one
would be given a part of what belongs to the service. Under the service's own id nothing is acknowledged, so that
what the broker hands out comes again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING

from fastkin.errors import MqttError
from fastkin.mqtt.subscriptions import SHARED
from fastkin.mqtt.visit import Visit, end_session, visit

if TYPE_CHECKING:
    from fastkin.config import Broker, Pipeline


async def subscribe(broker: Broker, pipeline: Pipeline, *, own_id: str | None) -> Visit:
    """What the broker says to the filters as they stand in the settings.

    `own_id`: the client id that the service has for this pipeline, to be used. MqttError: there is no connection.
    """
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
    )
    tried = await visit(broker, [(topic, pipeline.qos) for topic in asked], name=pipeline.id)
    if own_id and not tried.had_session and not broker.clean_session:
        # It came to be by this trial: without it the service's own first subscription gets what is retained.
        with contextlib.suppress(MqttError):
            await end_session(broker)
    tried.granted = {asked[topic]: qos for topic, qos in tried.granted.items()}
    tried.refused = {asked[topic]: told for topic, told in tried.refused.items()}
    return tried


def words(tried: Visit, topic: str, qos: int) -> tuple[bool, str]:
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
