"""Calls to Kinesis: a finished body in, the answer's bytes out, every error with what to do about it.

The sender sees three things: the bytes of a 200 answer, or a KinesisError whose `action` says what the
error table says. Refreshing keys, correcting the clock and signing again happen in here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from fastkin.aws.destinations import KINESIS
from fastkin.aws.endpoint import parse_arn
from fastkin.aws.error_table import SIGN_AGAIN, error_from, http_date, telling_requests
from fastkin.aws.shards import HASH_SPACE, Shard
from fastkin.errors import Action, ConfigError, FastkinError, KinesisError, UnexpectedResponse, masked, printable
from fastkin.limits import KIB, RECORD_BYTES
from fastkin.net.tls import client_context
from fastkin.status.instruments import FileCounters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

    from fastkin.aws.credentials import Provider
    from fastkin.aws.destinations import Destination
    from fastkin.aws.http_answer import Reply
    from fastkin.aws.signing import Credentials
    from fastkin.config import Kinesis

log: logging.Logger = logging.getLogger("fastkin.kinesis")

# Requests and answers at DEBUG, for who wants to see what is said. Never a header, so no signature and no key.
wire: logging.Logger = logging.getLogger("fastkin.wire")
WIRE_BYTES = 500  # of a body
NO_FILES = FileCounters()
RESIGNS = 2  # how often one call is signed again for fresh keys or a corrected clock
SKEW_S = 60.0  # a clock this far off explains a refused signature (the service allows 300 s)
# What an answer may make us keep or ask. A stream has at most some ten thousand shards, a page of DescribeStream 100.
MOST_SHARDS = 50_000
MOST_PAGES = 1_000
# AWS answers a DryRun that would have been allowed with an error of this name, and never with a 200.
DRY_RUN_PASSED = "DryRunOperationException"


class StreamSummary(NamedTuple):
    """What DescribeStreamSummary tells. `auto_keys`: the stream chooses shards itself."""

    name: str
    arn: str
    status: str
    shard_count: int
    max_record_bytes: int
    mode: str
    auto_keys: bool


class Client(ABC):
    """What the sender and the engine use. The same for every way: questions about a stream, keys, the clock."""

    def __init__(
        self,
        kinesis: Kinesis,
        *,
        name: str | None = None,
        clock: Callable[[], float] = time.time,
        destination: Destination = KINESIS,
    ) -> None:
        """`name` of the pipeline, for log lines."""
        if destination.names_stream and not kinesis.target:
            raise ConfigError("kinesis.stream", "is missing", "name the stream, or give stream_arn")
        if kinesis.stream_arn:
            parse_arn(kinesis.stream_arn)
        self.kinesis = kinesis
        self.destination: Destination = destination
        self.name = name
        # told each body that the transport sends a second time by itself
        self.on_resend: Callable[[Buffer], None] | None = None
        # What harmless() goes by: an endpoint that does not know DryRun would store the record that it is only asked
        # about.
        self.at_aws = False  # the endpoint is one of AWS's own
        self.dry_runs: bool | None = None  # the server knows DryRun; None: it was not asked
        self.took: bool = False  # it has stored a record of ours that was only meant to try
        self._clock = clock
        self.clock_offset: float = 0.0  # seconds to add for the service's time
        self._provider: Provider | None = None
        self.calls = 0
        self.resigned: int = 0
        self._begin()

    def _begin(self) -> None:  # noqa: B027 - not every client has some
        """The state of one way to call, while nothing is open: a way has no arguments of its own."""

    def read_files(self) -> None:  # noqa: B027 - not every client reads some
        """Read the files that the settings name, now; start() uses what was read. ConfigError names the file."""

    @abstractmethod
    async def start(self) -> None:
        """Find keys and endpoint. No call to Kinesis is made. Raises ConfigError, KinesisError."""

    async def put(self, body: Buffer) -> bytes:
        """The call that takes records, with a finished body: see call()."""
        return await self.call(self.destination.put, body)

    @abstractmethod
    async def call(self, target: str, body: Buffer, *, once: bool = False) -> bytes:
        """One call. Returns the body of a 200 answer, raises KinesisError for any other outcome.

        `once`: one request and no other, not even for a signature that the service found too old or a connection that
        had ended; what was learned from the refusal serves the next call.
        """

    @property
    def file_counters(self) -> FileCounters:
        """What it has made of files."""
        return NO_FILES

    @property
    def trouble(self) -> str | None:
        """What is wrong behind the calls, which are answered all the same; in words."""
        return None

    def only_the_question(self, error: KinesisError) -> bool:
        """Was describe() refused to us, which says nothing about records?"""
        return error.action is Action.OPERATOR and "ResourceNotFound" not in error.code

    async def finish(self) -> None:  # noqa: B027 - most have nothing to do behind their calls
        """Before close(): return when nothing is left to do behind the calls, however long that takes."""

    def abort(self) -> None:  # noqa: B027 - not every client holds some
        """Drop connections at once: the event loop is about to end, and nobody called close()."""

    @abstractmethod
    async def close(self) -> None:
        """Close connections. The client can be started again."""

    def target_json(self) -> bytes:
        """The member of a request that names the stream, as it stands in a JSON body."""
        return orjson.dumps(self._target())[1:-1]

    def _target(self) -> dict[str, Any]:
        return self.destination.stream_members(self.kinesis.name, self.kinesis.stream_arn)

    async def _mend(self, reply: Reply, credentials: Credentials, signed_offset: float, resigned: int) -> None:
        """Raise the error that a refused call was answered with. Return when signing it again may help instead.

        `signed_offset`: the clock's correction when the call was made; `resigned`: how often it was signed again.
        """
        now = self._clock()
        error = error_from(reply, now, (credentials.token, credentials.secret_key), self.destination.codes)
        # asked in any case: what is wrong may be the clock, and then the error says so
        again = error.action in SIGN_AGAIN and await self._correct(error, reply, credentials, now, signed_offset)
        if not again or resigned >= RESIGNS:
            raise error
        self.resigned += 1

    async def _correct(
        self, error: KinesisError, reply: Reply, credentials: Credentials, now: float, signed_offset: float
    ) -> bool:
        """Mend what made the service refuse the signature. True if signing again may help.

        `signed_offset`: the clock's correction when the refused call was made.
        """
        # The service's own Date tells more than its error code: several codes may stand for a wrong clock, and some
        # of them blame the keys. So the clock is looked at first, whatever the code says.
        at = http_date(reply.headers.get("date"))
        if at is not None and abs(at - (now + signed_offset)) > SKEW_S:
            error.action = Action.CLOCK  # whatever its code blames
            # of the calls that were open together, the first one has learned the time for all
            if abs(at - (now + self.clock_offset)) > SKEW_S:
                self.clock_offset = at - now
                log.warning(
                    "%s the clock of this machine is %.0f s off the service's: signing with its time",
                    f"pipeline={self.name} stage=send" if self.name else "stage=send",
                    -self.clock_offset,
                )
            return True
        if error.action is Action.CLOCK:
            return False
        assert self._provider is not None
        if not self._provider.invalidate(credentials):
            return False
        # The provider may have found the same keys again. To sign with them once more would only bring the same
        # refusal.
        return await self._provider.get() != credentials

    async def _ask(self, target: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            # Questions about a stream are only asked to do better. Whatever an answer holds, its caller must be able
            # to go on, so every failure becomes one error that callers expect.
            body = await self.call(target, orjson.dumps(request))
        except FastkinError:
            raise
        except Exception as error:
            what = f"{target}: {type(error).__name__}: {str(error)[:200]}"
            raise UnexpectedResponse("UnexpectedResponse", what) from error
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            with telling_requests():
                raise UnexpectedResponse("UnexpectedResponse", f"the answer to {target} is not JSON")
        return answer

    async def describe(self) -> StreamSummary:
        """The stream as it is now. Falls back to DescribeStream where there is no summary."""
        if not self.destination.shards:
            return await self._describe_delivery()
        try:
            answer = await self._ask(self.destination.describe, self._target())
        except KinesisError as error:
            if not _no_such_call(error):
                raise
            told, all_shards = await self._describe_stream()
            shards = sum(not shard.closed for shard in all_shards)
        else:
            with _expecting("a description of the stream"):
                told = _table(answer, "StreamDescriptionSummary")
                # Limits and names are a peer's words: numbers are held to a range before anything is sized by them,
                # texts are made fit for a log line.
                shards = _number(told, "OpenShardCount", 0, 10**9, 0)
        with _expecting("a description of the stream"):
            return StreamSummary(
                name=printable(_text(told, "StreamName") or self.kinesis.stream or "", 128),
                arn=printable(_text(told, "StreamARN") or self.kinesis.stream_arn or ""),
                status=printable(_text(told, "StreamStatus"), 128),
                shard_count=shards,
                max_record_bytes=_number(told, "MaxRecordSizeInKiB", 1, 2**20, RECORD_BYTES // KIB) * KIB,
                mode=printable(_text(_table(told, "StreamModeDetails", {}), "StreamMode") or "PROVISIONED", 128),
                auto_keys=_is_auto(told.get("RecordDistributionStrategy")),
            )

    async def _describe_delivery(self) -> StreamSummary:
        """A delivery stream: it has neither shards nor limits of its own, and takes no keys."""
        answer = await self._ask(self.destination.describe, self._target())
        with _expecting("a description of the delivery stream"):
            told = _table(answer, "DeliveryStreamDescription")
            return StreamSummary(
                name=printable(_text(told, "DeliveryStreamName") or self.kinesis.name or "", 128),
                arn=printable(_text(told, "DeliveryStreamARN")),
                status=printable(_text(told, "DeliveryStreamStatus"), 128),
                shard_count=0,
                max_record_bytes=self.destination.record_bytes,
                mode=printable(_text(told, "DeliveryStreamType") or "DirectPut", 128),
                auto_keys=True,
            )

    async def list_shards(self) -> list[Shard]:
        """Every shard, closed ones included."""
        shards: list[Shard] = []
        request = self._target()
        pages = _Pages("ListShards")
        while True:
            try:
                answer = await self._ask("ListShards", request)
            except KinesisError as error:
                if not _no_such_call(error):
                    raise
                return (await self._describe_stream())[1]
            with _expecting("a list of shards"):
                pages.add(shards, answer)
                token = _text(answer, "NextToken", 2**20)
                if not token:
                    return shards
                pages.turn(token)
            request = {"NextToken": token}  # with it the stream must not be named

    async def _describe_stream(self) -> tuple[dict[str, Any], list[Shard]]:
        shards: list[Shard] = []
        request = self._target()
        pages = _Pages("DescribeStream")
        while True:
            answer = await self._ask("DescribeStream", request)
            with _expecting("a description of the stream"):
                told = _table(answer, "StreamDescription")
                pages.add(shards, told)
                # Without a shard there is no name to ask for the next page by: a server that says "more" all the same
                # would be asked the same thing for ever.
                if not told.get("HasMoreShards") or not shards:
                    return told, shards
                pages.turn(shards[-1].id)
            request["ExclusiveStartShardId"] = shards[-1].id

    async def dry_run(self) -> bool:
        """Ask whether to put would be allowed. False: the server does not know DryRun and took it.

        Raises the KinesisError a real call would.
        """
        # No data and a short key: nothing about this record can be objected to, so a refusal is about permissions,
        # the stream or the settings.
        record = {"Data": "", "PartitionKey": "fastkin-dry-run"}
        request = {"Records": [record], "DryRun": True, **self._target()}
        try:
            await self.put(orjson.dumps(request))
        except KinesisError as error:
            if error.code == DRY_RUN_PASSED:
                self.dry_runs = True
                return True
            raise
        # The server ignored DryRun and stored the record. It is empty, its key says what it is, and it is not done
        # again: see harmless().
        self.dry_runs = False
        self.took = True
        return False

    async def harmless(self) -> bool | None:
        """Does the stream take a record that nobody can object to? None: that cannot be known without storing one.

        Only AWS, and who has answered a DryRun before, are known not to store what they are asked about.
        """
        # A server that has stored our test record once has answered the question: it takes records. To ask again
        # would store one more each time.
        if not self.dry_runs and (self.took or not (self.at_aws and self.destination.dry_run)):
            return True if self.took else None
        try:
            await self.dry_run()
        except KinesisError:
            return False
        return True


def wire_asked(target: str, body: Buffer) -> None:
    """Say what is about to be sent. Ask wire.isEnabledFor() first: this copies the head of the body."""
    view = memoryview(body)
    wire.debug("> %s, %d bytes: %s", target, view.nbytes, _head_of(view, ()))


def wire_answered(target: str, status: int, body: bytes, secrets: tuple[str | None, ...]) -> None:
    """Say what was answered."""
    wire.debug("< %s, status %d, %d bytes: %s", target, status, len(body), _head_of(memoryview(body), secrets))


def _head_of(view: memoryview, secrets: tuple[str | None, ...]) -> str:
    # Cut after the secrets are out of it: half a secret is one too. An answer is bounded, and this is for debugging.
    text = masked(bytes(view[: None if secrets else WIRE_BYTES]).decode("utf-8", "replace"), secrets)
    return printable(text[:WIRE_BYTES]) + ("..." if len(text) > WIRE_BYTES or view.nbytes > WIRE_BYTES else "")


_NO_SUCH_CALL = frozenset({"UnknownOperationException", "InvalidAction", "NotImplemented"})


def _no_such_call(error: KinesisError) -> bool:
    return error.code in _NO_SUCH_CALL or error.http_status == 404


@contextlib.contextmanager
def _expecting(what: str) -> Iterator[None]:
    """Whatever goes wrong in reading an answer ends the call that it belongs to, and nothing else."""
    with telling_requests():
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the text is a peer's: what it can bring about is not for us to list
            raise UnexpectedResponse(
                "UnexpectedResponse", f"expected {what}: {type(error).__name__} {str(error)[:200]}"
            ) from None


# Readers of an answer's members: they raise, inside _expecting(), for what the API does not promise.


def _table(told: object, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    value = told.get(name) if isinstance(told, dict) else None
    if value is None and default is not None:
        return default
    if not isinstance(value, dict):
        raise TypeError(f"{name} is not an object")
    return value


def _text(told: dict[str, Any], name: str, most: int = 2048) -> str:
    value = told.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > most:
        raise TypeError(f"{name} is not a text of at most {most} characters")
    return value


def _number(told: dict[str, Any], name: str, least: int, most: int, default: int | None = None) -> int:
    """A whole number, as one or in decimal digits: hash keys come as text."""
    value = told.get(name)
    if value is None and default is not None:
        return default
    # int() of a text takes time that grows with the square of its length, so the length is bounded before.
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is not a number from {least} to {most}")
    return value


_DIGITS = re.compile(r"[0-9]{1,39}")  # 2**128 has 39


class _Pages:
    """Pages of shards, bounded: a peer may say for ever that there are more."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._seen: set[int] = set()  # hashes: a token may be a megabyte

    def add(self, shards: list[Shard], page: dict[str, Any]) -> None:
        told = page.get("Shards") or []
        if not isinstance(told, list):
            raise TypeError("Shards is not a list")
        # Before they become objects of ours: a page of a million shards costs no more than its own bytes.
        if len(shards) + len(told) > MOST_SHARDS:
            raise ValueError(f"{self._target} tells of more than {MOST_SHARDS} shards")
        shards += map(_shard, told)

    def turn(self, token: str) -> None:
        """`token` leads to the next page."""
        if hash(token) in self._seen:
            raise ValueError(f"{self._target} leads to a page that was read already")
        if len(self._seen) >= MOST_PAGES:
            raise ValueError(f"{self._target} has more than {MOST_PAGES} pages")
        self._seen.add(hash(token))


def _is_auto(strategy: object) -> bool:
    # A text, or a structure that holds one: what there is may grow, and both are understood.
    if isinstance(strategy, dict):
        return "AUTO" in strategy.values()
    return strategy == "AUTO"


def _shard(told: object) -> Shard:
    keys = _table(told, "HashKeyRange")
    assert isinstance(told, dict)  # a table with a table in it
    name = printable(_text(told, "ShardId", 128), 128)
    if not name:
        raise ValueError("a shard without ShardId")
    start = _number(keys, "StartingHashKey", 0, HASH_SPACE - 1)
    return Shard(
        name,
        start,
        _number(keys, "EndingHashKey", start, HASH_SPACE - 1),
        _text(told, "ParentShardId", 128) or None,
        bool(_table(told, "SequenceNumberRange", {}).get("EndingSequenceNumber")),
        _text(told, "AdjacentParentShardId", 128) or None,
    )


def is_aws(base: str) -> bool:
    return base.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def bundle_path(kinesis: Kinesis) -> str | None:
    return kinesis.ca_bundle or os.environ.get("AWS_CA_BUNDLE") or None


def tls_context(kinesis: Kinesis) -> ssl.SSLContext:
    """TLS with verification: the system's authorities, or the bundle that is asked for."""
    bundle = bundle_path(kinesis)
    place = "kinesis.ca_bundle" if kinesis.ca_bundle else "AWS_CA_BUNDLE"
    try:
        return client_context(bundle)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(place, f"{bundle}: {error}", "give a file of PEM certificates") from None
