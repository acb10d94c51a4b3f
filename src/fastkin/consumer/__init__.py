"""The consumer: every record of a stream, in the order of its shards, from a place that is kept. `fastkin.Consumer`.

    consumer.py      the face; it owns the client, and hands out streams
    all_shards.py    which shards are read now, and which wait for their parents
    shard_reader.py  one shard: iterator, pace, what to do when an answer fails
    calls.py         the calls themselves; positions.py and checkpoints.py say where they begin

Records are decoded in codec/reading.pxi. One process reads a stream alone; to share shards among many is KCL's work
(examples/).
"""

from fastkin.consumer.calls import Batch
from fastkin.consumer.checkpoints import SHARD_END, Checkpoints, FileCheckpoints, MemoryCheckpoints
from fastkin.consumer.consumer import Consumer
from fastkin.consumer.positions import Position, ShardIteratorType

__all__ = [
    "SHARD_END",
    "Batch",
    "Checkpoints",
    "Consumer",
    "FileCheckpoints",
    "MemoryCheckpoints",
    "Position",
    "ShardIteratorType",
]
