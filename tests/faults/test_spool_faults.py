"""The spool: outages longer than memory, kills at every moment, disks that fail, and the policies that drop."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from disks import SmallDisk
from harness import Rig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1000  # bytes a record: memory holds some hundred
MEMORY = {"budget_bytes": 2**20, "max_batch_bytes": 2**17, "max_record_bytes": 2**15}


def spool_options(path: Path, **more: Any) -> dict[str, Any]:
    pipeline = {**MEMORY, "on_full": "spool", "spool": str(path), "spool_after_s": 0.3} | more.pop("pipeline", {})
    return {
        "spool": True,
        "pipeline": pipeline,
        "kinesis": {"request_timeout_s": 0.5, "connect_timeout_s": 0.5, "max_connections": 2},
        **more,
    }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with SmallDisk(tmp_path / "disk", 48 * 2**20) as made:
        yield made


def outage(rig: Rig) -> None:
    rig.wait(rig.kinesis_way.refuse())
    rig.call(rig.kinesis_way.cut)


def over(rig: Rig) -> None:
    rig.wait(rig.kinesis_way.start())


def all_acknowledged(rig: Rig) -> None:
    """All that was published is on the disk or in the stream: the broker holds nothing any more."""
    rig.until(lambda: len(rig.ledger.acked) >= rig.total, "everything is acknowledged in the outage")


def test_an_outage_longer_than_memory(tmp_path: Path) -> None:
    with Rig(tmp_path, **spool_options(tmp_path / "spool")) as rig:
        rig.flow(500, size=SIZE)
        rig.stored(200)
        outage(rig)
        rig.flow(4000, rate=4000, size=SIZE)
        all_acknowledged(rig)
        assert len(rig.spooled()) > 2000
        over(rig)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_records_leave_the_spool_in_the_order_they_came(tmp_path: Path) -> None:
    """First sending is in order of arrival: with one call at a time the stream shows it."""
    options = spool_options(tmp_path / "spool", pipelines=("raw",), shards=1)
    options["kinesis"]["max_connections"] = 1
    with Rig(tmp_path, **options) as rig:
        outage(rig)
        rig.flow(3000, rate=4000, size=SIZE)
        all_acknowledged(rig)
        over(rig)
        rig.settle()
        assert rig.finish()["dup"] == 0
        order = [int(data[1:8]) for data in rig.contents()]
        assert order == sorted(order)


@pytest.mark.parametrize("seed", [pytest.param(1), *(pytest.param(n, marks=pytest.mark.faults_full) for n in (2, 3))])
def test_sigkill_while_it_spools(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with Rig(tmp_path, **spool_options(tmp_path / "spool")) as rig:
        rig.flow(300, size=SIZE)
        rig.stored(100)
        outage(rig)
        rig.flow(3000, rate=2000, size=SIZE)
        for part in (500, 1500):
            rig.until(lambda part=part: len(rig.ledger.acked) > part, "records are spooled")
            time.sleep(rng.random() * 0.2)
            rig.kill()
            rig.restart()
        all_acknowledged(rig)
        over(rig)
        rig.settle()
        rig.finish(least_redelivered=1)


@pytest.mark.faults_full
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sigkill_while_the_spool_is_replayed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with Rig(tmp_path, emulator={"latency_ms": 60}, **spool_options(tmp_path / "spool")) as rig:
        outage(rig)
        rig.flow(4000, rate=4000, size=SIZE)
        all_acknowledged(rig)
        over(rig)
        for part in (300, 900, 1500):
            rig.stored(part)
            time.sleep(rng.random() * 0.1)
            rig.kill()
            rig.restart()
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_a_torn_tail_of_the_spools_log(tmp_path: Path) -> None:
    """What a crash left half written behind the last commit is not read, all before it is."""
    with Rig(tmp_path, **spool_options(tmp_path / "spool")) as rig:
        outage(rig)
        rig.flow(2000, rate=4000, size=SIZE)
        rig.until(lambda: len(rig.ledger.acked) > 800, "records are spooled")
        rig.kill()
        torn = 0
        for path in tmp_path.glob("spool.*-wal"):
            whole = path.read_bytes()
            if len(whole) > 10_000:
                torn += 1
                path.write_bytes(whole + whole[-8216:-3000])  # a frame again, half of it
        assert torn, "there was no log to tear"
        rig.restart()
        over(rig)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_sigterm_in_an_outage_leaves_all_in_the_spool(tmp_path: Path) -> None:
    options = spool_options(tmp_path / "spool", pipeline={"shutdown_timeout_s": 2})
    with Rig(tmp_path, **options) as rig:
        outage(rig)
        rig.flow(2500, rate=4000, size=SIZE)
        rig.until(lambda: len(rig.ledger.acked) > 500, "records are spooled")
        rig.terminate()
        over(rig)
        rig.restart()
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_kinesis_comes_and_goes_while_the_spool_is_replayed(tmp_path: Path) -> None:
    with Rig(tmp_path, **spool_options(tmp_path / "spool")) as rig:
        rig.flow(4000, rate=1500, size=SIZE)
        for part in (100, 800, 1800):
            rig.stored(part)
            outage(rig)
            time.sleep(0.8)
            over(rig)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_the_broker_is_cut_while_it_spools(tmp_path: Path) -> None:
    with Rig(tmp_path, **spool_options(tmp_path / "spool")) as rig:
        outage(rig)
        rig.flow(2500, rate=2500, size=SIZE)
        for part in (300, 900, 1500):
            rig.until(lambda part=part: len(rig.ledger.acked) > part, "records are spooled")
            rig.call(rig.broker_way.cut)
        all_acknowledged(rig)
        over(rig)
        rig.settle()
        rig.finish()


# -- its disk


@pytest.mark.faults_full
def test_the_disk_of_the_spool_is_full(tmp_path: Path, disk: SmallDisk) -> None:
    """Subscriber pauses, one ERROR a pipeline names the path and the cure, and all goes on when there is room again."""
    with Rig(tmp_path, **spool_options(disk.path / "spool")) as rig:
        rig.flow(300, size=SIZE)
        rig.stored(100)
        outage(rig)
        disk.fill()
        rig.flow(4000, rate=4000, size=SIZE)
        rig.logged("free space on the file system")
        time.sleep(1.5)
        held = len(rig.ledger.acked)
        assert held < 4000, "acknowledged more than can be safe anywhere"
        rig.scraper.look()
        errors = [line for line in rig.service.log().splitlines() if "ERROR" in line and "spool" in line]
        assert len(errors) <= 2, errors
        assert all(str(disk.path) in line and "free space" in line for line in errors)
        disk.free()
        rig.until(lambda: len(rig.ledger.acked) > held, "it spools again")
        over(rig)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_the_disk_of_the_spool_is_read_only_at_the_start(tmp_path: Path, disk: SmallDisk) -> None:
    """It does not start, and says why: the broker keeps what comes until somebody has mended it."""
    with Rig(tmp_path, **spool_options(disk.path / "spool")) as rig:
        rig.flow(500, size=SIZE)
        rig.stored(300)
        rig.terminate()
        disk.read_only()
        rig.service.start()
        assert rig.service.process is not None
        assert rig.service.process.wait(20) == 2
        assert f"{disk.path / 'spool'}.raw cannot be written" in rig.service.log()
        disk.writable()
        rig.restart()
        rig.flow(500, size=SIZE)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_sigkill_while_the_disk_of_the_spool_is_full(tmp_path: Path, disk: SmallDisk) -> None:
    with Rig(tmp_path, **spool_options(disk.path / "spool")) as rig:
        outage(rig)
        rig.flow(500, rate=4000, size=SIZE)
        all_acknowledged(rig)
        disk.fill()
        rig.flow(3000, rate=4000, size=SIZE)
        rig.logged("free space on the file system")
        rig.kill()
        began = len(rig.service.log())
        rig.service.start()
        rig.flow(12_000, rate=6000, size=SIZE)  # more than the room that the one before had kept for the way back
        rig.until(lambda: "free space on the file system" in rig.service.log()[began:], "it says so again")
        disk.free()
        over(rig)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_a_slow_disk_for_the_spool(tmp_path: Path) -> None:
    patch = {"slow": {"fastkin.delivery.spool_file:Spool.write": 0.3}}
    with Rig(tmp_path, **spool_options(tmp_path / "spool", patch=patch)) as rig:
        outage(rig)
        rig.flow(2500, rate=4000, size=SIZE)
        all_acknowledged(rig)
        over(rig)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_the_spool_is_full_by_its_own_bound(tmp_path: Path) -> None:
    """spool_max_bytes is reached: intake pauses, and goes on when Kinesis is back."""
    options = spool_options(tmp_path / "spool", pipeline={"spool_max_bytes": 2**20})
    with Rig(tmp_path, **options) as rig:
        outage(rig)
        rig.flow(5000, rate=5000, size=SIZE)
        time.sleep(3.0)
        assert len(rig.ledger.acked) < 3500
        over(rig)
        rig.settle()
        rig.finish()


# -- what may be lost, and is told


@pytest.mark.faults_full
def test_qos_0_with_a_spool_loses_at_a_kill_what_was_in_memory_alone(tmp_path: Path) -> None:
    with Rig(tmp_path, qos=0, **spool_options(tmp_path / "spool")) as rig:
        outage(rig)
        rig.flow(1500, rate=1000, size=300)
        rig.until(lambda: len(rig.ledger.handed) > 800, "records are handed out")
        early = set(rig.ledger.handed)
        time.sleep(1.5)  # several times spool_after_s
        rig.kill()
        kept = set(rig.spooled())
        in_memory = set(rig.ledger.handed) - kept
        assert not early - kept, "older than spool_after_s and not on the disk"
        rig.restart()
        over(rig)
        rig.flow(300, wait=True)
        rig.settle(lost=in_memory)
        books = rig.finish(lost=in_memory)
        assert books["dup"] <= books["bound"]


@pytest.mark.parametrize(
    "policy", [pytest.param("drop_oldest"), pytest.param("drop_newest", marks=pytest.mark.faults_full)]
)
def test_what_a_policy_drops_is_counted(tmp_path: Path, policy: str) -> None:
    options = spool_options(tmp_path / "spool", pipeline={"on_full": policy})
    del options["pipeline"]["spool"], options["pipeline"]["spool_after_s"]
    with Rig(tmp_path, **options) as rig:
        rig.flow(300, size=SIZE)
        rig.stored(300)
        outage(rig)
        rig.flow(5000, rate=5000, size=SIZE)
        rig.until(lambda: rig.told("records_dropped_total") > 500, "records are dropped")
        rig.published()
        over(rig)
        rig.until(lambda: rig.told("records_in_flight") == 0, "nothing is in flight")
        gone = rig.missing()
        assert len(gone) == rig.told("records_dropped_total"), "what is gone is not what was counted"
        rig.settle(lost=gone)
        rig.finish(lost=gone)
