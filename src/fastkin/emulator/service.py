"""What each operation does: a decoded body in, an answer out. No sockets, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .control import Control
from .reading import Reading
from .rules import ApiError, blob, check
from .state import State
from .wire import dumps
from .writing import Writing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_OF_FIREHOSE = frozenset({"PutRecordBatch", "DescribeDeliveryStream"})


@dataclass(kw_only=True, eq=False)
class Service(State):
    """An account's streams, and the operation that each call names."""

    def __post_init__(self) -> None:
        control, writing, reading = Control(self), Writing(self), Reading(self)
        self._put_records = writing.put_records
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "PutRecord": writing.put_record,
            "PutRecordBatch": writing.put_record_batch,
            "DescribeDeliveryStream": control.describe_delivery,
            "ListShards": control.list_shards,
            "DescribeStream": control.describe_stream,
            "DescribeStreamSummary": control.describe_summary,
            "CreateStream": control.create_stream,
            "DeleteStream": control.delete_stream,
            "ListStreams": control.list_streams,
            "SplitShard": control.split_shard,
            "MergeShards": control.merge_shards,
            "GetShardIterator": reading.get_shard_iterator,
            "GetRecords": reading.get_records,
        }

    def knows(self, target: str) -> bool:
        service, _, operation = target.partition(".")
        wanted = "Firehose_20150804" if operation in _OF_FIREHOSE else "Kinesis_20131202"
        return service == wanted and (operation == "PutRecords" or operation in self._operations)

    def stream_name(self, body: Mapping[str, Any]) -> str | None:
        """The name of the stream a call is about, as far as the body tells."""
        name = body.get("StreamName") or body.get("DeliveryStreamName")
        if name is None and isinstance(arn := body.get("StreamARN"), str):
            name = arn.rpartition("/")[2]
        return name if isinstance(name, str) else None

    @staticmethod
    def datas(body: Mapping[str, Any]) -> list[bytes]:
        """The data of the records of a call, as far as they are any."""
        records = body.get("Records")
        try:
            return [blob(record["Data"]) for record in records or (body,)]
        except (KeyError, TypeError, ApiError):
            return []

    def run(self, operation: str, body: dict[str, Any], content_type: str) -> bytes:
        """The body of the 200 answer, or ApiError."""
        if operation == "PutRecords":  # checks in its own fast way
            return self._put_records(body, content_type)
        check(operation, body)
        answer = self._operations[operation](body)
        return dumps(answer, content_type) if answer else b""
