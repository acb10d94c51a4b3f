"""fastkin itself: acknowledges after storing."""

from __future__ import annotations

import asyncio

import uvloop
from _measure import Meter, arguments

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings


async def main() -> None:
    args = arguments()
    settings = Settings(
        broker=Broker(host="127.0.0.1", port=args.port, client_id="bench", receive_maximum=20_000),
        pipelines=(
            Pipeline(
                id="bench",
                topics=("plant/#",),
                qos=args.qos,
                startup_check="none",
                kinesis=Kinesis(
                    stream="bench", region="us-east-1", endpoint_url=args.url, access_key="AK", secret_key="SK"
                ),
            ),
        ),
    )
    meter = Meter()
    stored = asyncio.Event()

    def settled(_: str) -> None:
        if engine.pipelines["bench"].delivery.batcher.stored >= args.count:
            stored.set()

    async with fastkin.Engine(settings, on_settled=settled) as engine:
        await stored.wait()
        stats = engine.stats()["bench"]
        meter.report(args.count, calls=stats["calls"], retries=stats["retries"], flushes=stats["flushes"])


uvloop.run(main())
