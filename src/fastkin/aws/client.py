"""Calls to Kinesis: a finished body in, the answer's bytes out, every error with what to do about it.

The sender sees three things: the bytes of a 200 answer, or a KinesisError whose `action` says what the
error table says. Refreshing keys, correcting the clock and signing again happen in here.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import os
import re
import ssl
import sys
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from fastkin.aws.credentials import Provider, make_provider
from fastkin.aws.endpoint import Endpoint, light_endpoint, parse_arn, resolve_endpoint
from fastkin.aws.http import IDLE_AWS_S, IDLE_FOREIGN_S, MAX_ANSWER, PUT_ANSWER, HttpPool, Reply
from fastkin.aws.shards import HASH_SPACE, Shard
from fastkin.aws.signing import Signer
from fastkin.errors import Action, ConfigError, FastkinError, KinesisError, UnexpectedResponse, masked, printable
from fastkin.net.tls import Renewed, client_context, system_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

    from fastkin.aws.signing import Credentials
    from fastkin.config import Kinesis

log = logging.getLogger("fastkin.kinesis")

API = "Kinesis_20131202"
JSON = "application/x-amz-json-1.1"
CBOR = "application/x-amz-cbor-1.1"
# A larger body is hashed in a thread. 256 KiB are 0.15 ms of the loop; handing over costs 45 us of CPU, so
# that 500 records of 200 B (169 kB) measured 110 us a call hashed here and 155 us hashed in a thread.
INLINE_BYTES = 256 * 1024
# One thread hashes 1.8 GB/s, more than one process sends. A second one measured worse on two cores: a 1 ms
# ticker was late by 10 ms at p99 instead of 0.9 ms, and 8 calls of 6.8 MB in flight made 170 instead of 305
# calls a second.
HASH_THREADS = 1
RESIGNS = 2  # how often one call is signed again for fresh keys or a corrected clock
SKEW_S = 60.0  # a clock this far off explains a refused signature (the service allows 300 s)
MESSAGE_CHARS = 500
CODE_CHARS = 80

# -- What to do about an error, of a call or of one record in an answer. The codes are those of the service model, of
# -- the common errors of AWS and of the throttling list of the SDKs; every row is held by a test.
_THROTTLE = """
ProvisionedThroughputExceededException Throttling ThrottlingException ThrottledException RequestThrottled
RequestThrottledException TooManyRequestsException RequestLimitExceeded BandwidthLimitExceeded
LimitExceededException SlowDown PriorRequestNotComplete TransactionInProgressException EC2ThrottledException
KMSThrottlingException
"""
_RETRY = """
InternalFailure InternalFailureException InternalServerError InternalServerException InternalError
InternalServiceError InternalServiceException ServiceUnavailable ServiceUnavailableException
RequestTimeout RequestTimeoutException RequestAborted RequestAbortedException ResourceInUseException
ExpiredIteratorException ExpiredNextTokenException
"""
_CREDENTIALS = """
ExpiredToken ExpiredTokenException TokenRefreshRequired UnrecognizedClientException UnrecognizedClient
InvalidClientTokenId InvalidAccessKeyId InvalidSignatureException InvalidSignature SignatureDoesNotMatch
IncompleteSignature IncompleteSignatureException MissingAuthenticationToken
MissingAuthenticationTokenException AuthFailure InvalidToken
"""
_CLOCK = "RequestExpired RequestTimeTooSkewed RequestInTheFuture"
_OPERATOR = """
AccessDenied AccessDeniedException NotAuthorized KMSAccessDeniedException KMSAccessDenied
KMSDisabledException KMSDisabled KMSInvalidStateException KMSInvalidState KMSNotFoundException KMSNotFound
KMSOptInRequired OptInRequired SubscriptionRequiredException ResourceNotFoundException InvalidAction
UnknownOperationException NotImplemented
"""
_REJECTED = """
InvalidArgumentException ValidationException ValidationError SerializationException
RequestEntityTooLarge RequestEntityTooLargeException
"""
REQUEST_ACTIONS: dict[str, Action] = {
    code: action
    for codes, action in (
        (_THROTTLE, Action.THROTTLE),
        (_RETRY, Action.RETRY),
        (_CREDENTIALS, Action.CREDENTIALS),
        (_CLOCK, Action.CLOCK),
        (_OPERATOR, Action.OPERATOR),
        (_REJECTED, Action.REJECTED),
    )
    for code in codes.split()
}
# For answers whose body names no error: code to report, what to do.
STATUS_ACTIONS: dict[int, tuple[str, Action]] = {
    401: ("MissingAuthenticationToken", Action.CREDENTIALS),
    403: ("AccessDenied", Action.OPERATOR),
    404: ("NotFound", Action.OPERATOR),
    407: ("ProxyAuthenticationRequired", Action.OPERATOR),
    408: ("RequestTimeout", Action.RETRY),
    413: ("RequestEntityTooLarge", Action.REJECTED),
    429: ("TooManyRequestsException", Action.THROTTLE),
    500: ("InternalFailure", Action.RETRY),
    502: ("BadGateway", Action.RETRY),
    503: ("ServiceUnavailable", Action.RETRY),
    504: ("GatewayTimeout", Action.RETRY),
}
SIGN_AGAIN = frozenset({Action.CREDENTIALS, Action.CLOCK})
RETRY_AFTER_S = 3600.0  # no longer, whoever asks
_SECONDS = re.compile(r"[0-9]{1,30}(\.[0-9]{0,9})?")
_DATES = (0.0, 4_102_444_800.0)  # 1970 to 2100: what lies outside cannot be written into a signature
# What an answer may make us keep or ask. A stream has at most some ten thousand shards, a page of DescribeStream 100.
MOST_SHARDS = 50_000
MOST_PAGES = 1_000
DRY_RUN_PASSED = "DryRunOperationException"

CONTROL = frozenset({"DescribeStreamSummary", "DescribeStream", "ListShards", "CreateStream"})


def classify_request(code: str | None, status: int) -> tuple[str, Action]:
    """(code, action) for a whole answer that is not 200. An unknown code is judged by its status."""
    if code:
        known = REQUEST_ACTIONS.get(code)
        if known is not None:
            return code, known
    name, action = STATUS_ACTIONS.get(status, (f"Http{status}", None))
    if action is None:
        # 5xx passes by itself; an unknown 3xx or 4xx does not, and must not cost data either
        action = Action.RETRY if status >= 500 else Action.OPERATOR
    return code or name, action


def classify_record(code: str) -> Action:
    """What to do about one record's own ErrorCode in a 200 answer: what a call with that code would get.

    Only two codes are documented there, and emulators invent others. What says that the record itself is bad is final.
    """
    known = REQUEST_ACTIONS.get(code)
    if known is not None:
        return known
    return Action.REJECTED if "InvalidArgument" in code or "Validation" in code else Action.STRANGE


def retry_after(headers: dict[str, str], now: float) -> float | None:
    """Seconds the server asks us to wait: Retry-After as a number or as a date."""
    text = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), RETRY_AFTER_S)
    at = _http_date(text)
    return None if at is None else min(max(at - now, 0.0), RETRY_AFTER_S)


def _http_date(text: str | None) -> float | None:
    """A date of a header, in seconds; None for what is no date."""
    if not text or len(text) > 64:
        return None
    try:
        told = email.utils.parsedate_to_datetime(text)
        at = (told if told.tzinfo is not None else told.replace(tzinfo=UTC)).timestamp()
    except Exception:  # noqa: BLE001 - a peer's text; what the parser makes of it has changed from version to version
        return None
    return at if _DATES[0] <= at <= _DATES[1] else None


def error_from(reply: Reply, now: float, secrets: tuple[str | None, ...] = ()) -> KinesisError:
    """The error an answer tells. Secrets are cut out of its text, should the server repeat them."""
    code: object = None
    message: object = ""
    try:
        told = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        told = None
        text = reply.body[:200].decode("utf-8", "replace").strip()
        # an HTML page of some load balancer says nothing that its status does not
        message = "" if text.startswith("<") else text.partition("\n")[0]
    if isinstance(told, dict):
        code = told.get("__type") or told.get("code") or told.get("Code")
        message = told.get("message") or told.get("Message") or told.get("errorMessage") or ""
    if not isinstance(code, str) or not code:
        code = reply.headers.get("x-amzn-errortype")
    name = code if isinstance(code, str) else ""
    # "com.amazonaws.kinesis.v20131202#Name", "Name:http://internal.amazon.com/..."
    name, action = classify_request(name.rpartition("#")[2].partition(":")[0].strip(), reply.status)
    if name not in REQUEST_ACTIONS:  # what it is was decided before anything is cut out of it
        name = masked(name, secrets)[:CODE_CHARS]
    # A refused signature comes with the canonical request, session token and all: first line only.
    words = message.strip().partition("\n")[0] if isinstance(message, str) else ""
    return KinesisError(
        name,
        masked(words, secrets)[:MESSAGE_CHARS],  # cut when they are out of it: half a secret is one too
        action=action,
        http_status=reply.status,
        request_id=(reply.headers.get("x-amzn-requestid") or reply.headers.get("x-amz-request-id") or "")[:80] or None,
        retry_after=retry_after(reply.headers, now),
    )


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

    def __init__(self, kinesis: Kinesis, *, name: str | None = None, clock: Callable[[], float] = time.time) -> None:
        """`name` of the pipeline, for log lines."""
        if not (kinesis.stream or kinesis.stream_arn):
            raise ConfigError("kinesis.stream", "is missing", "name the stream, or give stream_arn")
        if kinesis.stream_arn:
            parse_arn(kinesis.stream_arn)
        self.kinesis = kinesis
        self.name = name
        # told each body that the transport sends a second time by itself
        self.on_resend: Callable[[Buffer], None] | None = None
        self.at_aws = False  # the endpoint is one of AWS's own
        self.dry_runs: bool | None = None  # the server knows DryRun; None: it was not asked
        self.took = False  # it has stored a record of ours that was only meant to try
        self._clock = clock
        self.clock_offset = 0.0  # seconds to add for the service's time
        self._provider: Provider | None = None
        self.calls = 0
        self.resigned = 0

    def read_files(self) -> None:  # noqa: B027 - not every client reads some
        """Read the files that the settings name, now; start() uses what was read. ConfigError names the file."""

    @abstractmethod
    async def start(self) -> None:
        """Find keys and endpoint. No call to Kinesis is made. Raises ConfigError, KinesisError."""

    @abstractmethod
    async def call(self, target: str, body: Buffer) -> bytes:
        """One call. Returns the body of a 200 answer, raises KinesisError for any other outcome."""

    def abort(self) -> None:  # noqa: B027 - not every client holds some
        """Drop connections at once: the event loop is about to end, and nobody called close()."""

    @abstractmethod
    async def close(self) -> None:
        """Close connections. The client can be started again."""

    def target_json(self) -> bytes:
        """The member of a request that names the stream, as it stands in a JSON body."""
        return orjson.dumps(self._target())[1:-1]

    def _target(self) -> dict[str, Any]:
        if self.kinesis.stream_arn:
            return {"StreamARN": self.kinesis.stream_arn}
        return {"StreamName": self.kinesis.stream}

    async def _correct(
        self, error: KinesisError, reply: Reply, credentials: Credentials, now: float, signed_offset: float
    ) -> bool:
        """Mend what made the service refuse the signature. True if signing again may help.

        `signed_offset`: the clock's correction when the refused call was made.
        """
        at = _http_date(reply.headers.get("date"))
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
        return await self._provider.get() != credentials

    async def _ask(self, target: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
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
            raise UnexpectedResponse("UnexpectedResponse", f"the answer to {target} is not JSON")
        return answer

    async def describe(self) -> StreamSummary:
        """The stream as it is now. Falls back to DescribeStream where there is no summary."""
        try:
            answer = await self._ask("DescribeStreamSummary", self._target())
        except KinesisError as error:
            if not _no_such_call(error):
                raise
            told, all_shards = await self._describe_stream()
            shards = sum(not shard.closed for shard in all_shards)
        else:
            with _expecting("a description of the stream"):
                told = _table(answer, "StreamDescriptionSummary")
                shards = _number(told, "OpenShardCount", 0, 10**9, 0)
        with _expecting("a description of the stream"):
            return StreamSummary(
                name=printable(_text(told, "StreamName") or self.kinesis.stream or "", 128),
                arn=printable(_text(told, "StreamARN") or self.kinesis.stream_arn or ""),
                status=printable(_text(told, "StreamStatus"), 128),
                shard_count=shards,
                max_record_bytes=_number(told, "MaxRecordSizeInKiB", 1, 2**20, 1024) * 1024,
                mode=printable(_text(_table(told, "StreamModeDetails", {}), "StreamMode") or "PROVISIONED", 128),
                auto_keys=_is_auto(told.get("RecordDistributionStrategy")),
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
                if not told.get("HasMoreShards") or not shards:
                    return told, shards
                pages.turn(shards[-1].id)
            request["ExclusiveStartShardId"] = shards[-1].id

    async def dry_run(self) -> bool:
        """Ask whether PutRecords would be allowed. False: the server does not know DryRun and took it.

        Raises the KinesisError a real call would.
        """
        record = {"Data": "", "PartitionKey": "fastkin-dry-run"}
        request = {"Records": [record], "DryRun": True, **self._target()}
        try:
            await self.call("PutRecords", orjson.dumps(request))
        except KinesisError as error:
            if error.code == DRY_RUN_PASSED:
                self.dry_runs = True
                return True
            raise
        self.dry_runs = False
        self.took = True
        return False

    async def harmless(self) -> bool | None:
        """Does the stream take a record that nobody can object to? None: that cannot be known without storing one.

        Only AWS, and who has answered a DryRun before, are known not to store what they are asked about.
        """
        if not self.dry_runs and (self.took or not self.at_aws):
            return True if self.took else None
        try:
            await self.dry_run()
        except KinesisError:
            return False
        return True


_NO_SUCH_CALL = frozenset({"UnknownOperationException", "InvalidAction", "NotImplemented"})


def _no_such_call(error: KinesisError) -> bool:
    return error.code in _NO_SUCH_CALL or error.http_status == 404


@contextlib.contextmanager
def _expecting(what: str) -> Iterator[None]:
    """Whatever goes wrong in reading an answer ends the call that it belongs to, and nothing else."""
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
    )


class KinesisClient(Client):
    """The native way: own signature, own connections, nothing of the SDK on the path of a call."""

    def __init__(self, kinesis: Kinesis, *, name: str | None = None, clock: Callable[[], float] = time.time) -> None:
        super().__init__(kinesis, name=name, clock=clock)
        self._endpoint: Endpoint | None = None
        self._account: str | None = None
        self._signer: Signer | None = None
        self._pools: dict[str, HttpPool] = {}
        self._tls: Renewed | None = None
        self._threads: ThreadPoolExecutor | None = None

    def read_files(self) -> None:
        bundle = _bundle(self.kinesis)
        if self._tls is None and bundle and not (self.kinesis.endpoint_url or "").startswith("http:"):
            self._tls = Renewed(partial(tls_context, self.kinesis), (bundle,), log)

    async def start(self) -> None:
        """Find keys and endpoint. No call to Kinesis is made. Raises ConfigError, KinesisError."""
        self._provider = self._provider or await make_provider(self.kinesis, self.name)
        credentials = await self._provider.get()
        self._account = credentials.account_id
        endpoint = await resolve_endpoint(self.kinesis, credentials)
        if self._signer is None or self._signer.region != endpoint.region:
            self._signer = Signer(endpoint.region)
        if self._tls is None and "https:" in endpoint.data.base + endpoint.control.base:
            bundle = _bundle(self.kinesis)
            self._tls = Renewed(partial(tls_context, self.kinesis), (bundle,) if bundle else system_files(), log)
        self._endpoint = endpoint
        self.at_aws = is_aws(endpoint.data.base)

    def abort(self) -> None:
        for pool in self._pools.values():
            pool.abort()

    async def close(self) -> None:
        """Close connections and threads. The client can be started again."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            await pool.close()
        if self._provider is not None:
            await self._provider.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None
        self._endpoint = None

    async def call(self, target: str, body: Buffer) -> bytes:
        """One call. Returns the body of a 200 answer, raises KinesisError for any other outcome."""
        assert self._provider is not None
        self.calls += 1
        view = memoryview(body)
        length = view.nbytes
        view.release()
        digest = await self._digest(body, length)
        resigned = 0
        while True:
            credentials = await self._provider.get()
            endpoint = self._endpoint
            if endpoint is None or credentials.account_id != self._account:
                await self.start()  # another account has another host
                endpoint = self._endpoint
            assert endpoint is not None
            assert self._signer is not None
            url = endpoint.control if target in CONTROL else endpoint.data
            head = partial(self._head, self._signer, credentials, target, url.host, url.path, digest, length)
            pool = self._pools.get(url.base) or self._new_pool(url.base)
            offset = self.clock_offset
            began = time.monotonic()
            reply = await pool.request(head, body, PUT_ANSWER if target == "PutRecords" else MAX_ANSWER)
            if log.isEnabledFor(logging.DEBUG):
                log.debug(
                    "%s with %d bytes to %s: status %d, %d bytes, %.1f ms", target, length, url.host, reply.status,
                    len(reply.body), (time.monotonic() - began) * 1000,
                )  # fmt: skip
            if reply.status == 200:
                return reply.body
            now = self._clock()
            error = error_from(reply, now, (credentials.token, credentials.secret_key))
            if error.action in SIGN_AGAIN:
                again = await self._correct(error, reply, credentials, now, offset)
                if again and resigned < RESIGNS:
                    resigned += 1
                    self.resigned += 1
                    continue
            raise error

    def _head(
        self,
        signer: Signer,
        credentials: Credentials,
        target: str,
        host: str,
        path: str,
        digest: str,
        length: int,
    ) -> bytes:
        return signer.head(
            credentials,
            target=f"{API}.{target}",
            host=host,
            path=path,
            content_type=JSON,
            body_sha256_hex=digest,
            length=length,
            now=self._clock() + self.clock_offset,
        )

    async def _digest(self, body: Any, length: int) -> str:
        """SHA-256 of the body in hex. Kept with a body that can hold it, so a resend costs none."""
        kept = getattr(body, "digest", None)
        if isinstance(kept, str):
            return kept
        if length <= INLINE_BYTES:
            digest = sha256(body).hexdigest()
        else:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(HASH_THREADS, "fastkin-hash", _step_back)
            loop = asyncio.get_running_loop()
            digest = await loop.run_in_executor(self._threads, _sha256, body)
        if hasattr(body, "digest"):
            body.digest = digest
        return digest

    def _resent(self, body: Buffer) -> None:
        if self.on_resend is not None:
            self.on_resend(body)

    def _new_pool(self, base: str) -> HttpPool:
        kinesis = self.kinesis
        pool = self._pools[base] = HttpPool(
            base,
            max_connections=kinesis.max_connections,
            connect_timeout_s=kinesis.connect_timeout_s,
            request_timeout_s=kinesis.request_timeout_s,
            ssl_context=self._tls.context if self._tls is not None else None,
            ca_bundle=_bundle(kinesis),
            idle_s=IDLE_AWS_S if is_aws(base) else IDLE_FOREIGN_S,
            on_resend=self._resent,
        )
        return pool


def _step_back() -> None:
    """The loop's thread goes first when cores are scarce: 1 to 2 ms less lateness at p99 on a busy machine."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 5)


def _sha256(body: Buffer) -> str:
    return sha256(body).hexdigest()


def is_aws(base: str) -> bool:
    return base.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def _bundle(kinesis: Kinesis) -> str | None:
    return kinesis.ca_bundle or os.environ.get("AWS_CA_BUNDLE") or None


def tls_context(kinesis: Kinesis) -> ssl.SSLContext:
    """TLS with verification: the system's authorities, or the bundle that is asked for."""
    bundle = _bundle(kinesis)
    place = "kinesis.ca_bundle" if kinesis.ca_bundle else "AWS_CA_BUNDLE"
    try:
        return client_context(bundle)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(place, f"{bundle}: {error}", "give a file of PEM certificates") from None


def proxy_applies(kinesis: Kinesis) -> bool:
    """Does the environment send calls to this endpoint through a proxy? NO_PROXY is respected."""
    proxies = urllib.request.getproxies_environment()
    if not (proxies.get("https") or proxies.get("http")):
        return False
    endpoint = light_endpoint(kinesis)
    if endpoint is None:
        return True  # only the SDK can say where the call goes: it also knows about the proxy
    scheme = endpoint.data.base.partition(":")[0]
    if not proxies.get(scheme):
        return False
    return not urllib.request.proxy_bypass(endpoint.data.host)


def make_client(kinesis: Kinesis, name: str | None = None) -> Client:
    """The client that the settings and the environment ask for. `name` of the pipeline, for log lines."""
    if kinesis.transport == "sdk" or (kinesis.transport == "auto" and proxy_applies(kinesis)):
        from fastkin.aws.sdk import SdkClient  # the SDK costs 30 MB

        return SdkClient(kinesis, name=name)
    return KinesisClient(kinesis, name=name)
