"""A few hundred seeds in every run of the tests; that a seed replays exactly; that what is planted is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation import plant

RUN = [sys.executable, "-m", "simulation.run"]
TESTS = Path(__file__).parent.parent


def run(*arguments: str, hash_seed: str = "0", path: str = "") -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join([each for each in (path, str(TESTS)) if each]),
    }
    return subprocess.run([*RUN, *arguments], env=env, capture_output=True, text=True, timeout=110, check=False)


def test_seeds() -> None:
    done = run("--seeds", "0:300", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_seed_replays_exactly_in_another_process() -> None:
    first = run("--seeds", "1000:1100", "--jobs", "1", "--digest")
    again = run("--seeds", "1000:1100", "--jobs", "2", "--digest")
    assert first.returncode == 0, first.stdout
    digests = sorted(line for line in first.stdout.splitlines() if line[:4].isdigit())
    assert digests == sorted(line for line in again.stdout.splitlines() if line[:4].isdigit())
    assert len({line.split()[1] for line in digests}) == 100


@pytest.mark.parametrize("name", plant.names(compiled=False))
def test_what_is_planted_is_found(name: str) -> None:
    done = run("--plant", name, "--seeds", "0:2000", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_compiled_patch_still_applies(tmp_path: Path) -> None:
    """`ci/run` builds them and lets the seeds find them; here that would take minutes."""
    for name in plant.names(compiled=True):
        command = ["patch", "-p1", "-s", "--dry-run", "-d", plant.ROOT / "src", "-i", plant.PATCHES / f"{name}.patch"]
        subprocess.run(command, check=True, timeout=20)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_hash_depends_on_the_seed(seed: int) -> None:
    one = run("--trace", str(seed))
    other = run("--trace", str(seed + 2))
    assert one.stdout.splitlines()[-1].split()[2] != other.stdout.splitlines()[-1].split()[2]
