"""A record whose receipt said "spooled", and that Kinesis refuses for good afterwards."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fastkin.emulator import Emulator
from producer.test_overflow import identity, result, spooling

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_its_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its receipt has ended well long ago, so the log is the only place where somebody hears of it."""
    caplog.set_level(logging.ERROR)
    async with Emulator({"welders": 1}) as emulator, spooling(emulator.url, tmp_path / "spool.db") as one:
        await result(await one.put(b"first"))
        away = emulator.faults.cut("before", operation="PutRecords")
        receipt = await one.put(b"refused")
        assert (await result(receipt)).spooled
        emulator.faults.record("InvalidArgumentException", times=1)
        away.remove()
        async with asyncio.timeout(20):
            while one.stats()["dropped"] < 1:
                await asyncio.sleep(0.01)
        identity(one)
    told = [record.getMessage() for record in caplog.records if "refused for good" in record.getMessage()]
    assert len(told) == 1, caplog.text
    assert "1 records that came back from the spool" in told[0]
    assert "InvalidArgumentException" in told[0]
