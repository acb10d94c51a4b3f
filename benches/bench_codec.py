"""The per-record core: a frame to a finished PutRecords body, an answer to settlements, a put to its receipt.

    python -m pytest benches/bench_codec.py

Every contender starts from the same bytes and must give the same records, which is checked first; the peers'
bodies are as complete as ours: a fresh UUID per record, base64, JSON. Divide by extra_info["records"] for the time
per record. Nothing here touches a socket.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import statistics
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgpack
import orjson
import pybase64
import pytest

from fastkin import _codec, decode_frame, encode_frame
from fastkin._codec import DROPPED, Batch, Batcher, Budget, KeyPlan

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDS = 500
SIZES = {"200 B": 200, "2 KB": 2000, "10 KB": 10_000}
TARGET = '"StreamName":"welders"'


def records_of(size: int) -> list[bytes]:
    draw = random.Random(size)
    return [draw.randbytes(size) for _ in range(RECORDS)]


def batcher_for(**options: Any) -> Batcher:
    return Batcher(
        settler=None, budget=Budget(1 << 34, 1 << 34), frame="bulk", key=KeyPlan("uuid"), target=TARGET.encode(),
        **({"max_batch_bytes": 1 << 24} | options),
    )  # fmt: skip


def answer_of(count: int) -> bytes:
    entry = {"SequenceNumber": "49" * 28, "ShardId": "shardId-000000000012"}
    return json.dumps({"FailedRecordCount": 0, "Records": [entry] * count}, separators=(",", ":")).encode()


# -- frame to body


def ours(frame: bytes) -> Callable[[], Batch]:
    batcher = batcher_for()

    def run() -> Batch:
        batcher.offer(b"plant/7", frame, 0)
        batch = batcher.take()
        assert batch is not None
        batch.finish(DROPPED)
        return batch

    return run


def body_of(frame: bytes) -> bytes:
    batcher = batcher_for()
    batcher.offer(b"plant/7", frame, 0)
    batch = batcher.take()
    assert batch is not None
    body = bytes(batch)
    batch.finish(DROPPED)
    return body


def peer_orjson(frame: bytes) -> bytes:
    unpacker = msgpack.Unpacker(io.BytesIO(frame), max_buffer_size=1 << 30)
    assert next(unpacker) == "1.0"
    return orjson.dumps(
        {
            "Records": [
                {"Data": pybase64.b64encode(record).decode(), "PartitionKey": str(uuid.uuid4())} for record in unpacker
            ],
            "StreamName": "welders",
        }
    )


def peer_json(frame: bytes) -> bytes:
    unpacker = msgpack.Unpacker(io.BytesIO(frame), max_buffer_size=1 << 30)
    assert next(unpacker) == "1.0"
    return json.dumps(
        {
            "Records": [
                {"Data": base64.b64encode(record).decode(), "PartitionKey": str(uuid.uuid4())} for record in unpacker
            ],
            "StreamName": "welders",
        }
    ).encode()


def check(body: bytes, records: list[bytes]) -> None:
    parsed = json.loads(body)
    assert parsed["StreamName"] == "welders"
    assert [base64.b64decode(entry["Data"]) for entry in parsed["Records"]] == records
    keys = {entry["PartitionKey"] for entry in parsed["Records"]}
    assert len(keys) == len(records)
    assert {uuid.UUID(key).version for key in keys} == {4}


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(
    "peer", ["fastkin", "fastkin avx2", "fastkin scalar", "msgpack+orjson+pybase64", "msgpack+json"]
)
def test_frame_to_body(benchmark: Any, peer: str, shape: str) -> None:
    records = records_of(SIZES[shape])
    frame = encode_frame(records)
    before = _codec.simd()
    name, _, kernel = peer.partition(" ")
    if kernel and not _codec._use_simd(kernel):
        pytest.skip(f"this CPU has no {kernel}")
    try:
        run: Callable[[], object]
        if name == "fastkin":
            check(body_of(frame), records)
            run = ours(frame)
        else:
            contender = peer_orjson if "orjson" in peer else peer_json
            check(contender(frame), records)
            run = lambda: contender(frame)  # noqa: E731
        benchmark.group = f"frame to body, {shape}"
        benchmark.extra_info.update(records=RECORDS, bytes=sum(map(len, records)), kernel=_codec.simd())
        benchmark(run)
    finally:
        _codec._use_simd(before)


# -- parts


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("peer", ["fastkin", "msgpack"])
def test_decode(benchmark: Any, peer: str, shape: str) -> None:
    records = records_of(SIZES[shape])
    frame = encode_frame(records)

    def unpack() -> list[Any]:
        unpacker = msgpack.Unpacker(max_buffer_size=1 << 30)
        unpacker.feed(frame)
        return list(unpacker)[1:]

    run: Callable[[], list[Any]] = unpack if peer == "msgpack" else lambda: decode_frame(frame)
    assert run() == records
    benchmark.group = f"frame to list, {shape}"
    benchmark.extra_info.update(records=RECORDS, bytes=len(frame))
    benchmark(run)


@pytest.mark.parametrize("peer", ["fastkin", "orjson"])
def test_answer(benchmark: Any, peer: str) -> None:
    """Scan an answer of 500 stored entries; ours settles them too."""
    reply = answer_of(RECORDS)
    batcher = batcher_for()
    frame = encode_frame([b""] * RECORDS)

    def fill() -> tuple[tuple[Batch], dict[str, Any]]:
        batcher.offer(b"", frame, 0)
        batch = batcher.take()
        assert batch is not None
        return (batch,), {}

    def scan(batch: Batch) -> int:
        return len(batch.settle(reply))

    def parse(batch: Batch) -> int:
        return sum(1 for entry in orjson.loads(reply)["Records"] if entry.get("ErrorCode"))

    for run in (scan, parse):
        (batch,), _ = fill()
        assert run(batch) == 0
        if run is parse:
            batch.finish(DROPPED)
    benchmark.group = "answer of 500"
    benchmark.extra_info.update(records=RECORDS, bytes=len(reply))
    if peer == "fastkin":
        benchmark.pedantic(scan, setup=fill, rounds=2000)
    else:
        (batch,), _ = fill()
        benchmark(parse, batch)
        batch.finish(DROPPED)
    assert batcher.in_flight == 0


@pytest.mark.parametrize("shape", SIZES)
def test_put_to_receipt(benchmark: Any, shape: str) -> None:
    """put, encode and settle: what a producer pays besides the call itself."""
    records = records_of(SIZES[shape])
    reply = answer_of(RECORDS)
    batcher = batcher_for()

    def run() -> None:
        put = batcher.put
        for record in records:
            put(record)
        batch = batcher.take()
        assert batch is not None
        batch.settle(reply)

    run()
    assert batcher.stored == RECORDS
    benchmark.group = "put, encode, settle"
    benchmark.extra_info.update(records=RECORDS, bytes=sum(map(len, records)))
    benchmark(run)


@pytest.mark.parametrize("peer", ["fastkin", "uuid"])
def test_key(benchmark: Any, peer: str) -> None:
    draw: Callable[[], str] = _codec.uuid_key if peer == "fastkin" else lambda: str(uuid.uuid4())
    assert uuid.UUID(draw()).version == 4
    benchmark.group = "one UUID as text"
    benchmark(draw)


def test_retry_rebuilds_without_encoding(benchmark: Any) -> None:
    """Half of a call failed: its entries become a batch again."""
    frame = encode_frame(records_of(200))
    batcher = batcher_for()
    failed = {"ErrorCode": "InternalFailure", "ErrorMessage": "Internal Service Failure"}
    stored = {"SequenceNumber": "49" * 28, "ShardId": "shardId-000000000012"}
    reply = json.dumps({"FailedRecordCount": 250, "Records": [failed, stored] * 250}).encode()

    def fill() -> tuple[tuple[Batch], dict[str, Any]]:
        batcher.offer(b"", frame, 0)
        batch = batcher.take()
        assert batch is not None
        return (batch,), {}

    def run(batch: Batch) -> None:
        for failure in batch.settle(reply):
            assert len(failure.batch) == 250
            failure.batch.finish(DROPPED)

    benchmark.group = "settle with 250 of 500 failed"
    benchmark.extra_info.update(records=RECORDS)
    benchmark.pedantic(run, setup=fill, rounds=1000)


# -- ratios: interleaved, medians, generous


def median(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@pytest.mark.timing
def test_forty_times_faster_than_the_best_python() -> None:
    frame = encode_frame(records_of(200))
    run = ours(frame)
    ratios = [median(lambda: peer_orjson(frame), 9) / median(run, 99) for _ in range(3)]
    assert statistics.median(ratios) >= 40, ratios


@pytest.mark.timing
@pytest.mark.parametrize("kernel", ["avx2", "vbmi"])
def test_hashing_after_encoding_is_as_fast_as_before(kernel: str) -> None:
    """A vector kernel that leaves the upper halves dirty slows SHA-NI down by a third until somebody cleans up."""
    before = _codec.simd()
    if not _codec._use_simd(kernel):
        pytest.skip(f"this CPU has no {kernel}")
    try:
        body = random.Random(1).randbytes(2 << 20)
        data = body[:100_000]
        clean, after = [], []
        for _ in range(15):
            clean.append(median(lambda: hashlib.sha256(body), 1))
            _codec._base64(data)
            after.append(median(lambda: hashlib.sha256(body), 1))
        assert statistics.median(after) < 1.15 * statistics.median(clean)
    finally:
        _codec._use_simd(before)
