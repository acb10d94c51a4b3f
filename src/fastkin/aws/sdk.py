"""The reference way: the same face as KinesisClient, every call made by aiobotocore.

The finished body goes out through the SDK's public events, so its serialiser and parser do nothing;
signing, retries off, TLS, proxies and connections are the SDK's. While the clock of this machine is known to
be wrong, its signer is given the service's time, also through its events. Used for transport = "sdk" and behind a
proxy; tests and benches compare the native way with it. Importing this module loads the SDK.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
from aiobotocore.config import AioConfig
from aiobotocore.credentials import AioCredentials
from aiobotocore.session import AioSession
from botocore import UNSIGNED, xform_name
from botocore.auth import SIGV4_TIMESTAMP, SigV4Auth
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
    SSLError,
)
from botocore.exceptions import ConnectionError as SdkConnectionError

from fastkin.aws.client import RESIGNS, Client, is_aws, tls_context
from fastkin.aws.credentials import make_provider
from fastkin.aws.endpoint import session_region, split_url
from fastkin.aws.error_table import note_answer
from fastkin.aws.http import IDLE_AWS_S, IDLE_FOREIGN_S
from fastkin.aws.http_answer import Reply
from fastkin.aws.http_progress import PATIENCE
from fastkin.errors import Action, ConfigError, KinesisError, NotSent, TransportError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from typing_extensions import Buffer

    from fastkin.aws.credentials import Provider
    from fastkin.config import Kinesis

_SLOW_RATE = 16 * 1024  # bytes a second that any line carries


# The SDK's serialiser builds the body from `Records`. Ours is finished, so it is given an empty list, and the event
# `before-call` puts the finished body in the place of what it made.
class _Finished(list[Any]):
    """Stands for Records: an empty list that carries the whole body past the serialiser."""

    body: bytes = b""


class _RawParser:
    """Gives the answer's bytes out as they came, errors too: the client reads both."""

    async def parse(self, response: dict[str, Any], _shape: object) -> dict[str, Any]:
        return {
            "ResponseMetadata": {
                "HTTPStatusCode": response["status_code"],
                "HTTPHeaders": {k.lower(): v for k, v in response["headers"].items()},
            },
            "Body": response["body"],
        }


class _RawParserFactory:
    def create_parser(self, _protocol: str) -> _RawParser:
        return _RawParser()


class _Bridge(AioCredentials):  # type: ignore[misc]  # the SDK has no types
    """The SDK asks this for keys before each signature; our provider answers."""

    def __init__(self, provider: Provider, account_id: str | None) -> None:
        # Never used: get_frozen_credentials() is asked before each signature.
        super().__init__("-", "-", account_id=account_id, method="fastkin")
        self._provider = provider

    async def get_frozen_credentials(self) -> Any:
        return ReadOnlyCredentials(*await self._provider.get())


class _Resolver:
    def __init__(self, credentials: _Bridge) -> None:
        self._credentials = credentials

    async def load_credentials(self) -> _Bridge:
        return self._credentials


class _SignAt(SigV4Auth):  # type: ignore[misc]  # the SDK has no types
    """The SDK's signature, dated `at` instead of now."""

    def __init__(self, credentials: ReadOnlyCredentials, service: str, region: str, at: float) -> None:
        super().__init__(credentials, service, region)
        self._at = at

    def _modify_request_before_signing(self, request: Any) -> None:
        # add_auth calls this when it has written its own time there, and reads the time nowhere else
        request.context["timestamp"] = datetime.fromtimestamp(self._at, UTC).strftime(SIGV4_TIMESTAMP)
        super()._modify_request_before_signing(request)


async def _session(kinesis: Kinesis, provider: Provider) -> AioSession:
    """A session of the SDK that asks our provider for keys. KinesisError: there are none."""
    credentials = await provider.get()
    session = AioSession(profile=kinesis.profile)
    session.register_component("credential_provider", _Resolver(_Bridge(provider, credentials.account_id)))
    return session


@contextlib.asynccontextmanager
async def s3_client(kinesis: Kinesis, provider: Provider) -> AsyncIterator[Any]:
    """A client for S3 with this destination's keys, region and endpoint. ConfigError, KinesisError."""
    try:
        session = await _session(kinesis, provider)
        foreign = kinesis.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        at_aws = not foreign or is_aws(foreign)
        context = session.create_client(
            "s3",
            region_name=session_region(kinesis, session),
            endpoint_url=kinesis.endpoint_url or None,
            verify=kinesis.ca_bundle or None,
            config=AioConfig(
                retries={"total_max_attempts": 1},  # the uploader tries again
                connect_timeout=kinesis.connect_timeout_s,
                read_timeout=kinesis.request_timeout_s,
                # Others than AWS have neither a host for each bucket nor the SDK's newest checksums.
                s3=None if at_aws else {"addressing_style": "path"},
                request_checksum_calculation="when_supported" if at_aws else "when_required",
            ),
        )
    except BotoCoreError as error:
        raise ConfigError("s3", f"the SDK refuses the settings: {error}") from None
    async with context as client:
        client.meta.events.register("before-send.s3.PutObject", _at_once)
        yield client


def _at_once(request: Any, **_: object) -> None:
    # The SDK would wait for "100 Continue" before a file. A server that does not know it would hold the file for ever.
    request.headers.pop("Expect", None)


def slow_line_s(request_timeout_s: float, nbytes: int) -> float:
    """How long a call of the SDK with such a body may take: wide enough for a slow line."""
    return PATIENCE * request_timeout_s + nbytes / _SLOW_RATE


class SdkClient(Client):
    """Calls through aiobotocore, with the native client's errors and answers."""

    def _begin(self) -> None:
        self._client: Any = None
        self._context: AbstractAsyncContextManager[Any] | None = None

    async def start(self) -> None:
        """Find keys and make the SDK's client. No call to Kinesis is made."""
        kinesis = self.kinesis
        self._provider = self._provider or await make_provider(kinesis, self.name)
        try:
            session = await _session(kinesis, self._provider)
            region = session_region(kinesis, session)
            if kinesis.endpoint_url:
                split_url(kinesis.endpoint_url)
            if kinesis.ca_bundle or os.environ.get("AWS_CA_BUNDLE"):
                tls_context(kinesis)  # a broken bundle is told now
            session.register_component("response_parser_factory", _RawParserFactory())
            foreign = kinesis.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
            self.at_aws: bool = not foreign or is_aws(foreign)
            context = session.create_client(
                self.destination.service,
                region_name=region,
                endpoint_url=kinesis.endpoint_url or None,
                verify=kinesis.ca_bundle or None,
                config=AioConfig(
                    # It would look through every record again, at a third of the SDK's cost of a call.
                    parameter_validation=False,
                    # The sender decides what goes again and when; a second loop of retries below it would hide
                    # failures from it.
                    retries={"total_max_attempts": 1},
                    max_pool_connections=kinesis.max_connections,
                    connect_timeout=kinesis.connect_timeout_s,
                    read_timeout=kinesis.request_timeout_s,
                    connector_args={"keepalive_timeout": IDLE_FOREIGN_S if foreign else IDLE_AWS_S},
                ),
            )
            # Entered by hand: it lives from start() to close(), which are two calls.
            self._client = await context.__aenter__()
        except BotoCoreError as error:
            raise ConfigError("kinesis", f"the SDK refuses the settings: {error}") from None
        self._context = context
        events = self._client.meta.events
        service, put = self.destination.service, self.destination.put
        events.register(f"before-parameter-build.{service}.{put}", _take_body)
        events.register(f"before-call.{service}.{put}", _put_body)
        events.register(f"choose-signer.{service}", self._choose_signer)
        events.register(f"before-sign.{service}", self._sign)

    async def close(self) -> None:
        """Close the SDK's client."""
        context, self._context, self._client = self._context, None, None
        if context is not None:
            await context.__aexit__(None, None, None)
        if self._provider is not None:
            await self._provider.close()

    async def call(self, target: str, body: Buffer, *, once: bool = False) -> bytes:
        """One call. Returns the body of a 200 answer, raises KinesisError for any other outcome. `once`: see Client."""
        self.calls += 1
        assert self._provider is not None
        resigned = RESIGNS if once else 0
        while True:
            credentials = await self._provider.get()
            if self._client is None:
                raise KinesisError("NotStarted", "the client was not made yet: start() had no credentials")
            offset = self.clock_offset
            try:
                return await self._once(target, body)
            # The raw parser gave the body through, so the error is read by the same table as the native client's.
            except ClientError as refusal:
                told = refusal.response["ResponseMetadata"]
                reply = Reply(told["HTTPStatusCode"], told["HTTPHeaders"], refusal.response["Body"])
            await self._mend(reply, credentials, offset, resigned)
            resigned += 1

    async def _once(self, target: str, body: Buffer) -> bytes:
        arguments: dict[str, Any]
        if target == self.destination.put:
            records = _Finished()
            records.body = bytes(body)
            arguments = {"Records": records, **self._target()}
        else:
            arguments = orjson.loads(bytes(body))
            if "Data" in arguments:  # of PutRecord: the SDK wants bytes, and writes them as base64 again
                arguments["Data"] = base64.b64decode(arguments["Data"])
        method = getattr(self._client, xform_name(target))
        # The SDK's read timeout begins when the body is written: a peer that stops reading would hold the call for
        # ever. Only the SDK's connection knows how much has left: this way has one deadline, wide enough for a slow
        # line.
        most = slow_line_s(self.kinesis.request_timeout_s, memoryview(body).nbytes)
        try:
            async with asyncio.timeout(self.kinesis.connect_timeout_s + most):
                answer = await method(**arguments)
        except ClientError:
            raise  # an answer of the service
        except TimeoutError:
            raise TransportError("RequestTimeout", f"no whole answer within {most:.3g} s") from None
        except (ConnectTimeoutError, ReadTimeoutError) as error:
            # Whether the body can have arrived decides if the records may be stored twice: NotSent says that it
            # cannot.
            if isinstance(error, ConnectTimeoutError):
                raise NotSent("ConnectTimeout", str(error)) from None
            raise TransportError("RequestTimeout", str(error)) from None
        except SSLError as error:
            raise NotSent(
                "CertificateNotTrusted" if "CERTIFICATE_VERIFY" in str(error) else "TlsFailed",
                str(error),
                action=Action.OPERATOR,
            ) from None
        except EndpointConnectionError as error:
            raise NotSent("ConnectFailed", str(error)) from None
        except (HTTPClientError, SdkConnectionError) as error:
            raise TransportError("ConnectionLost", str(error)) from None
        except BotoCoreError as error:
            raise KinesisError("SdkError", str(error), action=Action.OPERATOR) from None
        note_answer(answer["ResponseMetadata"]["HTTPHeaders"])
        found: bytes = answer["Body"]
        return found

    def _choose_signer(self, **_: object) -> object:
        """With a right clock nobody interferes; with a wrong one `_sign` does what the SDK's signer cannot."""
        return UNSIGNED if self.clock_offset else None

    async def _sign(
        self, request: Any, signing_name: str, region_name: str, signature_version: object, **_: object
    ) -> None:
        # not by the offset: another call may have learned it since this one's signer was chosen
        if signature_version is not UNSIGNED:
            return
        assert self._provider is not None
        keys = ReadOnlyCredentials(*await self._provider.get())
        scope = request.context.get("signing", {})  # an endpoint may have its own
        service, region = scope.get("signing_name") or signing_name, scope.get("region") or region_name
        _SignAt(keys, service, region, self._clock() + self.clock_offset).add_auth(request)


def _take_body(params: dict[str, Any], context: dict[str, Any], **_: object) -> None:
    records = params.get("Records")
    if isinstance(records, _Finished):
        context["fastkin_body"] = records.body


def _put_body(params: dict[str, Any], context: dict[str, Any], **_: object) -> None:
    body = context.get("fastkin_body")
    if body is not None:
        # aiohttp warns of large bytes: it would write them in one go
        params["body"] = io.BytesIO(body) if len(body) > 2**20 else body
