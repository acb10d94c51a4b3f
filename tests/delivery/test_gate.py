"""The gate: how long it closes after which failure, and what opens it."""

from __future__ import annotations

from random import Random

import pytest

from fastkin.delivery.gate import Gate
from fastkin.errors import Action, KinesisError

RETRY = KinesisError("InternalFailure", "", action=Action.RETRY)
OPERATOR = KinesisError("AccessDeniedException", "", action=Action.OPERATOR)
KEYS = KinesisError("ExpiredTokenException", "", action=Action.CREDENTIALS)
NO_KEYS = KinesisError("NoCredentials", "", action=Action.OPERATOR)


def gate(max_calls: int = 8) -> Gate:
    return Gate(max_calls, Random(1))


@pytest.mark.parametrize(
    ("error", "least", "most"), [(RETRY, 0.05, 5.0), (OPERATOR, 5.0, 30.0), (KEYS, 1.0, 10.0), (NO_KEYS, 1.0, 10.0)]
)
def test_the_wait_grows_within_its_bounds(error: KinesisError, least: float, most: float) -> None:
    one = gate()
    delays = [one.delay(error) for _ in range(60)]
    assert delays[0] <= 3 * least
    assert min(delays) >= least
    assert max(delays) == most


def test_an_answer_makes_the_next_wait_a_short_one() -> None:
    one = gate()
    for error in (RETRY, OPERATOR, KEYS):
        for _ in range(60):
            one.delay(error)
    one.answered()
    assert one.delay(RETRY) <= 0.15
    assert one.delay(OPERATOR) <= 15.0
    assert one.delay(KEYS) <= 3.0


def test_it_never_opens_sooner_than_it_was_closed_for() -> None:
    one = gate()
    one.close_for(100.0, 5.0)
    one.close_for(101.0, 1.0)
    assert one.opens_at == 105.0


@pytest.mark.parametrize(("asked", "opens_at"), [(None, 102.0), (0.5, 102.0), (7.0, 107.0), (3600.0, 130.0)])
def test_a_server_is_believed_up_to_half_a_minute(asked: float | None, opens_at: float) -> None:
    one = gate()
    one.close_for(100.0, 2.0, asked)
    assert one.opens_at == opens_at


def test_a_failed_call_halves_what_may_be_open_and_answers_bring_it_back() -> None:
    one = gate(8)
    one.failed()
    assert one.limit == 4
    for _ in range(3):
        one.failed()
    assert one.limit == 1
    for _ in range(100):
        one.answered()
    assert one.limit == 8
