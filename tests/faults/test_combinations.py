"""Random combinations of two to four faults over one run of a few seconds. The seed is the test's id.

    FASTKIN_FAULT_SEEDS=300 pytest tests/faults/test_combinations.py    seeds 0..299; 6 when it is not set
    FASTKIN_FAULT_SEED=17   pytest tests/faults/test_combinations.py    this one alone

A seed fixes what happens and when; how far the records have come by then is the machine's affair.
"""

from __future__ import annotations

import os
import signal
import time
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from harness import STREAM, Rig
from servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastkin.emulator import Faults

    Step = tuple[float, str, Callable[[], Any]]

RECORDS = 2000
RATE = 1300.0
SPAN_S = 1.4  # faults begin within
SHUTDOWN_S = 1.0
ONE = os.environ.get("FASTKIN_FAULT_SEED")
SEEDS = [int(ONE)] if ONE else list(range(int(os.environ.get("FASTKIN_FAULT_SEEDS", "6"))))


class Wall:
    off = 0.0

    def __call__(self) -> float:
        return time.time() + self.off


class Case:
    """What one seed stands for: settings of the rig, and steps at their times."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Random(seed)
        self.wall = Wall()
        self.spool = False
        self.options: dict[str, Any] = {
            "persistence": True,
            "emulator": {
                "latency_ms": rng.choice([2, 10, 30, 80]),
                "credentials": {ACCESS_KEY: SECRET_KEY},
                "wall": self.wall,
            },
            "kinesis": {"request_timeout_s": 1.0, "max_connections": rng.choice([1, 2, 4, 16])},
            "broker": {"keep_alive_s": 1, "receive_maximum": rng.choice([20, 200, 2000])},
            "pipeline": {"shutdown_timeout_s": SHUTDOWN_S, "linger_ms": rng.choice([5, 50])},
        }
        if rng.random() < 0.25:
            self.options["pipeline"] |= {"budget_bytes": 2**20, "max_batch_bytes": 2**17, "max_record_bytes": 2**16}
        if rng.random() < 0.3:
            self.spool = True
        if rng.random() < 0.25:
            self.options["patch"] = {"fsync_s": 0.1}
        names = list(FAULTS)
        chosen = rng.sample(names, rng.randint(2, 4))
        if "broker-forgets" in chosen:
            # What only the broker had is lost with it: nothing else may take records from fastkin then.
            chosen = ["broker-forgets", *(name for name in chosen if name.startswith(("kinesis", "answer", "stream")))]
            if len(chosen) == 1:
                chosen.append("answer-error")
            self.options["lossy_broker"] = True
        self.names = chosen
        self.steps: list[Step] = []

    def plan(self, rig: Rig) -> list[Step]:
        for name in (name for name in self.names if name in FAULTS):
            at = self.rng.uniform(0.0, SPAN_S)
            self.steps += [(at + after, name, step) for after, step in FAULTS[name](rig, self)]
        return sorted(self.steps, key=lambda step: step[0])


Made = list[tuple[float, "Callable[[], Any]"]]
FAULTS: dict[str, Callable[[Rig, Case], Made]] = {}


def fault(name: str) -> Callable[[Callable[[Rig, Case], Made]], Callable[[Rig, Case], Made]]:
    def keep(function: Callable[[Rig, Case], Made]) -> Callable[[Rig, Case], Made]:
        FAULTS[name] = function
        return function

    return keep


# -- the process


@fault("sigkill")
def _sigkill(rig: Rig, case: Case) -> Made:
    return [(0.0, lambda: end(rig, signal.SIGKILL)), (case.rng.uniform(0.0, 0.3), lambda: begin(rig))]


@fault("sigterm")
def _sigterm(rig: Rig, case: Case) -> Made:
    return [(0.0, lambda: end(rig, signal.SIGTERM)), (case.rng.uniform(0.0, 0.3), lambda: begin(rig))]


def end(rig: Rig, number: signal.Signals) -> None:
    if rig.service.running:
        assert rig.service.process is not None
        rig.service.process.send_signal(number)
        code = rig.service.process.wait(SHUTDOWN_S + 15)
        # -15: it had only begun to start, and nobody listened to the signal yet
        assert code in ((-9,) if number is signal.SIGKILL else (0, -15)), f"exit status {code} after {number.name}"
        rig.look_at_spool()


def begin(rig: Rig) -> None:
    if not rig.service.running:
        rig.service.start()


# -- the broker and the way to it


@fault("broker-restarts")
def _broker_restarts(rig: Rig, case: Case) -> Made:
    return [(0.0, rig.stop_broker), (case.rng.uniform(0.05, 0.6), rig.broker.start)]


@fault("broker-forgets")
def _broker_forgets(rig: Rig, case: Case) -> Made:
    return [(0.0, lambda: rig.stop_broker(kill=True)), (case.rng.uniform(0.05, 0.6), rig.broker.start)]


@fault("broker-cut")
def _broker_cut(rig: Rig, case: Case) -> Made:
    return [(case.rng.uniform(0.0, 0.5), lambda: rig.call(rig.broker_way.cut)) for _ in range(case.rng.randint(1, 3))]


@fault("broker-cut-inside")
def _broker_cut_inside(rig: Rig, case: Case) -> Made:
    way = case.rng.choice([rig.broker_way.up, rig.broker_way.down])
    at = case.rng.randrange(3000)
    return [(0.0, lambda: setattr(way, "cut_in", at))]


@fault("broker-half-closes")
def _broker_half_closes(rig: Rig, case: Case) -> Made:
    return [(0.0, lambda: rig.call(rig.broker_way.half_close))]


@fault("broker-black-hole")
def _broker_black_hole(rig: Rig, case: Case) -> Made:
    long = case.rng.uniform(0.2, 2.0)
    return [(0.0, lambda: rig.call(rig.broker_way.hold)), (long, lambda: rig.call(rig.broker_way.release))]


@fault("broker-refuses")
def _broker_refuses(rig: Rig, case: Case) -> Made:
    return [
        (0.0, lambda: rig.wait(rig.broker_way.refuse())),
        (0.01, lambda: rig.call(rig.broker_way.cut)),
        (case.rng.uniform(0.1, 0.8), lambda: rig.wait(rig.broker_way.start())),
    ]


@fault("broker-trickles")
def _broker_trickles(rig: Rig, case: Case) -> Made:
    way = case.rng.choice([rig.broker_way.up, rig.broker_way.down])
    step = case.rng.choice([1, 13, 211])
    return [(0.0, lambda: setattr(way, "trickle", step)), (0.5, lambda: setattr(way, "trickle", 0))]


@fault("broker-slow")
def _broker_slow(rig: Rig, case: Case) -> Made:
    way = case.rng.choice([rig.broker_way.up, rig.broker_way.down])
    late = case.rng.uniform(0.02, 0.3)
    return [(0.0, lambda: setattr(way, "delay_s", late)), (0.8, lambda: setattr(way, "delay_s", 0.0))]


@fault("plant-cut")
def _plant_cut(rig: Rig, case: Case) -> Made:
    return [(0.0, lambda: rig.call(rig.plant_way.cut))]


# -- the way to Kinesis


@fault("kinesis-cut")
def _kinesis_cut(rig: Rig, case: Case) -> Made:
    return [(case.rng.uniform(0.0, 0.5), lambda: rig.call(rig.kinesis_way.cut)) for _ in range(case.rng.randint(1, 4))]


@fault("kinesis-cut-inside")
def _kinesis_cut_inside(rig: Rig, case: Case) -> Made:
    way = case.rng.choice([rig.kinesis_way.up, rig.kinesis_way.down])
    at = case.rng.randrange(4000)
    return [(0.0, lambda: setattr(way, "cut_in", at))]


@fault("kinesis-half-closes")
def _kinesis_half_closes(rig: Rig, case: Case) -> Made:
    return [(0.0, lambda: rig.call(rig.kinesis_way.half_close))]


@fault("kinesis-black-hole")
def _kinesis_black_hole(rig: Rig, case: Case) -> Made:
    long = case.rng.uniform(0.2, 1.8)
    return [(0.0, lambda: rig.call(rig.kinesis_way.hold)), (long, lambda: rig.call(rig.kinesis_way.release))]


@fault("kinesis-answers-lost")
def _kinesis_answers_lost(rig: Rig, case: Case) -> Made:
    way = rig.kinesis_way.down
    long = case.rng.uniform(0.2, 1.5)
    return [(0.0, lambda: rig.call(way.passing.clear)), (long, lambda: rig.call(way.passing.set))]


@fault("kinesis-refuses")
def _kinesis_refuses(rig: Rig, case: Case) -> Made:
    return [
        (0.0, lambda: rig.wait(rig.kinesis_way.refuse())),
        (0.01, lambda: rig.call(rig.kinesis_way.cut)),
        (case.rng.uniform(0.1, 0.8), lambda: rig.wait(rig.kinesis_way.start())),
    ]


@fault("kinesis-trickles")
def _kinesis_trickles(rig: Rig, case: Case) -> Made:
    way = case.rng.choice([rig.kinesis_way.up, rig.kinesis_way.down])
    step = case.rng.choice([53, 211])
    return [(0.0, lambda: setattr(way, "trickle", step)), (0.5, lambda: setattr(way, "trickle", 0))]


@fault("kinesis-flips-a-byte")
def _kinesis_flips(rig: Rig, case: Case) -> Made:
    way = case.rng.choice([rig.kinesis_way.up, rig.kinesis_way.down])
    at = case.rng.randrange(4000)
    return [(0.0, lambda: setattr(way, "corrupt_in", at))]


# -- its answers


def answered(rig: Rig, case: Case, add: Callable[[Faults], Any]) -> Made:
    return [(0.0, lambda: rig.call(lambda: add(rig.kinesis.faults)))]


@fault("answer-error")
def _answer_error(rig: Rig, case: Case) -> Made:
    code = case.rng.choice(
        [
            "InternalFailureException", "ServiceUnavailable", "ThrottlingException", "LimitExceededException",
            "KMSThrottlingException", "RequestTimeout", "AccessDeniedException", "ResourceNotFoundException",
            "ExpiredTokenException", "UnrecognizedClientException", "MissingAuthenticationToken", "OptInRequired",
            "RequestExpired", "InvalidSignatureException", "SomethingNewException",
        ]
    )  # fmt: skip
    times = case.rng.randint(1, 4)
    stored = code in ("InternalFailureException", "ServiceUnavailable", "RequestTimeout") and case.rng.random() < 0.5
    return answered(rig, case, lambda f: f.call(code, times=times, stored=stored))


@fault("answer-html")
def _answer_html(rig: Rig, case: Case) -> Made:
    status, stored = case.rng.choice([500, 502, 503, 504]), case.rng.random() < 0.5
    return answered(rig, case, lambda f: f.html(status, times=3, stored=stored))


@fault("answer-cut")
def _answer_cut(rig: Rig, case: Case) -> Made:
    where, every = case.rng.choice(["before", "after", "inside"]), case.rng.randint(1, 3)
    return answered(rig, case, lambda f: f.cut(where, times=4, every=every))


@fault("answer-is-none")
def _answer_is_none(rig: Rig, case: Case) -> Made:
    body = case.rng.choice(
        [b"", b"OK", b"{}", b"[]", b'{"Records":[', b'{"FailedRecordCount":0,"Records":[]}', b"\xff"]
    )
    return answered(rig, case, lambda f: f.garbage(body, times=3))


@fault("answer-wrong-count")
def _answer_wrong_count(rig: Rig, case: Case) -> Made:
    delta = case.rng.choice([-2, -1, 1, 5])
    return answered(rig, case, lambda f: f.wrong_count(delta, times=3))


@fault("answer-late")
def _answer_late(rig: Rig, case: Case) -> Made:
    ms = case.rng.choice([300, 900, 1100, 1600])
    return answered(rig, case, lambda f: f.latency(ms, times=4, every=2))


@fault("answer-dribbles")
def _answer_dribbles(rig: Rig, case: Case) -> Made:
    ms = case.rng.choice([200, 800, 1500])
    return answered(rig, case, lambda f: f.slow(ms, times=4))


@fault("answer-early")
def _answer_early(rig: Rig, case: Case) -> Made:
    return answered(rig, case, lambda f: f.early(times=2))


@fault("answer-entries-fail")
def _answer_entries_fail(rig: Rig, case: Case) -> Made:
    code = case.rng.choice(
        ["ProvisionedThroughputExceededException", "InternalFailure", "ServiceUnavailableException", "OddException"]
    )
    part = case.rng.choice([0.05, 0.3, 0.8])
    return answered(rig, case, lambda f: f.record(code, probability=part, times=800, for_s=1.0))


@fault("answer-poison")
def _answer_poison(rig: Rig, case: Case) -> Made:
    poison = b"n%07d." % case.rng.randrange(RECORDS)
    code = case.rng.choice(["ValidationException", "SerializationException", "InvalidArgumentException"])
    return answered(rig, case, lambda f: f.call(code, contains=poison))


# -- the stream, the keys, the clock


@fault("stream-created-again")
def _stream_created_again(rig: Rig, case: Case) -> Made:
    shards = case.rng.randint(1, 4)
    return [(0.0, lambda: gone(rig)), (case.rng.uniform(0.05, 0.5), lambda: back(rig, shards))]


def gone(rig: Rig) -> None:
    if STREAM in rig.emulator.service.streams:
        rig.delete_stream()


def back(rig: Rig, shards: int) -> None:
    if STREAM not in rig.emulator.service.streams:
        rig.create_stream(shards)


@fault("stream-narrow")
def _stream_narrow(rig: Rig, case: Case) -> Made:
    def scale(factor: float) -> Callable[[], Any]:
        def work() -> None:
            if STREAM in rig.emulator.service.streams:
                rig.kinesis.set_limits(True)
                rig.kinesis.scale_limits(factor)

        return lambda: rig.call(work)

    return [(0.0, scale(0.1)), (case.rng.uniform(0.3, 1.0), scale(1.0))]


@fault("stream-splits")
def _stream_splits(rig: Rig, case: Case) -> Made:
    def split() -> None:
        stream = rig.emulator.service.streams.get(STREAM)
        if stream is not None:
            rig.split_shard(stream.open_shards[0].index)

    return [(0.0, split), (0.2, split)]


@fault("keys-withdrawn")
def _keys_withdrawn(rig: Rig, case: Case) -> Made:
    verifier = rig.emulator.verifier
    assert verifier is not None
    key = verifier.secrets[ACCESS_KEY]
    return [
        (0.0, lambda: verifier.secrets.pop(ACCESS_KEY, None)),
        (case.rng.uniform(0.1, 0.8), lambda: verifier.secrets.update({ACCESS_KEY: key})),
    ]


@fault("clock-jumps")
def _clock_jumps(rig: Rig, case: Case) -> Made:
    off = case.rng.choice([-1200.0, 1200.0])
    return [(0.0, lambda: setattr(case.wall, "off", off)), (1.0, lambda: setattr(case.wall, "off", 0.0))]


@fault("frames-that-are-none")
def _frames(rig: Rig, case: Case) -> Made:
    def publish() -> None:
        bad = rig.plant.messages(30, 0)
        rig.flow_messages([("plant/bulk/1", b"\xc1" + data, which) for _, data, which in bad])

    return [(0.0, publish)]


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed-{seed}")
def test_combination(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    if case.spool:
        case.options["spool"] = True
        case.options["pipeline"] |= {"on_full": "spool", "spool": str(tmp_path / "spool"), "spool_after_s": 0.2}
        case.names.append("with a spool")
    print(f"seed {seed}: {', '.join(case.names)}; FASTKIN_FAULT_SEED={seed} repeats it")
    with Rig(tmp_path, name=f"seed-{seed} [{' + '.join(case.names)}]", **case.options) as rig:
        steps = case.plan(rig)
        rig.flow(RECORDS, rate=RATE)
        began = time.monotonic()
        for at, name, step in steps:
            time.sleep(max(0.0, began + at - time.monotonic()))
            print(f"  {time.monotonic() - began:.2f} s {name}")
            step()
        # Everything is well from here on, but for what was broken for good.
        rig.call(rig.broker_way.heal)
        rig.call(rig.kinesis_way.heal)
        if not rig.broker.running:
            rig.broker.start()
        begin(rig)
        rig.settle()
        rig.finish()
