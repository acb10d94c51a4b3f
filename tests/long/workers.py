"""`fastkin run --workers`: the CPU time of a message with one worker and with two, and what a SIGKILL loses.

    python tests/long/workers.py                            200,000 messages each
    python tests/long/workers.py --messages 20000

A real mosquitto, and the emulator in a process of its own. The workers are held (SIGSTOP) while the messages are
published, so that each round begins with all of them at the broker: else the CPU time of a message is a question of how
many come with one read, which is how fast the publisher is. What counts is the CPU time of all processes of the service
from there to the last stored record, median of the rounds.

Exit code 0: two workers take at most 1.1 times the CPU time of one, each was fed, and nothing is lost when one is
killed half-way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import psutil
from stand import Report, Stand, record, service, wait_for, workplace

from fastkin.config import Broker
from fastkin.mqtt.publisher import Publisher
from support.servers import free_port, mosquitto

if TYPE_CHECKING:
    from support.running import Service

SETTLE_S = 3.0
CONF = "max_inflight_messages 10000\nmax_queued_messages 0\n"
SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "svc"
keep_alive_s = 3600

[kinesis]
stream = "s"
endpoint_url = "{url}"
region = "us-east-1"

[status]
port = {status}

[workers]
count = {count}

[[pipeline]]
id = "a"
topics = ["plant/#"]
dead_letter = "none"
"""


def workers(status: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{status}/healthz", timeout=20) as reply:
        return json.loads(reply.read())["workers"]  # type: ignore[no-any-return]


def cpu_s(run: Service) -> float:
    """Of the process above and its workers."""
    assert run.process is not None
    above = psutil.Process(run.process.pid)
    times = [each.cpu_times() for each in (above, *above.children(recursive=True))]
    return sum(each.user + each.system for each in times)


async def publish(port: int, begin: int, end: int) -> None:
    async with Publisher(Broker(host="127.0.0.1", port=port), window=1000) as publisher:
        for n in range(begin, end):
            await publisher.publish("plant/1/welder", record(n), 1)
        await publisher.drain()


def round_of(count: int, messages: int, *, kill: bool, report: Report) -> tuple[float, dict[str, Any], list[float]]:
    """CPU microseconds a message, the account, and how many each worker took."""
    with workplace(None) as directory, Stand({"s": 4}, limits=False) as kinesis, mosquitto(CONF) as broker:
        status = free_port()
        toml = SETTINGS.format(port=broker.port, url=kinesis.url, status=status, count=count)
        with service(directory, toml) as run:
            wait_for(lambda: run.log().count(" subscribed ") == count, 600, "subscribed")
            wait_for(lambda: "running: " in run.log(), 600, "all of them run")
            pids = [each["pid"] for each in workers(status).values()]
            time.sleep(SETTLE_S)  # what the start has to do is over
            if kill:
                before = cpu_s(run)
                asyncio.run(publish(broker.port, 0, messages // 2))
                os.kill(pids[1], signal.SIGKILL)
                asyncio.run(publish(broker.port, messages // 2, messages))
            else:
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                asyncio.run(publish(broker.port, 0, messages))
                before = cpu_s(run)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            wait_for(lambda: kinesis.stored("s") >= messages, 300, "all stored")
            spent = cpu_s(run) - before
            if kill:
                wait_for(lambda: not kinesis.ask("account", "s", messages, messages)["missing"], 60, "none missing")
            with urllib.request.urlopen(f"http://127.0.0.1:{status}/metrics", timeout=20) as reply:
                lines = [line for line in reply.read().decode().splitlines() if "records_stored_total{" in line]
            account = kinesis.ask("account", "s", messages, messages)
            run.terminate()
            each = [float(line.rpartition(" ")[2]) for line in lines]
            us = spent / messages * 1e6
            what = f"{count} workers{', one killed' if kill else ''}: {us:.2f} us a message"
            found = f"{account['missing']} missing, {account['repeated']} twice"
            report.note(f"{what}, {found}, taken by each: {[int(one) for one in each]}")
            return us, account, each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    report = Report(f"workers, {args.messages} messages of 152 B")
    one, two, fed = [], [], True
    for _ in range(args.rounds):
        one.append(round_of(1, args.messages, kill=False, report=report)[0])
        us, account, each = round_of(2, args.messages, kill=False, report=report)
        two.append(us)
        fed = fed and len(each) == 2 and min(each) > args.messages / 10 and not account["missing"]
    ratio = sorted(two)[len(two) // 2] / sorted(one)[len(one) // 2]
    report.claim(ratio <= 1.1, f"two workers take {ratio:.2f} times the CPU time of one (bound 1.10)")
    report.claim(fed, "both were fed, and nothing is missing")
    _, account, _ = round_of(2, args.messages, kill=True, report=report)
    report.claim(not account["missing"], f"{account['missing']} lost with a worker killed, {account['repeated']} twice")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
