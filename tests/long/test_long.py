"""The long runs, short: that they work, not what they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LONG = Path(__file__).resolve().parent.parent / "long"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(LONG / script), *arguments], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(120)
def test_a_soak_accounts_for_every_record() -> None:
    said = run("soak.py", "--messages", "60000", "--rate", "20000")
    assert "held   raw: 0 of 51,429 lost" in said
    assert "held   bulk: 0 of 42,855 lost" in said


@pytest.mark.timeout(120)
def test_many_pipelines_in_one_process_take_a_megabyte_each_at_most() -> None:
    said = run("pipelines.py", "--count", "48", "--messages", "5", "--tls")
    assert "held   every message of every pipeline was stored, once" in said
    assert "held   a further pipeline takes" in said


def test_the_account_finds_what_is_missing_and_what_came_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LONG))
    from stand import Tally, imbalance, record, slope, sums

    tally = Tally()
    tally.add("s", [record(n) for n in (0, 1, 1, 3, 7)])
    found = tally.account("s", 5, 5)
    assert (found["missing"], found["repeated"], found["strange"], found["examples"]) == (2, 1, 1, [2, 4])
    tally.add("t", [record(n % 3) for n in range(7)])
    assert tally.account("t", 3, 7)["missing"] == tally.account("t", 3, 7)["repeated"] == 0
    assert tally.account("t", 3, 8)["missing"] == 1
    page = 'fastkin_records_received_total{pipeline="p"} 5.0\nfastkin_records_stored_total{pipeline="p"} 4.0\n'
    assert imbalance(sums(page)["p"]) is not None
    assert imbalance(sums(page + 'fastkin_spool_records{pipeline="p"} 1.0\n')["p"]) is None
    rate, half = slope([(float(s), 2**20 + s * 2**20 // 3600) for s in range(0, 3600, 10)])
    assert rate == pytest.approx(1.0, abs=0.01)
    assert half < 0.1
