"""Log lines of the commands: `time level pipeline stage message`, one line each, text or JSON.

Messages of the engine begin with `pipeline=NAME stage=WORD`, so that they say as much in a service
that embeds it and logs its own way; here the two become columns (JSON: fields). Without them the
stage is the last part of the logger's name. Messages may quote topics, which strangers choose:
control characters are written as escapes, so that a topic cannot forge a line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BEGIN = re.compile(r"pipeline=(\S+) stage=(\w+) |stage=(\w+) ")


def setup(*, level: int = logging.INFO, json_lines: bool = False, stream: TextIO | None = None) -> None:
    """Log to stderr. For the process's owner: an embedded engine logs through its host's set-up."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonLine() if json_lines else TextLine())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # the SDK's own DEBUG lines show headers and bodies: never below WARNING
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("fastkin").setLevel(level)
    logging.captureWarnings(True)


class _Line(logging.Formatter):
    def parts(self, record: logging.LogRecord) -> tuple[str, str, str, str, str]:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage()
        name, pipeline = record.name, "-"
        name = name.rpartition(".")[2] if name.startswith("fastkin.") else name
        if begin := _BEGIN.match(message):
            pipeline, name = begin[1] or pipeline, begin[2] or begin[3]
            message = message[begin.end() :]
        return f"{seconds}.{int(record.msecs):03d}Z", record.levelname, pipeline, name, message

    def trace(self, record: logging.LogRecord) -> str:
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return text + (self.formatStack(record.stack_info) if record.stack_info else "")


class TextLine(_Line):
    def format(self, record: logging.LogRecord) -> str:
        stamp, level, pipeline, name, message = self.parts(record)
        line = f"{stamp} {level:<7} {_plain(pipeline)} {_plain(name)} {_plain(message)}"
        if trace := self.trace(record):
            # a trace stands on lines of its own, marked so that they cannot pass for log lines
            line += "".join(f"\n  | {_plain(part)}" for part in trace.splitlines())
        return line


class JsonLine(_Line):
    def format(self, record: logging.LogRecord) -> str:
        keys = ("time", "level", "pipeline", "stage", "message")
        line = dict(zip(keys, self.parts(record), strict=True))
        if trace := self.trace(record):
            line["trace"] = trace
        return json.dumps(line)


def _plain(text: str) -> str:
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)
