"""Every producer that is compared stores what it is given, each record once."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import pytest

from fastkin.bench import times
from fastkin.bench.endpoint import Endpoint
from fastkin.bench.peers import PEERS, find
from fastkin.bench.peers.producers import putter
from fastkin.bench.plan import KEY, Plan

if TYPE_CHECKING:
    from pathlib import Path

MESSAGES = 30


@pytest.mark.parametrize("name", [each.name for each in PEERS if each.kind == "producer"])
async def test_what_is_put_is_stored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # as the process of a run has them
        monkeypatch.setenv(key, KEY)
    peer = find("producer", name)
    plan = Plan(
        command="producer", peer=name, messages=MESSAGES, aggregates=peer.aggregates, route=peer.route,
        folder=str(tmp_path),
    )  # fmt: skip
    forms = plan.forms()
    times.make(plan, forms.block)
    times.mark(times.share(plan), 0, MESSAGES, time.monotonic())
    async with Endpoint(plan) as endpoint:
        async with putter(dataclasses.replace(plan, endpoint_url=endpoint.url)) as put:
            await put.send(list(forms.all_records(0, MESSAGES)))
            await put.flush()
        balance = endpoint.balance()
    assert (balance["published"], balance["stored"], balance["lost"]) == (MESSAGES, MESSAGES, 0)
    assert (balance["duplicates"], balance["foreign"]) == (0, 0)
    assert balance["latency_ms"]["p50"] > 0
