"""Log lines of the commands: `time level pipeline stage message`, one line each, text or JSON.

Messages of the engine begin with `pipeline=NAME stage=WORD`, so that they say as much in a service
that embeds it and logs its own way; here the two become columns (JSON: fields). Without them the
stage is the last part of the logger's name. A message about one topic goes on with `topic=...`, quoted
and escaped as `ascii()` does it; in JSON it is a field and says the topic as it came. Strangers choose
topics, payloads and what servers answer: whatever does not print is written as an escape, so that none of
it can forge a line, and what can be said again and again goes through `Repeats`.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from fastkin.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable

_BEGIN = re.compile(r"pipeline=(\S+) stage=(\w+) |stage=(\w+) ")
# as ascii() writes it
_TOPIC = re.compile(r"""topic=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*") """)
_LINE_CHARS = 16 * 1024  # of one message
_KINDS = 64


def setup(
    *,
    level: int = logging.INFO,
    json_lines: bool = False,
    stream: TextIO | None = None,
    worker: str | None = None,
) -> None:
    """Log to stderr. For the process's owner: an embedded engine logs through its host's set-up.

    worker: which one of several processes this is; each line says it.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonLine(worker) if json_lines else TextLine(worker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # the SDK's own DEBUG lines show headers and bodies: never below WARNING
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("fastkin").setLevel(level)
    logging.captureWarnings(True)


class _Line(logging.Formatter):
    def __init__(self, worker: str | None = None) -> None:
        super().__init__()
        self.worker = worker

    def parts(self, record: logging.LogRecord) -> tuple[str, str, str, str, str]:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage()
        name, pipeline = record.name, "-"
        name = name.rpartition(".")[2] if name.startswith("fastkin.") else name
        # Only our own loggers: a library's message that begins like this is not to be taken apart.
        if name != record.name and (begin := _BEGIN.match(message)):
            pipeline, name = begin[1] or pipeline, begin[2] or begin[3]
            message = message[begin.end() :]
        return f"{seconds}.{int(record.msecs):03d}Z", record.levelname, pipeline, name, message

    def trace(self, record: logging.LogRecord) -> str:
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return text + (self.formatStack(record.stack_info) if record.stack_info else "")


class TextLine(_Line):
    @property
    def _who(self) -> str:
        return "" if self.worker is None else f"worker={self.worker} "

    def format(self, record: logging.LogRecord) -> str:
        stamp, level, pipeline, name, message = self.parts(record)
        line = f"{stamp} {level:<7} {_plain(pipeline)} {_plain(name)} {self._who}{_plain(message)}"
        if trace := self.trace(record):
            # a trace stands on lines of its own, marked so that they cannot pass for log lines
            line += "".join(f"\n  | {_plain(part)}" for part in trace.splitlines())
        return line


class JsonLine(_Line):
    def format(self, record: logging.LogRecord) -> str:
        stamp, level, pipeline, name, message = self.parts(record)
        line = {"time": stamp, "level": level, "pipeline": pipeline, "stage": name}
        if self.worker is not None:
            line["worker"] = self.worker
        if name != record.name and (topic := _TOPIC.match(message)):
            # Written by ascii() and matched as such a literal: nothing else can get here.
            line["topic"] = ast.literal_eval(topic[1])
            message = message[topic.end() :]
        line["message"] = message if len(message) <= _LINE_CHARS else f"{message[:_LINE_CHARS]}..."
        if trace := self.trace(record):
            line["trace"] = trace
        return json.dumps(line)


def _plain(text: str) -> str:
    return printable(text, _LINE_CHARS)


class _Timer(Protocol):
    def cancel(self) -> None: ...


class _Window:
    __slots__ = ("held", "last", "said", "timer")

    def __init__(self, timer: _Timer, said: int) -> None:
        self.timer = timer
        self.said = said
        self.held = 0
        self.last: tuple[int, str, tuple[object, ...]] = (0, "", ())


# The first lines of a kind are said at once, so that a fault is seen when it begins. What comes after them within the
# same window is counted, and the last of them is said with that count when the window ends.
class Repeats:
    """Says what a peer can make us say without end: so much of a kind per while, and then how often more."""

    def __init__(
        self,
        log: logging.Logger,
        later: Callable[..., _Timer],
        *,
        most: int,
        per_s: float,
    ) -> None:
        """`most` lines of a kind per `per_s` seconds; `later` is the loop's call_later()."""
        self._log = log
        self._later = later
        self._most = most
        self._per_s = per_s
        self._windows: dict[str, _Window] = {}
        self._closed = False

    def say(self, level: int, kind: str, message: str, *args: object) -> None:
        if self._closed or not self._log.isEnabledFor(level):
            self._log.log(level, message, *args)
            return
        # Kinds may hold a peer's words, such as an error code: beyond the bound all others are one kind.
        if kind not in self._windows and len(self._windows) >= _KINDS:
            kind = ""
        window = self._windows.get(kind)
        if window is None:
            window = self._windows[kind] = self._window(kind, 0)
        if window.said < self._most:
            window.said += 1
            self._log.log(level, message, *args)
        else:
            window.held += 1
            window.last = (level, message, args)

    def close(self) -> None:
        """Say what was held back; from now on everything is said at once."""
        self._closed = True
        for window in self._windows.values():
            window.timer.cancel()
            self._sum_up(window)
        self._windows.clear()

    def _window(self, kind: str, said: int) -> _Window:
        return _Window(self._later(self._per_s, self._over, kind), said)

    def _over(self, kind: str) -> None:
        window = self._windows.pop(kind)
        if window.held:
            self._sum_up(window)
            # What was held back was said just now, so the next window begins with one line used.
            self._windows[kind] = self._window(kind, 1)

    def _sum_up(self, window: _Window) -> None:
        level, message, args = window.last
        if window.held > 1:
            message, args = message + " (%d more like this)", (*args, window.held - 1)
        if window.held:
            self._log.log(level, message, *args)
