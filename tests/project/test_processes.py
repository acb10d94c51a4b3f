"""A test that starts a process and does not say so fails: support/processes.py."""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def run() -> None:
    subprocess.run(["true"], check=True)


def run_in_a_loop() -> None:
    async def main() -> None:
        await (await asyncio.create_subprocess_exec("true")).wait()

    asyncio.run(main())


def fork() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def shell() -> None:
    os.system("true")


WAYS = [run, run_in_a_loop, fork, shell]


@pytest.mark.parametrize("start", WAYS)
def test_a_test_without_the_mark_may_start_none(start: Callable[[], None]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"mark it with @pytest\.mark\.process"):
        start()


@pytest.mark.process
@pytest.mark.parametrize("start", WAYS)
def test_one_with_the_mark_may(start: Callable[[], None]) -> None:
    start()


@pytest.fixture
def ended(process: None) -> int:
    return subprocess.run(["true"], check=False).returncode


def test_one_whose_fixture_asks_for_process_bears_the_mark(ended: int, request: pytest.FixtureRequest) -> None:
    assert ended == 0
    assert request.node.get_closest_marker("process") is not None
