"""A disk that hangs fails no call: what waits for it must not stand still without a word, under green probes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from delivery.test_backlog import Feed, broker, pipeline, until
from fastkin.deadletter.file import DeadLetters
from fastkin.deadletter.handler import FileStore
from fastkin.delivery.spool_file import Spool
from fastkin.service.pipeline import PipelineRun
from support.servers import free_port

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def hanging(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> threading.Event:
    """Until the event is set, calls of this method do not return; 0.3 s of that are too long."""
    go_on = threading.Event()
    real = getattr(owner, name)

    def call(*arguments: Any, **more: Any) -> Any:
        go_on.wait(60)
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, call)
    with contextlib.suppress(ImportError):
        import fastkin.runtime.worker

        monkeypatch.setattr(fastkin.runtime.worker, "HANGS_S", 0.3, raising=False)
    return go_on


def errors(caplog: pytest.LogCaptureFixture, place: Path) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.ERROR and str(place) in record.getMessage()
    ]


async def test_a_spool_that_hangs_is_told_and_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool"
    run = PipelineRun(pipeline(f"http://127.0.0.1:{free_port()}", path), broker())  # Kinesis is away
    go_on = hanging(monkeypatch, Spool, "write")
    run.start()
    try:
        await until(lambda: run.delivery.backlog is not None and run.delivery.backlog.task is not None)
        Feed(run).offer(10)
        with contextlib.suppress(TimeoutError):
            await until(lambda: f"spool {path} has not answered" in str(run.unready()), 5.0)
        assert f"spool {path} has not answered" in str(run.unready())
        assert len(errors(caplog, path)) == 1
        go_on.set()
        await until(lambda: run.stats()["spooled_ever"] == 10)
        assert "has not answered" not in str(run.unready())
        assert f"spool {path} answers again" in caplog.text
    finally:
        go_on.set()
        await run.stop()


async def test_a_spool_that_hangs_from_the_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool"
    run = PipelineRun(pipeline(f"http://127.0.0.1:{free_port()}", path), broker())
    go_on = hanging(monkeypatch, Spool, "open")
    run.start()
    try:
        with contextlib.suppress(TimeoutError):
            await until(lambda: bool(errors(caplog, path)), 5.0)
        assert errors(caplog, path)
        assert f"spool {path} has not answered" in str(run.unready())
    finally:
        go_on.set()
        await run.stop()


async def test_dead_letters_that_hang_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dead"
    go_on = hanging(monkeypatch, DeadLetters, "write")
    store = FileStore("p", DeadLetters(str(path)))
    await store.open()
    letter = {"time": 0.0, "pipeline": "p", "topic": "t", "reason": "r", "offset": 0, "index": None, "payload": b"x"}
    storing = asyncio.create_task(store.store([letter]))
    try:
        with contextlib.suppress(TimeoutError):
            await until(lambda: bool(errors(caplog, path)), 5.0)
        assert [text for text in errors(caplog, path) if text.startswith("pipeline=p stage=settle ")]
    finally:
        go_on.set()
        await storing
        await store.close()
