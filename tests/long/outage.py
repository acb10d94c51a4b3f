"""A stream that cannot be reached for minutes, with a spool and a SIGKILL in the middle: what became of every record?

    python tests/long/outage.py --minutes 10 --rate 2000 --budget-mib 16
    python tests/long/outage.py --minutes 1                   a look whether it works

mosquitto with a persistent session, QoS 1, most messages raw (152 B), some bulk frames; two pipelines with a spool
each. Exit code 0: nothing lost, duplicates within the bound, memory within budget plus 10 % above the idle service,
the backlog drained at no less than the pacing limit, and the accounting identity true at every scrape.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any, Self

from stand import MIB, WELDER_BYTES, Memory, Report, Scraper, Stand, record, service, wait_for, workplace

from fastkin._codec import encode_frame
from fastkin.config import Broker
from fastkin.mqtt.publisher import Publisher
from support.servers import free_port, mosquitto

SHARDS = 8  # of the raw stream: 8,000 records/s
BULK_SHARDS = 2
BULK_RECORDS = 5
BULK_SHARE = 0.1  # of the messages
FLOW_S = 10.0
BROKER = "max_queued_messages 0\nmax_inflight_messages 20000\nautosave_interval 60\n"
# Drawn keys do not fill the shards evenly within a second, and what a shard has above its limit is throttled: a
# stream that is used to the last record of every shard stores some percent less than the sum of their limits.
NEAR = 0.95

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "outage"
clean_session = false
receive_maximum = 20000

[kinesis]
endpoint_url = "{url}"
region = "us-east-1"

[status]
port = {status}

[[pipeline]]
id = "raw"
stream = "raw"
topics = ["raw/#"]
budget_bytes = {raw_budget}
on_full = "spool"
spool = "{directory}/raw.spool"
spool_max_bytes = 8589934592

[[pipeline]]
id = "bulk"
stream = "bulk"
format = "bulk"
topics = ["bulk/#"]
budget_bytes = {bulk_budget}
on_full = "spool"
spool = "{directory}/bulk.spool"
spool_max_bytes = 8589934592
"""


async def _publish(options: dict[str, Any]) -> None:
    """The plant's process: publishes until its stdin ends, then says how many."""
    publisher = Publisher(Broker(host="127.0.0.1", port=options["port"], clean_session=True))
    await publisher.connect()
    loop = asyncio.get_running_loop()
    over = loop.run_in_executor(None, sys.stdin.read)
    rate: float = options["rate"]
    began = time.monotonic()
    raw = bulk = 0
    owed = 0.0
    while not over.done():
        due = int((time.monotonic() - began) * rate)
        while raw + bulk < due:
            owed += BULK_SHARE
            if owed >= 1.0:
                owed -= 1.0
                first = bulk * BULK_RECORDS
                frame = encode_frame([record(first + k) for k in range(BULK_RECORDS)])
                await publisher.publish("bulk/1", frame, 1)
                bulk += 1
            else:
                await publisher.publish("raw/1", record(raw), 1)
                raw += 1
        await asyncio.sleep(0.01)
    await publisher.drain()
    await publisher.close()
    print(json.dumps({"raw": raw, "bulk": bulk * BULK_RECORDS, "seconds": time.monotonic() - began}), flush=True)


class Plant:
    def __init__(self, **options: Any) -> None:
        self._options = options

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--publish", json.dumps(self._options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for end in (self.process.stdin, self.process.stdout):
            assert end is not None
            end.close()

    def stop(self) -> dict[str, Any]:
        """Records published, by stream."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.process.wait(30)
        return said


def outage(args: argparse.Namespace) -> int:
    away_s = args.minutes * 60
    budget = int(args.budget_mib * MIB)
    report = Report(
        f"outage: {args.minutes:g} min without the stream at {args.rate:,.0f} messages/s, budget {args.budget_mib:g}"
        " MiB, SIGKILL in the middle"
    )
    status_port = free_port()
    with (
        workplace(args.directory) as directory,
        mosquitto(BROKER, persistence=True) as broker,
        Stand({"raw": SHARDS, "bulk": BULK_SHARDS}, latency_ms=20) as stand,
        service(
            directory,
            SETTINGS.format(
                port=broker.port, url=stand.url, status=status_port, directory=directory,
                raw_budget=budget * 3 // 4, bulk_budget=budget // 4,
            ),
        ) as run,
        Memory(run) as memory,
        Scraper(status_port) as scraper,
    ):  # fmt: skip
        wait_for(lambda: run.log().count("subscribed") >= 2, 30, "both pipelines subscribed")
        time.sleep(1.0)
        idle = memory.now()
        with Plant(port=broker.port, rate=args.rate) as plant:
            time.sleep(FLOW_S)
            report.note(f"idle RSS {idle / MIB:.1f} MiB, {stand.stored():,} records stored; the stream goes away")
            before = stand.stored()
            stand.ask("away")
            gone = time.monotonic()
            said_at, killed = gone, False
            while (passed := time.monotonic() - gone) < away_s:
                time.sleep(0.2)
                if not killed and passed > away_s / 2:
                    killed = True
                    report.note("SIGKILL")
                    run.kill()
                    run.start()
                if time.monotonic() - said_at >= 30:
                    said_at = time.monotonic()
                    spooled = sum(scraper.value(name, "fastkin_spool_records") for name in ("raw", "bulk"))
                    report.note(f"{spooled:,.0f} records in the spool, RSS {memory.now() / MIB:.1f} MiB")
            behind = scraper.value("raw", "fastkin_spool_records") + scraper.value("raw", "fastkin_records_in_flight")
            report.claim(stand.stored() == before, "nothing was stored meanwhile")
            stand.ask("back")
            back = time.monotonic()
            wait_for(lambda: stand.stored() > before, 60, "the first record is stored", every_s=0.02)
            first = time.monotonic()
            at = stand.stored("raw")
            report.note(
                f"the stream is back, {behind:,.0f} raw records behind; the first came after {first - back:.1f} s"
            )
            drained_by = first + 60 + 3 * behind / (SHARDS * 1000 - args.rate)
            raw_rate = 0.0
            while time.monotonic() < drained_by:
                time.sleep(0.2)
                left = scraper.value("raw", "fastkin_spool_records")
                # to nine tenths: the rest is sent while what is new comes in between
                if left <= behind * 0.1:
                    raw_rate = (stand.stored("raw") - at) / (time.monotonic() - first)
                    break
            report.note(f"{raw_rate:,.0f} raw records/s while draining")
            published = plant.stop()
        total = published["raw"] + published["bulk"]
        wait_for(lambda: stand.stored() >= total, 600, f"{total} records are stored")
        wait_for(
            lambda: all(scraper.value(name, "fastkin_records_in_flight") == 0 for name in ("raw", "bulk")),
            30,
            "settled",
        )
        time.sleep(2.0)
        status = run.terminate()
        log = run.log()
        accounts = {name: stand.ask("account", name, published[name], published[name]) for name in ("raw", "bulk")}
    report.note(f"{total:,} records published, {total / published['seconds']:,.0f}/s; {WELDER_BYTES} B each")
    # At the kill the stream took nothing: only what it had answered before and was not told can come twice. And in
    # the drain there is no fault. What the sender itself calls possible is the bound.
    bound = sum(
        int(line.partition("duplicates-possible ")[2].split(";")[0].split(",")[0])
        for line in log.splitlines()
        if "duplicates-possible " in line
    )
    unknown = sum(account["repeated"] for account in accounts.values())
    for name, account in accounts.items():
        report.claim(account["missing"] == 0, f"{name}: {account['missing']} of {account['published']:,} lost")
        report.claim(account["strange"] == 0, f"{name}: {account['strange']} that nobody published")
    report.claim(unknown <= bound + args.window, f"{unknown} stored twice, bound {bound} + {args.window} at the kill")
    growth = memory.peak - idle
    report.claim(
        growth <= budget * 1.1, f"RSS peak {growth / MIB:.1f} MiB above idle, {budget * 1.1 / MIB:.1f} are allowed"
    )
    limit = SHARDS * 1000
    report.claim(raw_rate >= NEAR * limit, f"drained at {raw_rate:,.0f} records/s, the pacing limit is {limit:,}")
    report.claim(
        scraper.scrapes > 0 and not scraper.wrong,
        f"identity at {scraper.scrapes} scrapes, wrong at {len(scraper.wrong)}{': ' if scraper.wrong else ''}"
        + "; ".join(scraper.wrong[:3]),
    )
    report.claim(status == 0, f"exit status {status}")
    return report.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="without the stream")
    parser.add_argument("--rate", type=float, default=2000.0, help="messages per second")
    parser.add_argument("--budget-mib", type=float, default=16.0, help="of both pipelines together")
    parser.add_argument("--window", type=int, default=2000, help="records that the kill may make come twice")
    parser.add_argument("--directory", help="keep settings, spool and log here")
    parser.add_argument("--publish", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish is not None:
        asyncio.run(_publish(json.loads(args.publish)))
        return 0
    return outage(args)


if __name__ == "__main__":
    sys.exit(main())
