"""What to do about an error of a call, or of one record in an answer: one table for both.

The same code comes in both places, and must mean the same in both. Only a code that speaks of the record itself
gives it up at once: what is given up by mistake cannot be had back.
"""

from __future__ import annotations

import contextlib
import re
from contextvars import ContextVar
from datetime import UTC
from typing import TYPE_CHECKING

import orjson

from fastkin.errors import Action, RequestFailed, UnexpectedResponse, masked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastkin.aws.http_answer import Reply

MESSAGE_CHARS = 500
CODE_CHARS = 80
KEPT_BYTES = 64 * 1024  # of an answer that an error keeps: an error of AWS is below 1 KiB

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
InvalidKMSResourceException InvalidSourceException
"""
_REJECTED = """
InvalidArgumentException ValidationException ValidationError SerializationException
RequestEntityTooLarge RequestEntityTooLargeException
"""
# Where a code stands decides what becomes of data. REJECTED is the only action that gives records up, so a code goes
# there only when it is known to be about the records themselves.
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
# Firehose knows no code of its own for a throttle: above its limits it answers with this one ("Slow down."), for a
# record and for a call. https://docs.aws.amazon.com/firehose/latest/APIReference/API_PutRecordBatch.html
OF_FIREHOSE: dict[str, Action] = {"ServiceUnavailableException": Action.THROTTLE}
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
_NONE: dict[str, Action] = {}
SIGN_AGAIN = frozenset({Action.CREDENTIALS, Action.CLOCK})
RETRY_AFTER_S = 3600.0  # no longer, whoever asks
_SECONDS = re.compile(r"[0-9]{1,30}(\.[0-9]{0,9})?")
_DATES = (0.0, 4_102_444_800.0)  # 1970 to 2100: what lies outside cannot be written into a signature


def classify_request(code: str | None, status: int, own: Mapping[str, Action] = _NONE) -> tuple[str, Action]:
    """(code, action) for a whole answer that is not 200. An unknown code is judged by its status.

    `own`: what codes mean at this destination alone (Destination.codes).
    """
    if code:
        known = own.get(code) or REQUEST_ACTIONS.get(code)
        if known is not None:
            return code, known
    name, action = STATUS_ACTIONS.get(status, (f"Http{status}", None))
    if action is None:
        # 5xx passes by itself; an unknown 3xx or 4xx does not, and must not cost data either
        action = Action.RETRY if status >= 500 else Action.OPERATOR
    return code or name, action


def classify_record(code: str, own: Mapping[str, Action] = _NONE) -> Action:
    """What to do about one record's own ErrorCode in a 200 answer: what a call with that code would get. `own`: as
    above.

    Only two codes are documented there, and emulators invent others. What says that the record itself is bad is final.
    """
    known = own.get(code) or REQUEST_ACTIONS.get(code)
    if known is not None:
        return known
    return Action.REJECTED if "InvalidArgument" in code or "Validation" in code else Action.STRANGE


def retry_after(headers: dict[str, str], now: float) -> float | None:
    """Seconds the server asks us to wait: Retry-After as a number or as a date."""
    text = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), RETRY_AFTER_S)
    at = http_date(text)
    return None if at is None else min(max(at - now, 0.0), RETRY_AFTER_S)


def http_date(text: str | None) -> float | None:
    """A date of a header, in seconds; None for what is no date."""
    if not text or len(text) > 64:
        return None
    try:
        from email.utils import parsedate_to_datetime  # a megabyte, for the rare answer that is refused for its time

        told = parsedate_to_datetime(text)
        at = (told if told.tzinfo is not None else told.replace(tzinfo=UTC)).timestamp()
    except Exception:  # noqa: BLE001 - a peer's text; what the parser makes of it has changed from version to version
        return None
    return at if _DATES[0] <= at <= _DATES[1] else None


def error_from(
    reply: Reply, now: float, secrets: tuple[str | None, ...] = (), own: Mapping[str, Action] = _NONE
) -> RequestFailed:
    """The error an answer tells. Secrets are cut out of its text, should the server repeat them. `own`: as above."""
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
    name, action = classify_request(name.rpartition("#")[2].partition(":")[0].strip(), reply.status, own)
    if name not in REQUEST_ACTIONS:  # what it is was decided before anything is cut out of it
        name = masked(name, secrets)[:CODE_CHARS]
    # A refused signature comes with the canonical request, session token and all: first line only.
    words = message.strip().partition("\n")[0] if isinstance(message, str) else ""
    return RequestFailed(
        name,
        masked(words, secrets)[:MESSAGE_CHARS],  # cut when they are out of it: half a secret is one too
        action=action,
        http_status=reply.status,
        request_id=_request_id(reply.headers),
        retry_after=retry_after(reply.headers, now),
        http_response=response_of(reply.body, secrets),
    )


# The id of the request whose answer this task has got last. Who reads an answer has its body alone: a reader of headers
# through every call would be carried along for the one answer in millions that is not as the API promises.
_ANSWERED: ContextVar[str | None] = ContextVar("fastkin_answered", default=None)


def _request_id(headers: Mapping[str, str]) -> str | None:
    return (headers.get("x-amzn-requestid") or headers.get("x-amz-request-id") or "")[:80] or None


def note_answer(headers: Mapping[str, str]) -> None:
    """Of a 200: what cannot be read in it may be told of its request."""
    _ANSWERED.set(_request_id(headers))


@contextlib.contextmanager
def telling_requests() -> Iterator[None]:
    """UnexpectedResponse names the request whose answer it could not read."""
    try:
        yield
    except UnexpectedResponse as error:
        error.of_request(_ANSWERED.get())
        raise


def response_of(body: bytes, secrets: tuple[str | None, ...] = ()) -> object:
    """An answer's body for people: parsed when it is JSON, {} when it is empty, else text. Secrets are cut out of it.

    None when it is longer than KEPT_BYTES: an error may be kept for long.
    """
    if not body.strip():
        return {}
    if len(body) > KEPT_BYTES:
        return None
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        told = body.decode("utf-8", "replace")
    return _without(told, secrets)


def _without(told: object, secrets: tuple[str | None, ...]) -> object:
    # In what was parsed, and not in the text of the JSON: there a secret may be written with escapes. orjson reads no
    # deeper than 1,024 levels, which is beyond what Python would let us walk.
    if isinstance(told, str):
        return masked(told, secrets)
    try:
        if isinstance(told, dict):
            return {masked(name, secrets): _without(value, secrets) for name, value in told.items()}
        if isinstance(told, list):
            return [_without(value, secrets) for value in told]
    except RecursionError:
        return None
    return told
