"""What can go wrong on the way to Kinesis and in its answers, one fault at a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from harness import STREAM, Rig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastkin.emulator import Fault, Faults

RECORDS = 800
THROTTLES = (
    "ProvisionedThroughputExceededException", "Throttling", "ThrottlingException", "ThrottledException",
    "RequestThrottled", "RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "LimitExceededException", "SlowDown", "PriorRequestNotComplete",
    "KMSThrottlingException",
)  # fmt: skip
CREDENTIALS = (
    "ExpiredTokenException", "RequestExpired", "InvalidSignatureException", "SignatureDoesNotMatch",
    "UnrecognizedClientException", "InvalidClientTokenId", "MissingAuthenticationToken",
    "MissingAuthenticationTokenException",
)  # fmt: skip
OPERATOR = (
    "AccessDeniedException", "KMSAccessDeniedException", "KMSDisabledException", "KMSInvalidStateException",
    "KMSNotFoundException", "KMSOptInRequired", "OptInRequired", "ResourceNotFoundException",
)  # fmt: skip


def full(*values: Any, id: str) -> Any:  # noqa: A002
    return pytest.param(*values, id=id, marks=pytest.mark.faults_full)


def test_nothing_goes_wrong(tmp_path: Path) -> None:
    """The suite's own zero: no fault, no duplicate, and a bound of none."""
    with Rig(tmp_path) as rig:
        rig.flow(1000)
        rig.settle()
        books = rig.finish()
        assert books["dup"] == books["bound"] == 0


# -- kinesis-facts 4.3, row by row: nothing is lost, nothing is set aside, and what was not stored never comes twice


def passing(name: str, fault: Callable[[Faults], Fault], *, twice: bool = False, fast: bool = False) -> Any:
    """`twice`: the fault hides that records were stored."""
    return pytest.param(fault, twice, id=name, marks=() if fast else pytest.mark.faults_full)


ROWS = [
    passing("record-throttled", lambda f: f.record(times=300, probability=0.5), fast=True),
    passing("record-internal-failure", lambda f: f.record("InternalFailure", times=200, probability=0.5)),
    passing("record-service-unavailable", lambda f: f.record("ServiceUnavailableException", times=100, every=3)),
    passing("record-unknown-code", lambda f: f.record("KMSOddityException", times=60, every=5)),
    passing("call-internal-failure", lambda f: f.call("InternalFailureException", times=4, skip=1)),
    passing("call-internal-failure-stored", lambda f: f.call("InternalFailureException", times=3, skip=1, stored=True),
            twice=True, fast=True),
    passing("call-service-unavailable", lambda f: f.call("ServiceUnavailable", times=4, skip=1)),
    passing("call-500-without-a-code", lambda f: f.html(500, times=4, skip=1)),
    passing("call-502-html", lambda f: f.html(502, times=4, skip=1)),
    passing("call-503-html-stored", lambda f: f.html(503, times=4, skip=1, stored=True), twice=True),
    passing("call-504-html-stored", lambda f: f.html(504, times=4, skip=1, stored=True), twice=True),
    passing("call-unknown-code", lambda f: f.call("NeverHeardOfException", times=4, skip=1)),
    *(passing(f"throttle-{code}", lambda f, code=code: f.call(code, times=3, skip=1)) for code in THROTTLES),
    *(
        passing(f"unknown-outcome-{code}", lambda f, code=code: f.call(code, times=3, skip=1, stored=True), twice=True)
        for code in ("RequestTimeout", "RequestTimeoutException", "RequestAborted")
    ),
    *(passing(f"credentials-{code}", lambda f, code=code: f.call(code, times=4, skip=1)) for code in CREDENTIALS),
    *(passing(f"operator-{code}", lambda f, code=code: f.call(code, times=3, skip=1)) for code in OPERATOR),
    passing("answer-one-entry-short", lambda f: f.wrong_count(-1, times=3, skip=1), twice=True, fast=True),
    passing("answer-one-entry-long", lambda f: f.wrong_count(1, times=3, skip=1), twice=True),
    passing("answer-empty", lambda f: f.garbage(b"", times=3, skip=1), twice=True),
    passing("answer-not-json", lambda f: f.garbage(b"OK, thank you", times=3, skip=1), twice=True),
    passing("answer-half-json", lambda f: f.garbage(b'{"FailedRecordCount":0,"Records":[', times=3, skip=1),
            twice=True),
    passing("answer-without-records", lambda f: f.garbage(b'{"FailedRecordCount":0}', times=3, skip=1), twice=True),
    passing("answer-of-empty-entries", lambda f: f.garbage(b'{"FailedRecordCount":0,"Records":[{}]}', times=3, skip=1),
            twice=True),
    passing("cut-before-storing", lambda f: f.cut("before", times=4, skip=1)),
    passing("cut-after-storing", lambda f: f.cut("after", times=4, skip=1), twice=True, fast=True),
    passing("cut-inside-the-answer", lambda f: f.cut("inside", times=4, skip=1), twice=True),
    passing("answer-later-than-the-timeout", lambda f: f.latency(1500, times=3, skip=1), twice=True),
    passing("answer-trickles-in-time", lambda f: f.slow(400, times=5)),
    passing("answer-trickles-past-the-timeout", lambda f: f.slow(3000, times=3, skip=1), twice=True),
    passing("early-413", lambda f: f.early(times=2, skip=1)),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "twice"), ROWS)
def test_a_fault_that_passes(tmp_path: Path, fault: Callable[[Faults], Fault], twice: bool) -> None:
    # On a busy machine a call that was about to be answered may time out in a second: a good reason to store twice.
    with Rig(tmp_path, kinesis={"request_timeout_s": 1.0 if twice else 3.0}) as rig:
        rig.flow(100, wait=True)
        rig.stored(100)
        struck = rig.call(lambda: fault(rig.kinesis.faults))
        rig.flow(RECORDS)
        rig.settle()
        books = rig.finish()
        assert struck.hits > 0, "the fault never struck"
        assert books["dead"] == 0
        if not twice:
            assert books["dup"] == 0, "nothing was stored twice here for any good reason"
        assert rig.duplicates_told >= books["dup"], "fastkin_duplicates_possible_total is no upper bound"


POISON = b"n0000333."


@pytest.mark.parametrize(
    "fault",
    [
        full(lambda f: f.call("ValidationException", contains=POISON), id="call-validation"),
        pytest.param(lambda f: f.call("InvalidArgumentException", contains=POISON), id="call-invalid-argument"),
        full(lambda f: f.call("SerializationException", contains=POISON), id="call-serialization"),
        full(lambda f: f.call("RequestEntityTooLarge", status=413, contains=POISON), id="call-413"),
        full(lambda f: f.record("InvalidArgumentException", contains=POISON), id="record-invalid-argument"),
        full(lambda f: f.record("ValidationException", contains=POISON), id="record-validation"),
        full(lambda f: f.record("SomethingForEver", contains=POISON), id="record-unknown-code-for-ever"),
    ],
)
def test_one_poisonous_record_is_set_aside_alone(tmp_path: Path, fault: Callable[[Faults], Fault]) -> None:
    # an entry code that is nobody's is tried 36 times, which takes ten minutes
    with Rig(tmp_path, patch={"set": {"fastkin.delivery.answers:_STRANGE_ATTEMPTS": 6}}) as rig:
        rig.call(lambda: fault(rig.kinesis.faults))
        rig.flow(RECORDS)
        rig.settle()
        books = rig.finish()
        assert (books["dead"], rig.dead(), books["dup"]) == (1, {333}, 0)


# -- shards and streams


@pytest.mark.faults_full
def test_one_shard_takes_a_tenth(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator={"limits": True}) as rig:
        rig.call(lambda: rig.kinesis.scale_limits(STREAM, 0.1, shard=1))
        rig.flow(2000)
        rig.stored(1500)
        rig.call(lambda: rig.kinesis.scale_limits(STREAM, 1.0, shard=1))
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_shards_split_and_merge_in_flow(tmp_path: Path) -> None:
    with Rig(
        tmp_path, emulator={"limits": True}, patch={"set": {"fastkin.delivery.stream_watch:_EVERY_S": 0.3}}
    ) as rig:
        rig.flow(2500)
        rig.stored(500)
        rig.split_shard(0)
        rig.stored(1200)
        rig.merge_shards(2, 3)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
@pytest.mark.parametrize("code", ["ResourceInUseException", "ExpiredIteratorException", "ExpiredNextTokenException"])
def test_the_shards_cannot_be_listed_while_they_split(tmp_path: Path, code: str) -> None:
    """The old map paces on; the new one is there as soon as somebody tells it."""
    often = {"fastkin.delivery.stream_watch:_EVERY_S": 0.2, "fastkin.delivery.stream_watch:_LOOKS": 1}
    with Rig(tmp_path, emulator={"limits": True}, patch={"set": often}) as rig:
        struck = rig.call(lambda: rig.kinesis.faults.call(code, operation="ListShards"))
        rig.flow(2500)
        rig.stored(500)
        rig.split_shard(0)
        rig.until(lambda: struck.hits >= 4, "the shards were asked for")
        rig.logged(code)
        rig.stored(1500)
        rig.call(rig.kinesis.faults.clear)
        rig.logged("5 open shards")
        rig.settle()
        books = rig.finish()
        assert (books["dup"], books["dead"]) == (0, 0)


@pytest.mark.faults_full
def test_a_dry_run_at_the_start(tmp_path: Path) -> None:
    """Its DryRunOperationException says that all is well: both pipelines ask, nothing is stored, then all flows."""
    with Rig(tmp_path, pipeline={"startup_check": "dry_run"}, start=False) as rig:
        asked = rig.call(lambda: rig.kinesis.faults.latency(0))  # only to be counted
        rig.service.start()
        rig.subscribed()
        assert (asked.hits, rig.books()["stored"]) == (2, 0)
        rig.flow(1000)
        rig.settle()
        books = rig.finish()
        assert (books["dup"], books["dead"]) == (0, 0)
        assert "DryRunOperationException" not in rig.service.log(), "it was taken for an error"


def test_the_stream_is_deleted_and_created_again(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(1500)
        rig.stored(400)
        rig.delete_stream()
        rig.logged("ResourceNotFoundException")
        time.sleep(0.5)
        rig.create_stream(shards=2)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_the_stream_comes_into_being_after_the_start(tmp_path: Path) -> None:
    with Rig(tmp_path, start=False) as rig:
        rig.delete_stream()
        rig.service.start()
        rig.logged("not ready")
        rig.subscribed()
        rig.flow(600, wait=True)
        rig.create_stream(shards=2)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_a_budget_of_one_mebibyte_and_a_slow_stream(tmp_path: Path) -> None:
    """Subscriber at speed against 100 ms a call: reading pauses again and again, nothing is lost."""
    with Rig(
        tmp_path,
        emulator={"latency_ms": 100},
        pipeline={"budget_bytes": 2**20, "max_batch_bytes": 2**17, "max_record_bytes": 2**16},
        broker={"receive_maximum": 20_000},
        kinesis={"max_connections": 1},
    ) as rig:
        rig.flow(6000, rate=20_000, size=1000)
        rig.settle(60)
        assert rig.finish()["dup"] == 0
