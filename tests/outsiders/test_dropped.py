"""An event loop that ends before anybody called close() or stop(): one clear line at most, and no traceback."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import pytest

from fastkin.emulator import Emulator
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.servers import Server

HEAD = """
import asyncio, sys
import uvloop
from fastkin import Engine, Producer
from fastkin.config import Broker, Kinesis, Pipeline, Settings
url, port, new_loop = sys.argv[1], int(sys.argv[2]), getattr(sys.modules[sys.argv[3]], "new_event_loop")
keys = dict(region="us-east-1", endpoint_url=url, access_key="a", secret_key="b")
def engine():
    pipeline = Pipeline(id="p", topics=("t/#",), kinesis=Kinesis(stream="s", **keys), dead_letter="none")
    return Engine(Settings(broker=Broker(port=port, client_id="dropped"), pipelines=(pipeline,)))
async def producer_dropped():
    producer = Producer("s", **keys)
    await producer.start()
    await producer.put(b"x")
async def producer_kept():
    global kept
    kept = Producer("s", linger_ms=60000, **keys)
    await kept.start()
    await kept.put(b"x")
    await asyncio.sleep(0.2)
async def engine_kept():
    global kept
    kept = engine()
    await kept.start()
    await asyncio.wait_for(kept.pipelines["p"].subscriber.connected.wait(), 10)
async def engine_dropped():
    mine = engine()
    await mine.start()
    await asyncio.wait_for(mine.pipelines["p"].subscriber.connected.wait(), 10)
"""
RUN = "with asyncio.Runner(loop_factory=new_loop) as runner: runner.run({}())"
EARLY = "loop = new_loop()\nloop.run_until_complete({}())\nloop.close()"
STRICT = ("-X", "dev", "-W", "error")


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("case", "how", "flags"),
    [
        ("producer_dropped", RUN, STRICT),
        ("producer_kept", RUN, STRICT),
        ("producer_dropped", EARLY, ()),
        ("producer_kept", EARLY, ()),
        ("engine_dropped", RUN, ()),
        ("engine_kept", RUN, ()),
        ("engine_kept", EARLY, ()),
        ("engine_dropped", EARLY, ()),
    ],
)
async def test_a_loop_that_ends_first_prints_no_traceback(
    server: Server, case: str, how: str, flags: tuple[str, ...], loop: str
) -> None:
    async with Emulator({"s": 1}) as emulator:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *flags, "-c", HEAD + how.format(case), emulator.url, str(server.port), loop,
            stderr=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONASYNCIODEBUG": ""},
        )  # fmt: skip
        try:
            _, err = await asyncio.wait_for(process.communicate(), 30)
        finally:
            if process.returncode is None:
                process.kill()
    said = [line for line in err.decode().splitlines() if not line.startswith("Executing <")]  # a busy machine
    assert len(said) <= 1, err.decode()
    if said:
        assert "1 records were not stored; use `async with Producer(...)`" in said[0]
    assert process.returncode == 0
