"""Kinesis: streams with shards, limits and moods, behind the product's own `Client`.

The stand-in is a `Client` whose `call` carries JSON bodies, so that describe, list_shards and dry_run are the
product's own code. What is in a call is looked at as AWS would: a call over a limit is a finding, for limits are the
product's business.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import Counter
from hashlib import md5
from typing import TYPE_CHECKING, Any

import orjson

from fastkin.aws.client import Client
from fastkin.errors import Action, KinesisError, NotSent, TransportError
from fastkin.lambdas import deaggregate
from simulation.loop import PROCESS, Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulation.world import World

SPACE = 1 << 128
_KPL = b"\xf3\x89\x9a\xc2"


class Stream:
    """One stream; its moods are plain attributes that the scenario sets."""

    def __init__(self, world: World, name: str, shards: int, books: Any) -> None:
        self.world = world
        self.name = name
        self.books = books
        self.stored: Counter[bytes] = Counter()
        self.poison: set[bytes] = set()
        self.calls = 0
        self.open: list[dict[str, Any]] = []
        self.closed: list[dict[str, Any]] = []
        self._shard_serial = 0
        for at in range(shards):
            self._add_shard(SPACE * at // shards, SPACE * (at + 1) // shards - 1)
        self.max_records = 500
        self.max_call_bytes = 5 << 20
        self.max_record_bytes = 1 << 20
        self.auto = False
        self.at_aws = False  # a DryRun is known to be one
        self.shard_rate = 1000.0  # records per second
        # moods
        self.latencies: Sequence[float] = (0.01,)
        self.limits = False  # throttles by shard
        self.first_takes = 1.0  # of what the others take
        self.call_fault = ""  # one of CALL_FAULTS
        self.call_fault_share = 0.0
        self.entry_fault = ""
        self.entry_fault_share = 0.0
        self.answer_fault = ""
        self.answer_fault_share = 0.0
        self.hangs = False
        self.control_fault = ""  # describe and list_shards fail so

    def heal(self) -> None:
        self.call_fault = self.entry_fault = self.answer_fault = self.control_fault = ""
        self.hangs = self.limits = False
        self.latencies = (0.01,)

    # -- shards --------------------------------------------------------------------------------------

    def _add_shard(self, start: int, end: int, parent: str | None = None) -> None:
        shard = {
            "ShardId": f"shardId-{self._shard_serial:012d}",
            "HashKeyRange": {"StartingHashKey": str(start), "EndingHashKey": str(end)},
            "SequenceNumberRange": {"StartingSequenceNumber": "1"},
        }
        if parent:
            shard["ParentShardId"] = parent
        self._shard_serial += 1
        self.open.append(
            {"id": shard["ShardId"], "start": start, "end": end, "told": shard, "tokens": 1000.0, "at": 0.0}
        )
        self.open.sort(key=lambda each: each["start"])

    def _close(self, shard: dict[str, Any]) -> None:
        self.open.remove(shard)
        shard["told"]["SequenceNumberRange"]["EndingSequenceNumber"] = "9"
        self.closed.append(shard)

    def reshard(self) -> None:
        """Split one shard, or merge two."""
        if len(self.open) > 1 and self.world.chance("merge", 0.4):
            at = self.world.between("shard", 0, len(self.open) - 2)
            first, second = self.open[at], self.open[at + 1]
            self._close(first)
            self._close(second)
            self._add_shard(first["start"], second["end"], first["id"])
            self.world.mark("shards merged")
        else:
            shard = self.open[self.world.between("shard", 0, len(self.open) - 1)]
            middle = (shard["start"] + shard["end"]) // 2
            self._close(shard)
            self._add_shard(shard["start"], middle, shard["id"])
            self._add_shard(middle + 1, shard["end"], shard["id"])
            self.world.mark("a shard split")

    def shard_of(self, record: dict[str, Any]) -> dict[str, Any]:
        explicit = record.get("ExplicitHashKey")
        key = (
            int(explicit) if explicit else int.from_bytes(md5(record.get("PartitionKey", "").encode()).digest(), "big")
        )
        return next(shard for shard in self.open if shard["start"] <= key <= shard["end"])

    # -- PutRecords --------------------------------------------------------------------------------------

    def put(self, body: bytes) -> tuple[int, bytes]:
        """(HTTP status, answer) of what Kinesis does with a call that has arrived."""
        world = self.world
        self.calls += 1
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise Finding(f"a call to {self.name} is not JSON: {body[:80]!r}") from None
        records = request["Records"]
        if request.get("StreamName") != self.name:
            raise Finding(f"a call for {request.get('StreamName')} came to {self.name}")
        if request.get("DryRun"):
            return 400, _error("DryRunOperationException", "it would have been allowed")
        if not 1 <= len(records) <= self.max_records:
            raise Finding(f"a call of {len(records)} records")
        decoded, total, refused = [], 0, False
        for record in records:
            try:
                data = base64.b64decode(record["Data"], validate=True)
            except binascii.Error:
                raise Finding(f"a record's data is no base64: {record['Data'][:40]!r}") from None
            key = record.get("PartitionKey", "")
            if not self.auto and not 1 <= len(key) <= 256:
                raise Finding(f"a partition key of {len(key)} characters")
            size = len(data) + len(key.encode())
            total += size
            if size > self.max_record_bytes:
                refused = True
            decoded.append(self._users(data))
        if total > self.max_call_bytes:
            raise Finding(f"a call of {total} bytes")
        if refused or (self.poison and any(user in self.poison for users in decoded for user in users)):
            world.mark("a call refused for one record")
            if len(decoded) == 1 < len(decoded[0]):
                world.mark("a refused aggregate")
            return 400, _error("ValidationException", "1 validation error detected")
        answers, failed = [], 0
        shard = self.open[0]
        for record, users in zip(records, decoded, strict=True):
            if len(self.open) > 1:
                shard = self.shard_of(record)
            told = self._entry_fault(shard)
            if told is not None:
                failed += 1
                answers.append(told)
                continue
            for user in users:
                self._store(user)
            answers.append(
                {"SequenceNumber": str(sum(self.stored.values()) if world.tracing else 1), "ShardId": shard["id"]}
            )
        if failed and failed < len(answers):
            world.mark("an answer with some entries failed")
        return 200, orjson.dumps({"FailedRecordCount": failed, "EncryptionType": "KMS", "Records": answers})

    def _users(self, data: bytes) -> list[bytes]:
        if data[:4] == _KPL:
            self.world.mark("an aggregate")
            return [user for _, user in deaggregate(data)]
        return [data]

    def _store(self, user: bytes) -> None:
        self.stored[user] += 1
        self.books.stored(user)

    def _entry_fault(self, shard: dict[str, Any]) -> dict[str, Any] | None:
        now = self.world.loop.now
        if self.limits:
            rate = self.shard_rate * (self.first_takes if shard is self.open[0] else 1.0)
            shard["tokens"] = min(rate, shard["tokens"] + (now - shard["at"]) * rate)
            shard["at"] = now
            if shard["tokens"] < 1:
                self.world.mark("throttled by shard")
                return _throttled(shard["id"], self.name)
            shard["tokens"] -= 1
        if self.entry_fault and self.world.rng.random() < self.entry_fault_share:
            code = self.entry_fault
            if code == "ProvisionedThroughputExceededException":
                return _throttled(shard["id"], self.name)
            return {"ErrorCode": code, "ErrorMessage": f"{code}, said the simulation"}
        return None

    # -- questions ------------------------------------------------------------------------------------------

    def ask(self, target: str, body: bytes) -> tuple[int, bytes]:
        request = orjson.loads(body)
        if self.control_fault:
            self.world.mark("a question about the stream is refused")
            return 400, _error(self.control_fault, "not now, said the simulation")
        if target == "DescribeStreamSummary":
            told = {
                "StreamName": self.name, "StreamARN": f"arn:aws:kinesis:eu-west-1:1:stream/{self.name}",
                "StreamStatus": "ACTIVE", "OpenShardCount": len(self.open), "MaxRecordSizeInKiB": 1024,
                "StreamModeDetails": {"StreamMode": "PROVISIONED"},
            }  # fmt: skip
            return 200, orjson.dumps({"StreamDescriptionSummary": told})
        if target == "ListShards":
            shards = [each["told"] for each in (*self.closed, *self.open)]
            if request.get("NextToken"):
                return 200, orjson.dumps({"Shards": shards[1:]})
            if len(shards) > 2:
                return 200, orjson.dumps({"Shards": shards[:1], "NextToken": "more"})
            return 200, orjson.dumps({"Shards": shards})
        raise Finding(f"a call of {target}")


def _throttled(shard: str, stream: str) -> dict[str, Any]:
    return {
        "ErrorCode": "ProvisionedThroughputExceededException",
        "ErrorMessage": f"Rate exceeded for shard {shard} in stream {stream} under account 111122223333.",
    }


def _error(code: str, message: str) -> bytes:
    return orjson.dumps({"__type": code, "message": message})


# What a whole call may meet: (action or None, may it have been stored). Of the codes one of each class.
CALL_FAULTS: dict[str, tuple[type[KinesisError], Action | None, int | None]] = {
    "ConnectFailed": (NotSent, None, None),
    "ConnectionLost": (TransportError, None, None),
    "Timeout": (TransportError, None, None),
    "InternalFailure": (KinesisError, Action.RETRY, 500),
    "ServiceUnavailable": (KinesisError, Action.RETRY, 503),
    "LimitExceededException": (KinesisError, Action.THROTTLE, 400),
    "KMSThrottlingException": (KinesisError, Action.THROTTLE, 400),
    "ExpiredTokenException": (KinesisError, Action.CREDENTIALS, 400),
    "InvalidSignatureException": (KinesisError, Action.CLOCK, 400),
    "AccessDeniedException": (KinesisError, Action.OPERATOR, 400),
    "ResourceNotFoundException": (KinesisError, Action.OPERATOR, 400),
}
ENTRY_FAULTS = (
    "ProvisionedThroughputExceededException", "InternalFailure", "ServiceUnavailableException", "UnheardOfException",
    "AccessDeniedException", "KMSThrottlingException",
)  # fmt: skip
ANSWER_FAULTS = ("html", "empty", "torn", "doubled", "short", "long", "count", "null", "list")


def spoilt(world: World, kind: str, answer: bytes) -> bytes:
    """An answer that cannot be used, or one whose count lies."""
    world.mark(f"answer: {kind}")
    told = orjson.loads(answer)
    records = told["Records"]
    match kind:
        case "html":
            return b"<html><body>502 Bad Gateway</body></html>"
        case "empty":
            return b""
        case "torn":
            return answer[: world.between("bytes of the answer", 1, max(1, len(answer) - 1))]
        case "doubled":
            return answer + answer
        case "short":
            told["Records"] = records[:-1]
        case "long":
            told["Records"] = [*records, records[0]]
        case "count":
            told["FailedRecordCount"] = len(records) - told["FailedRecordCount"]
        case "null":
            told["Records"] = None
        case "list":
            return orjson.dumps([told])
    return orjson.dumps(told)


class SimClient(Client):
    """What make_client() of the product gives in here."""

    def __init__(self, world: World, settings: Any) -> None:
        super().__init__(settings)
        self.world = world
        self.stream: Stream = world.streams[settings.stream]
        self.process = PROCESS.get()
        self.running = False

    async def start(self) -> None:
        await asyncio.sleep(0)
        if self.stream.call_fault == "NoCredentials":
            raise KinesisError("NoCredentials", "none were found", action=Action.OPERATOR)
        self.running = True
        self.at_aws = self.stream.at_aws

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.running = False

    async def call(self, target: str, body: Any) -> bytes:
        self.calls += 1
        stream, world = self.stream, self.world
        with memoryview(body) as view:
            data = bytes(view)
        world.note(f"call {target} {stream.name}", data)
        future: asyncio.Future[bytes] = world.loop.create_future()
        fault = ""
        if stream.call_fault and world.chance(f"the call meets {stream.call_fault}", stream.call_fault_share):
            fault = stream.call_fault
        latency = world.rng.random() * 2 * stream.latencies[int(world.rng.random() * len(stream.latencies))]
        if fault == "Timeout" or stream.hangs:
            fault = fault or "Timeout"
            latency += 30.0
            world.mark("a call that hangs")
        world.later(latency, self._arrived, target, data, fault, future)
        try:
            return await future
        except asyncio.CancelledError:
            world.mark("a call is cut short")
            raise

    def _arrived(self, target: str, data: bytes, fault: str, future: asyncio.Future[bytes]) -> None:
        """The request is at Kinesis, whoever still waits for the answer."""
        world, stream = self.world, self.stream
        if world.over:
            return
        if future.done() and world.rng.random() < 0.5:
            return  # it had not left yet when it was cancelled
        error: Exception | None = None
        if fault == "NoCredentials":
            fault = ""
        if fault:
            kind, action, status = CALL_FAULTS[fault]
            world.mark(f"call: {fault}")
            text = f"{fault}, said the simulation"
            error = kind(fault, text) if action is None else kind(fault, text, action=action, http_status=status)
            stored = kind is TransportError or (status or 0) >= 500
            if stored and target == "PutRecords" and world.chance("it is stored all the same", 0.5):
                stream.put(data)
                world.mark("stored, and the answer lost")
        else:
            status, answer = stream.put(data) if target == "PutRecords" else stream.ask(target, data)
            if status != 200:
                told = orjson.loads(answer)
                error = _as_error(told["__type"], told["message"], status)
            elif (
                target == "PutRecords"
                and stream.answer_fault
                and world.rng.random() < stream.answer_fault_share
            ):  # fmt: skip
                answer = spoilt(world, stream.answer_fault, answer)
        if future.done() or not world.loop.alive(self.process):
            return
        if error is not None:
            world.note(f"answer {error}")
            future.set_exception(error)
        else:
            world.note("answer", answer)
            future.set_result(answer)


def _as_error(code: str, message: str, status: int) -> KinesisError:
    from fastkin.aws.error_table import classify_request

    code, action = classify_request(code, status)
    return KinesisError(code, message, action=action, http_status=status)
