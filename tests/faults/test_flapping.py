"""A link to the broker that flaps while Kinesis is away."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from harness import Rig

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("away_s", "cut_s"), [(6.0, 0.5), pytest.param(30.0, 2.0, marks=pytest.mark.faults_full)])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_link_that_flaps_through_an_outage_repeats_almost_nothing(
    tmp_path: Path, protocol: str, away_s: float, cut_s: float
) -> None:
    """Kinesis is away and the broker's link is cut again and again: what waits here is not stored once for each cut."""
    with Rig(tmp_path, broker={"protocol": protocol, "inflight": 500}, conf="max_inflight_messages 500\n") as rig:
        rig.flow(400)
        rig.stored(100)
        rig.wait(rig.kinesis_way.refuse())
        rig.call(rig.kinesis_way.cut)
        rig.flow(2000, rate=2000 / away_s)
        until = time.monotonic() + away_s
        cuts = 0
        while time.monotonic() < until:
            time.sleep(cut_s)
            cuts += rig.call(rig.broker_way.cut) > 0
        assert cuts > 5
        rig.wait(rig.kinesis_way.start())
        rig.settle()
        rig.finish()
        times: Counter[int] = Counter(rig.call(lambda: Counter(rig._look())).values())
        assert max(times) <= 2, f"stored so often: {times}"
        assert times[1] >= 0.9 * times.total(), f"stored so often: {times}"
