"""What the watchdog found in this process since the test began."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

found: list[tuple[str, str]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """The list that is filled while the block runs."""
    found.clear()
    if importlib.util.find_spec("fastkin.delivery.watchdog") is None:  # these tests, on a fastkin of before
        yield found
        return
    from fastkin.delivery import watchdog

    def note(name: str, what: str) -> None:
        found.append((name, what))

    watchdog.on_stall.append(note)
    try:
        yield found
    finally:
        watchdog.on_stall.remove(note)


def look_every(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    if importlib.util.find_spec("fastkin.delivery.watchdog") is not None:
        monkeypatch.setattr("fastkin.delivery.watchdog.EVERY_S", seconds)


def told_in(log: str) -> bool:
    """Does the log of a process say that its watchdog found something?"""
    return " watchdog stalled" in log or '"stage": "watchdog"' in log
