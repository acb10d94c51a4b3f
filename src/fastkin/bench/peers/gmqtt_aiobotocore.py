"""gmqtt and aiobotocore on one loop. The peer whose name ends with "late" acknowledges after storing, else before."""

from __future__ import annotations

import asyncio
import ssl
import sys
import uuid
from typing import Any
from urllib.parse import urlsplit

from aiobotocore.session import get_session
from botocore.config import Config
from gmqtt import Client
from gmqtt.mqtt.constants import MQTTv311

from fastkin.bench.plan import KEY, Plan
from fastkin.runtime.loops import loop_factory

_LINGER_S = 0.05
_RECORDS = 500

Backlog = asyncio.Queue[tuple[bytes, "asyncio.Future[int] | None"]]


async def main(plan: Plan) -> None:
    """Until it is ended."""
    loop = asyncio.get_running_loop()
    late = plan.peer.endswith("late")
    backlog: Backlog = asyncio.Queue()
    client: Any = Client("bench", clean_session=True, optimistic_acknowledgement=not late)

    async def after(_client: Any, _topic: str, payload: bytes, _qos: int, _properties: object) -> int:
        done: asyncio.Future[int] = loop.create_future()
        backlog.put_nowait((payload, done))
        return await done

    def before(_client: Any, _topic: str, payload: bytes, _qos: int, _properties: object) -> int:
        backlog.put_nowait((payload, None))
        return 0

    client.on_message = after if late else before
    client.on_connect = lambda client, *_: client.subscribe(plan.forms().filter, plan.qos)
    config = Config(retries={"total_max_attempts": 1})
    async with get_session().create_client(
        "kinesis", region_name=plan.region, endpoint_url=plan.endpoint_url, aws_access_key_id=KEY,
        aws_secret_access_key=KEY, verify=plan.endpoint_ca, config=config,
    ) as made:  # fmt: skip
        kinesis: Any = made  # its methods are made of a description that type checkers do not read
        broker = urlsplit(plan.broker_url)
        tls: Any = ssl.create_default_context(cafile=plan.broker_ca) if plan.broker_ca else False
        await client.connect(broker.hostname, broker.port, ssl=tls, version=MQTTv311)
        while True:
            batch = await _batch(backlog)
            await kinesis.put_records(
                StreamName=plan.stream,
                Records=[{"Data": data, "PartitionKey": str(uuid.uuid4())} for data, _ in batch],
            )
            for _, done in batch:
                if done is not None:
                    done.set_result(0)


async def _batch(backlog: Backlog) -> list[tuple[bytes, asyncio.Future[int] | None]]:
    batch = [await backlog.get()]
    deadline = asyncio.get_running_loop().time() + _LINGER_S
    while len(batch) < _RECORDS:
        if not backlog.empty():
            batch.append(backlog.get_nowait())
            continue
        try:
            async with asyncio.timeout_at(deadline):
                batch.append(await backlog.get())
        except TimeoutError:
            break
    return batch


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main(Plan.of(sys.argv[1])))
