"""MODE's events: a JSON object with `eventType`, `eventData`, `timestamp` and `homeId`, checked field by field.

What is right is stored byte for byte. Devices send type and data only; the platform adds the rest. `Enricher` does
that: it writes what is missing behind what is there, and changes no byte of it.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from fastkin.errors import DataFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# MODE's own words for the fields of an event.
_REQUIRED: dict[str, type] = {"eventType": str, "eventData": dict, "timestamp": str, "homeId": int}
_OPTIONAL: dict[str, type] = {
    "originDeviceId": int,
    "originDeviceClass": str,
    "originDeviceIp": str,
    "originProjectKeyID": str,
    "originProjectKeyName": str,
}
_WORDS: dict[type, str] = {str: "a text", dict: "an object", int: "a whole number"}
# RFC 3339, section 5.6; a second of 60 is a leap second.
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T([01]\d|2[0-3]):([0-5]\d):([0-5]\d|60)(?:\.\d+)?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII | re.IGNORECASE,
)
_DEVICE = re.compile(r"/?devices/(\d{1,18})/", re.ASCII)
# Of one event. Each is an object of Python: of "{}," seven million fit into a message, and would take half a gigabyte.
_VALUES = 1 << 19
ANY = "*"  # a home for every device that has none of its own


def records(payload: bytes) -> list[bytes]:
    """The payload itself, if it is an event. DataFormatError names the field that is not as it must be."""
    event = _object(payload)
    _check(event, payload)
    return [payload]


class Enricher:
    """Adds what a device leaves out: `timestamp` (now, UTC), `originDeviceId` (from the topic), `homeId`."""

    def __init__(self, homes: Iterable[str], now: Callable[[], datetime] | None = None) -> None:
        """`homes`: "DEVICE=HOME" or "*=HOME", numbers both. ValueError: one is not of this form."""
        self._now = now or partial(datetime.now, UTC)
        self._homes: dict[str, int] = {}
        for each in homes:
            device, home = home_of(each)
            self._homes[device] = home

    def records(self, payload: bytes, topic: str) -> list[bytes]:
        """The event with what was missing. DataFormatError: it is none, or its home is not known."""
        event = _object(payload)
        found = _DEVICE.match(topic)
        device = None if found is None else str(int(found[1]))
        more: dict[str, Any] = {}
        if "eventData" not in event:
            more["eventData"] = {}
        if "timestamp" not in event:
            more["timestamp"] = self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if "homeId" not in event:
            home = self._homes.get(device or "", self._homes.get(ANY))
            if home is not None:
                more["homeId"] = home
        if "originDeviceId" not in event and device is not None:
            more["originDeviceId"] = int(device)
        _check(event | more, payload)
        if not more:
            return [payload]
        # An event is an object that has at least its type, so a comma is right, and its last byte is the brace.
        return [payload.rstrip()[:-1] + b"," + orjson.dumps(more)[1:]]


def home_of(text: str) -> tuple[str, int]:
    """(device, home) of "DEVICE=HOME". ValueError: it is not of this form."""
    if re.fullmatch(r"(\d{1,18}|\*)=\d{1,18}", text, re.ASCII) is None:
        raise ValueError(f"{text!r} is not DEVICE=HOME")
    device, _, home = text.partition("=")
    return (device if device == ANY else str(int(device))), int(home)


def _object(payload: bytes) -> dict[str, Any]:
    # Counted before anything is made of it. What stands in texts is counted, too: that is no event either.
    if len(payload) > _VALUES and sum(map(payload.count, (b",", b"{", b"["))) > _VALUES:
        raise DataFormatError(0, f"an event has at most {_VALUES:,} values")
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        # its position counts characters
        at = len(error.doc[: error.pos].encode("utf-8", "surrogatepass"))
        raise DataFormatError(at, f"an event is a JSON object: {error.msg}") from None
    if not isinstance(event, dict):
        raise DataFormatError(0, "an event is a JSON object")
    return event


def _check(event: dict[str, Any], payload: bytes) -> None:
    for name, kind in _REQUIRED.items():
        if name not in event:
            raise DataFormatError(0, f"the event has no {name}", name)
        _check_kind(name, event[name], kind, payload)
    for name, kind in _OPTIONAL.items():
        if name in event:
            _check_kind(name, event[name], kind, payload)
    if not _is_time(event["timestamp"]):
        raise DataFormatError(_where("timestamp", payload), "timestamp is not a time as RFC 3339 has it", "timestamp")


def _check_kind(name: str, value: object, kind: type, payload: bytes) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataFormatError(_where(name, payload), f"{name} is not {_WORDS[kind]}", name)


def _where(name: str, payload: bytes) -> int:
    """About where: the first time that the name stands in the payload."""
    return max(payload.find(b'"' + name.encode() + b'"'), 0)


def _is_time(text: str) -> bool:
    found = _TIME.fullmatch(text)
    if found is None:
        return False
    year, month, day = map(int, found.group(1, 2, 3))
    try:
        datetime(year, month, day, tzinfo=UTC)
    except ValueError:
        return False
    return True
