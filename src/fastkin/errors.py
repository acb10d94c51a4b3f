"""Every exception of fastkin. `retriable` is a class attribute: callers ask the class, never a list of names.

Four roots are kept apart: a setting is wrong (`ConfigError`), a payload is bad (`DataFormatError`, `RecordError`), the
broker spoke nonsense or refused us (`MqttError`), Kinesis, the way to it or the call of its Python face failed
(`KinesisError`: who puts or reads records catches this one, and asks its `type`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkin._codec import Receipt
    from fastkin.results import PutResult
else:
    Receipt, PutResult = Awaitable, Any  # what get_type_hints() shows: both modules import this one


def escaped(text: str) -> str:
    """The whole text, fit for a terminal whoever chose it: what does not print is written as an escape, also what ends
    a line for some reader, or turns the direction of reading."""
    # Nearly every text is: the walk over its characters is for those that are not.
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def printable(text: str, most: int = 1000) -> str:
    """Fit for one line of a log: escaped(), and at most so many characters of the text."""
    if len(text) > most:
        text = f"{text[:most]}... ({len(text):,} characters)"
    return escaped(text)


def masked(text: str, secrets: Iterable[str | None]) -> str:
    """The same text without our secrets, for what a peer says and may have repeated.

    A secret of a sensible length is cut out wherever it stands. A short one only where it stands alone: a password
    `any` is part of many words, and nobody learns it from these.
    """
    for secret in secrets:
        if not secret or secret not in text:
            continue
        if len(secret) >= _SECRET_LEAST:
            text = text.replace(secret, "***")
        elif any(one.isalnum() for one in secret):
            before = r"(?<!\w)" if _is_word(secret[0]) else ""
            behind = r"(?!\w)" if _is_word(secret[-1]) else ""
            text = re.sub(before + re.escape(secret) + behind, "***", text)
    return text


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_SECRET_LEAST = 8


class FastkinError(Exception):
    """The root of everything fastkin raises on purpose."""

    retriable = False
    receipts: tuple[Receipt[PutResult], ...] = ()  # of `put_many`: those of the records before, which were taken


class ConfigError(FastkinError):
    """A setting is wrong. `place` names file, table and key; the message ends with the cure."""

    def __init__(self, place: str, problem: str, cure: str = "") -> None:
        self.place = place
        self.problem = problem
        self.cure = cure
        text = f"{place}: {problem}" + (f"; {cure}" if cure else "")
        # the names of files, keys and variables may hold anything: one line each, and nothing a terminal obeys
        super().__init__(printable(text, 4000))


class ClosedError(FastkinError):
    """The producer or engine is closed, or was closed before the record could be stored."""


class DataFormatError(FastkinError, ValueError):
    """A payload is not what its format says. `offset` counts bytes from the start of the payload."""

    def __init__(self, offset: int, reason: str, field: str | None = None) -> None:
        self.offset = offset
        self.reason = reason
        self.field = field
        where = f"byte {offset}" if field is None else f"field {field!r} at byte {offset}"
        super().__init__(f"{reason} ({where})")


class RecordError(FastkinError, ValueError):
    """One record can never be stored as it is: too large, or its key is not allowed."""


class RecordDropped(FastkinError):  # noqa: N818
    """One record was given up because memory was full and `on_full` said so."""


class DeliveryTimeout(FastkinError):  # noqa: N818
    """`delivery_timeout_s` passed before the record had an outcome.

    may_be_stored: a call with it was made whose outcome nobody knows, so it may be in the stream, or come there yet.
    False: it was given up, and is not in the stream.
    """

    def __init__(self, timeout_s: float, *, may_be_stored: bool, last_error: str | None = None) -> None:
        self.timeout_s = timeout_s
        self.may_be_stored = may_be_stored
        self.last_error = last_error
        told = "the record may have been stored" if may_be_stored else "the record was given up and is not stored"
        why = f"; last error: {last_error}" if last_error else ""
        super().__init__(f"no outcome within delivery_timeout_s = {timeout_s:g} s: {told}{why}")


class RecordsLost(FastkinError):  # noqa: N818
    """A producer was closed with records that had no outcome yet: their receipts raise ClosedError.

    records: how many. last_error: what kept them from being stored, None when nothing is known.
    """

    def __init__(self, records: int, last_error: str | None) -> None:
        self.records = records
        self.last_error = last_error
        super().__init__(
            f"{records} records had no outcome when the producer was closed (last error: {last_error or 'none'}): raise"
            ' close_timeout_s, or give on_full="spool"'
        )


class BudgetFull(FastkinError):  # noqa: N818
    """`put_nowait` finds no room in the budget: nothing was taken. `await put()` waits for it."""

    retriable = True


class SpoolError(FastkinError):
    """The spool takes or gives nothing now. Nothing of the call happened: hold the data and try again."""

    retriable = True

    def __init__(self, path: object, problem: str, cure: str) -> None:
        self.path = path
        self.problem = problem
        self.cure = cure
        super().__init__(f"spool {path}: {problem}; {cure}")


class CheckpointError(FastkinError):
    """How far a consumer has read cannot be kept, or be read back. The message ends with the cure."""


class MqttError(FastkinError):
    """The MQTT connection cannot go on; the session reconnects."""

    retriable = True


class ProtocolError(MqttError):
    """The broker sent bytes that are not MQTT. `offset` counts from the start of the packet."""

    def __init__(self, reason: str, offset: int = 0, code: int = 0x81) -> None:
        self.reason = reason
        self.offset = offset
        self.code = code
        super().__init__(f"malformed MQTT from the broker: {reason} (byte {offset} of the packet)")


class RefusedError(MqttError):
    """The broker refused the connection or a subscription. `code` is its reason code."""

    def __init__(self, message: str, code: int) -> None:
        self.code = code
        super().__init__(message)


class Action(enum.Enum):
    """What the sender does about a failed call or record."""

    RETRY = "retry"  # transient: again, with backoff
    THROTTLE = "throttle"  # a rate was exceeded: again, slower
    CREDENTIALS = "credentials"  # fetch fresh credentials, sign again
    CLOCK = "clock"  # correct the clock offset, sign again
    OPERATOR = "operator"  # somebody must act: slow retry, data kept
    REJECTED = "rejected"  # the request itself is bad: bisect to the one bad record
    STRANGE = "strange"  # one record failed with a code that nobody documented: again, ever slower, for minutes


class ErrorType(enum.StrEnum):
    """Whose fault a `KinesisError` is, for who asks before anything else."""

    LIBRARY_ERROR = "LIBRARY_ERROR"  # the caller's: nothing was sent
    REQUEST_FAILED = "REQUEST_FAILED"  # Kinesis said no, or nobody answered
    UNEXPECTED_RESPONSE = "UNEXPECTED_RESPONSE"  # it answered, and not as the API promises


class KinesisError(FastkinError):
    """A call failed. `code` is Kinesis's error type or one of fastkin's own for a broken connection.

    type: an ErrorType. http_status: None when nobody answered. request_id: the service's own, or None.
    http_response: the answer's body, parsed when it is JSON, else as text, {} when it is empty, None when nobody
    answered or it was not kept; secrets of ours are cut out of it. failed_record_count: how many records the call had,
    of `put_record` and `put_records`, for none of them is known to be stored.

    What the other side said is made fit for a log line here, once for all who quote it.
    """

    retriable = True
    type = ErrorType.REQUEST_FAILED

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        action: Action = Action.RETRY,
        http_status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        http_response: object = None,
    ) -> None:
        self.http_response = http_response
        self.failed_record_count: int | None = None
        code = printable(code, 128)
        self.code: str = code
        message = printable(message)
        self.message: str = message
        self.action = action
        self.http_status = http_status
        request_id = printable(request_id, 128) if request_id else None
        self.request_id: str | None = request_id
        self.retry_after = retry_after
        parts = [f"HTTP {http_status}"] if http_status is not None else []
        parts += [f"request {request_id}"] if request_id else []
        super().__init__(f"{code}: {message or 'no message'}" + (f" ({', '.join(parts)})" if parts else ""))

    @property
    def details(self) -> str:
        """What went wrong, in words."""
        return self.message


class LibraryError(KinesisError, ValueError):
    """An argument of the Python face is wrong; nothing was sent."""

    retriable = False
    type = ErrorType.LIBRARY_ERROR

    def __init__(self, message: str, *, failed_record_count: int | None = None) -> None:
        super().__init__("LibraryError", message)
        self.args = (message,)  # its text is what is wrong, and no code
        self.failed_record_count = failed_record_count


class RequestFailed(KinesisError):  # noqa: N818 - it reads better in `except`
    """Kinesis answered with an error, or nobody answered."""

    @property
    def details(self) -> str:
        """The status, where there is one; `code` and `message` say what Kinesis says."""
        if self.http_status is None:
            return self.message
        return f"AWS Kinesis request failed with status code: {self.http_status}"


class TransportError(RequestFailed):
    """No answer, or half of one: whether the records were stored is unknown, unless it is NotSent.

    `unsent_bytes`: of a call that timed out, what of its body had not reached the other machine; 0 when all of it had,
    None when nobody knows.
    """

    unsent_bytes: int | None = None


class NotSent(TransportError):  # noqa: N818
    """There was no connection: certainly nothing was stored."""


class UnexpectedResponse(KinesisError):  # noqa: N818 - it reads better in `except`
    """The answer is not what the API promises: not JSON, wrong record count, missing fields."""

    type = ErrorType.UNEXPECTED_RESPONSE

    def of_request(self, request_id: str | None) -> None:
        """Name the request whose answer it was, when nobody has yet: who reads an answer does not see its headers."""
        if request_id and not self.request_id:
            self.request_id = printable(request_id, 128)
            self.args = (f"{self.args[0]} (request {self.request_id})",)


class RecordFailed(KinesisError):  # noqa: N818
    """One record was refused for good, by its own entry in the answer."""

    retriable = False
