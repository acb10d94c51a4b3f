"""Which sink a message goes to, and what is said of messages that nobody wants.

A pipeline has one batcher. With one payload format the batcher is the sink itself; with several there is a sink for
each, and one more for topics that no filter of ours explains.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fastkin._codec import Batcher, ExcludedSink, FormatSink, StraySink
from fastkin.mqtt._core import CallbackSink, Router
from fastkin.service.shapes import Way, format_of, shape_of, ways

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin._codec import Sink
    from fastkin.config import Pipeline
    from fastkin.service.tee import Tee

_LOG = logging.getLogger("fastkin.pipeline")
_UNROUTED_EVERY_S = 60.0  # how often to say that messages came which nobody wants
_FILTERS_SHOWN = 10


class Routes:
    """Of one pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        batcher: Batcher,
        on_message: Callable[[str, bytes, bytes], None] | None,
        tee: Tee | None = None,
    ) -> None:
        """`on_message(pipeline, topic, payload)` hears of each message that was taken, `tee` writes each down; both
        cost Python per message."""
        self._name = pipeline.id
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._tee = tee
        router = Router()
        self.router: Router = router
        filters = ways(pipeline)
        sinks = {way: self._tapped(_sink(pipeline, way, batcher)) for _, way in filters}
        several = len(sinks) > 1
        if several:
            shown = ", ".join(f"{topic!a} ({way})" for topic, way in filters[:_FILTERS_SHOWN])
            router.otherwise = self._tapped(StraySink(batcher, shown))
        elif pipeline.exclude:
            router.otherwise = sinks[filters[0][1]]
        # An identifier is believed before any topic, and what is excluded is known by its topic only. So with `exclude`
        # none are asked for: the first filter that matches decides.
        identified = not pipeline.exclude
        excluded = ExcludedSink(batcher)
        for topic in pipeline.exclude:
            router.add(topic, excluded)
        for topic, way in filters:
            router.add(topic, sinks[way], way.identifier if identified else 0)
        # The Subscription Identifier of each filter: a 5.0 broker says with a message which filter it came by.
        # `filters` of the pipeline are as long as its topics, and in their order.
        asked = dict(zip(pipeline.topics, pipeline.filters, strict=True))
        self.identifiers: dict[str, int] = (
            {asked[topic]: way.identifier for topic, way in filters} if several and identified else {}
        )
        self.seen: int = 0  # the router's count of unrouted messages, when it was last looked at
        self._said_at = -_UNROUTED_EVERY_S

    def _tapped(self, sink: Batcher | FormatSink | StraySink) -> Sink:
        on_message = self._on_message
        if self._tee is not None:
            return self._tee.into(sink, self._heard)
        if on_message is None:
            return sink

        def tap(topic: bytes, payload: bytes, token: int) -> int:
            taken = sink.offer(topic, payload, token)
            if taken >= 0:
                on_message(self._name, topic, payload)
            return taken

        return CallbackSink(tap)

    def _heard(self, topic: bytes, payload: bytes) -> None:
        if self._on_message is not None:
            self._on_message(self._name, topic, payload)

    def say_unrouted(self, client_id: str) -> None:
        """Messages came that no filter wants. The caller compares `seen` first: this is no work for each read."""
        self.seen = self.router.unrouted
        if (now := self._loop.time()) - self._said_at < _UNROUTED_EVERY_S:
            return
        self._said_at = now
        former = self.router.former
        _LOG.warning(
            "pipeline=%s stage=intake topic=%s matches a filter that was removed (%s%s) and none that is set:"
            " acknowledged and discarded, %d messages so far. The broker's session of client %s had them queued; to"
            " keep such messages set the filter again",
            self._name, ascii(self.router.stray.decode("utf-8", "replace")),
            ", ".join(map(ascii, former[:_FILTERS_SHOWN])), ", ..." if len(former) > _FILTERS_SHOWN else "",
            self.seen, ascii(client_id),
        )  # fmt: skip


def _sink(pipeline: Pipeline, way: Way, batcher: Batcher) -> Batcher | FormatSink:
    """The batcher itself where that is the same: it costs less."""
    shape = shape_of(pipeline, way)
    if shape is None and way.format == pipeline.format:
        return batcher
    return FormatSink(batcher, format_of(pipeline, way.format), shape)
