"""gmqtt and aiobotocore on uvloop. A fifth argument "after" acknowledges after storing, else before."""

from __future__ import annotations

import asyncio
import sys
import uuid

import uvloop
from _measure import Meter, arguments
from aiobotocore.session import get_session
from botocore.config import Config
from gmqtt import Client
from gmqtt.mqtt.constants import MQTTv311

AFTER = sys.argv[5:6] == ["after"]


async def main() -> None:
    args = arguments()
    loop = asyncio.get_running_loop()
    backlog: asyncio.Queue[tuple[bytes, asyncio.Future[int] | None]] = asyncio.Queue()
    client = Client("bench", clean_session=True, optimistic_acknowledgement=not AFTER)

    async def after(client: Client, topic: str, payload: bytes, qos: int, properties: object) -> int:
        done: asyncio.Future[int] = loop.create_future()
        backlog.put_nowait((payload, done))
        return await done

    def before(client: Client, topic: str, payload: bytes, qos: int, properties: object) -> int:
        backlog.put_nowait((payload, None))
        return 0

    client.on_message = after if AFTER else before
    client.on_connect = lambda client, *rest: client.subscribe("plant/#", args.qos)
    config = Config(retries={"total_max_attempts": 1})
    async with get_session().create_client(
        "kinesis", region_name="us-east-1", endpoint_url=args.url, aws_access_key_id="AK", aws_secret_access_key="SK",
        config=config,
    ) as kinesis:  # fmt: skip
        meter = Meter()
        await client.connect("127.0.0.1", args.port, version=MQTTv311)
        stored = 0
        while stored < args.count:
            batch = [await backlog.get()]
            deadline = loop.time() + 0.05
            while len(batch) < 500:
                if not backlog.empty():
                    batch.append(backlog.get_nowait())
                    continue
                try:
                    async with asyncio.timeout_at(deadline):
                        batch.append(await backlog.get())
                except TimeoutError:
                    break
            answer = await kinesis.put_records(
                StreamName="bench", Records=[{"Data": data, "PartitionKey": str(uuid.uuid4())} for data, _ in batch]
            )
            stored += len(batch) - answer["FailedRecordCount"]
            for _, done in batch:
                if done is not None:
                    done.set_result(0)
        meter.report(args.count)
        await asyncio.sleep(1.0)  # for its last acknowledgements
        await client.disconnect()


uvloop.run(main())
