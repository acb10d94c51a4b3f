"""What `fastkin run` takes of memory while a stream takes a tenth of what is offered, and in the drain after it.

    python tests/long/memory.py                                 every case
    python tests/long/memory.py --case 8:152 --seconds 30       budget in MiB : bytes of a record

Exit code 0: in every case the resident memory stayed within the budget plus 10 % above that of the idle service
(plus the floor that DESIGN.md tells, which no budget goes below), and everything was stored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

from stand import MIB, ROOT, Memory, Report, Stand, service, wait_for, workplace

# budget in MiB, bytes of a record
CASES = (
    (8, 152),
    (16, 152),
    (1, 152),
    (8, 10_000),
    (16, 10_000),
    (1, 10_000),
    (8, 900_000),
    (16, 900_000),
)
OFFERED = {152: 3000.0, 10_000: 400.0, 900_000: 5.0}  # messages per second
SHARDS = 8
FLOW_S = 5.0

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "memory"
clean_session = false
receive_maximum = 20000

[kinesis]
stream = "welders"
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "welders"
topics = ["plant/#"]
budget_bytes = {budget}
max_record_bytes = {largest}
"""


def floor_of(size: int) -> int:
    """What a budget does not bound: see DESIGN.md. The packet being received and its record as it is encoded."""
    return MIB + 4 * size


def case(budget_mib: float, size: int, seconds: float, report: Report) -> None:
    budget = int(budget_mib * MIB)
    rate = OFFERED.get(size, min(3000.0, 4_000_000 / size))
    messages = round(rate * (FLOW_S + seconds))
    source = subprocess.Popen(
        [sys.executable, "-m", "fastkin.bench.source", "--messages", str(messages), "--payload", str(size),
         "--rate", str(rate), "--window", "20000", "--timeout", "900"],
        stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    try:
        assert source.stdout is not None
        port = int(source.stdout.readline())
        with (
            workplace(None) as directory,
            Stand({"welders": SHARDS}, numbered=False, latency_ms=20) as stand,
            service(
                directory, SETTINGS.format(port=port, url=stand.url, budget=budget, largest=min(MIB, budget // 4))
            ) as run,
            Memory(run, every_s=0.02) as memory,
        ):
            wait_for(lambda: "subscribed" in run.log(), 20, "subscribed", every_s=0.01)
            idle = memory.now()
            wait_for(lambda: stand.stored() > rate * FLOW_S * 0.8, 60, "records flow")
            flowing, memory.peak = memory.peak, 0
            stand.ask("scale", 0.1)
            time.sleep(seconds)
            throttled, memory.peak = memory.peak, 0
            behind = round(rate * (FLOW_S + seconds)) - stand.stored()
            stand.ask("scale", 1.0)
            wait_for(lambda: stand.stored() >= messages, 300, f"{messages} are stored")
            drained, memory.peak = memory.peak, 0
            time.sleep(1.0)
            after = memory.now()
            status = run.terminate()
            last = run.log().strip().splitlines()[-1]
    finally:
        source.kill()
        source.wait()
        assert source.stdout is not None
        source.stdout.close()
    most = max(flowing, throttled, drained) - idle
    allowed = max(budget * 1.1, budget + floor_of(size)) if size > 64 * 1024 or budget < 8 * MIB else budget * 1.1
    report.claim(
        most <= allowed and status == 0,
        f"budget {budget_mib:g} MiB, {size:,} B: +{most / MIB:.1f} MiB of {allowed / MIB:.1f}"
        f" (idle {idle / MIB:.1f}; flowing {mib(flowing - idle)}, throttled {mib(throttled - idle)},"
        f" draining {mib(drained - idle)}, after {mib(after - idle)}; {behind:,} behind)",
    )
    if status:
        report.note(last)


def mib(nbytes: int) -> str:
    return f"{nbytes / MIB:+.1f}"


def _case(text: str) -> tuple[float, int]:
    budget, _, size = text.partition(":")
    return float(budget), int(size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=_case, action="append", help="MIB:BYTES, may be given again")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the throttle")
    args = parser.parse_args()
    report = Report(f"memory: {args.seconds:g} s at a tenth of what is offered, then the drain")
    cases: Any = args.case or CASES
    for budget_mib, size in cases:
        case(budget_mib, size, args.seconds, report)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
