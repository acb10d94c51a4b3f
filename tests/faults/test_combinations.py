"""Random combinations of two to four faults over one run of a few seconds. The seed is the test's id.

    FASTKIN_FAULT_SEEDS=300 pytest tests/faults/test_combinations.py    seeds 0..299; 6 when it is not set
    FASTKIN_FAULT_SEED=17   pytest tests/faults/test_combinations.py    this one alone

A seed fixes what happens and when; how far the records have come by then is the machine's affair.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from authority import YESTERDAY, Authority
from disks import SmallDisk, mountable
from harness import STREAM, Plant, Rig
from ledger import Ledger
from scripted import ScriptedBroker
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastkin.emulator import Faults

    Step = tuple[float, str, Callable[[], Any]]

RECORDS = 2000
RATE = 1300.0
SPAN_S = 1.4  # faults begin within
SHUTDOWN_S = 1.0
# What a broker may do and mosquitto does not. It plays by itself, so only what Kinesis does goes with it.
SCRIPTED: dict[str, dict[str, Any]] = {
    "broker-shuffles": {"order": "shuffled", "cut_after": 60, "cuts": 6},
    "broker-reverses": {"order": "reversed", "cut_after": 60, "cuts": 6},
    "broker-repeats": {"repeat": 3},
    "broker-reuses-ids": {"window": 10},
    "broker-begins-ids-again": {"forget": True, "cut_after": 50, "cuts": 6, "window": 50},
}
HOSTS = ("127.0.0.1", "localhost")
KINESIS_SIDE = ("kinesis", "answer", "stream", "keys", "clock")
ONE = os.environ.get("FASTKIN_FAULT_SEED")
SEEDS = [int(ONE)] if ONE else list(range(int(os.environ.get("FASTKIN_FAULT_SEEDS", "6"))))


class Wall:
    off = 0.0

    def __call__(self) -> float:
        return time.time() + self.off


class Case:
    """What one seed stands for: settings of the rig, and steps at their times."""

    kinesis_authority: Authority
    broker_authority: Authority
    dead_letter_disk: SmallDisk
    spool_disk: SmallDisk
    unknown: Path  # while it exists no name resolves

    def __init__(self, seed: int) -> None:
        self.seed = seed
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
            "patch": {},
        }
        if rng.random() < 0.25:
            self.options["pipeline"] |= {"budget_bytes": 2**20, "max_batch_bytes": 2**17, "max_record_bytes": 2**16}
        if rng.random() < 0.3:
            self.spool = True
        if rng.random() < 0.25:
            self.options["patch"]["fsync_s"] = 0.1
        names = [name for name in FAULTS if self._possible(name)]
        chosen = rng.sample(names, rng.randint(2, 4))
        self.scripted = rng.random() < 0.15
        if self.scripted:
            beside = [name for name in names if name.startswith(KINESIS_SIDE)]
            chosen = [rng.choice(list(SCRIPTED)), *rng.sample(beside, rng.randint(1, 3))]
            # It has one more message for each acknowledgement, whatever window was granted: a smaller one than its own
            # would close every batch at one record, and few connections with long calls take minutes for those.
            self.options["broker"]["receive_maximum"] = 500
            self.options["kinesis"]["max_connections"] = rng.choice([4, 16])
            self.options["emulator"]["latency_ms"] = rng.choice([2, 30])
        elif "broker-forgets" in chosen:
            # What only the broker had is lost with it: nothing else may take records from fastkin then.
            chosen = ["broker-forgets", *(name for name in chosen if name.startswith(("kinesis", "answer", "stream")))]
            if len(chosen) == 1:
                chosen.append("answer-error")
            self.options["lossy_broker"] = True
        self.names = chosen
        self._form()
        # Not drawn: a seed stays what it was. No aggregates, for what goes unaggregated before the mode of the stream
        # is known goes under another key.
        if seed % 2 and "KPL" not in self.names:
            self.options["pipeline"]["partition_key"] = "content"
        self.steps: list[Step] = []

    def _form(self) -> None:
        """QoS 2, aggregates, a WebSocket: forms of a pipeline that any fault may meet."""
        options, names = self.options, self.names
        if not self.scripted and self.rng.random() < 0.2:
            options["qos"] = 2
            names.append("QoS 2")
        if self.rng.random() < 0.2:
            options["pipeline"]["aggregation"] = "kpl"
            names.append("KPL")
        if "broker-certificate" not in names and "names-unknown" not in names and self.rng.random() < 0.15:
            options["websocket"] = True
            names.append("WebSocket")

    def _possible(self, name: str) -> bool:
        if name.startswith("spool") and not self.spool:
            return False
        return name not in MOUNTED or mountable()

    def prepare(self, path: Path, held: contextlib.ExitStack) -> None:
        """What its faults need from the beginning."""
        options, names = self.options, self.names
        if self.scripted:
            messages = Plant(0, Ledger()).messages(RECORDS, 0)
            options["scripted"] = ScriptedBroker(messages, **SCRIPTED[names[0]], pace_s=0.0015, seed=self.seed)
        if "names-unknown" in names:
            self.unknown = path / "unknown"
            options["host"] = "localhost"
            options["patch"]["unknown"] = str(self.unknown)
        if "kinesis-certificate" in names:
            self.kinesis_authority = authority(path / "kinesis-ca")
            options["emulator"]["ssl_context"] = self.kinesis_authority.context
            options["kinesis"]["ca_bundle"] = str(self.kinesis_authority.path)
        if "broker-certificate" in names:
            self.broker_authority = authority(path / "broker-ca")
            options["tls"] = self.broker_authority.context
            options["broker"]["tls"] = {"ca": str(self.broker_authority.path)}
        if "dead-letters-full" in names or "dead-letters-read-only" in names:
            self.dead_letter_disk = held.enter_context(SmallDisk(path / "dead-letter-disk", 2**20))
            options["dead_letter_path"] = self.dead_letter_disk.path / "dead.jsonl"
        if self.spool:
            folder = path
            if "spool-disk-full" in names:
                self.spool_disk = held.enter_context(SmallDisk(path / "spool-disk", 48 * 2**20))
                folder = self.spool_disk.path
            if "spool-disk-slow" in names:
                options["patch"]["slow"] = {"fastkin.delivery.spool_file:Spool.write": self.rng.choice([0.1, 0.3])}
            options["spool"] = True
            options["pipeline"] |= {"on_full": "spool", "spool": str(folder / "spool"), "spool_after_s": 0.2}
            names.append("with a spool")

    def plan(self, rig: Rig) -> list[Step]:
        for name in (name for name in self.names if name in FAULTS):
            at = self.rng.uniform(0.0, SPAN_S)
            self.steps += [(at + after, name, step) for after, step in FAULTS[name](rig, self)]
        return sorted(self.steps, key=lambda step: step[0])


Made = list[tuple[float, "Callable[[], Any]"]]
FAULTS: dict[str, Callable[[Rig, Case], Made]] = {}
MOUNTED = ("dead-letters-full", "dead-letters-read-only", "spool-disk-full")  # these need a disk of their own


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


@fault("reload")
def _reload(rig: Rig, case: Case) -> Made:
    def take_up(linger_ms: float) -> None:
        # A process that has only just begun has no handler for SIGHUP yet, and would end of it.
        if rig.service.running and "running:" in rig.service.log_of_process():
            rig.reload(linger_ms=linger_ms)

    return [(0.0, lambda: take_up(11)), (case.rng.uniform(0.0, 0.5), lambda: take_up(12))]


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


@fault("broker-certificate")
def _broker_certificate(rig: Rig, case: Case) -> Made:
    return wrong_certificate(case, case.broker_authority, lambda: rig.call(rig.broker_way.cut))


def authority(folder: Path) -> Authority:
    folder.mkdir()
    made = Authority(folder)
    made.show(*HOSTS)
    return made


def wrong_certificate(case: Case, shown: Authority, cut: Callable[[], Any]) -> Made:
    """Those who are connected would not look at it: so they are cut."""
    names, options = case.rng.choice([(HOSTS, {"not_after": YESTERDAY}), (("another.example",), {})])
    long = case.rng.uniform(0.2, 0.8)
    return [(0.0, lambda: shown.show(*names, **options)), (0.0, cut), (long, lambda: shown.show(*HOSTS))]


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
    return outage(rig, case.rng.uniform(0.1, 0.8))


def outage(rig: Rig, long: float) -> Made:
    return [
        (0.0, lambda: rig.wait(rig.kinesis_way.refuse())),
        (0.01, lambda: rig.call(rig.kinesis_way.cut)),
        (long, lambda: rig.wait(rig.kinesis_way.start())),
    ]


@fault("kinesis-certificate")
def _kinesis_certificate(rig: Rig, case: Case) -> Made:
    return wrong_certificate(case, case.kinesis_authority, lambda: rig.call(rig.kinesis_way.cut))


@fault("names-unknown")
def _names_unknown(rig: Rig, case: Case) -> Made:
    """Broker's and Kinesis's; nobody would ask for them while connections are open."""
    return [
        (0.0, case.unknown.touch),
        (0.0, lambda: rig.call(rig.kinesis_way.cut)),
        (0.0, lambda: rig.call(rig.broker_way.cut)),
        (case.rng.uniform(0.2, 1.0), lambda: case.unknown.unlink(missing_ok=True)),
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


# -- the disks


@fault("dead-letters-full")
def _dead_letters_full(rig: Rig, case: Case) -> Made:
    disk = case.dead_letter_disk
    return [(0.0, disk.fill), *_frames(rig, case), (case.rng.uniform(0.3, 1.2), disk.mend)]


@fault("dead-letters-read-only")
def _dead_letters_read_only(rig: Rig, case: Case) -> Made:
    """No disk becomes read-only under a file that is open for writing: it does between two processes."""
    disk = case.dead_letter_disk

    def between() -> None:
        end(rig, signal.SIGKILL)
        disk.read_only()
        begin(rig)

    return [(0.0, between), *_frames(rig, case), (case.rng.uniform(0.5, 1.5), disk.mend)]


@fault("spool-disk-full")
def _spool_disk_full(rig: Rig, case: Case) -> Made:
    """In an outage: nothing is written to a spool without one."""
    disk = case.spool_disk
    return [(0.0, disk.fill), *outage(rig, case.rng.uniform(0.5, 1.5)), (case.rng.uniform(0.3, 2.0), disk.mend)]


@fault("spool-disk-slow")
def _spool_disk_slow(rig: Rig, case: Case) -> Made:
    """From the beginning; the outage makes it spool."""
    return outage(rig, case.rng.uniform(0.5, 1.5))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed-{seed}")
def test_combination(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    with contextlib.ExitStack() as held:
        case.prepare(tmp_path, held)
        print(f"seed {seed}: {', '.join(case.names)}; FASTKIN_FAULT_SEED={seed} repeats it")
        rig = held.enter_context(Rig(tmp_path, name=f"seed-{seed} [{' + '.join(case.names)}]", **case.options))
        steps = case.plan(rig)
        if not case.scripted:
            rig.flow(RECORDS, rate=RATE)
        began = time.monotonic()
        for at, name, step in steps:
            time.sleep(max(0.0, began + at - time.monotonic()))
            print(f"  {time.monotonic() - began:.2f} s {name}")
            step()
        # Everything is well from here on, but for what was broken for good.
        rig.call(rig.broker_way.heal)
        rig.call(rig.kinesis_way.heal)
        if not case.scripted and not rig.broker.running:
            rig.broker.start()
        begin(rig)
        rig.settle()
        rig.finish()
