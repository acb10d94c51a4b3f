"""Raw and bulk messages by the million through `fastkin run`: does its memory stand still, is every record there?

    python tests/long/soak.py                       20 million messages, about ten minutes
    python tests/long/soak.py --messages 300000     a look whether it works

Two pipelines, one raw and one bulk, each with its own connection to the project's load source. Exit code 0:
nothing lost, and the slope of the resident memory after the warm-up is below 1 MiB per hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from typing import Any, Self

from stand import MIB, WELDER_BYTES, Memory, Report, Stand, record, service, slope, wait_for, workplace

from fastkin.bench.source import CYCLE, Source, _Player, frame

RAW_SHARE = 6 / 7  # of the messages
BULK_RECORDS = 5  # in each frame
BULK_BYTES = 60  # each
MOST_MIB_PER_HOUR = 1.0
SHARDS = 64  # of each stream: more than the rate needs, so that pacing is at work and never the limit

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "soak"
clean_session = false
receive_maximum = 20000

[kinesis]
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "raw"
stream = "raw"
topics = ["plant/#"]
budget_bytes = {budget}

[[pipeline]]
id = "bulk"
stream = "bulk"
format = "bulk"
topics = ["plant/#"]
budget_bytes = {budget}
"""


# -- the source's process ---------------------------------------------------------------------------


class _Door(asyncio.Protocol):
    """Looks at the client identifier of a CONNECT and hands the connection to the source it is meant for."""

    def __init__(self, sources: dict[bytes, Source]) -> None:
        self._sources = sources
        self._data = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        for ending, source in self._sources.items():
            if ending in self._data:
                player = _Player(source)
                self._transport.set_protocol(player)
                player.connection_made(self._transport)
                player.data_received(self._data)
                return


async def _serve(options: dict[str, Any]) -> None:
    raw, bulk = options["raw"], options["bulk"]
    share = raw / (raw + bulk)
    sources = [
        Source(
            bulk,
            payloads=[
                frame([record(i * BULK_RECORDS + k, BULK_BYTES) for k in range(BULK_RECORDS)])
                for i in range(min(CYCLE, bulk))
            ],
            rate=options["rate"] * (1 - share),
        ),
        Source(raw, payloads=[record(i) for i in range(min(CYCLE, raw))], rate=options["rate"] * share),
    ]
    loop = asyncio.get_running_loop()
    async with sources[0], sources[1]:
        door = await loop.create_server(lambda: _Door({b"soak-bulk": sources[0], b"soak": sources[1]}), "127.0.0.1", 0)
        print(json.dumps({"port": door.sockets[0].getsockname()[1]}), flush=True)
        waiting = [asyncio.ensure_future(source.done.wait()) for source in sources]
        while True:
            done, _ = await asyncio.wait(waiting, timeout=1.0, return_when=asyncio.ALL_COMPLETED)
            print(json.dumps({"bulk": sources[0].report(), "raw": sources[1].report()}), flush=True)
            if len(done) == len(waiting):
                break
        await asyncio.gather(*(source.left.wait() for source in sources))
        door.close()


class Plant:
    """The source's process and what it last said of itself."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.said: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(self._options)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port: int = json.loads(self.process.stdout.readline())["port"]
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said = json.loads(line)

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._thread.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def acked(self) -> int:
        return sum(each["acked"] for each in self.said.values())

    @property
    def done(self) -> bool:
        return bool(self.said) and all(each["done"] for each in self.said.values())


# -- the run --------------------------------------------------------------------------------------


def soak(args: argparse.Namespace) -> int:
    raw = round(args.messages * RAW_SHARE)
    bulk = args.messages - raw
    records = raw + bulk * BULK_RECORDS
    report = Report(
        f"soak: {args.messages:,} messages ({raw:,} raw of {WELDER_BYTES} B, {bulk:,} frames of {BULK_RECORDS}),"
        f" {records:,} records, {args.rate:,.0f} messages/s"
    )
    with (
        workplace(args.directory) as directory,
        Stand({"raw": SHARDS, "bulk": SHARDS}) as stand,
        Plant(raw=raw, bulk=bulk, rate=args.rate) as plant,
        service(directory, SETTINGS.format(port=plant.port, url=stand.url, budget=int(args.budget_mib * MIB))) as run,
        Memory(run, every_s=0.2, csv=directory / "memory.csv" if args.directory else None) as memory,
    ):
        wait_for(lambda: run.log().count("subscribed") >= 2, 30, "both pipelines subscribed")
        began = said_at = time.monotonic()
        timeout = args.messages / args.rate * 4 + 60
        while not plant.done:
            time.sleep(0.2)
            now = time.monotonic()
            if run.process is None or run.process.poll() is not None:
                report.claim(False, f"the service ended: {run.log()[-2000:]}")
                return report.end()
            if now - began > timeout:
                report.claim(False, f"not done within {timeout:.0f} s: {plant.said}")
                return report.end()
            if now - said_at >= 30:
                said_at = now
                report.note(f"{plant.acked:,} messages acknowledged, RSS {memory.now() / MIB:.1f} MiB")
        seconds = time.monotonic() - began
        points = list(memory.points)
        status = run.terminate()
        log = run.log()
        accounts = {
            "raw": stand.ask("account", "raw", min(CYCLE, raw), raw),
            "bulk": stand.ask("account", "bulk", min(CYCLE, bulk) * BULK_RECORDS, bulk * BULK_RECORDS),
        }
        counters = stand.ask("counters")
    report.note(f"{args.messages / seconds:,.0f} messages/s over {seconds:.0f} s, {counters['calls']:,} calls")
    report.note(log.strip().splitlines()[-1])
    for name, account in accounts.items():
        report.claim(account["missing"] == 0, f"{name}: {account['missing']} of {account['published']:,} lost")
        report.claim(account["repeated"] + account["strange"] == 0, f"{name}: {account['repeated']} stored twice")
    for name, each in plant.said.items():
        report.claim(
            each["acked"] == each["messages"] and not each["order_errors"],
            f"{name}: {each['acked']:,} acknowledged, {each['order_errors']} out of order, {each['connects']} connects",
        )
    report.claim(status == 0, f"exit status {status}")
    # Not from the first point: on a busy machine the service takes longer to start than a short run lasts.
    warm = began + args.warmup * seconds
    kept = [point for point in points if point[0] >= warm] or points[-1:]
    rate, half = slope(kept, max(1.0, min(15.0, (kept[-1][0] - kept[0][0]) / 12)))
    low = min(rss for _, rss in kept) / MIB
    high = max(rss for _, rss in kept) / MIB
    text = (
        f"RSS {rate:+.2f} MiB/h ± {half:.2f} (95 %) over {(kept[-1][0] - kept[0][0]) / 60:.1f} min after the warm-up,"
        f" {low:.1f} to {high:.1f} MiB, peak {memory.peak / MIB:.1f}"
    )
    if args.messages < 5_000_000:
        report.note(text + ": too short to judge the slope")
        growth = (kept[-1][1] - kept[0][1]) / MIB
        report.claim(growth < 8, f"RSS grew by {growth:.1f} MiB after the warm-up")
    else:
        report.claim(rate < MOST_MIB_PER_HOUR, text)
    return report.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000_000)
    parser.add_argument("--rate", type=float, default=35_000.0, help="messages per second")
    parser.add_argument("--budget-mib", type=float, default=16.0, help="of each pipeline")
    parser.add_argument("--warmup", type=float, default=0.2, help="share of the time that the slope leaves out")
    parser.add_argument("--directory", help="keep settings and log here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        try:
            import uvloop
        except ImportError:
            asyncio.run(_serve(json.loads(args.serve)))
        else:
            uvloop.run(_serve(json.loads(args.serve)))
        return 0
    return soak(args)


if __name__ == "__main__":
    sys.exit(main())
