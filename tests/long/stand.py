"""What the long runs share: numbered records, a stream that counts them, `fastkin run` as a process, its memory.

Every record carries its number at a fixed place. The emulator runs in a process of its own and keeps no payload:
it counts, per number, how often it was stored. So twenty million records cost a few megabytes and every one of
them is accounted for.

    python tests/long/stand.py '{"streams": {"raw": 4}, ...}'     the emulator's process; one JSON line per command
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

ROOT = Path(__file__).resolve().parent.parent.parent
for _path in (ROOT / "tests", ROOT / "src"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

from fastkin.emulator import Emulator  # noqa: E402
from fastkin.emulator.streams import Batch, Stream  # noqa: E402
from support.running import Service, service  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MIB = 2**20
FIRST = 10**9  # numbers are written with ten digits, at bytes 5 to 14
_FILL = b',"name":"device%03d","model":"welder","status":"running","sensor_1":12.%d,"sensor_2":34.5,"sensor_3":56.7,'
WELDER_BYTES = 152
_START_S = 30.0


def record(n: int, size: int = WELDER_BYTES) -> bytes:
    """Record `n` as JSON of `size` bytes, 40 at least."""
    head = b'{"n":%d' % (FIRST + n)
    room = size - len(head) - 1
    fill = (_FILL % (n % 1000, n % 10))[: max(0, room - 9)]
    fill = fill[: fill.rfind(b",") + 1] if b"," in fill[1:] else b","
    return head + fill + b'"z":"' + b"." * (room - len(fill) - 6) + b'"}'


def number(data: bytes) -> int:
    return int(data[5:15]) - FIRST


# -- the emulator's process -----------------------------------------------------------------------


class Tally:
    """How often each number was stored, per stream."""

    def __init__(self) -> None:
        self.counts: dict[str, array[int]] = {}
        self.stored: dict[str, int] = {}
        self._put = Stream.put

    def install(self) -> None:
        """Count what any stream of this process stores from now on."""
        tally, put = self, self._put

        def counting(stream: Stream, batch: Batch, *args: Any, **more: Any) -> tuple[list[str], int, int]:
            entries, throttled, failed = put(stream, batch, *args, **more)
            datas: Sequence[bytes] = batch.datas
            if failed:
                datas = [data for data, entry in zip(datas, entries, strict=True) if '"ErrorCode"' not in entry]
            tally.add(stream.name, datas)
            return entries, throttled, failed

        Stream.put = counting  # type: ignore[method-assign]

    def add(self, name: str, datas: Sequence[bytes]) -> None:
        counts = self.counts.get(name)
        if counts is None:
            counts = self.counts[name] = array("H")
        for data in datas:
            n = int(data[5:15]) - FIRST
            try:
                counts[n] += 1
            except IndexError:
                counts.extend(array("H", bytes(2 * (n + 1 - len(counts) + 65_536))))
                counts[n] += 1
        self.stored[name] = self.stored.get(name, 0) + len(datas)

    def account(self, name: str, cycle: int, total: int) -> dict[str, Any]:
        """`total` records were published, numbered 0..cycle-1 again and again."""
        counts = self.counts.get(name, array("H"))
        whole, part = divmod(total, cycle)
        missing = repeated = strange = 0
        examples: list[int] = []
        for n in range(cycle):
            have = counts[n] if n < len(counts) else 0
            more = have - (whole + (n < part))
            if more < 0:
                missing -= more
                examples += [n] if len(examples) < 10 else []
            else:
                repeated += more
        for n in range(cycle, len(counts)):
            strange += counts[n]
        return {
            "published": total, "stored": self.stored.get(name, 0), "missing": missing, "repeated": repeated,
            "strange": strange, "examples": examples,
        }  # fmt: skip


async def _tally(options: dict[str, Any]) -> None:
    tally = Tally()
    if options.pop("numbered", True):
        tally.install()
    emulator = Emulator(keep="count", **options)
    await emulator.start()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def say(answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    say({"port": emulator.port})
    while line := await reader.readline():
        command, *arguments = json.loads(line)
        if command == "stored":
            say({name: stream.records for name, stream in emulator.service.streams.items()})
        elif command == "account":
            say(tally.account(*arguments))
        elif command == "away":  # nobody listens any more, connections are reset
            await emulator.close()
            say({})
        elif command == "back":
            await emulator.start()
            say({})
        elif command == "scale":
            emulator.scale_limits(arguments[0])
            say({})
        elif command == "counters":
            counters = emulator.counters
            say({"calls": counters.calls, "throttled": counters.throttled, "refused": counters.refused})
        else:
            raise ValueError(command)
    await emulator.close()


class Stand:
    """The emulator's process, seen from the run. Calls may come from several threads."""

    def __init__(self, streams: dict[str, int], **options: Any) -> None:
        self._options = {"streams": streams, **options}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(self._options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.port: int = self._read()["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the emulator's process ended")
        return json.loads(line)

    def ask(self, *command: Any) -> Any:
        assert self.process.stdin is not None
        with self._lock:
            self.process.stdin.write(json.dumps(command) + "\n")
            return self._read()

    def stored(self, stream: str | None = None) -> int:
        counts: dict[str, int] = self.ask("stored")
        return sum(counts.values()) if stream is None else counts.get(stream, 0)


# -- memory ---------------------------------------------------------------------------------------


def rss_of(pid: int) -> int:
    """Resident bytes of a process; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGESIZE")


class Memory:
    """RSS of a service, looked at all the time; `run` may be killed and started meanwhile."""

    def __init__(self, run: Service, every_s: float = 0.05, *, csv: Path | None = None) -> None:
        """`csv`: note each second's time, resident bytes and those of them that are no file's."""
        self._run = run
        self._to = csv.open("w") if csv is not None else None
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0
        self.points: list[tuple[float, int]] = []  # one per second

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(10)
        if self._to is not None:
            self._to.close()

    def _anonymous(self) -> int:
        assert self._run.process is not None
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{self._run.process.pid}/status").read_text()
            return int(status.partition("RssAnon:")[2].split()[0]) * 1024
        return 0

    def now(self) -> int:
        return rss_of(self._run.process.pid) if self._run.process is not None else 0

    def settle(self, seconds: float = 3.0) -> int:
        """RSS once it has stood still for a second."""
        until = time.monotonic() + seconds
        before = self.now()
        while time.monotonic() < until:
            time.sleep(0.5)
            if (after := self.now()) == before:
                break
            before = after
        return before

    def _watch(self) -> None:
        noted = 0.0
        while not self._over.wait(self._every_s):
            rss = self.now()
            self.peak = max(self.peak, rss)
            if (now := time.monotonic()) - noted >= 1.0 and rss:
                noted = now
                self.points.append((now, rss))
                if self._to is not None:
                    self._to.write(f"{now:.1f},{rss},{self._anonymous()}\n")
                    self._to.flush()


def slope(points: Sequence[tuple[float, int]], block_s: float = 10.0) -> tuple[float, float]:
    """(MiB per hour, half width of its 95 % interval) by least squares over means of blocks.

    Neighbouring samples are alike, so that single ones would make the interval too narrow.
    """
    blocks: dict[int, list[tuple[float, float]]] = {}
    for at, rss in points:
        blocks.setdefault(int((at - points[0][0]) / block_s), []).append((at / 3600, rss / MIB))
    means = [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in blocks.values()]
    n = len(means)
    if n < 3:
        return math.nan, math.inf
    mx = sum(x for x, _ in means) / n
    my = sum(y for _, y in means) / n
    sxx = sum((x - mx) ** 2 for x, _ in means)
    b = sum((x - mx) * (y - my) for x, y in means) / sxx
    residual = sum((y - my - b * (x - mx)) ** 2 for x, y in means)
    t = 1.96 + 2.4 / (n - 2) + 5.0 / (n - 2) ** 2  # Student's quantile, near enough above three blocks
    return b, t * math.sqrt(residual / (n - 2) / sxx)


# -- the service ----------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace(keep: str | None) -> Iterator[Path]:
    """A directory for settings, spool and logs: the one given, or one that goes away."""
    if keep:
        path = Path(keep)
        path.mkdir(parents=True, exist_ok=True)
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fastkin-long-") as name:
        yield Path(name)


def wait_for(condition: Callable[[], Any], timeout: float, what: str, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(every_s)


_SAMPLE = re.compile(r"^(fastkin_\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


class Scraper:
    """Reads /metrics all the time and holds the accounting identity against each page."""

    def __init__(self, port: int, every_s: float = 1.0) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.scrapes = 0
        self.wrong: list[str] = []
        self.latest: dict[str, dict[str, float]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(10)

    def value(self, pipeline: str, name: str) -> float:
        return self.latest.get(pipeline, {}).get(name, 0.0)

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                with urllib.request.urlopen(self._url, timeout=5) as reply:
                    page = reply.read().decode()
            except OSError:
                continue  # it is being killed or started
            self.scrapes += 1
            self.latest = sums(page)
            for pipeline, have in self.latest.items():
                if (wrong := imbalance(have)) is not None:
                    self.wrong.append(f"{pipeline}: {wrong}")


def sums(page: str) -> dict[str, dict[str, float]]:
    """Per pipeline: each metric, summed over its other labels."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in _SAMPLE.findall(page):
        pipeline = re.search(r'pipeline="([^"]*)"', labels)
        if pipeline is not None:
            have = found.setdefault(pipeline[1], {})
            have[name] = have.get(name, 0.0) + float(value)
    return found


_ENDS = (
    "fastkin_records_stored_total", "fastkin_records_dead_lettered_total", "fastkin_records_filtered_total",
    "fastkin_records_dropped_total", "fastkin_records_in_flight", "fastkin_spool_records",
)  # fmt: skip


def imbalance(have: dict[str, float]) -> str | None:
    """What is wrong with: received == stored + dead-lettered + filtered + dropped + in flight + spooled."""
    received = have.get("fastkin_records_received_total")
    if received is None:
        return None
    ends = {name: have.get(name, 0.0) for name in _ENDS}
    if received == sum(ends.values()):
        return None
    return f"received {received:.0f}, but " + ", ".join(f"{name} {value:.0f}" for name, value in ends.items())


class Report:
    """What was found, line by line, and whether it holds."""

    def __init__(self, title: str) -> None:
        self.held = True
        self._began = time.monotonic()
        print(title, flush=True)

    def note(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:7.1f} s] {text}", flush=True)

    def claim(self, holds: bool, text: str) -> None:
        self.held = self.held and holds
        print(f"{'held  ' if holds else 'BROKEN'} {text}", flush=True)

    def end(self) -> int:
        print("held" if self.held else "DOES NOT HOLD", flush=True)
        return 0 if self.held else 1


__all__ = ["MIB", "Memory", "Report", "Scraper", "Service", "Stand", "record", "service", "wait_for", "workplace"]

if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(_tally(json.loads(sys.argv[1])))
    else:
        uvloop.run(_tally(json.loads(sys.argv[1])))
