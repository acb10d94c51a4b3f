"""How Kinesis names a stream: by a name, or by an ARN that has the name in it."""

from __future__ import annotations

import re
from typing import NamedTuple

_NAME = r"[a-zA-Z0-9_.-]{1,128}"
_STREAM_NAME = re.compile(_NAME)
_STREAM_ARN = re.compile(rf"arn:(aws[a-z-]*):kinesis:([a-z0-9]+(?:-[a-z0-9]+)*):([0-9]{{12}}):stream/({_NAME})")


class StreamArn(NamedTuple):
    """The parts of a stream's ARN."""

    partition: str
    region: str
    account: str
    stream: str


def is_stream_name(text: str) -> bool:
    """Whether a stream may have this name."""
    return _STREAM_NAME.fullmatch(text) is not None


def stream_arn(text: str) -> StreamArn | None:
    """The parts of the ARN, or None when the text is not the ARN of a stream."""
    found = _STREAM_ARN.fullmatch(text)
    return None if found is None else StreamArn(*found.groups())
