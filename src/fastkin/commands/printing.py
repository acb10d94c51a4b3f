"""Prints every message as the MQTT-to-Kinesis microservice does: key line, value line.

Into a file or a pipe the bytes go as they came; on a terminal what does not print is written as an escape, for
strangers choose topics and payloads.
"""

from __future__ import annotations

import asyncio
import sys
from typing import BinaryIO

from fastkin.errors import escaped


class Printer:
    """Call it with topic and payload. Writes are gathered; the loop flushes them within 100 ms."""

    FLUSH_S = 0.1
    GATHER_BYTES = 64 * 1024

    def __init__(self, out: BinaryIO | None = None) -> None:
        self._out: BinaryIO | None = out if out is not None else sys.stdout.buffer
        self._terminal = self._out is not None and self._out.isatty()
        self._held = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, topic: bytes, payload: bytes) -> None:
        if self._out is None:
            return
        if self._terminal:
            topic, payload = _plain(topic), _plain(payload)
        self._held += b"key: %b\nvalue: %b\n" % (topic, payload)
        if len(self._held) >= self.GATHER_BYTES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.FLUSH_S, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._out is None:
            return
        try:
            self._out.write(self._held)
            self._out.flush()
        except (BrokenPipeError, ValueError):
            # nobody reads any more (`| head`): the messages themselves are not in danger
            self._out = None
        self._held.clear()


def _plain(data: bytes) -> bytes:
    return escaped(data.decode("utf-8", "backslashreplace")).encode()
