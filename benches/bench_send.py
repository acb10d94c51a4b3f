"""One PutRecords call from a finished body to its answer: CPU time of the calling process, beside the SDKs.

A trivial server in a process of its own reads and counts. Every peer's records are compared first (the
native way and the reference path byte for byte). FASTKIN_BENCH_SCALE (1.0) scales the number of calls.

    pytest benches/bench_send.py            as a benchmark, wall time per call; CPU time in extra_info
    python benches/bench_send.py            the same as a table of CPU times, and the loop's lateness
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from fastkin.aws.native import KinesisClient
from fastkin.config import Kinesis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SCALE = float(os.environ.get("FASTKIN_BENCH_SCALE", "1"))
KEYS = {"access_key": "AKIDEXAMPLE", "secret_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}

# records, bytes of each, calls of the native way (the SDKs make fewer)
SHAPES = {
    "1 x 200 B": (1, 200, 8000),
    "500 x 200 B": (500, 200, 3000),
    "500 x 2 KB": (500, 2000, 500),
    "500 x 10 KB": (500, 10_000, 100),
}


# -- the server


class Counter(asyncio.Protocol):
    """Reads requests by their Content-Length, answers for as many records as the path asks."""

    answers: dict[bytes, bytes] = {}  # noqa: RUF012

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.head = b""
        self.left = 0
        self.path = b""
        self.kept: bytearray | None = None

    def data_received(self, data: bytes) -> None:
        if not self.left:
            head, found, rest = (self.head + data).partition(b"\r\n\r\n")
            if not found:
                self.head = head
                return
            self.head = b""
            self.path = head.split(b" ", 2)[1]
            self.left = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            self.kept = bytearray() if self.path.startswith(b"/keep") else None
            data = rest
        self.left -= len(data)
        if self.kept is not None:
            self.kept += data
        if not self.left:
            body = self.answer()
            self.transport.write(b"HTTP/1.1 200 OK\r\nx-amzn-RequestId: 5a9d2b1c-0000-0000-0000-000000000000\r\n"
                b"Content-Type: application/x-amz-json-1.1\r\nDate: Wed, 04 Mar 2026 12:00:00 GMT\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip

    def answer(self) -> bytes:
        if self.kept is not None:
            told = {"FailedRecordCount": 0, "Records": [], "EncryptionType": base64.b64encode(self.kept).decode()}
            return json.dumps(told).encode()
        found = self.answers.get(self.path)
        if found is None:
            entry = {"SequenceNumber": "4" * 56, "ShardId": "shardId-000000000000"}
            count = int(self.path[1:])
            found = json.dumps({"FailedRecordCount": 0, "Records": [entry] * count}).encode()
            self.answers[self.path] = found
        return found


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Counter, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def counting_server() -> Iterator[str]:
    child = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


# -- the peers: each yields a function that makes one call


def records(count: int, size: int) -> list[tuple[bytes, str]]:
    return [(os.urandom(size), str(uuid.uuid4())) for _ in range(count)]


def finished_body(rows: list[tuple[bytes, str]]) -> bytes:
    entries = [{"Data": base64.b64encode(data).decode(), "PartitionKey": key} for data, key in rows]
    return json.dumps({"Records": entries, "StreamName": "bench"}, separators=(",", ":")).encode()


@contextlib.asynccontextmanager
async def native(url: str, rows: list[tuple[bytes, str]]) -> AsyncIterator[Any]:
    client = KinesisClient(Kinesis(stream="bench", region="us-east-1", endpoint_url=url, **KEYS))
    await client.start()
    body = finished_body(rows)
    yield lambda: client.call("PutRecords", body)
    await client.close()


@contextlib.asynccontextmanager
async def reference(url: str, rows: list[tuple[bytes, str]]) -> AsyncIterator[Any]:
    from fastkin.aws.sdk import SdkClient

    client = SdkClient(Kinesis(stream="bench", region="us-east-1", endpoint_url=url, **KEYS))
    await client.start()
    body = finished_body(rows)
    yield lambda: client.call("PutRecords", body)
    await client.close()


SDK_KEYS = {"aws_access_key_id": KEYS["access_key"], "aws_secret_access_key": KEYS["secret_key"]}


@contextlib.asynccontextmanager
async def aiobotocore(url: str, rows: list[tuple[bytes, str]]) -> AsyncIterator[Any]:
    from aiobotocore.session import AioSession

    entries = [{"Data": data, "PartitionKey": key} for data, key in rows]
    session = AioSession()
    async with session.create_client("kinesis", region_name="us-east-1", endpoint_url=url, **SDK_KEYS) as client:
        yield lambda: client.put_records(Records=entries, StreamName="bench")


@contextlib.asynccontextmanager
async def boto3(url: str, rows: list[tuple[bytes, str]]) -> AsyncIterator[Any]:
    import boto3 as sdk

    entries = [{"Data": data, "PartitionKey": key} for data, key in rows]
    client = sdk.client("kinesis", region_name="us-east-1", endpoint_url=url, **SDK_KEYS)

    async def call() -> Any:
        return client.put_records(Records=entries, StreamName="bench")  # it blocks, as in a program of its own

    yield call
    client.close()


PEERS: dict[str, tuple[Any, int]] = {
    "fastkin": (native, 1),
    "fastkin transport=sdk": (reference, 8),
    "aiobotocore": (aiobotocore, 25),
    "boto3": (boto3, 25),
}


async def what_arrives(peer: Any, url: str, rows: list[tuple[bytes, str]]) -> bytes:
    """The body as the server got it: it comes back in a member of the answer that takes any text."""
    async with peer(url + "/keep", rows) as call:
        answer = await call()
    told = answer if isinstance(answer, dict) else json.loads(answer)
    return base64.b64decode(told["EncryptionType"])


async def check_peers(url: str) -> None:
    """Every peer stores the same records; the two ways of fastkin send the same bytes."""
    rows = [*records(50, 200), (b"", "k"), (bytes(range(256)), "\u00e4\u4e16")]
    bodies = {name: await what_arrives(peer, url, rows) for name, (peer, _) in PEERS.items()}
    expected = finished_body(rows)
    for name, body in bodies.items():
        assert json.loads(body) == json.loads(expected), name
        assert not name.startswith("fastkin") or body == expected, name


async def measured(peer: Any, url: str, shape: str, part: float) -> tuple[float, float]:
    """(CPU us, wall us) of one call, one after the other."""
    count, size, calls = SHAPES[shape]
    rows = records(count, size)
    async with peer(f"{url}/{count}", rows) as call:
        for _ in range(3):
            await call()
        n = max(int(calls * part * SCALE), 5)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(n):
            await call()
        return (time.process_time() - cpu) / n * 1e6, (time.perf_counter() - wall) / n * 1e6


async def lateness(url: str, seconds: float, *, flying: int = 8) -> tuple[float, float, float]:
    """(p50 ms, p99 ms, calls/s): how late a 1 ms ticker is with calls of 500 x 10 KB in flight."""
    rows = records(500, 10_000)
    late: list[float] = []
    calls = 0
    stop = False
    client = KinesisClient(Kinesis(stream="bench", region="us-east-1", endpoint_url=f"{url}/500", **KEYS))
    await client.start()
    bodies = [finished_body(rows) for _ in range(flying)]

    async def fly(body: bytes) -> None:
        nonlocal calls
        while not stop:
            await client.call("PutRecords", body)
            calls += 1

    async def tick() -> None:
        while not stop:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append((time.perf_counter() - due) * 1e3)

    tasks = [asyncio.create_task(fly(body)) for body in bodies]
    await asyncio.sleep(0.3)
    ticker = asyncio.create_task(tick())
    before, begin = calls, time.perf_counter()
    await asyncio.sleep(seconds)
    rate = (calls - before) / (time.perf_counter() - begin)
    stop = True
    await asyncio.gather(ticker, *tasks)
    await client.close()
    late.sort()
    return late[len(late) // 2], late[int(len(late) * 0.99)], rate


# -- as a benchmark


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with counting_server() as url:
        uvloop.run(check_peers(url))
        yield url


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiobotocore through aiohttp
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PEERS)
def test_call(benchmark: Any, server: str, name: str, shape: str) -> None:
    peer, fewer = PEERS[name]
    benchmark.group = f"PutRecords call, {shape}"
    count, size, calls = SHAPES[shape]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rounds = 1 if benchmark.disabled else 3
        part = (0.02 if benchmark.disabled else 1.0) / fewer
        figures: list[tuple[float, float]] = []
        benchmark.pedantic(
            lambda: figures.append(runner.run(measured(peer, server, shape, part))), rounds=rounds, iterations=1
        )
    benchmark.extra_info |= {
        "cpu_us_per_call": round(statistics.median(figure[0] for figure in figures), 1),
        "wall_us_per_call": round(statistics.median(figure[1] for figure in figures), 1),
        "records": count,
        "bytes": count * size,
        "calls": int(calls * part * SCALE),
    }


def test_the_loop_stays_free(benchmark: Any, server: str) -> None:
    """With 8 calls of 500 x 10 KB in flight a 1 ms ticker is late by at most 5 ms at p99."""
    benchmark.group = "lateness of a 1 ms ticker"
    figures: list[tuple[float, float, float]] = []
    seconds = 0.5 if benchmark.disabled else 3.0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        benchmark.pedantic(
            lambda: figures.append(runner.run(lateness(server, seconds))), rounds=1 if benchmark.disabled else 3
        )
    p99 = statistics.median(figure[1] for figure in figures)
    benchmark.extra_info |= {"p99_ms": p99, "calls_per_s": statistics.median(figure[2] for figure in figures)}
    if not benchmark.disabled:
        assert p99 <= 5.0


def main() -> None:
    with counting_server() as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check_peers(url))
        for shape in SHAPES:
            base = 0.0
            for name, (peer, fewer) in PEERS.items():
                runs = sorted(runner.run(measured(peer, url, shape, 1 / fewer)) for _ in range(3))
                cpu, wall = runs[1]
                base = base or cpu
                print(
                    f"{shape:12} {name:22} {cpu:10.1f} us CPU/call {wall:10.1f} us wall  x{cpu / base:.1f}", flush=True
                )
        for _ in range(3):
            p50, p99, rate = runner.run(lateness(url, 3.0))
            print(
                f"1 ms ticker, 8 x 500 x 10 KB: late p50 {p50:.2f} ms p99 {p99:.2f} ms, {rate:.0f} calls/s", flush=True
            )


if __name__ == "__main__":
    uvloop.run(serve()) if sys.argv[1:] == ["--serve"] else main()
