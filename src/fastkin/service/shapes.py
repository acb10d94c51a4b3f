"""What becomes of the payloads of a filter: how they are read, and what their records become before they are stored."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NamedTuple

from fastkin._codec import PayloadFormat, Shape
from fastkin.config import label_filter
from fastkin.formats import event
from fastkin.formats.table import format_named

if TYPE_CHECKING:
    from fastkin.config import Pipeline

# Added to the format's number: frames of a bulk_label are never filtered, so a format may be read in both ways. Brokers
# keep these numbers in sessions as they keep those of formats.
_EVENTS = 1000


class Way(NamedTuple):
    """How the payloads of a filter are treated."""

    format: str
    events: bool = False  # only events of the wanted types are stored

    @property
    def identifier(self) -> int:
        """The Subscription Identifier of filters that go this way."""
        return format_named(self.format).number + (_EVENTS if self.events else 0)

    def __str__(self) -> str:
        return f"{self.format}, filtered by events" if self.events else self.format


def ways(pipeline: Pipeline) -> tuple[tuple[str, Way], ...]:
    """Each filter with its way; where several match a topic, the first decides."""
    label = None if pipeline.bulk_label is None else label_filter(pipeline.bulk_label)
    return tuple((topic, Way(kind, bool(pipeline.wanted) and topic != label)) for topic, kind in pipeline.formats)


def format_of(pipeline: Pipeline, name: str) -> PayloadFormat:
    """The format of this name as the pipeline's settings want it. LibraryError: there is none."""
    row = format_named(name)
    if name == "event" and pipeline.enrich:
        return PayloadFormat(row.name, row.number, row.doc, event.Enricher(pipeline.homes).records, topic=True)
    return row


def shape_of(pipeline: Pipeline, way: Way) -> Shape | None:
    """None: records are stored as they come, and nobody is asked."""
    enveloped = pipeline.envelope == "spark"
    if not (pipeline.topic_field or pipeline.separator or enveloped or way.events):
        return None
    return Shape(
        topic_field=pipeline.topic_field,
        topic_clash=pipeline.topic_clash,
        topic_others=pipeline.topic_others,
        separator=pipeline.separator,
        envelope=(pipeline.envelope_host or socket.gethostname()) if enveloped else None,
        events=pipeline.wanted if way.events else (),
    )
