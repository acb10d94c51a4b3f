"""Run seeds: processes, progress, findings, marks.

    tests/simulation/run --seeds 0:2000 --jobs 2 --marks     what ci/run does
    tests/simulation/run --seeds 0:200000 --jobs 2           the long one
    tests/simulation/run --trace 4711                        the history of one seed
    tests/simulation/run --seeds 0:2000 --plant early-puback the suite must find what is planted

A finding names its seed; the seed replays it exactly, keys included, in any process. To add a fault: an act in
scenario.py (or a mood of broker.py, kinesis.py, disks.py) and its place in the climate. To add a mark: marks.py.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from simulation import marks, plant
from simulation.loop import Finding
from simulation.seed import Outcome, run_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REAL_CLOCK = time.monotonic
CHUNK = 20  # seeds between two reports of a process
SEED_CPU_S = 90  # the longest seeds take 20: one that takes longer turns in a circle
SEED_S = 900  # of real time, on whatever else the machine does: one that takes longer waits for what never comes


def _stuck(signum: int, frame: object) -> None:
    raise Finding(f"the seed takes more than {SEED_CPU_S} s of a processor, or {SEED_S} s of real time")


def _ready() -> None:
    run_seed(0)  # what is imported late is imported now
    gc.collect()
    gc.freeze()
    marks.reached.clear()


def _one(seed: int) -> Outcome:
    signal.setitimer(signal.ITIMER_PROF, SEED_CPU_S)
    signal.alarm(SEED_S)
    try:
        return run_seed(seed)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def _work(seeds: Sequence[int], pipe: Connection) -> None:
    """In a process of its own: what it is at, then what came out of it."""
    signal.signal(signal.SIGALRM, _stuck)
    signal.signal(signal.SIGPROF, _stuck)
    _ready()
    done: list[Outcome] = []
    for seed in seeds:
        pipe.send(seed)
        done.append(_one(seed))
        if len(done) == CHUNK or done[-1].finding is not None:
            pipe.send((done, Counter(marks.reached)))
            marks.reached.clear()
            done = []
    pipe.send((done, Counter(marks.reached)))
    pipe.send(None)


def _outcomes(seeds: Sequence[int], jobs: int) -> Iterator[tuple[list[Outcome], Counter[str]]]:
    fork = multiprocessing.get_context("fork")
    at: dict[Connection, int] = {}
    workers = []
    for job in range(jobs):
        ours, theirs = fork.Pipe(duplex=False)
        worker = fork.Process(target=_work, args=(seeds[job::jobs], theirs), daemon=True)
        worker.start()
        theirs.close()
        workers.append(worker)
        at[ours] = -1
    try:
        while at:
            for pipe in wait(list(at)):
                assert isinstance(pipe, Connection)
                try:
                    told = pipe.recv()
                except EOFError:
                    yield [Outcome(at.pop(pipe), "the process died", "", 1000.0, "died")], Counter()
                    continue
                if told is None:
                    del at[pipe]
                elif isinstance(told, int):
                    at[pipe] = told
                else:
                    yield told
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/simulation/run", description="Deterministic simulation of fastkin.")
    parser.add_argument("--seeds", default="0:2000", metavar="FROM:TO")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so long")
    parser.add_argument("--findings", type=int, default=5, help="stop after so many (default 5)")
    parser.add_argument("--marks", action="store_true", help="fail when a mark was never reached")
    parser.add_argument("--trace", type=int, metavar="SEED", help="print the history of one seed")
    parser.add_argument("--digest", action="store_true", help="print the hash of each seed's trace")
    parser.add_argument("--plant", metavar="NAME", help="run with a fault of planted/, or `all`: it must be found")
    options = parser.parse_args(argv)

    if options.plant is not None:
        every = [*plant.names(compiled=False), *plant.names(compiled=True)]
        chosen = every if options.plant == "all" else [options.plant]
        failed = 0
        for name in chosen:
            print(f"-- {name}", flush=True)
            failed += plant.find(name, options.seeds, options.jobs)
        return 1 if failed else 0

    if options.trace is not None:
        outcome = run_seed(options.trace, tracing=True)
        print(f"seed {outcome.seed} {outcome.digest} {outcome.kind}: {outcome.finding or 'nothing found'}")
        return 1 if outcome.finding else 0

    first, _, last = options.seeds.partition(":")
    seeds = range(int(first), int(last or int(first) + 1))
    began = REAL_CLOCK()
    done = bad = 0
    virtual = 0.0
    reached: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    try:
        for outcomes, more in _outcomes(seeds, min(options.jobs, len(seeds))):
            reached += more
            for outcome in outcomes:
                done += 1
                virtual += outcome.virtual_s - 1000.0
                kinds[outcome.kind] += 1
                if options.digest:
                    print(outcome.seed, outcome.digest)
                if outcome.finding is not None:
                    bad += 1
                    print(f"seed {outcome.seed}: {outcome.finding[:1200]}", flush=True)
                    print(f"    replay: tests/simulation/run --trace {outcome.seed}", flush=True)
            passed = REAL_CLOCK() - began
            if sys.stderr.isatty():
                print(f"\r{done} of {len(seeds)} seeds, {bad} findings, {done / passed:.0f}/s", end="", file=sys.stderr)
            if bad >= options.findings or (options.seconds and passed > options.seconds):
                break
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    passed = REAL_CLOCK() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(
        f"{done} seeds ({shown}), {bad} findings, {virtual / 3600:.1f} hours of virtual time in {passed:.0f} s,"
        f" {done / passed:.0f} seeds/s; {done / max(spent, 0.001):.0f} for a second of one processor"
    )
    if options.marks:
        missing = [name for name in sorted(marks.MARKS) if not reached[name]]
        rare = ", ".join(f"{name} ({count})" for name, count in reached.most_common()[:-11:-1])
        print(f"{len(marks.MARKS) - len(missing)} of {len(marks.MARKS)} marks reached; the rarest: {rare}")
        for name in missing:
            print(f"mark never reached: {name}")
        if missing:
            return 1
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
