"""Pages for another process: look at the counters, add faults, change limits while it runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from .server import Emulator


def admin(emulator: Emulator, method: str, path: str, body: bytes) -> tuple[int, str]:
    """Status and page of a call to /_emulator/...: how another process looks and steers.

    GET counters; POST faults (JSON lines) adds, DELETE faults clears;
    POST limits {"stream": ..., "factor": ..., "on": ...}
    """
    what = (method, path.removeprefix("/_emulator/"))
    try:
        if what == ("GET", "counters"):
            answer: Any = asdict(emulator.counters)
            answer["streams"] = {
                name: emulator.stored_count(name) for name in (*emulator.service.streams, *emulator.service.deliveries)
            }
        elif what == ("POST", "faults"):
            answer = len(emulator.faults.parse_lines(body.decode(), "request"))
        elif what == ("DELETE", "faults"):
            emulator.faults.clear()
            answer = 0
        elif what == ("POST", "limits"):
            wanted = orjson.loads(body)
            name = wanted.get("stream")
            if "on" in wanted:
                emulator.set_limits(bool(wanted["on"]), name)
            if "factor" in wanted:
                factor = float(wanted["factor"])
                if name is None:
                    emulator.scale_limits(factor)
                else:
                    emulator.scale_limits(name, factor)
            answer = True
        else:
            return 404, '"no such page"'
    except (ValueError, KeyError, AttributeError) as error:
        return 400, orjson.dumps(str(error)).decode()
    return 200, orjson.dumps(answer).decode()
