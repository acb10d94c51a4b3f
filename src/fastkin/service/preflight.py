"""Is the stream there, may we write to it, and do the settings fit it?

It is asked at the start, and again until it was answered or a record was stored: either makes a pipeline ready. Only
the first look is waited for. What is asked to do better (mode, limits, shards) is asked behind it, and nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any

import orjson

from fastkin._codec import DRAIN, DROPPED, Batcher, Budget, KeyPlan
from fastkin.delivery.stream_watch import StreamWatch
from fastkin.errors import ConfigError, KinesisError
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastkin.aws.client import Client, StreamSummary
    from fastkin.config import Pipeline
    from fastkin.delivery.delivery import Delivery

_LOG = logging.getLogger("fastkin.pipeline")
_RETRY_S = 5.0  # between attempts at what an operator must mend


class Preflight:
    """Of one run."""

    def __init__(
        self,
        pipeline: Pipeline,
        client: Client,
        delivery: Delivery,
        *,
        static_key: bool,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        """`static_key`: all records have the same partition key. `spawn` starts a task of the run."""
        self._pipeline = pipeline
        self._client = client
        self._refusals = delivery.sender.refusals
        self._static_key = static_key
        self._spawn = spawn
        self._lines = Repeats(_LOG, asyncio.get_running_loop().call_later, most=5, per_s=60.0)
        self.ready: bool = False  # the stream was reached: it answered, or it stored something
        self.start_error: str | None = None  # why it was not yet
        asks = pipeline.startup_check != "none"
        self._watch = StreamWatch(
            delivery, shards=asks, limits=asks, fits=self._fits, cure='set aggregation = "none"',
            misfit=lambda problem: ConfigError(
                f"pipeline {pipeline.id!r} aggregation", problem, 'set aggregation = "none"'
            ),
        )  # fmt: skip

    async def first(self) -> None:
        """The first look. ConfigError: the settings do not fit the stream. Further looks go on by themselves."""
        if not await self._look():
            self._spawn(self._look_later(), "prepare")

    def settle_in(self) -> None:
        """Records flow from here on: what does not fit the stream is said, and no longer an error."""
        self._watch.settled_in = True
        self._watch.say_unknown_mode()

    def reached(self) -> None:
        self.ready = True
        self.start_error = None

    def close(self) -> None:
        self._lines.close()

    async def _look(self) -> bool:
        """Find credentials and endpoint, try the stream. False: not now, for a reason that was logged."""
        check = self._pipeline.startup_check
        try:
            await self._client.start()
            if check == "dry_run":
                await self._client.dry_run()
            elif check == "put":
                await self._put_connection_test()
                self._client.took = True
            elif check == "describe":
                await self._watch.look_at_stream()
        except KinesisError as error:
            if not self.ready:  # else records are stored: it is only the question that was not answered
                self.start_error = str(error)
                if error.code != "NoCredentials":  # who looks for them has told it
                    self._lines.say(
                        logging.ERROR, "not ready",
                        "pipeline=%s stage=send not ready: %s; trying again in %.0f s",
                        self._pipeline.id, error, _RETRY_S,
                    )  # fmt: skip
                return False
        self.reached()
        # What is asked from here on makes us better and is not needed: nothing waits for it but the first connect.
        await self._watch.look()
        self._spawn(self._watch.run(), "shards")
        return True

    async def _look_later(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_S)
            if await self._look():
                return

    def _fits(self, summary: StreamSummary) -> None:
        """Do the settings fit the stream? ConfigError, or a WARNING."""
        if not self._client.destination.shards:
            return  # it takes no keys, and its limits are in its row
        if not summary.auto_keys and self._pipeline.partition_key == "none":
            raise ConfigError(
                f"pipeline {self._pipeline.id!r} partition_key",
                f"'none' needs a stream with RecordDistributionStrategy AUTO, {summary.name} is not one",
                "use uuid",
            )
        self._refusals.takes = summary.max_record_bytes
        if self._pipeline.max_record_bytes > summary.max_record_bytes:
            _LOG.warning(
                "pipeline=%s stage=send max_record_bytes %d is above what stream %s takes (%d): larger records"
                " will be dead-lettered one by one", self._pipeline.id, self._pipeline.max_record_bytes, summary.name,
                summary.max_record_bytes,
            )  # fmt: skip
        if self._static_key and summary.shard_count > 1:
            _LOG.warning(
                "pipeline=%s stage=send one static partition key on %d shards: everything goes to one shard, which"
                " takes 1 MiB/s; use partition_key = uuid or topic to use all", self._pipeline.id, summary.shard_count,
            )  # fmt: skip

    async def _put_connection_test(self) -> None:
        """One real record, for permission systems that know no dry run; consumers are told to ignore it."""
        budget = Budget(1 << 16, 1)
        batcher = Batcher(
            settler=None, budget=budget, frame="raw",
            key=KeyPlan("parts", [("text", "key")]) if self._client.destination.keyed else KeyPlan("none"),
            target=self._client.target_json(), answer=self._client.destination.answer,
        )  # fmt: skip
        test = {"type": "connection_test", "host": socket.gethostname(), "data": "CONNECTION_TEST"}
        batcher.add(orjson.dumps(test))
        batcher.close_batch(DRAIN)
        batch = batcher.take()
        assert batch is not None
        for failure in batch.settle(await self._client.put(batch)):
            failure.batch.finish(DROPPED)
            raise KinesisError(failure.code, failure.message)
