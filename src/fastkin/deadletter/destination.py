"""Where a pipeline's dead letters go when they go to a stream: what `dead_letter` says, read once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fastkin.arn import is_stream_name, stream_arn

if TYPE_CHECKING:
    from fastkin.config import Kinesis, Pipeline

PREFIX = "stream:"


def wrong(text: str) -> str | None:
    """What is wrong with a `dead_letter` that begins with stream:, or None."""
    name = text.removeprefix(PREFIX)
    if is_stream_name(name) or stream_arn(name):
        return None
    return f"{text!r} names no stream"


def destination(pipeline: Pipeline) -> Kinesis | None:
    """The stream of the pipeline's dead letters, reached as the pipeline's own is. None: they go elsewhere."""
    text = pipeline.dead_letter or ""
    if not text.startswith(PREFIX):
        return None
    name = text.removeprefix(PREFIX)
    if arn := stream_arn(name):
        return dataclasses.replace(
            pipeline.kinesis, stream=arn.stream, stream_arn=name, firehose=None, region=arn.region, max_connections=1
        )
    return dataclasses.replace(pipeline.kinesis, stream=name, stream_arn=None, firehose=None, max_connections=1)


def is_own(pipeline: Pipeline) -> bool:
    """Whether the dead letters would go where the records go."""
    other = destination(pipeline)
    if other is None:
        return False
    own = pipeline.kinesis
    if own.firehose:
        return False  # another service: the same name is another stream
    if own.stream_arn and other.stream_arn:
        return own.stream_arn == other.stream_arn
    # A region that is not said may be the same one. In doubt it counts as the same, for the caller only warns.
    same_region = own.region is None or other.region is None or own.region == other.region
    return own.stream == other.stream and same_region
