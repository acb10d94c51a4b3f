"""Prints the newest records of a stream: every 15 seconds at most 10 of each shard, with value and origin.

    python examples/consumer.py STREAM [SECONDS]

Set AWS_REGION and credentials (for an emulator any, and AWS_ENDPOINT_URL_KINESIS). The single calls are used here, as a
program does that decides itself when to read; `consumer.stream()` does all of it, with retries and checkpoints.
"""

import asyncio
import sys

import fastkin

LIMIT = 10


async def main(stream: str, seconds: float) -> None:
    async with fastkin.Consumer(stream) as consumer:
        iterators: dict[str, str | None] = {}
        begin = fastkin.ShardIteratorType.LATEST
        while True:
            for shard in await consumer.list_shards():
                if shard.id not in iterators:
                    iterators[shard.id] = await consumer.get_shard_iterator(shard.id, begin)
            # a shard that comes later, by a split, is read from its first record
            begin = fastkin.ShardIteratorType.TRIM_HORIZON
            for shard_id, iterator in iterators.items():
                if iterator is None:
                    continue  # the shard has ended
                batch = await consumer.get_records(iterator, LIMIT)
                for record in batch.records:
                    shown = repr(record.raw) if record.error else record.data
                    print(f"{shard_id} {record.timestamp} {shown}", flush=True)
                iterators[shard_id] = batch.next_iterator
            await asyncio.sleep(seconds)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 15.0))
