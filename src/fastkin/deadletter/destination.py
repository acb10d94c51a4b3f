"""Where a pipeline's dead letters go when they go to a stream: what `dead_letter` says, read once."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkin.config import Kinesis, Pipeline

PREFIX = "stream:"
_ARN = re.compile(r"arn:aws[a-z-]*:kinesis:([a-z0-9-]+):\d{12}:stream/([a-zA-Z0-9_.-]{1,128})")
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


def wrong(text: str) -> str | None:
    """What is wrong with a `dead_letter` that begins with stream:, or None."""
    name = text.removeprefix(PREFIX)
    if _NAME.fullmatch(name) or _ARN.fullmatch(name):
        return None
    return f"{text!r} names no stream"


def destination(pipeline: Pipeline) -> Kinesis | None:
    """The stream of the pipeline's dead letters, reached as the pipeline's own is. None: they go elsewhere."""
    text = pipeline.dead_letter or ""
    if not text.startswith(PREFIX):
        return None
    name = text.removeprefix(PREFIX)
    if match := _ARN.fullmatch(name):
        region, stream = match.groups()
        return dataclasses.replace(pipeline.kinesis, stream=stream, stream_arn=name, region=region, max_connections=1)
    return dataclasses.replace(pipeline.kinesis, stream=name, stream_arn=None, max_connections=1)


def is_own(pipeline: Pipeline) -> bool:
    """Whether the dead letters would go where the records go."""
    other = destination(pipeline)
    if other is None:
        return False
    own = pipeline.kinesis
    if own.stream_arn and other.stream_arn:
        return own.stream_arn == other.stream_arn
    same_region = own.region is None or other.region is None or own.region == other.region
    return own.stream == other.stream and same_region
