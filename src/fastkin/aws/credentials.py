"""Where the keys come from: settings or environment as they stand, or the SDK's whole chain.

Keys that expire are refreshed before they do, beside the calls. Calls go on with the present keys meanwhile, as long as
these are valid, also when a refresh fails. If it were done at the last moment, every call would wait for STS, and an
STS that is away for a minute would stop the pipeline. A call waits for new keys, or fails, only when there are no valid
ones or the service has refused them.

Trouble is told here, in one line with the pipeline, the role, what was said and the cure. The SDK would tell it in
tracebacks of a hundred lines, each time it tries. Those are kept back while it works for us.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from fastkin.aws.destinations import KINESIS
from fastkin.aws.endpoint import find_region
from fastkin.aws.signing import Credentials
from fastkin.errors import Action, ConfigError, KinesisError, masked, printable
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastkin.config import Kinesis

log: logging.Logger = logging.getLogger("fastkin.credentials")

POLL_S = 60.0  # the longest time between two looks at the SDK's keys; never more than one a second
ADVISORY_S = 900.0  # the SDK begins to refresh this long before the end
BACKOFF_S = 30.0
WAITING_S = 10.0  # without valid keys what is held waits: no longer than this when they come back
REFUSED_EVERY_S = 5.0  # refused keys are fetched anew at most this often: STS throttles too
REFRESH_S = 90.0  # one look at all of the chain: it may ask several services, each with its own timeouts
# Of one request to STS or SSO. Trying again is ours, so that each try can be told: the SDK would try five times, a
# minute each, in silence.
STS_CONNECT_S = 5.0
STS_READ_S = 10.0
_TROUBLE_LINES = 5  # of a kind per _TROUBLE_S, then the number of the others
_TROUBLE_S = 60.0
_FAR_S = 400 * 86_400.0
_ACCOUNT = re.compile(r"[0-9]{12}")


class Provider(Protocol):
    """What a client asks for keys."""

    async def get(self) -> Credentials:
        """The keys to sign with now. Cheap when fresh. Raises KinesisError."""
        ...

    def invalidate(self, refused: Credentials | None = None) -> bool:
        """The service refused the keys: fetch others with the next get(). False if there are none."""
        ...

    async def close(self) -> None:
        """Stop refreshing."""


def checked(credentials: Credentials, place: str) -> Credentials:
    """The same credentials, if they can stand in a header. Raises ConfigError that shows no secret."""
    for name, value in (
        ("access key", credentials.access_key),
        ("session token", credentials.token or "-"),
    ):
        # Both go into a header. A line break in a key would let it add headers of its own.
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ConfigError(
                place,
                f"the {name} holds a blank, a line break or another character that no key has",
                "copy it again",
            )
    # It never leaves this process, so any character would do; but a blank at its end is what a careless copy brings,
    # and the service would only say that the signature is wrong.
    if credentials.secret_key != credentials.secret_key.strip():
        raise ConfigError(place, "the secret key begins or ends with a blank", "copy it again")
    try:
        credentials.secret_key.encode()
    except UnicodeEncodeError:
        raise ConfigError(place, "the secret key is not text", "copy it again") from None
    if credentials.account_id is not None and not _ACCOUNT.fullmatch(credentials.account_id):
        # it becomes a part of the host's name
        raise ConfigError(place, "the account id is not a number of 12 digits", "correct it, or leave it out")
    return credentials


class StaticCredentials:
    """A key pair that stays as it is."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def get(self) -> Credentials:
        return self._credentials

    def invalidate(self, refused: Credentials | None = None) -> bool:  # noqa: ARG002
        return False

    async def close(self) -> None:
        pass


def static_credentials(kinesis: Kinesis, environ: Mapping[str, str] | None = None) -> Credentials | None:
    """Keys of the settings or the environment, when nothing asks for more than these."""
    env = os.environ if environ is None else environ
    if kinesis.access_key or kinesis.secret_key:
        if not (kinesis.access_key and kinesis.secret_key):
            missing = "secret_key" if kinesis.access_key else "access_key"
            raise ConfigError("kinesis", f"{missing} is missing", "set both keys or neither")
        return checked(
            Credentials(kinesis.access_key, kinesis.secret_key, kinesis.session_token or None),
            "kinesis.access_key",
        )
    # A profile is asked for, or keys that expire: only the SDK's chain knows how to follow these.
    if kinesis.profile or env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE"):
        return None
    access_key, secret_key = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
    if not (access_key and secret_key) or env.get("AWS_CREDENTIAL_EXPIRATION"):
        return None
    return checked(
        Credentials(
            access_key,
            secret_key,
            env.get("AWS_SESSION_TOKEN") or env.get("AWS_SECURITY_TOKEN") or None,
            env.get("AWS_ACCOUNT_ID") or None,
        ),
        "AWS_ACCESS_KEY_ID",
    )


# Three states. Keys that are valid and not due: handed out. Due: handed out, and a look goes on beside it. None,
# refused or expired: whoever asks waits for the look, and hears its error when it fails.
class ChainCredentials:
    """The SDK's whole chain: profile, SSO, web identity, container, IMDS, a process, an assumed role.

    Keys are kept here and handed out at once; a look at the SDK's own happens in the background, well
    before they expire, so that calls go on meanwhile. When a refresh fails the present keys are used for
    as long as they are valid.
    """

    def __init__(
        self, kinesis: Kinesis, *, name: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`name` of the pipeline, for log lines."""
        self._kinesis = kinesis
        self._where = f"pipeline={name} stage=credentials" if name else "stage=credentials"
        self._lines: Repeats | None = None
        self._clock = clock
        self._source: Any = None
        self._current: Credentials | None = None
        self._expires = math.inf  # on our clock, as _due is
        self._due = 0.0  # the next look at the SDK's keys
        self._failures = 0
        self._why = ""  # what the last refresh failed of
        self._refused = False
        self._not_refused_before = 0.0
        self._task: asyncio.Task[Credentials] | None = None

    async def get(self) -> Credentials:
        current = self._current
        wait = self._due - self._clock()
        # Not time to look again. Keys that are valid are handed out at once; where there are none the last reason is
        # told again, so that a hundred calls do not ask an STS that is down a hundred times.
        if wait > 0:
            if current is not None:
                return current
            if self._why:
                raise KinesisError("NoCredentials", self._why, action=Action.OPERATOR, retry_after=wait)
        # One look at a time, whoever asks: the others wait for the same task.
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._refresh(), name="fastkin credentials")
            self._task.add_done_callback(_consume)
        # The present keys are good: the look goes on in the background, and this call does not wait for it.
        if current is not None and not self._refused and self._clock() < self._expires:
            return current
        # Shielded, for the look belongs to everybody who waits: one cancelled call must not end it.
        return await asyncio.shield(self._task)

    def invalidate(self, refused: Credentials | None = None) -> bool:
        if refused is not None and refused != self._current:
            return True  # newer keys are here already
        now = self._clock()
        if now < self._not_refused_before:
            return False  # asked a moment ago: whoever refuses them will refuse them again
        self._not_refused_before = now + REFUSED_EVERY_S
        self._refused = True
        self._due = 0.0
        return True

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1.0)
            self._task = None
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    async def _refresh(self) -> Credentials:
        before = self._current
        forced = self._refused
        _quietly()
        try:
            async with asyncio.timeout(REFRESH_S):
                if self._source is None or forced:
                    # keys that were refused before their time: find new ones from the start of the chain
                    self._source = await _load_source(self._kinesis)
                frozen = await self._source.get_frozen_credentials()
            current = checked(
                Credentials(
                    frozen.access_key,
                    frozen.secret_key,
                    frozen.token or None,
                    getattr(frozen, "account_id", None) or None,
                ),
                "credentials",
            )
            left = _seconds_left(self._source)
        except asyncio.CancelledError:
            raise
        except ConfigError as error:
            # Nothing was ever found with these settings: that is a mistake of theirs, and the start ends with it.
            if self._source is None:
                raise  # never worked: the user hears of it at the start
            return self._failed(str(error), _cure(self._kinesis, error))
        except Exception as error:  # noqa: BLE001 - every provider has exceptions of its own
            return self._failed(self._told(error), _cure(self._kinesis, error))
        finally:
            self._task = None
            if forced:
                self._refused = False
        now = self._clock()
        self._current = current
        self._expires = now + left
        # The SDK swallows a failed refresh while its keys are valid: the same keys, and little time left, are the
        # only sign.
        if current == before and left < ADVISORY_S:
            # the SDK tried and kept the old ones
            return self._failed("the refresh brought no newer keys", _cure(self._kinesis, None))
        if self._failures:
            log.info("%s credentials are fresh again", self._where)
        self._failures = 0
        self._why = ""
        # Early enough for three more attempts before the end, and often enough that keys which somebody replaced on
        # the disk are noticed within a minute.
        self._due = now + min(max(left / 4, 1.0), POLL_S) if left < math.inf else math.inf
        return current

    def _failed(self, why: str, cure: str) -> Credentials:
        why = printable(why)
        now = self._clock()
        # A failed refresh costs nothing while the present keys are valid.
        current = self._current if now < self._expires else None
        wait = min(2.0 ** min(self._failures, 10), BACKOFF_S, math.inf if current is not None else WAITING_S)
        self._failures += 1
        self._due = now + wait
        self._why = why
        if self._lines is None:
            self._lines = Repeats(log, asyncio.get_running_loop().call_later, most=_TROUBLE_LINES, per_s=_TROUBLE_S)
        why = self._why = f"{why}; {cure}"
        if current is None:
            self._current = None
            self._lines.say(
                logging.ERROR, "none", "%s no valid credentials, next try in %.0f s: %s", self._where, wait, why
            )
            raise KinesisError("NoCredentials", why, action=Action.OPERATOR)
        left = self._expires - now
        self._lines.say(
            logging.ERROR,
            "old",
            "%s credentials could not be refreshed, next try in %.0f s, the present ones are used%s: %s",
            self._where,
            wait,
            "" if left == math.inf else f" for {left:.0f} s more",
            why,
        )
        return current

    def _told(self, error: Exception) -> str:
        kinesis = self._kinesis
        # Providers put what they were given into their exceptions; what comes from a peer is cut besides.
        secrets = (kinesis.secret_key, kinesis.session_token, kinesis.external_id)
        text = masked(f"{type(error).__name__}: {error}".partition("\n")[0], secrets)[:500]
        if isinstance(error, TimeoutError):
            text = f"whoever gives them has not answered within {REFRESH_S:g} s"
        return f"role {kinesis.role_arn}: {text}" if kinesis.role_arn else text


# What services say to a request for keys, and what to do then. The second one is about the keys that ask.
_REFUSED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedException", "ForbiddenException"})
_WRONG_KEYS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "SignatureDoesNotMatch",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "MissingAuthenticationToken",
    }
)


def _cure(kinesis: Kinesis, error: Exception | None) -> str:
    from botocore import exceptions as sdk

    role = kinesis.role_arn
    if isinstance(error, sdk.ClientError):
        code = str(error.response.get("Error", {}).get("Code"))
        # Each answer of STS has its own cure; "check the credentials" would be true for all of them and help with
        # none.
        if code in _REFUSED and error.operation_name == "AssumeRole":
            return (
                "allow these keys sts:AssumeRole on the role, and see that its trust policy names them and that"
                " external_id is the one it asks for"
            )
        if code in _REFUSED and error.operation_name == "AssumeRoleWithWebIdentity":
            return "see that the role's trust policy names this identity provider and this service account"
        if code in _WRONG_KEYS:
            return "the keys that ask are expired or wrong: set others" + (", or set this clock right" if role else "")
        if code == "RegionDisabledException":
            return "activate STS for this region in the account's settings, or set another region"
        if code in {"ValidationError", "MalformedPolicyDocument"}:
            return "check role_arn, session_name and external_id"
    if isinstance(error, (sdk.HTTPClientError, sdk.ConnectionError, TimeoutError)):
        what = "STS" if role else "what gives the keys"
        return (
            f"{what} cannot be reached: check network, name resolution, proxy and region (AWS_ENDPOINT_URL_STS names"
            " another endpoint of STS)"
        )
    if role and not isinstance(error, sdk.NoCredentialsError):
        return "check role_arn, external_id, and the keys that assume the role"
    if kinesis.profile:
        return f"sign in again or mend profile {kinesis.profile!r} in ~/.aws"
    return (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or profile, or give this machine a role"
        f" that allows {KINESIS.permission}"
    )


_OURS: ContextVar[bool] = ContextVar("fastkin credentials", default=False)


class _KeepBack(logging.Filter):
    """Warnings and tracebacks of the SDK that come of our own asking."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or not _OURS.get()


_KEEP_BACK = _KeepBack()


def _quietly() -> None:
    """From here on this task's SDK says nothing by itself. Who uses the SDK beside us hears all that it says to him."""
    _OURS.set(True)
    # A filter, and not a level: the level of these loggers belongs to the application that embeds us.
    for package in ("aiobotocore", "botocore"):
        for module in ("credentials", "tokens", "utils", "httpchecksum", "endpoint", "httpsession"):
            logging.getLogger(f"{package}.{module}").addFilter(_KEEP_BACK)


def _consume(task: asyncio.Task[Credentials]) -> None:
    if not task.cancelled():
        task.exception()  # told by the log, and to whoever awaits it


def _seconds_left(source: Any) -> float:
    """How long the SDK's keys are valid, found by its public question alone."""
    needed = getattr(source, "refresh_needed", None)
    # Keys without an end: nothing has to be looked at again.
    if needed is None or not needed(refresh_in=_FAR_S):
        return math.inf
    # The SDK keeps the time of expiry to itself and only answers "must they be refreshed within so many seconds?".
    # Some twenty such questions find the time to half a second.
    low, high = 0.0, _FAR_S
    while high - low > 0.5:
        middle = (low + high) / 2
        if needed(refresh_in=middle):
            high = middle
        else:
            low = middle
    return low


async def _load_source(kinesis: Kinesis) -> Any:
    """The SDK's credentials object: whole chain, then the role on top. Raises ConfigError."""
    # imported here: the SDK costs 30 MB and half a second, and static keys never need it
    from aiobotocore.config import AioConfig
    from aiobotocore.credentials import (
        AioAssumeRoleCredentialFetcher,
        AioCredentials,
        AioDeferredRefreshableCredentials,
    )
    from aiobotocore.session import AioSession
    from botocore.exceptions import (
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    session = AioSession(profile=kinesis.profile)
    # Its own attempts would stack on ours, each with its own waits.
    session.set_default_client_config(
        AioConfig(retries={"total_max_attempts": 1}, connect_timeout=STS_CONNECT_S, read_timeout=STS_READ_S)
    )
    try:
        region = find_region(kinesis) or session.get_config_variable("region")
        # Keys of the settings may be what a role is assumed with: then they are the beginning of the chain.
        keys = static_credentials(kinesis)
        source = AioCredentials(*keys[:3]) if keys else await session.get_credentials()
    except ProfileNotFound as error:
        raise ConfigError("kinesis.profile", str(error), "name one of ~/.aws/config") from None
    except PartialCredentialsError as error:
        raise ConfigError("credentials", str(error), "set both keys or neither") from None
    if source is None:
        raise NoCredentialsError
    if not kinesis.role_arn:
        return source
    arguments = {"RoleSessionName": kinesis.session_name or "fastkin"}
    if kinesis.external_id:
        arguments["ExternalId"] = kinesis.external_id
    # The SDK assumes the role when its keys are first asked for, and again before they expire.
    fetcher = AioAssumeRoleCredentialFetcher(
        partial(session.create_client, region_name=region),
        source,
        kinesis.role_arn,
        extra_args=arguments,
    )
    return AioDeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")


async def make_provider(kinesis: Kinesis, name: str | None = None) -> Provider:
    """Where this destination's keys come from. `name` of the pipeline, for log lines."""
    keys = static_credentials(kinesis)
    if keys is not None and not kinesis.role_arn:
        return StaticCredentials(keys)
    return ChainCredentials(kinesis, name=name)
