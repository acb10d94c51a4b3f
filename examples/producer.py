"""Writes a counter every 10 seconds, by put_record and put_records in turns.

    python examples/producer.py STREAM [SECONDS]

Set AWS_REGION and credentials (for an emulator any, and AWS_ENDPOINT_URL_KINESIS). examples/consumer.py shows what
arrives. These calls make one request each and do not try again: `producer.put()` does, and is what most programs want.
"""

import asyncio
import itertools
import sys

import fastkin


async def main(stream: str, seconds: float) -> None:
    async with fastkin.Producer(stream) as producer:
        for value in itertools.count(1):
            origin = "putRecord" if value % 2 else "putRecords"
            record = fastkin.Record({"value": value, "origin": origin}, "testPartitionKey")
            try:
                if origin == "putRecord":
                    result = await producer.put_record(record)
                else:
                    _, [result] = await producer.put_records([record])
            except fastkin.KinesisError as error:
                print(f"failed: {error}", file=sys.stderr, flush=True)
            else:
                print(record.payload.decode(), result.error_code or result.shard_id, flush=True)
            await asyncio.sleep(seconds)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 10.0))
