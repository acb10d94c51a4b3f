"""A record that Kinesis refuses for good, before anything was stored or when nothing else may come: it blocks what is
behind it for a minute, and not for ever."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING

import pytest

from delivery.test_backlog import broker, pipeline, until
from delivery.test_sender import Rig, Scripted, Verdict, refuses
from fastkin import encode_frame
from fastkin._codec import DRAIN
from fastkin.emulator import Emulator
from fastkin.service.pipeline import PipelineRun
from service.test_pipeline import rig
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.servers import Server

ONE = {"receive_maximum": 1, "protocol": "5"}


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\n") as running:
        yield running


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.delivery.refusals.REFUSED_FOR_S", 0.5, raising=False)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.05)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.1)


def poisoned(emulator: Emulator) -> None:
    emulator.faults.call("ValidationException", contains=b"poison")


def letters(path: Path) -> list[bytes]:
    return [base64.b64decode(json.loads(line)["payload"]) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("check", ["dry_run", "put"])
async def test_first_after_the_start_at_window_one(server: Server, tmp_path: Path, check: str) -> None:
    """A DryRun of a harmless record passes, or a test record was stored at the start: so it is the record's fault."""
    place = tmp_path / "letters"
    async with rig(server, prepare=poisoned, startup_check=check, broker=ONE, dead_letter=str(place)) as r:
        await r.publish(b"poison 1", b"good 1", b"poison 2", b"good 2")
        await r.settled(4)
        assert letters(place) == [b"poison 1", b"poison 2"]
        assert [record.data for record in r.stored() if record.data.startswith(b"good")] == [b"good 1", b"good 2"]


async def test_larger_than_the_stream_takes_first_after_the_start(server: Server, tmp_path: Path) -> None:
    """The stream has told its limit: what is above it and refused is refused for that."""
    place = tmp_path / "letters"
    large = b"large".ljust(1_500_000, b".")
    async with rig(server, broker=ONE, dead_letter=str(place), max_record_bytes=2 * 2**20, shards=1) as r:
        await r.publish(large, b"good")
        await r.settled(2)
        assert letters(place) == [large]
        assert [record.data for record in r.stored()] == [b"good"]


async def test_alone_and_many_in_a_row() -> None:
    """The eleventh in a row: something was stored in this run, and nothing else may come before it has ended."""

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict] | Exception:
        if any(base64.b64decode(record["Data"]).startswith(b"bad") for record in records):
            return refuses(call, records)
        return [None] * len(records)

    one = Rig(Scripted(script), max_calls=1)
    for data in (b"good", *[b"bad %d" % n for n in range(12)], b"also good"):
        one.batcher.add(data)
        one.batcher.close_batch(DRAIN)
        async with asyncio.timeout(10):
            await one.sender.flush()
    assert [data for data, _ in one.aside] == [b"bad %d" % n for n in range(12)]
    assert [data for data, _ in one.client.stored] == [b"good", b"also good"]
    one.check()
    await one.sender.close()


async def test_first_in_a_spool_whose_share_of_memory_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back first into a share that holds nothing else: the next row tells whose fault it is."""
    monkeypatch.setattr("fastkin.delivery.refusals.REFUSED_IN_A_ROW", 0)
    place = tmp_path / "letters"
    async with Emulator({"welders": 1}) as emulator:
        settings = pipeline(
            emulator.url, tmp_path / "spool", budget_records=4, max_records=1, startup_check="none",
            dead_letter=str(place), spool_after_s=0.1, shutdown_timeout_s=2.0,
        )  # fmt: skip
        away = emulator.faults.cut("before", operation="PutRecords")
        former = PipelineRun(settings, broker())
        former.start()
        feed = [b"poison", b"good 1", b"good 2", b"good 3"]
        for data in feed:
            await until(lambda data=data: former.delivery.batcher.offer(b"plant/1", data, 0) >= 0)  # type: ignore[misc]
            former._read()
        await former.stop()
        assert former.delivery.batcher.spooled == len(feed)
        away.remove()
        poisoned(emulator)
        run = PipelineRun(settings, broker())
        run.start()
        await until(lambda: run.delivery.batcher.stored == 3 and run.delivery.batcher.dead_lettered == 1)
        await run.stop()
        assert letters(place) == [b"poison"]
        assert [record.data for record in emulator.stored("welders")] == feed[1:]


@pytest.mark.parametrize("large", [False, True])
async def test_that_leaves_no_room_for_what_would_tell(
    server: Server, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame that needs all of the memory comes behind it: it is read all the same, and told apart by it."""
    monkeypatch.setattr("fastkin.delivery.refusals.REFUSED_FOR_S", 1e9)  # only what else is stored can tell
    place = tmp_path / "letters"
    bound = {"budget_records": 1000, "budget_bytes": 1_000_000} if large else {"budget_records": 20}
    poison = b"poison".ljust(200_000 if large else 100, b".")
    frames = [[poison], [b"good %d" % n + b"." * (30_000 if large else 0) for n in range(20)], [b"last"]]
    async with rig(
        server, prepare=poisoned, startup_check="none", format="bulk", dead_letter=str(place),
        max_record_bytes=400_000, max_batch_bytes=400_000, **bound,
    ) as r:  # fmt: skip
        await r.publish(*map(encode_frame, frames))
        await r.settled(22)
        assert letters(place) == [poison]
        assert sorted(record.data for record in r.stored()) == sorted([*frames[1], *frames[2]])
