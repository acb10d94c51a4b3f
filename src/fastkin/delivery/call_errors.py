"""What the error of a failed call says: who can mend it, whether its records may be stored, what helps. Pure.

The table of error codes (aws/error_table.py) says what to do about an error. Here is what the sender reads out of one
besides that. Nothing here keeps a state.
"""

from __future__ import annotations

from fastkin.errors import Action, KinesisError, NotSent, RequestFailed, TransportError, UnexpectedResponse

# Nothing but a person, or new keys, helps. It is tried for ever, slowly; it is an ERROR, and shows as not ready.
HOPELESS = frozenset({Action.OPERATOR, Action.CREDENTIALS, Action.CLOCK})
# The service gave up on a call that it may have carried out, whatever the status says.
_OUTCOME_UNKNOWN = frozenset({"RequestTimeout", "RequestTimeoutException", "RequestAborted", "RequestAbortedException"})


def for_keys(error: KinesisError) -> bool:
    """New keys mend it, and they come without anybody telling us."""
    return error.action is Action.CREDENTIALS or error.code == "NoCredentials"


def too_large(error: KinesisError) -> bool:
    """The body of the call was too large: a smaller one may pass."""
    # A proxy may refuse it before Kinesis does, and then there is no code.
    return error.http_status == 413 or "EntityTooLarge" in error.code


def not_taken(error: KinesisError) -> bool:
    """The body of the call had not wholly left when it ended for want of time: a smaller one may."""
    return bool(isinstance(error, TransportError) and error.unsent_bytes) or error.http_status == 408


def maybe_stored(error: KinesisError) -> bool:
    """Whether the records of a failed call may be in the stream: the outcome is unknown, or a 5xx hides it."""
    # Nobody answered, or somebody who is not Kinesis. Only what never left is surely not stored.
    if isinstance(error, UnexpectedResponse | TransportError):
        return not isinstance(error, NotSent)
    return error.code in _OUTCOME_UNKNOWN or (error.http_status is not None and error.http_status >= 500)


def as_operator(error: KinesisError, *, untold: bool) -> KinesisError:
    """The error of a refused record, as one that an operator must look after: the fault may be the destination's.

    `untold`: it cannot be known either whether a harmless record would be taken.
    """
    hint = ', or set startup_check = "put": then a test record tells whose fault it is' if untold else ""
    return RequestFailed(
        error.code,
        f"{error.message}; even single records are refused and none is stored: check the destination and its"
        f" limits{hint}",
        action=Action.OPERATOR,
        http_status=error.http_status,
        request_id=error.request_id,
        http_response=error.http_response,
    )


def cure(error: KinesisError, permission: str) -> str:
    """What helps, as the end of a log line; empty when nobody knows. `permission` is the one that a call needs."""
    # By the action first: several codes mean the same.
    if error.action is Action.CLOCK:
        return ": set this machine's clock"
    if error.action is Action.CREDENTIALS:
        return ": check the credentials"
    if "ResourceNotFound" in error.code:
        return ": check stream name, region and account"
    if "AccessDenied" in error.code:
        return f": allow {permission} on the stream"
    return ""
