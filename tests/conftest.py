"""Fixtures for every test; `async def test_...` runs under pytest-asyncio in a loop of its own.

Every test has a time limit (`timeout` in pyproject.toml, or the test's own mark). pytest-timeout enforces it with a
signal, which only fails the one test, but needs a main thread that still runs Python. A main thread that is stuck in
a lock or in a loop's C code never sees it. So a second limit, a little later, is watched by a thread of the
interpreter's own (faulthandler): it prints the stacks of all threads and ends the process.

Tests that start a process bear the mark `process`: see support/processes.py.
"""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support import processes, servers, stalls

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_WHOLE = {"faults", "long", "simulation", "system"}  # folders whose every test is about processes
_GRACE_S = 20.0  # what the signal gets to end a test in order
_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # output is not captured yet: later this number may be a file of pytest's


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    os.close(config.stash[_stderr])


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        whole = any(_HERE / folder in item.path.parents for folder in _WHOLE)
        if whole or "process" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.process)
    if "long" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    mark = item.get_closest_marker("timeout")
    given = (mark.args[0] if mark.args else mark.kwargs.get("timeout")) if mark is not None else None
    limit = float(given or item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + _GRACE_S, exit=True, file=item.config.stash[_stderr])
    processes.watch(item)
    try:
        return (yield)
    finally:
        processes.watch(None)
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def process() -> None:
    """For fixtures that start a process. What asks for this, by way of others too, bears the mark `process`."""


@pytest.fixture
def broker(process: None) -> Iterator[servers.Server]:
    """A fresh mosquitto for this test."""
    with servers.mosquitto() as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(process: None) -> Iterator[servers.Server]:
    """One moto for the whole run: use names of your own."""
    with servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def kinesalite_server(process: None) -> Iterator[servers.KinesisServer]:
    """One kinesalite for the whole run: use a stream name of your own."""
    with servers.kinesalite() as server:
        yield server


@pytest.fixture(scope="session")
def kinesis_mock_server(process: None) -> Iterator[servers.KinesisServer]:
    """One kinesis-mock for the whole run: use a stream name of your own."""
    with servers.kinesis_mock() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_stalls() -> Iterator[None]:
    """What the watchdog finds is a bug of fastkin, whatever the test is about. A test that makes it find something
    clears `stalls`."""
    with stalls.watched() as found:
        yield
    assert found == []
