"""Where calls go: the same answer as the SDK's, without loading it in the plain cases.

An explicit endpoint wins over everything, then AWS_ENDPOINT_URL_ and the service, then AWS_ENDPOINT_URL, then the
host of the region; a stream named by its ARN, or an account id in the credentials, has hosts of its own.
Anything else (FIPS, dual stack, other partitions, the shared config file) is asked from aiobotocore: it
builds one request, and its final URL is taken before it would be sent.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from fastkin.arn import stream_arn
from fastkin.aws.destinations import KINESIS
from fastkin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastkin.arn import StreamArn
    from fastkin.aws.destinations import Destination
    from fastkin.aws.signing import Credentials
    from fastkin.config import Kinesis


class Url(NamedTuple):
    """An endpoint taken apart: `base` is scheme and host for the pool, the rest is what is signed."""

    base: str
    host: str  # the Host header
    path: str


class Endpoint(NamedTuple):
    """Where records go (`data`) and where questions about the stream go (`control`)."""

    data: Url
    control: Url
    region: str


def parse_arn(text: str) -> StreamArn:
    """The parts of a stream's ARN. Raises ConfigError."""
    arn = stream_arn(text)
    if arn is None:
        raise ConfigError(
            "kinesis.stream_arn",
            f"{text!r} is not the ARN of a stream",
            "it looks like arn:aws:kinesis:eu-west-1:123456789012:stream/NAME",
        )
    return arn


def split_url(url: str, place: str = "kinesis.endpoint_url") -> Url:
    """Take an endpoint URL apart as it will be sent and signed. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(place, f"{error}", "it looks like http://localhost:4567") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(place, "is not an http or https URL", "it looks like http://localhost:4567")
    try:
        # The resolver would raise this error in the middle of the first call; here it names the setting.
        parts.hostname.encode("idna")
    except UnicodeError:
        raise ConfigError(place, f"{parts.hostname!r} is no name of a host", "it looks like localhost") from None
    # They would be sent in the clear with each call, and nothing reads them.
    if parts.username is not None or parts.password is not None:
        raise ConfigError(place, "must not hold a user name or password", "set the AWS keys instead")
    if parts.query or parts.fragment:
        raise ConfigError(place, "must end with the path", "leave out everything from ? or #")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    # The Host header is signed: it must be written as every client writes it, without the port that goes without
    # saying.
    if port is not None and port != {"http": 80, "https": 443}[parts.scheme]:
        host = f"{host}:{port}"
    # what may not stand in a request line is encoded; what is encoded already stays
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return Url(f"{parts.scheme}://{host}", host, path)


def find_region(kinesis: Kinesis, environ: Mapping[str, str] | None = None) -> str | None:
    """The region, without the SDK: setting, AWS_REGION, AWS_DEFAULT_REGION, the stream's ARN."""
    env = os.environ if environ is None else environ
    arn = parse_arn(kinesis.stream_arn) if kinesis.stream_arn else None
    region = kinesis.region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    # It becomes a part of a host's name: a slash or an @ in it would send signed calls somewhere else.
    if region and not re.fullmatch(r"[a-zA-Z0-9-]{1,63}", region):
        raise ConfigError("kinesis.region", f"{region!r} is not a region", "for example eu-west-1")
    if arn is not None:
        # The region is signed. A stream that is somewhere else would be answered with "not found", which tells nobody
        # why.
        if region and region != arn.region:
            raise ConfigError(
                "kinesis.stream_arn",
                f"the stream is in {arn.region}, the region is set to {region}",
                "leave the region out, or make both equal",
            )
        return arn.region
    return region or None


def region_of(kinesis: Kinesis) -> str:
    """The region, from the SDK's configuration files too. Raises ConfigError."""
    region = find_region(kinesis)
    if region is not None:
        return region
    # imported here: only who keeps the region in those files pays for the SDK
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        return session_region(kinesis, Session(profile=kinesis.profile))
    except BotoCoreError as error:
        raise ConfigError("kinesis", f"the SDK refuses the settings: {error}") from None


def session_region(kinesis: Kinesis, session: Any) -> str:
    """The region: what find_region() finds, else that of the SDK's session. Raises ConfigError."""
    region = find_region(kinesis) or session.get_config_variable("region")
    if not region:
        raise ConfigError("kinesis.region", "is missing", "set it, or AWS_REGION")
    return str(region)


def light_endpoint(
    kinesis: Kinesis,
    account_id: str | None = None,
    environ: Mapping[str, str] | None = None,
    destination: Destination = KINESIS,
) -> Endpoint | None:
    """The endpoint in the plain cases, None where the SDK must be asked."""
    env = os.environ if environ is None else environ
    region = find_region(kinesis, env)
    if region is None:
        return None
    url = kinesis.endpoint_url
    place = "kinesis.endpoint_url"
    if not url and env.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
        for place in destination.endpoint_variables:
            url = env.get(place)
            if url:
                break
    if url:
        # One address was given, so it serves for both kinds of calls.
        taken = split_url(url, place)
        return Endpoint(taken, taken, region)
    # To guess wrong here would send records to the wrong place. In doubt the SDK is asked, which costs 30 MB once.
    if _asks_for_more(kinesis, env):
        return None
    # the stream's own account has hosts of its own, else the account of the keys, when they tell it
    account = parse_arn(kinesis.stream_arn).account if kinesis.stream_arn else account_id
    hosts = destination.hosts(region, account)
    if hosts is None:
        return None
    data, control = hosts
    return Endpoint(split_url(f"https://{data}"), split_url(f"https://{control}"), region)


def _asks_for_more(kinesis: Kinesis, env: Mapping[str, str]) -> bool:
    """Does anything bend the plain rule: a profile, FIPS, dual stack, a shared config file?"""
    if kinesis.profile or any(env.get(name) for name in _BENDING):
        return True
    if any(env.get(name, "").lower() == "true" for name in _SWITCHES):
        return True
    if env.get("AWS_ACCOUNT_ID_ENDPOINT_MODE", "preferred").lower() != "preferred":
        return True
    path = Path(env.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    try:
        # The file is not parsed: one of these words anywhere in it is enough to leave the answer to the SDK.
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(word in text for word in ("endpoint", "fips", "dualstack", "services"))


_BENDING = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_DATA_PATH")
_SWITCHES = ("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT")


async def captured_endpoint(kinesis: Kinesis, credentials: Credentials, destination: Destination = KINESIS) -> Endpoint:
    """Ask the SDK: it builds a call, and its URL is taken where it would be sent. Nothing goes out."""
    # imported here: the SDK costs 30 MB and half a second, and the plain cases never need it
    from aiobotocore.awsrequest import AioAWSResponse
    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession
    from botocore import xform_name
    from botocore.exceptions import BotoCoreError

    session = AioSession(profile=kinesis.profile)
    seen: list[tuple[str, str]] = []

    def take(request: Any, **_: object) -> Any:
        # The region that the SDK signed for stands in the scope of its signature: it may differ from the one that was
        # set.
        signed = request.headers["Authorization"]
        if isinstance(signed, bytes):
            signed = signed.decode()
        seen.append((request.url, signed.split("/")[2]))
        return AioAWSResponse(request.url, 200, {}, _Nothing())

    try:
        region = session_region(kinesis, session)
        async with session.create_client(
            destination.service,
            region_name=region,
            endpoint_url=kinesis.endpoint_url or None,
            # The real keys are needed for an account's own host. The call is stopped before it would leave.
            aws_access_key_id=credentials.access_key,
            aws_secret_access_key=credentials.secret_key,
            aws_session_token=credentials.token,
            aws_account_id=credentials.account_id,
            config=AioConfig(parameter_validation=False, retries={"total_max_attempts": 1}),
        ) as made:
            client: Any = made  # its operations are made at run time
            # "before-send" may answer in the place of the network: the SDK takes what the handler returns for the
            # answer.
            client.meta.events.register(f"before-send.{destination.service}", take)
            name = destination.stream_members(kinesis.name or "-", kinesis.stream_arn)
            await getattr(client, xform_name(destination.put))(Records=[], **name)
            if destination.account_hosts:
                await client.describe_stream_summary(**name)
    except BotoCoreError as error:
        raise ConfigError("kinesis", f"the SDK finds no endpoint: {error}") from None
    (data, scope), (control, _) = seen[0], seen[-1]
    return Endpoint(split_url(data), split_url(control), scope)


class _Nothing:
    """The body of an answer that never came."""

    async def read(self) -> bytes:
        return b"{}"


async def resolve_endpoint(kinesis: Kinesis, credentials: Credentials, destination: Destination = KINESIS) -> Endpoint:
    """The endpoint the SDK would use. Raises ConfigError."""
    endpoint = light_endpoint(kinesis, credentials.account_id, destination=destination)
    return endpoint if endpoint is not None else await captured_endpoint(kinesis, credentials, destination)
