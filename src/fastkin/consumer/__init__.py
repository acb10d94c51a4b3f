"""The consumer: every record of a stream, in the order of its shards, from a place that is kept. `fastkin.Consumer`."""

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
