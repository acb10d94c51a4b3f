"""What every bridge of bench_pipeline.py has in common: arguments, and its own CPU time from first to last record."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Arguments:
    port: int
    url: str
    count: int
    qos: int


def arguments() -> Arguments:
    port, url, count, qos = sys.argv[1:5]
    return Arguments(int(port), url, int(count), int(qos))


class Meter:
    """Started when the bridge is connected, stopped when the last record is stored."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._cpu = time.process_time()

    def report(self, count: int, **more: object) -> None:
        cpu = time.process_time() - self._cpu
        wall = time.perf_counter() - self._began
        status = Path("/proc/self/status").read_text()
        rss = int(status.partition("VmHWM:")[2].split()[0]) / 1024  # ru_maxrss would carry the parent's over
        line = {"count": count, "cpu_s": cpu, "wall_s": wall, "us_per_message": cpu / count * 1e6, "rss_mb": rss}
        print(json.dumps(line | more), flush=True)
