"""Coverage-guided fuzzing of everything a peer can send: runs the targets under libFuzzer.

    make fuzz [SECONDS=60] [RUNS=0] [JOBS=2] [TARGETS="frame mqtt"]

comes here by way of ci/variant, which builds the extensions with clang. `--merge` puts what a run found new
into tests/corpus/fuzz/, thinned out. The last line is the sum; the exit code is 1 when there was a finding,
whose input then is in the folder `--artifacts`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent), str(HERE)]

import corpus  # noqa: E402

# how long inputs may become, and how much of the time a target gets beside the others
TARGETS = {
    "frame": (300, 1.6),
    "answer": (500, 1.4),
    "restore": (500, 1.2),
    "reading": (300, 0.6),
    "shape": (300, 0.6),
    "lines": (300, 0.6),
    "mqtt": (400, 0.8),
    "router": (200, 0.4),
    "http": (500, 0.15),
    "settings": (400, 0.15),
}
PYTHON = {  # targets whose code is Python: which files are watched
    "http": ("fastkin/aws/http",),
    "settings": ("fastkin/settings", "fastkin/config", "fastkin/formats", "fastkin/aws/endpoint"),
}
DONE = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def child(target: str, arguments: list[str]) -> None:
    """The fuzzing process itself: never returns."""
    os.environ.pop("LD_PRELOAD")  # what is started from here, the symbolizer, must not get it
    import fuzz_driver
    import fuzz_targets

    fuzz_targets.close_end = fuzz_driver.close_end
    fuzz_targets.open_end = fuzz_driver.open_end
    if target in PYTHON:
        fuzz_driver.trace(PYTHON[target])
    # a merge starts its workers by the first word
    fuzz_driver.run(fuzz_targets.TARGETS[target], [os.environ.get("FASTKIN_FUZZ_SELF", "fuzz"), *arguments])


def libfuzzer(target: str, arguments: list[str], log: Path) -> int:
    command = [sys.executable, str(HERE / "run.py"), "--child", target, *arguments]
    # Python keeps memory to the end on purpose, so leaks are not looked for; pymalloc would hide reads past the
    # end of an object. libFuzzer's counters must be found before AddressSanitizer's idle ones of the same name.
    env = {
        **os.environ,
        "LD_PRELOAD": os.environ["FASTKIN_FUZZ_PRELOAD"],
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "verify_asan_link_order=0:detect_leaks=0:quarantine_size_mb=16:handle_abort=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    with log.open("wb") as out:
        return subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT, check=False).returncode


def run(target: str, given: argparse.Namespace, work: Path) -> tuple[str, int, int, float]:
    """(target, its executions, exit code, seconds)."""
    folder = work / target
    folder.mkdir()
    for one in corpus.inputs(target):
        (folder / hashlib.sha1(one).hexdigest()).write_bytes(one)
    longest, share = TARGETS[target]
    log = work / f"{target}.log"
    arguments = [f"-max_len={longest}", "-print_final_stats=1", "-timeout=20", "-rss_limit_mb=2048"]
    arguments += [f"-seed={given.seed}", f"-artifact_prefix={given.artifacts}/{target}-"]
    if (words := HERE / f"{target}.dict").exists():
        arguments.append(f"-dict={words}")
    if given.runs:
        arguments.append(f"-runs={given.runs}")
    else:
        seconds = given.seconds * share * len(TARGETS) / sum(part for _, part in TARGETS.values())
        arguments.append(f"-max_total_time={max(1, round(seconds))}")
    started = time.monotonic()
    code = libfuzzer(target, [*arguments, str(folder)], log)
    spent = time.monotonic() - started
    said = log.read_text("utf-8", "replace")
    found = DONE.search(said)
    if code or found is None:
        print(f"--- {target}: exit code {code}\n{said[-8000:]}", file=sys.stderr, flush=True)
        code = code or 1
    return target, int(found.group(1)) if found else 0, code, spent


def merge(target: str, folder: Path, work: Path) -> None:
    """The fewest inputs that reach what all of them reach."""
    kept = work / f"{target}-kept"
    kept.mkdir()
    again = work / f"{target}-again"
    preload = os.environ["FASTKIN_FUZZ_PRELOAD"]
    again.write_text(f'#!/bin/sh\nLD_PRELOAD="{preload}" exec {sys.executable} {HERE}/run.py --child {target} "$@"\n')
    again.chmod(0o700)
    os.environ["FASTKIN_FUZZ_SELF"] = str(again)
    longest = TARGETS[target][0]
    log = work / f"{target}-merge.log"
    code = libfuzzer(target, ["-merge=1", f"-max_len={longest}", str(kept), str(folder)], log)
    if code or not any(kept.iterdir()):
        sys.exit(f"{target}: the merge failed\n{log.read_text('utf-8', 'replace')[-4000:]}")
    inputs = [path.read_bytes() for path in kept.iterdir()]
    corpus.pack(target, inputs)
    print(f"{target}: {len(inputs)} inputs kept, {sum(map(len, inputs)):,} bytes", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="frame, answer, restore, mqtt, router, http, settings; all"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target, on the average (%(default)s)")
    parser.add_argument("--runs", type=int, default=0, help="executions of each target, instead of seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at the same time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="libFuzzer's, 0: a new one")
    parser.add_argument("--artifacts", type=Path, default=Path.cwd(), help="where the input of a finding goes")
    parser.add_argument("--merge", action="store_true", help="keep what is new in tests/corpus/fuzz/")
    given = parser.parse_args()
    wanted = given.targets or list(TARGETS)
    if unknown := [name for name in wanted if name not in TARGETS]:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    started = time.monotonic()
    total = bad = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(given.jobs) as pool:
        for target, done, code, spent in pool.map(lambda one: run(one, given, Path(name)), wanted):
            result = "no finding" if code == 0 else "A FINDING, see above"
            print(f"fuzz: {target}: {done:,} executions in {spent:.0f} s, {result}", flush=True)
            total += done
            bad += code != 0
        for target in wanted if given.merge and not bad else ():
            merge(target, Path(name) / target, Path(name))
    print(f"fuzz: {total:,} executions of {len(wanted)} targets in {time.monotonic() - started:.0f} s, {bad} findings")
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    sys.exit(main())
