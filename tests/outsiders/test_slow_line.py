"""A call whose body does not leave in time is not sent again as it is: smaller ones leave, and sizes grow back."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from delivery.test_sender import Rig, Scripted, numbered
from fastkin.errors import Action, KinesisError, TransportError

if TYPE_CHECKING:
    from fastkin._codec import Batch


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._CALL_CAP_S", 0.05)


class Line(Scripted):
    """Bodies up to so many bytes leave in time."""

    def __init__(self, most: float) -> None:
        super().__init__(lambda call, records: [None] * len(records))
        self.most = most
        self.late = 0
        self.carried = 0
        self.sizes: list[int] = []
        self.records: list[int] = []

    def too_late(self, left: int) -> Exception:
        error = TransportError("RequestTimeout", "no whole answer")
        error.unsent_bytes = left
        return error

    async def call(self, target: str, body: Batch) -> bytes:
        self.sizes.append(body.nbytes)
        self.records.append(len(body))
        self.carried += int(min(body.nbytes, self.most))
        if body.nbytes > self.most:
            self.late += 1
            raise self.too_late(int(body.nbytes - self.most))
        return await super().call(target, body)


async def test_smaller_calls_leave_in_time() -> None:
    line = Line(60_000)
    rig = Rig(line)
    payloads = [number.ljust(200, b".") for number in numbered(3000)]
    await rig.send(payloads, timeout=60)
    assert Counter(data for data, _ in line.stored) == Counter(payloads)
    assert sum(line.records) < 3 * 3000, "much was sent in vain"
    assert min(line.records) > 10


async def test_sizes_grow_back() -> None:
    line = Line(60_000)
    rig = Rig(line)
    first = [number.ljust(200, b".") for number in numbered(1000)]
    for record in first:
        rig.batcher.add(record)
    rig.batcher.close_batch(5)
    await rig.sender.flush()
    line.most = 1e9
    for record in [number.ljust(200, b".") for number in numbered(20_000)]:
        rig.batcher.add(record)
    rig.batcher.close_batch(5)
    await rig.sender.flush()
    assert max(line.records[-4:]) == 500
    rig.check()
    await rig.sender.close()


async def test_a_proxy_that_takes_small_bodies_only_is_not_asked_with_large_ones_each_time() -> None:
    class Proxy(Line):
        def too_late(self, left: int) -> Exception:
            return KinesisError("RequestEntityTooLarge", "", http_status=413, action=Action.REJECTED)

    proxy = Proxy(60_000)
    rig = Rig(proxy, max_calls=1)
    payloads = [number.ljust(200, b".") for number in numbered(10_000)]
    await rig.send(payloads, timeout=60)
    assert len(proxy.stored) == 10_000
    assert proxy.late <= 12
    assert rig.aside == []
