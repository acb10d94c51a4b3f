"""A record processor for the Kinesis Client Library: many machines read one stream, each shard by one of them.

    pip install amazon_kclpy fastkin
    amazon_kclpy_helper.py --print_command --java JAVA --properties welders.properties     (executableName = this file)

KCL gives leases, restarts and checkpoints in DynamoDB, and takes aggregates apart; records are decoded as
`fastkin.Consumer` decodes them. What is no JSON is set aside alone. Records of fastkin that were sent twice have the
same key and data: make `store` idempotent by both.
"""

import logging
import time
from typing import Any

from amazon_kclpy import kcl  # pyright: ignore[reportMissingImports]
from amazon_kclpy.v3 import processor  # pyright: ignore[reportMissingImports]

import fastkin

LOG = logging.getLogger("welders")
CHECKPOINT_S = 60.0


def store(key: str, value: Any) -> None:
    """Yours. Raise when it cannot be stored: KCL ends the process and gives the records to another one again."""
    LOG.info("%s %s", key, value)


class RecordProcessor(processor.RecordProcessorBase):  # type: ignore[misc]  # the library has no types
    """One shard's reader; KCL makes one for each lease."""

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None  # the record that was stored last
        self._kept = time.monotonic()
        self.bad = 0

    def initialize(self, initialize_input: Any) -> None:
        LOG.info("begins with shard %s", initialize_input.shard_id)

    def process_records(self, process_records_input: Any) -> None:
        for record in process_records_input.records:
            data = record.binary_data
            try:
                store(record.partition_key, fastkin.decode_json(data))
            except fastkin.DataFormatError as error:
                self.bad += 1
                # One line: where it was raised says nothing about the record.
                LOG.error(  # noqa: TRY400
                    "%s: %s; %d bytes", record.sequence_number, error, len(data)
                )
            self._last = (record.sequence_number, record.sub_sequence_number)
        if time.monotonic() - self._kept >= CHECKPOINT_S:
            self._keep(process_records_input.checkpointer)

    def _keep(self, checkpointer: Any) -> None:
        # A failed checkpoint only means that more comes again later: throttled, or the lease has gone.
        if self._last is None:
            return
        try:
            checkpointer.checkpoint(*self._last)
            self._kept = time.monotonic()
        except kcl.CheckpointError as error:
            LOG.warning("checkpoint at %s: %s", self._last[0], error)

    def lease_lost(self, lease_lost_input: Any) -> None:
        """Another worker has the shard: it has begun behind our last checkpoint."""

    def shard_ended(self, shard_ended_input: Any) -> None:
        # Without a checkpoint here KCL never begins with the children of this shard.
        shard_ended_input.checkpointer.checkpoint()

    def shutdown_requested(self, shutdown_requested_input: Any) -> None:
        self._keep(shutdown_requested_input.checkpointer)


if __name__ == "__main__":
    # Standard output belongs to KCL's protocol: logs go to standard error.
    logging.basicConfig(level=logging.INFO)
    kcl.KCLProcess(RecordProcessor()).run()
