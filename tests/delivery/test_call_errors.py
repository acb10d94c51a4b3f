"""What the error of a call says: may its records be stored, is it the size, what helps."""

from __future__ import annotations

import pytest

from fastkin.delivery.call_errors import as_operator, cure, for_keys, maybe_stored, not_taken, too_large
from fastkin.errors import Action, KinesisError, NotSent, TransportError


def error(code: str, action: Action = Action.RETRY, status: int | None = None) -> KinesisError:
    return KinesisError(code, "no", action=action, http_status=status)


@pytest.mark.parametrize(
    ("what", "may_be"),
    [
        (NotSent("ConnectFailed", "down", action=Action.RETRY), False),
        (TransportError("ConnectionLost", "cut", action=Action.RETRY), True),
        (error("InternalFailure", status=500), True),
        (error("RequestTimeoutException", status=400), True),
        (error("ValidationException", Action.REJECTED, 400), False),
        (error("ProvisionedThroughputExceededException", Action.THROTTLE, 400), False),
    ],
)
def test_whether_the_records_may_be_stored(what: KinesisError, may_be: bool) -> None:
    assert maybe_stored(what) is may_be


@pytest.mark.parametrize(
    ("what", "too", "late"),
    [
        (error("X", status=413), True, False),
        (error("RequestEntityTooLarge"), True, False),
        (error("RequestTimeout", status=408), False, True),
        (error("X", status=400), False, False),
    ],
)
def test_whether_a_smaller_call_may_pass(what: KinesisError, too: bool, late: bool) -> None:
    assert too_large(what) is too
    assert not_taken(what) is late


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (error("SignatureDoesNotMatch", Action.CLOCK), "clock"),
        (error("ExpiredTokenException", Action.CREDENTIALS), "credentials"),
        (error("ResourceNotFoundException", Action.OPERATOR), "stream name"),
        (error("AccessDeniedException", Action.OPERATOR), "kinesis:PutRecords"),
    ],
)
def test_what_helps_is_said(what: KinesisError, says: str) -> None:
    assert says in cure(what, "kinesis:PutRecords")


def test_what_nobody_knows_a_cure_for_says_nothing() -> None:
    assert cure(error("KMSDisabledException", Action.OPERATOR), "kinesis:PutRecords") == ""


def test_missing_keys_are_waited_for_like_expired_ones() -> None:
    assert for_keys(error("NoCredentials", Action.OPERATOR))
    assert for_keys(error("ExpiredTokenException", Action.CREDENTIALS))
    assert not for_keys(error("AccessDeniedException", Action.OPERATOR))


@pytest.mark.parametrize("untold", [True, False])
def test_a_refused_record_becomes_an_operators_matter(untold: bool) -> None:
    found = as_operator(error("ValidationException", Action.REJECTED, 400), untold=untold)
    assert (found.code, found.action, found.http_status) == ("ValidationException", Action.OPERATOR, 400)
    assert "check the destination" in found.message
    assert ("startup_check" in found.message) is untold
