"""The limit that holds when the main thread is stuck where no signal reaches it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

TESTS = Path(__file__).resolve().parent.parent

STUCK = """
import signal
import threading

import pytest


@pytest.mark.timeout(0.5)
def test_stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    threading.Thread(target=the_other_thread, daemon=True).start()
    threading.Event().wait()


def the_other_thread():
    threading.Event().wait()
"""


def test_a_stuck_main_thread_ends_the_run_with_all_stacks(tmp_path: Path) -> None:
    source = (TESTS / "conftest.py").read_text()
    assert "_GRACE_S = 20.0" in source
    (tmp_path / "conftest.py").write_text(source.replace("_GRACE_S = 20.0", "_GRACE_S = 0.5"))
    (tmp_path / "test_stuck.py").write_text(STUCK)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 60\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_stuck.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(TESTS), "PATH": ""}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "in test_stuck" in done.stderr
    assert "in the_other_thread" in done.stderr
