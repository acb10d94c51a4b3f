"""What is known of the stream while records flow into it: whether it chooses shards itself, its limits, its shards.

All of it only makes us better: aggregates where consumers take them, pacing by shard, keys that spread. So nothing
waits for it. It is asked for at the start and now and then, sooner when an answer names a shard that is not known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Protocol

from fastkin._codec import ShardTable
from fastkin.aws.shards import ShardMap
from fastkin.errors import KinesisError, LibraryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastkin.aws.client import StreamSummary
    from fastkin.aws.shards import Shard
    from fastkin.delivery.delivery import Delivery

_LOG = logging.getLogger("fastkin.pipeline")

_EVERY_S = 30.0  # between looks: has an answer named a shard that the map does not have?
_LOOKS = 10  # mode and map are asked for again after this many looks in any case


class Questions(Protocol):
    """What is asked of a Kinesis client. Both raise KinesisError."""

    async def describe(self) -> StreamSummary: ...

    async def list_shards(self) -> Sequence[Shard]: ...


class StreamWatch:
    """Keeps mode, limits and shards of one stream up to date in its delivery."""

    def __init__(
        self,
        delivery: Delivery,
        *,
        shards: bool,
        limits: bool,
        misfit: Callable[[str], Exception],
        fits: Callable[[StreamSummary], None] | None = None,
        cure: str,
    ) -> None:
        """`shards`, `limits`: the map, the stream's limits are wanted.

        `misfit(problem)` is the error for aggregates on a stream that takes none; it is raised until `settled_in` is
        set, and logged after that, with `cure` at the end. `fits(summary)` checks the owner's settings, once, and may
        raise.
        """
        self._delivery = delivery
        asked = delivery.client.destination.shards  # else there is nothing to ask for
        self._wants_shards = shards and asked
        self._wants_limits = limits and asked
        self._misfit = misfit
        self._fits = fits
        self._cure = cure
        # Nothing is aggregated before it is known that the stream does not choose shards itself.
        self.aggregate_bytes: int = delivery.batcher.aggregate_bytes
        delivery.batcher.aggregate_bytes = 0
        self.settled_in = False  # records flow: what does not fit is said, and no longer an error
        self.described: bool = False
        self.auto_keys: bool = False  # the stream is known to choose shards itself
        self._describe_failed = False
        self._shards_failed = False

    async def look_at_stream(self) -> None:
        """What the stream is, if we may know. KinesisError: it is not there, or nobody answers."""
        try:
            summary = await self._delivery.client.describe()
        except KinesisError as error:
            # To describe a stream is a permission of its own. Without it records can be stored all the same.
            if not self._delivery.client.only_the_question(error):
                raise
            self._say_undescribed(error)
            return
        self.auto_keys = summary.auto_keys
        self._aggregate(summary)
        # The owner checks its settings once. Later its stream may change, and the run goes on.
        if self.described:
            return
        self.described = True
        if self._fits is not None:
            self._fits(summary)

    async def look(self) -> None:
        """Mode, limits and shards, as far as they are wanted and nobody said no before."""
        if (self.aggregate_bytes or self._wants_limits) and not (self.described or self._describe_failed):
            try:
                await self.look_at_stream()
            except LibraryError:
                raise  # what does not fit, and no answer
            except KinesisError as error:
                self._say_undescribed(error)
        if self._wants_shards or self.described:
            await self._read_shards()

    async def run(self) -> None:
        """Splits and merges, and a stream that comes to choose shards itself: look again now and then."""
        looks = 0
        sender = self._delivery.sender
        seen: set[str] = set()  # shards that answers named and the map did not know: asked about once
        while True:
            await asyncio.sleep(_EVERY_S)
            looks += 1
            if self.aggregate_bytes and (not self.described or looks >= _LOOKS):
                # It was said at the first look.
                with contextlib.suppress(KinesisError):
                    await self.look_at_stream()
            # No map yet: perhaps it was forbidden, or nobody answered. It is asked for with each look.
            known = sender.shards
            if known is None:
                if self._wants_shards:
                    await self._read_shards()
                continue
            # A throttle names its shard. One that the map does not have is the first sign of a split or a merge.
            strange = {s for s in sender.counters.throttled if s and known.ordinal(s) is None} - seen
            if strange or looks >= _LOOKS:
                looks = 0
                seen |= strange
                await self._read_shards()

    def say_unknown_mode(self) -> None:
        """Records begin to flow: say so when they are not aggregated for want of an answer."""
        if self.aggregate_bytes and not self.described:
            _LOG.warning(
                "pipeline=%s stage=batch it is not known whether stream %s chooses shards itself, and there consumers"
                " drop aggregates: records go out one by one until it is; allow kinesis:DescribeStreamSummary, and see"
                " that the control endpoint can be reached", self._delivery.name, self._delivery.stream,
            )  # fmt: skip

    def _say_undescribed(self, error: KinesisError) -> None:
        # It is asked again and again, and said once.
        if not self._describe_failed:
            to = self._delivery.client.destination
            allow = f"{to.service}:{to.describe}"
            _LOG.warning(
                "pipeline=%s stage=send the stream cannot be described (%s): going on without%s",
                self._delivery.name, error.code,
                f" its limits and shard map; allow {allow} and {to.service}:ListShards to pace by shard" if to.shards
                else f"; allow {allow} to see at the start whether it is there",
            )  # fmt: skip
        self._describe_failed = True

    def _aggregate(self, summary: StreamSummary) -> None:
        """Aggregate on a stream that is known to take it. One may be told to choose shards itself at any time."""
        if not self.aggregate_bytes:
            return
        batcher = self._delivery.batcher
        # The stream takes keys as they are, so its consumers know aggregates.
        if not summary.auto_keys:
            if not batcher.aggregate_bytes:
                batcher.aggregate_bytes = self.aggregate_bytes
                self._delivery.attend()
            return
        problem = (
            f"stream {summary.name} chooses shards itself (RecordDistributionStrategy AUTO) and consumers drop"
            " aggregates on it"
        )
        # Nothing has been taken yet, so nothing is lost by an error, and the user hears at once.
        if not self.settled_in:
            raise self._misfit(problem)
        # Once records flow it is too late for an error: they must go on, one by one.
        if batcher.aggregate_bytes or not self.described:
            batcher.aggregate_bytes = 0
            self._delivery.attend()
            _LOG.error(
                "pipeline=%s stage=batch %s: records go out one by one from now on; %s",
                self._delivery.name, problem, self._cure,
            )  # fmt: skip

    async def _read_shards(self) -> None:
        delivery = self._delivery
        try:
            shards = ShardMap(await delivery.client.list_shards())
            current = delivery.sender.shards
            # The same shards. To set them anew would forget what their buckets have learned.
            if current is not None and current.ids == shards.ids:
                self._shards_failed = False
                return
            # Both at once, so that few batches are encoded by one map and paced by another.
            delivery.batcher.shards = ShardTable(shards.ends)
            delivery.sender.set_shards(shards)
        except Exception as error:  # noqa: BLE001 - records go out without a map: no answer may end what sends them
            level = logging.DEBUG if self._shards_failed else logging.WARNING  # asked again and again, said once
            _LOG.log(
                level,
                "pipeline=%s stage=send no shard map (%s): throttles are learned from answers until there is one;"
                " allow kinesis:ListShards", delivery.name, error,
            )  # fmt: skip
            self._shards_failed = True
            return
        self._shards_failed = False
        _LOG.info("pipeline=%s stage=send %d open shards", delivery.name, len(shards))
