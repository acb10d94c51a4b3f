"""Which version of MQTT to try: by the clock."""

from __future__ import annotations

import pytest

from fastkin.mqtt.dialect import TOLD_S, UNANSWERED_S, Dialect


def test_a_time_out_is_believed_for_a_while() -> None:
    dialect = Dialect("auto")
    assert dialect.next(0.0) == 5
    assert dialect.unanswered(5, 10.0, timed_out=True)
    assert dialect.next(10.0) == 4
    dialect.worked(4)
    assert dialect.next(10.0 + UNANSWERED_S - 1) == 4
    assert dialect.next(10.0 + UNANSWERED_S) == 5


def test_a_close_is_believed_once() -> None:
    dialect = Dialect("auto")
    assert dialect.next(0.0) == 5
    assert dialect.unanswered(5, 0.0, timed_out=False)
    assert dialect.next(0.0) == 4
    dialect.worked(4)
    assert dialect.next(0.1) == 5


def test_a_guess_that_did_not_help_is_dropped() -> None:
    dialect = Dialect("auto")
    assert dialect.unanswered(5, 0.0, timed_out=True)
    assert dialect.next(0.0) == 4
    assert not dialect.unanswered(4, 10.0, timed_out=True)
    assert dialect.next(10.0) == 5


def test_a_refusal_in_words_expires_slowly() -> None:
    dialect = Dialect("auto")
    assert dialect.refused(5, 0.0)
    assert dialect.next(TOLD_S - 1) == 4
    assert dialect.next(TOLD_S) == 5
    assert dialect.refused(5, TOLD_S)
    assert not dialect.refused(4, TOLD_S + 1)  # it takes neither: nothing is left to try at once
    assert dialect.next(TOLD_S + 1) == 5


def test_silence_is_not_read_where_the_version_has_worked() -> None:
    dialect = Dialect("auto")
    dialect.worked(5)
    for timed_out in (True, False):
        assert not dialect.unanswered(5, 0.0, timed_out=timed_out)
        assert dialect.next(0.0) == 5
    assert dialect.refused(5, 0.0)  # words are: the broker was replaced
    assert dialect.next(0.0) == 4
    assert dialect.unanswered(5, TOLD_S, timed_out=False)


@pytest.mark.parametrize(("protocol", "version"), [("5", 5), ("3.1.1", 4)])
def test_what_the_user_set_stays(protocol: str, version: int) -> None:
    dialect = Dialect(protocol)
    assert not dialect.refused(version, 0.0)
    assert not dialect.unanswered(version, 0.0, timed_out=True)
    assert dialect.next(0.0) == version


def test_whoever_prefers_the_older_one() -> None:
    dialect = Dialect("auto", prefer=4)
    assert dialect.next(0.0) == 4
    assert dialect.refused(4, 0.0)
    assert dialect.next(0.0) == 5
