"""Puts numbered readings into a stream: every 10 seconds one by PutRecord, or two by PutRecords, in turn.

    python examples/producer.py STREAM [SECONDS]

Set AWS_REGION and credentials (for an emulator any, and AWS_ENDPOINT_URL_KINESIS). The single calls are used here, one
request each and nothing tried again, as a program does that decides itself what to do about an error;
`producer.put()` does all of it: batches, retries, pacing.
"""

import asyncio
import sys

import fastkin


async def main(stream: str, seconds: float) -> None:
    value = 0

    def reading(origin: str) -> fastkin.Record:
        nonlocal value
        value += 1
        return fastkin.Record({"value": value, "origin": origin}, partition_key=f"key{value}")

    async with fastkin.Producer(stream) as producer:
        while True:
            try:
                one = await producer.put_record(reading("put_record"))
                print(f"put_record: {one.shard_id} {one.sequence_number}", flush=True)
                await asyncio.sleep(seconds)
                failed, results = await producer.put_records([reading("put_records"), reading("put_records")])
                for result in results:
                    what = result.error_code or f"{result.shard_id} {result.sequence_number}"
                    print(f"put_records, {failed} failed: {what}", flush=True)
            except fastkin.KinesisError as error:
                print(f"{error.type}: {error.details} (HTTP {error.http_status})", file=sys.stderr)
            await asyncio.sleep(seconds)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 10.0))
