"""The example programs, as they stand in examples/."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from consumer.rig import consumer, put
from fastkin.emulator import Emulator
from support.servers import ACCESS_KEY, SECRET_KEY, kinesis_mock

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


@pytest.mark.process
@pytest.mark.parametrize("server", ["emulator", "kinesis-mock"])
async def test_the_consumer_prints_what_arrives(server: str) -> None:
    """EI-31: LATEST, at most ten records of a shard each time."""
    if server == "emulator":
        async with Emulator({"s": 2}) as emulator:
            await _watch(emulator.url)
    else:
        with kinesis_mock() as mock:
            mock.create_stream("s", 2)
            await _watch(mock.url)


async def _watch(url: str) -> None:
    await put(url, [b'{"value":0,"origin":"old"}'])
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "consumer.py"), "s", "0.3",
        env=keys | {"AWS_ENDPOINT_URL_KINESIS": url}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(40):
            reading = asyncio.create_task(process.stdout.readline())
            n = 0
            while not reading.done():  # until it has its iterators
                n += 1
                await put(url, [b'{"value":%d,"origin":"put_record"}' % n, b"no json"])
                await asyncio.wait({reading}, timeout=0.5)
            line = (await reading).decode()
    finally:
        process.kill()
        await process.wait()
    assert line.startswith("shardId-")
    assert "old" not in line
    assert "put_record" in line or "no json" in line


@pytest.mark.process
@pytest.mark.parametrize("server", ["emulator", "kinesis-mock"])
async def test_the_producer_puts_by_both_calls_in_turn(server: str) -> None:
    """EI-31: a counter as value, and the call as origin."""
    if server == "emulator":
        async with Emulator({"s": 2}) as emulator:
            await _produce(emulator.url)
    else:
        with kinesis_mock() as mock:
            mock.create_stream("s", 2)
            await _produce(mock.url)


async def _produce(url: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "producer.py"), "s", "0.01",
        env=keys | {"AWS_ENDPOINT_URL_KINESIS": url}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            said = [(await process.stdout.readline()).split()[0] for _ in range(6)]
            origins: dict[int, str] = {}
            async with consumer(url) as one:
                async for record in one.stream("trim_horizon"):
                    origins[record.data["value"]] = record.data["origin"]
                    if origins.keys() >= set(range(1, 7)):
                        break
    finally:
        process.kill()
        await process.wait()
    ways = ["putRecord", "putRecords"] * 3
    assert said == [b'{"value":%d,"origin":"%b"}' % (n, way.encode()) for n, way in enumerate(ways, 1)]
    assert [origins[n] for n in range(1, 7)] == ways


class Checkpointer:
    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = error

    def checkpoint(self, *place: Any) -> None:
        self.calls.append(place)
        if self.error is not None:
            raise self.error


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The processor beside a stand-in of the library, of the names that the library has."""
    package, kcl = types.ModuleType("amazon_kclpy"), types.ModuleType("amazon_kclpy.kcl")
    v3, processor = types.ModuleType("amazon_kclpy.v3"), types.ModuleType("amazon_kclpy.v3.processor")
    kcl.CheckpointError = type("CheckpointError", (Exception,), {})  # type: ignore[attr-defined]
    processor.RecordProcessorBase = object  # type: ignore[attr-defined]
    package.kcl, package.v3, v3.processor = kcl, v3, processor  # type: ignore[attr-defined]
    for one in (package, kcl, v3, processor):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    spec = importlib.util.spec_from_file_location("example_kcl_processor", EXAMPLES / "kcl_processor.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def given(checkpointer: Checkpointer, *payloads: bytes) -> Any:
    records = [
        types.SimpleNamespace(binary_data=data, partition_key=f"k{n}", sequence_number="7", sub_sequence_number=n)
        for n, data in enumerate(payloads)
    ]
    return types.SimpleNamespace(records=records, checkpointer=checkpointer)


def test_the_processor_decodes_as_the_consumer_does(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[tuple[str, Any]] = []
    monkeypatch.setattr(module, "store", lambda key, value: stored.append((key, value)))
    one, checkpointer = module.RecordProcessor(), Checkpointer()
    one.process_records(given(checkpointer, b'{"n":1}', b"x", b"9223372036854775808"))
    assert stored == [("k0", {"n": 1}), ("k2", 2**63)]
    assert one.bad == 1
    assert checkpointer.calls == []  # the minute is not over
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    one.process_records(given(checkpointer, b"1", b"2"))
    assert checkpointer.calls == [("7", 1)]


def test_the_processor_keeps_its_place_at_the_end_of_a_shard_and_of_itself(module: Any) -> None:
    one = module.RecordProcessor()
    ended, asked, refused = Checkpointer(), Checkpointer(), Checkpointer(module.kcl.CheckpointError("throttled"))
    one.shutdown_requested(types.SimpleNamespace(checkpointer=asked))
    assert asked.calls == []  # nothing was read
    one.process_records(given(Checkpointer(), b"1"))
    one.shutdown_requested(types.SimpleNamespace(checkpointer=asked))
    assert asked.calls == [("7", 0)]
    one.shutdown_requested(types.SimpleNamespace(checkpointer=refused))
    assert refused.calls == [("7", 0)]
    one.shard_ended(types.SimpleNamespace(checkpointer=ended))
    assert ended.calls == [()]


def test_a_record_that_cannot_be_stored_is_not_passed_over(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(key: str, value: Any) -> None:
        raise OSError("the table is away")

    monkeypatch.setattr(module, "store", store)
    one, checkpointer = module.RecordProcessor(), Checkpointer()
    with pytest.raises(OSError, match="the table is away"):
        one.process_records(given(checkpointer, b"1"))
    one.shutdown_requested(types.SimpleNamespace(checkpointer=checkpointer))
    assert checkpointer.calls == []
