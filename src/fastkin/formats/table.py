"""The payload formats: what a message's bytes are read as. One row each; who needs their names reads them here.

The first rows are the compiled formats (codec/formats.pxi). A format written in Python is one file in this folder with
a function, and a row behind them:

    PayloadFormat("lines", 9, "each line is a record", lines.records)

`records(payload)`, or with `topic=True` `records(payload, topic)`, gets bytes nobody vouches for and gives the records,
as bytes, all of them or none: for what is no such payload it raises DataFormatError(offset, reason), and the payload is
set aside. It costs a call for each payload, and a copy.
"""

from __future__ import annotations

from fastkin._codec import COMPILED_FORMATS, PayloadFormat
from fastkin.errors import LibraryError
from fastkin.formats import event


def _msgpack(payload: bytes) -> list[bytes]:
    # Loaded with the first such payload: who has none would have a library in memory for nothing.
    from fastkin.formats import msgpack

    return msgpack.records(payload)


ROWS: tuple[PayloadFormat, ...] = (
    *COMPILED_FORMATS,
    PayloadFormat("event", 3, "an event of MODE, checked", event.records),
    PayloadFormat("msgpack", 4, "a MessagePack map becomes a JSON record", _msgpack),
)

# The number is the format's Subscription Identifier: brokers keep it in sessions and beside queued messages, so it is
# never given to another format.
FORMATS: dict[str, PayloadFormat] = {row.name: row for row in ROWS}
DEFAULT = "raw"  # where nothing is said
FRAME = "bulk"  # of a bulk_label, and of `put_frame`


def format_named(name: str) -> PayloadFormat:
    """The row of this name. LibraryError: there is none; settings made in code are not checked before."""
    try:
        return FORMATS[name]
    except KeyError:
        raise LibraryError(f"{name!r} is no payload format: use {', '.join(FORMATS)}") from None
