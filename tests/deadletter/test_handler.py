"""What is set aside ends when its letter is stored, in a file or in another stream, and not before."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
import fastkin.deadletter.handler
import fastkin.deadletter.insist
from fastkin._codec import Batcher, Budget, KeyPlan
from fastkin.config import Broker, Kinesis, Pipeline
from fastkin.deadletter import destination as letterplace
from fastkin.deadletter.file import numbered
from fastkin.deadletter.handler import DeadLetterHandler
from fastkin.deadletter.stream import RECORD_BYTES, records_of
from fastkin.emulator import Emulator
from fastkin.service.pipeline import PipelineRun
from fastkin.settings import SettingsError
from support.servers import ACCESS_KEY, SECRET_KEY, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastkin.deadletter.insist, "_RETRY_S", 0.05)


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator({"welders": 1, "dead": 1}) as emulator:
        yield emulator


def pipeline(emulator: Emulator, **options: Any) -> Pipeline:
    kinesis = Kinesis(
        stream="welders", region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
    )
    return Pipeline(**({"id": "p", "topics": ("plant/#",), "kinesis": kinesis, "shutdown_timeout_s": 1.0} | options))


def run_of(emulator: Emulator, **options: Any) -> PipelineRun:
    """Its broker is not there: messages are offered to the batcher by the tests."""
    broker = Broker(host="127.0.0.1", port=free_port(), client_id="aside", clean_session=False)
    return PipelineRun(pipeline(emulator, **options), broker)


async def until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


def offer(run: PipelineRun, *payloads: bytes) -> None:
    for payload in payloads:
        assert run.delivery.batcher.offer(b"plant/1", payload, 0) >= 0
    run._read()


def identity(run: PipelineRun) -> None:
    stats = run.stats()
    ended = stats["stored"] + stats["dead_lettered"] + stats["filtered"] + stats["dropped"]
    assert stats["received"] == ended + stats["in_flight"]
    assert sum(run.dead_letters.dead_lettered_by.values()) == stats["dead_lettered"]


def errors(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in r.getMessage() and r.levelno == logging.ERROR for r in caplog.records)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# --- files ---


async def test_letters_are_counted_by_reason_when_they_are_settled(emulator: Emulator, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    emulator.faults.record("InvalidArgumentException", contains=b"poison")
    run = run_of(emulator, dead_letter=str(path), max_record_bytes=2000)
    run.start()
    offer(run, b"good", b"poison", b"x" * 3000, b"poison too")
    await until(lambda: not run.delivery.batcher.in_flight)
    identity(run)
    assert run.dead_letters.dead_lettered_by == {"oversize": 1, "InvalidArgumentException": 2}
    assert run.dead_letters.dropped == {}
    assert {line["topic"] for line in lines(path) if line["partition_key"]} == {None}
    assert await run.stop() == 0


async def test_what_kinesis_refused_has_the_topic_where_there_is_only_one(emulator: Emulator, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    emulator.faults.record("InvalidArgumentException", contains=b"poison")
    run = run_of(emulator, dead_letter=str(path), topics=("plant/1",))
    run.start()
    offer(run, b"good", b"poison")
    await until(lambda: not run.delivery.batcher.in_flight)
    assert [line["topic"] for line in lines(path)] == ["plant/1"]
    await run.stop()


@pytest.mark.parametrize("topics", [(), ("a", "b"), ("a/+",), ("#",), ("$share/g/a",)])
def test_a_topic_that_is_not_certain_is_not_guessed(topics: tuple[str, ...]) -> None:
    assert fastkin.deadletter.handler._only(topics) is None


async def test_without_a_place_they_are_dropped_and_counted_as_that(emulator: Emulator) -> None:
    run = run_of(emulator, dead_letter="none", format="bulk")
    run.start()
    offer(run, b"\xc0", b"\xc1")
    await until(lambda: not run.delivery.batcher.in_flight)
    identity(run)
    assert run.delivery.batcher.dropped == 2
    assert run.dead_letters.dropped == {"no_dead_letter": 2}
    assert run.dead_letters.dead_lettered_by == {}
    await run.stop()


async def test_a_wrong_place_is_told_at_start_and_the_pipeline_goes_on(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(emulator, dead_letter=str(tmp_path / "gone" / "dead.jsonl"))
    run.start()
    await until(lambda: errors(caplog, "mkdir -p") == 1)
    offer(run, b"good")
    await until(lambda: run.delivery.batcher.stored == 1)
    assert await run.stop() == 0
    path = tmp_path / "dead.jsonl"
    run = run_of(emulator, dead_letter=str(path))
    run.start()
    await until(path.exists)
    await run.stop()


async def test_rotation_says_what_it_deleted(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dead.jsonl"
    run = run_of(emulator, dead_letter=str(path), dead_letter_max_bytes=500, dead_letter_keep=1, format="bulk")
    run.start()
    for n in range(8):
        offer(run, b"\xc0%d" % n)
        await until(lambda n=n: run.delivery.batcher.dead_lettered == n + 1)  # type: ignore[misc]
    assert run.stats()["dead_letters_deleted"] > 0
    left = len(lines(path)) + len(lines(numbered(path, 1)))
    assert left + run.stats()["dead_letters_deleted"] == 8
    said = [r.getMessage() for r in caplog.records if "rotation deleted" in r.getMessage()]
    assert said
    assert f"{run.stats()['dead_letters_deleted']} since the start" in said[-1]
    await run.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("may not mount a small disk here; test_a_file_that_may_not_grow covers it")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.process
async def test_a_full_disk_pauses_intake_says_so_once_and_loses_nothing(
    emulator: Emulator, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filler, path = small_disk / "filler", small_disk / "dead.jsonl"
    run = run_of(emulator, dead_letter=str(path), format="bulk", budget_bytes=65_536, max_record_bytes=1024)
    run.start()
    await until(path.exists)
    filler.write_bytes(b"x" * 200_000)
    # the file system counts pages: fill what is left of it
    with (small_disk / "more").open("ab", buffering=0) as more, contextlib.suppress(OSError):
        while True:
            more.write(b"x" * 4096)
    taken = 0
    while run.delivery.batcher.offer(b"plant/1", b"\xc0%0999d" % taken, 0) >= 0:
        taken += 1
        assert taken < 1000, "the budget never filled"
    run._read()
    await until(lambda: errors(caplog, "No space left") == 1)
    await asyncio.sleep(0.5)
    identity(run)
    assert errors(caplog, "No space left") == 1
    assert errors(caplog, str(path)) == 1
    assert errors(caplog, "free space") == 1
    assert run.delivery.budget.full
    assert run.delivery.batcher.dead_lettered == 0
    for each in (filler, small_disk / "more"):
        each.unlink()
    await until(lambda: not run.delivery.batcher.in_flight)
    identity(run)
    assert not run.delivery.budget.full
    assert sorted(base64.b64decode(line["payload"]) for line in lines(path)) == [
        b"\xc0%0999d" % n for n in range(taken)
    ]
    assert any("takes letters again" in record.getMessage() for record in caplog.records)
    assert await run.stop() == 0


LIMITED = """
import asyncio, logging, resource, signal, sys
sys.path.insert(0, sys.argv[2])
import fastkin.deadletter.insist
from deadletter.test_handler import Emulator, run_of, offer, until
fastkin.deadletter.insist._RETRY_S = 0.05
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logging.basicConfig(stream=sys.stdout, level=logging.ERROR)

async def main():
    async with Emulator({"welders": 1}) as emulator:
        run = run_of(emulator, dead_letter=sys.argv[1], format="bulk")
        run.start()
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        offer(run, b"\\xc0" + b"x" * 1000)
        await asyncio.sleep(0.5)
        assert run.delivery.batcher.in_flight == 1 and run.delivery.batcher.dead_lettered == 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await until(lambda: run.delivery.batcher.dead_lettered == 1)
        assert await run.stop() == 0

asyncio.run(main())
"""


@pytest.mark.process
def test_a_file_that_may_not_grow_holds_records_back_until_it_may(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), os.path.dirname(os.path.dirname(__file__))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large") == 1
    assert "ulimit -f" in done.stdout
    assert len(lines(path)) == 1


class Slow:
    """A store that is told when to finish."""

    deleted = 0

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = asyncio.Event()

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def store(self, letters: Sequence[dict[str, Any]]) -> None:
        self.sizes.append(sum(len(letter["payload"]) for letter in letters))
        await self.go.wait()


async def test_letters_are_written_in_bounded_chunks_and_reasons_are_counted_in_a_bounded_table() -> None:
    batcher = Batcher(
        settler=None, budget=Budget(1 << 30, 1 << 20), frame="bulk", key=KeyPlan("uuid"),
        target=b'"StreamName":"s"', max_records=1,
    )  # fmt: skip
    tasks = []

    def spawn(work: Any, _: str) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1]

    store = Slow()
    aside = DeadLetterHandler("p", batcher, store, spawn=spawn, on_settled=lambda: None)
    for _ in range(10):
        assert batcher.offer(b"t", b"\xc0" + b"x" * 399_999, 0) >= 0
    for reject in batcher.take_rejects():
        aside.rejected(reject)
    for n in range(60):
        batcher.put(b"x")
        if (batch := batcher.take()) is not None:
            aside.refused(batch, f"Code{n}: invented" if n % 2 else "no code: at all")
    store.go.set()
    await asyncio.gather(*tasks)
    assert aside.waiting == 0
    assert max(store.sizes) <= 1 << 20
    assert len(aside.dead_lettered_by) <= aside.dead_lettered_by.most + 1
    assert aside.dead_lettered_by["other"] >= 25
    assert sum(aside.dead_lettered_by.values()) == batcher.dead_lettered == 70


# --- another stream ---


def letters_in(emulator: Emulator, stream: str = "dead") -> list[dict[str, Any]]:
    return [json.loads(record.data) for record in emulator.stored(stream)]


async def test_letters_go_to_another_stream(emulator: Emulator) -> None:
    emulator.faults.record("InvalidArgumentException", contains=b"poison", stream="welders")
    run = run_of(emulator, dead_letter="stream:dead", max_record_bytes=2000)
    run.start()
    offer(run, b"good", b"poison", b"x" * 3000)
    await until(lambda: not run.delivery.batcher.in_flight)
    identity(run)
    assert run.delivery.batcher.dead_lettered == 2
    told = {line["reason"].partition(":")[0][:8]: line for line in letters_in(emulator)}
    assert [record.data for record in emulator.stored("welders")] == [b"good"]
    assert len(told) == 2
    poison = told["InvalidA"]
    assert list(poison) == ["time", "pipeline", "topic", "reason", "offset", "index", "partition_key", "payload"]
    assert base64.b64decode(poison["payload"]) == b"poison"
    assert poison["partition_key"]
    assert run.delivery.budget.bytes == 0
    assert await run.stop() == 0


async def test_a_letter_larger_than_a_record_is_split_and_nothing_of_it_is_gone(emulator: Emulator) -> None:
    payload = b"\xc0" + os.urandom(2_500_000)
    run = run_of(emulator, dead_letter="stream:dead", format="bulk", max_batch_bytes=4 << 20)
    run.start()
    offer(run, payload)
    await until(lambda: not run.delivery.batcher.in_flight, 20)
    parts = sorted(letters_in(emulator), key=lambda part: part["part"])
    assert [part["part"] for part in parts] == list(range(parts[0]["parts"]))
    assert len({part["id"] for part in parts}) == 1
    assert b"".join(base64.b64decode(part["payload"]) for part in parts) == payload
    assert len({record.partition_key for record in emulator.stored("dead")}) == 1
    assert run.delivery.batcher.dead_lettered == 1
    await run.stop()


@pytest.mark.parametrize("size", [700_000, 786_000, 786_200, 786_432, 1_048_576, 10_485_760])
@pytest.mark.parametrize("topic", ["t", "\x01" * 65_535])
def test_no_part_is_larger_than_a_record(size: int, topic: str) -> None:
    letter = {"pipeline": "p" * 64, "topic": topic, "reason": "r" * 600, "payload": os.urandom(size)}
    found = list(records_of(letter))
    assert all(len(data) + len(key) <= RECORD_BYTES for data, key in found)
    told = [json.loads(data) for data, _ in found]
    assert b"".join(base64.b64decode(each["payload"]) for each in told) == letter["payload"]
    assert [each.get("part", 0) for each in told] == list(range(len(found)))


async def test_a_dead_letter_that_the_dead_letter_stream_refuses_does_not_loop_and_is_not_lost(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    fault = emulator.faults.record("InvalidArgumentException", "never", stream="dead")
    run = run_of(emulator, dead_letter="stream:dead", format="bulk")
    run.start()
    offer(run, b"\xc0")
    await until(lambda: errors(caplog, "takes no dead letters") == 1)
    await asyncio.sleep(0.4)
    identity(run)
    assert errors(caplog, "takes no dead letters") == 1
    assert "set another `dead_letter`" in caplog.text
    assert run.delivery.batcher.in_flight == 1
    assert run.delivery.batcher.received == 1
    emulator.faults.clear()
    assert fault is not None
    await until(lambda: run.delivery.batcher.dead_lettered == 1)
    assert len(letters_in(emulator)) == 1
    assert await run.stop() == 0


async def test_a_missing_stream_is_told_at_start_and_records_wait(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(emulator, dead_letter="stream:nowhere", format="bulk", shutdown_timeout_s=0.2)
    run.start()
    await until(lambda: errors(caplog, "dead letter stream nowhere: ResourceNotFound") == 1)
    offer(run, b"\xc0", fastkin.encode_frame([b"good"]))
    await until(lambda: run.delivery.batcher.stored == 1)
    identity(run)
    assert await run.stop() == 1
    assert run.delivery.batcher.dead_lettered == run.delivery.batcher.dropped == 0


async def test_throttled_dead_letters_are_waited_for(emulator: Emulator) -> None:
    emulator.faults.record(stream="dead", for_s=0.3)
    run = run_of(emulator, dead_letter="stream:dead", format="bulk")
    run.start()
    offer(run, *(b"\xc0%d" % n for n in range(20)))
    await until(lambda: run.delivery.batcher.dead_lettered == 20)
    assert sorted(base64.b64decode(line["payload"]) for line in letters_in(emulator)) == sorted(
        b"\xc0%d" % n for n in range(20)
    )
    await run.stop()


ARN = "arn:aws:kinesis:eu-west-1:123456789012:stream/dead"


@pytest.mark.parametrize(
    ("place", "stream", "region"),
    [("stream:dead", "dead", "us-east-1"), (f"stream:{ARN}", "dead", "eu-west-1"), ("dead", None, None)],
)
async def test_the_stream_is_reached_as_the_pipelines_own(
    emulator: Emulator, place: str, stream: str | None, region: str | None
) -> None:
    made = pipeline(emulator, dead_letter=place)
    there = letterplace.destination(made)
    if stream is None:
        assert there is None
        return
    assert there is not None
    assert (there.stream, there.region) == (stream, region)
    assert (there.endpoint_url, there.access_key) == (emulator.url, ACCESS_KEY)
    assert not letterplace.is_own(made)


@pytest.mark.parametrize(
    ("place", "cure"),
    [
        ("stream:", "stream:NAME"),
        ("stream:a b", "stream:NAME"),
        ("stream:arn:aws:sqs:eu-west-1:123456789012:x", "stream:NAME"),
        ("stream:welders", "name another stream"),
        (".", "name a file"),
        ("no such folder/x", "make it"),
    ],
)
def test_a_wrong_place_is_a_settings_error_that_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, cure: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.toml"
    path.write_text(
        f'[broker]\nclient_id = "c"\n[[pipeline]]\nid = "p"\ntopics = ["a"]\nstream = "welders"\n'
        f'region = "eu-west-1"\ndead_letter = "{place}"\n'
    )
    with pytest.raises(SettingsError, match="dead_letter") as caught:
        fastkin.load_settings(path, env={})
    assert cure in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    path = tmp_path / "x.toml"
    path.write_text(
        f'[broker]\nclient_id = "c"\n[[pipeline]]\nid = "p"\ntopics = ["a"]\nstream = "welders"\n'
        f'region = "eu-west-1"\ndead_letter = "{folder}/dead.jsonl"\n'
    )
    made = fastkin.load_settings(path, env={})
    # root may write anywhere
    assert bool(made.warnings) == bool(os.geteuid())
    shutil.rmtree(folder)
