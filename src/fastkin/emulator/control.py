"""What makes, describes, changes and deletes streams and their shards.

A split or merge closes shards and makes children with the hash ranges that Kinesis would give them, for pacing and the
order of reading depend on exactly that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .rules import ApiError, broken_rule, refuse
from .state import StreamSpec
from .tokens import pack, unpack
from .wire import Millis

if TYPE_CHECKING:
    from .state import State
    from .streams import Shard, Stream


class Control:
    """Operations on streams, not on records."""

    def __init__(self, state: State) -> None:
        self._state = state

    def create_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["StreamName"]
        if name in self._state.streams:
            raise ApiError(
                "ResourceInUseException",
                f"Stream {name} under account {self._state.account} already exists.",
            )
        mode = (body.get("StreamModeDetails") or {}).get("StreamMode", "PROVISIONED")
        if mode not in ("PROVISIONED", "ON_DEMAND"):
            modes = "Member must satisfy enum value set: [PROVISIONED, ON_DEMAND]"
            refuse([broken_rule(mode, "streamModeDetails.streamMode", modes)])
        auto_keys = body.get("RecordDistributionStrategy") == "AUTO"
        if auto_keys and mode != "ON_DEMAND":
            raise ApiError(
                "InvalidArgumentException",
                "RecordDistributionStrategy AUTO is only for streams in ON_DEMAND mode.",
            )
        if mode == "PROVISIONED" and body.get("ShardCount") is None:
            raise ApiError("InvalidArgumentException", "ShardCount must be given.")
        self._state.add_stream(
            name,
            StreamSpec(
                shards=body.get("ShardCount") or 4,  # an on-demand stream starts with four
                max_record_kib=body.get("MaxRecordSizeInKiB") or 1024,
                mode=mode,
                auto_keys=auto_keys,
            ),
            delay_s=self._state.create_s,
        )
        return {}

    def describe_delivery(self, body: dict[str, Any]) -> dict[str, Any]:
        """A delivery stream of Firehose. Its destinations are not told: nothing is delivered from here."""
        name = self._state.delivery(body["DeliveryStreamName"]).name
        arn = f"arn:aws:firehose:{self._state.region}:{self._state.account}:deliverystream/{name}"
        return {
            "DeliveryStreamDescription": {
                "DeliveryStreamName": name,
                "DeliveryStreamARN": arn,
                "DeliveryStreamStatus": "ACTIVE",
                "DeliveryStreamType": "DirectPut",
                "VersionId": "1",
                "HasMoreDestinations": False,
                "Destinations": [],
            }
        }

    def delete_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._state.stream(body, active=False)
        self._state.gone_bytes += stream.stored_bytes
        del self._state.streams[stream.name]
        return {}

    def list_streams(self, body: dict[str, Any]) -> dict[str, Any]:
        # A token is a name, as the real one may be: the list is in order, and streams may come and go between two
        # pages.
        start = body.get("ExclusiveStartStreamName") or body.get("NextToken") or ""
        names = sorted(name for name in self._state.streams if name > start)
        page = names[: body.get("Limit") or 100]
        more = len(page) < len(names)
        now = self._state.clock()
        answer: dict[str, Any] = {
            "StreamNames": page,
            "HasMoreStreams": more,
            "StreamSummaries": [
                {
                    "StreamName": name,
                    "StreamARN": self._state.streams[name].arn,
                    "StreamStatus": self._state.streams[name].status(now),
                    "StreamModeDetails": {"StreamMode": self._state.streams[name].mode},
                    "StreamCreationTimestamp": Millis(self._state.streams[name].created_at * 1000),
                }
                for name in page
            ],
        }
        if more:
            answer["NextToken"] = page[-1]
        return answer

    def describe_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._state.stream(body, active=False)
        start = body.get("ExclusiveStartShardId") or ""
        shards = [shard for shard in stream.shards if shard.id > start]
        page = shards[: body.get("Limit") or 100]
        return {
            "StreamDescription": {
                **self._description(stream),
                "Shards": [_shard_map(shard) for shard in page],
                "HasMoreShards": len(page) < len(shards),
            }
        }

    def describe_summary(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._state.stream(body, active=False)
        return {
            "StreamDescriptionSummary": {
                **self._description(stream),
                "OpenShardCount": len(stream.open_shards),
                "ConsumerCount": 0,
                "MaxRecordSizeInKiB": stream.max_record_kib,
                "RecordDistributionStrategy": ("AUTO" if stream.auto_keys else "USER_PARTITION_KEY"),
            }
        }

    def _description(self, stream: Stream) -> dict[str, Any]:
        return {
            "StreamName": stream.name,
            "StreamARN": stream.arn,
            "StreamStatus": stream.status(self._state.clock()),
            "StreamModeDetails": {"StreamMode": stream.mode},
            "RetentionPeriodHours": 24,
            "StreamCreationTimestamp": Millis(stream.created_at * 1000),
            "EnhancedMonitoring": [{"ShardLevelMetrics": []}],
            "EncryptionType": "NONE",
        }

    def list_shards(self, body: dict[str, Any]) -> dict[str, Any]:
        token = body.get("NextToken")
        start = body.get("ExclusiveStartShardId") or ""
        # The token holds name and place: the stream must not be named a second time, as on AWS.
        if token is not None:
            if body.get("StreamName") is not None or body.get("StreamARN") is not None:
                raise ApiError("InvalidArgumentException", "NextToken and StreamName cannot be given together.")
            name, start = unpack(token, 2, "Invalid NextToken.")
            body = {**body, "StreamName": name}
        stream = self._state.stream(body)
        shards = _filtered(stream, body.get("ShardFilter"))
        shards = [shard for shard in shards if shard.id > start]
        page = shards[: body.get("MaxResults") or 1000]
        answer: dict[str, Any] = {"Shards": [_shard_map(shard) for shard in page]}
        if len(page) < len(shards):
            answer["NextToken"] = pack(stream.name, page[-1].id)
        return answer

    def split_shard(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._state.stream(body)
        shard = self._open_shard(stream, body["ShardToSplit"])
        new_start = int(body["NewStartingHashKey"])
        # Stricter than it need be, as the service is: each child gets two hash keys at least.
        if not shard.start + 1 < new_start < shard.end:
            raise ApiError(
                "InvalidArgumentException",
                f"NewStartingHashKey {new_start} used in SplitShard() on shard {shard.id} in "
                f"stream {stream.name} under account {self._state.account} is not both greater than one "
                f"plus the shard's StartingHashKey {shard.start} and less than the shard's "
                f"EndingHashKey {shard.end}.",
            )
        stream.split(shard, new_start, self._state.wall(), self._state.clock())
        return {}

    def merge_shards(self, body: dict[str, Any]) -> dict[str, Any]:
        stream = self._state.stream(body)
        one = self._open_shard(stream, body["ShardToMerge"])
        two = self._open_shard(stream, body["AdjacentShardToMerge"])
        if one.end + 1 != two.start and two.end + 1 != one.start:
            raise ApiError(
                "InvalidArgumentException",
                f"Shards {one.id} and {two.id} in stream {stream.name} under account "
                f"{self._state.account} are not an adjacent pair of shards eligible for merging",
            )
        stream.merge(one, two, self._state.wall(), self._state.clock())
        return {}

    def _open_shard(self, stream: Stream, shard_id: str) -> Shard:
        shard = self._state.shard(stream, shard_id)
        if shard.closed_at is not None:
            raise ApiError(
                "InvalidArgumentException",
                f"Shard {shard.id} in stream {stream.name} under account {self._state.account} has "
                "already been merged or split, and thus is not eligible for merging or splitting.",
            )
        return shard


def _shard_map(shard: Shard) -> dict[str, Any]:
    sequences = {"StartingSequenceNumber": shard.starting_sequence}
    if shard.ending_sequence is not None:
        sequences["EndingSequenceNumber"] = shard.ending_sequence
    answer: dict[str, Any] = {
        "ShardId": shard.id,
        "HashKeyRange": shard.key_range,
        "SequenceNumberRange": sequences,
    }
    if shard.parent is not None:
        answer["ParentShardId"] = shard.parent
    if shard.adjacent_parent is not None:
        answer["AdjacentParentShardId"] = shard.adjacent_parent
    return answer


def _filtered(stream: Stream, wanted: Any) -> list[Shard]:
    """ListShards' ShardFilter. Nothing is trimmed: the horizon is the stream's creation."""
    if not wanted:
        return stream.shards
    kind = wanted.get("Type")
    if kind == "AT_LATEST":
        return [shard for shard in stream.shards if shard.closed_at is None]
    if kind == "AFTER_SHARD_ID":
        return [shard for shard in stream.shards if shard.id > (wanted.get("ShardId") or "")]
    # Nothing is ever trimmed here, so the shards of that moment are those that have no parents.
    if kind == "AT_TRIM_HORIZON":
        return [shard for shard in stream.shards if shard.parent is None]
    if kind == "FROM_TRIM_HORIZON":
        return stream.shards
    when = wanted.get("Timestamp")
    if kind not in ("AT_TIMESTAMP", "FROM_TIMESTAMP") or when is None:
        raise ApiError("InvalidArgumentException", "ShardFilter needs a known Type and its field.")
    when = when / 1000 if isinstance(when, Millis) else when
    alive = [shard for shard in stream.shards if shard.closed_at is None or shard.closed_at >= when]
    if kind == "AT_TIMESTAMP":
        return [shard for shard in alive if shard.created_at <= when]
    return alive
