"""A spool on a disk that fills up while the stream is away: intake pauses, one ERROR says why, nothing is lost.

    python tests/long/disk_full.py                            root: a tmpfs of its own, mounted for the run
    python tests/long/disk_full.py --directory /mnt/small     a small file system that is there already

Exit code 0: the spool stopped growing and intake paused, exactly one ERROR names path and cure, memory stayed
within the budget plus 10 %, and when there was space again everything published was stored.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from outage import Plant
from stand import MIB, Memory, Report, Scraper, Stand, service, wait_for, workplace

from support.servers import free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator

FREE_MIB = 12  # for the spool to fill
BALLAST_MIB = 96  # freed when space shall be back
TIGHT_MIB = 8  # the same where what comes fills the disk again before the stream is back

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "disk"
clean_session = false
receive_maximum = 20000

[kinesis]
endpoint_url = "{url}"
region = "us-east-1"
stream = "raw"

[status]
port = {status}

[[pipeline]]
id = "raw"
topics = ["raw/#"]
budget_bytes = {budget}
on_full = "spool"
spool = "{disk}/raw.spool"
"""


@contextlib.contextmanager
def small_disk(given: str | None, mib: int) -> Iterator[Path]:
    if given:
        yield Path(given)
        return
    if os.geteuid() != 0:
        sys.exit("only root can mount a tmpfs: run as root, or give --directory of a small file system")
    with tempfile.TemporaryDirectory(prefix="fastkin-disk-") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def disk_full(args: argparse.Namespace) -> int:
    budget = int(args.budget_mib * MIB)
    ballast_mib = TIGHT_MIB if args.disk_full else BALLAST_MIB
    report = Report(
        f"disk full: a spool on {FREE_MIB} MiB, {args.rate:,.0f} messages/s, budget {args.budget_mib:g} MiB"
    )
    status_port = free_port()
    with (
        small_disk(args.directory, FREE_MIB + ballast_mib) as disk,
        workplace(None) as directory,
        mosquitto("max_queued_messages 0\nmax_inflight_messages 20000\n", persistence=True) as broker,
        Stand({"raw": 8, "bulk": 8}, latency_ms=20) as stand,
        service(
            directory,
            SETTINGS.format(port=broker.port, url=stand.url, status=status_port, disk=disk, budget=budget),
        ) as run,
        Memory(run) as memory,
        Scraper(status_port) as scraper,
    ):
        wait_for(lambda: "subscribed" in run.log(), 30, "subscribed")
        time.sleep(1.0)
        idle = memory.now()
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(ballast_mib * MIB))

        def errors() -> list[str]:
            return [line for line in run.log().splitlines() if " ERROR " in line and str(disk) in line]

        with Plant(port=broker.port, rate=args.rate) as plant:
            time.sleep(3.0)
            stand.ask("away")
            wait_for(errors, 120, "an ERROR names the spool")
            report.note(f"full: {errors()[0]}")
            wait_for(lambda: scraper.value("raw", "fastkin_intake_paused_seconds_total") > 1.0, 60, "intake pauses")
            received = scraper.value("raw", "fastkin_records_received_total")
            time.sleep(args.seconds)
            more = scraper.value("raw", "fastkin_records_received_total") - received
            report.claim(more <= 0.02 * args.rate * args.seconds, f"{more:.0f} records taken while the disk was full")
            report.claim(
                len(errors()) == 1 and "free" in errors()[0].lower(), f"{len(errors())} ERROR lines, path and cure told"
            )
            ballast.unlink()
            stopped = received + more
            wait_for(
                lambda: scraper.value("raw", "fastkin_records_received_total") > stopped + args.rate, 30,
                "intake goes on with space",
            )  # fmt: skip
            report.note("space is back: intake goes on")
            stand.ask("back")
            published = plant.stop()
        wait_for(lambda: stand.stored("raw") >= published["raw"], 300, "everything is stored")
        time.sleep(2.0)
        status = run.terminate()
        account = stand.ask("account", "raw", published["raw"], published["raw"])
    report.claim(account["missing"] == 0, f"{account['missing']} of {account['published']:,} lost")
    report.note(f"{account['repeated']} stored twice")
    growth = memory.peak - idle
    report.claim(growth <= budget * 1.1, f"RSS {growth / MIB:.1f} MiB above idle, {budget * 1.1 / MIB:.1f} allowed")
    report.claim(
        scraper.scrapes > 0 and not scraper.wrong,
        f"identity at {scraper.scrapes} scrapes, wrong at {len(scraper.wrong)} {scraper.wrong[:3]}",
    )
    report.claim(status == 0, f"exit status {status}")
    return report.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=3000.0, help="messages per second")
    parser.add_argument("--budget-mib", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=15.0, help="with a full disk")
    parser.add_argument("--directory", help="a small file system for the spool")
    parser.add_argument("--tight", action="store_true", help="little space comes back: the disk is full again at once")
    return disk_full(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
