"""fastkin beside its peers: outputs compared first, then rounds in turns.

In turns, because a machine that others share changes its speed within minutes: only neighbours can be compared.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

from fastkin.bench.children import BenchError
from fastkin.bench.comparison import Contender, Group
from fastkin.bench.peers import PEERS, Kind, Peer
from fastkin.bench.runs import run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fastkin.bench.plan import Plan, Sample
    from fastkin.bench.result import Result
    from fastkin.bench.runs import Show

CHECKED = 2_000  # messages by which outputs are compared

TITLES: dict[Kind, str] = {
    "bridge": "MQTT QoS {qos} in to stored, {form}",
    "producer": "producer, {form}",
}


class _Words:
    """Tells what a run says, and no progress: a round is short."""

    def __init__(self, show: Show) -> None:
        self.say = show.say

    def now(self, sample: Sample) -> None:
        pass


class Differs(BenchError):  # noqa: N818 - it reads better in `except`
    """A contender stored something else than was sent."""


async def compare(
    plan: Plan, kinds: Sequence[Kind], names: Sequence[str], rounds: int, folder: Path, show: Show
) -> list[Group]:
    """`names`: the peers wanted, all that are installed when it is empty. Differs: outputs are not equal."""
    made = []
    for kind in kinds:
        wanted = [each for each in PEERS if each.kind == kind and (not names or each.name in (*names, "fastkin"))]
        if names and len(wanted) == 1 and "fastkin" not in names:
            continue  # all peers that were named are of the other kind
        there = [each for each in wanted if not each.missing]
        group = Group(TITLES[kind].format(qos=plan.qos, form=plan.form))
        group.left_out = [(each.name, each.missing) for each in wanted if each.missing]
        group.contenders = [Contender(each.name, each.says) for each in there]
        for peer in there:
            show.say(f"checking what {peer.name} stores")
            await _one(plan, peer, min(CHECKED, plan.messages), folder, show)
        for number in range(1, rounds + 1):
            for peer, contender in zip(there, group.contenders, strict=True):
                result = await _one(plan, peer, plan.messages * peer.weight, folder, show)
                contender.add(result.cpu_us, result.per_s, result.rss_mb)
                show.say(f"round {number} of {rounds}, {peer.name}: {result.cpu_us:.2f} us, {result.per_s:,.0f}/s")
        made.append(group)
    return made


async def _one(plan: Plan, peer: Peer, messages: int, folder: Path, show: Show) -> Result:
    """One run of a peer; every run looks each record up, so a loss in a round is found too."""
    own = folder / "run"
    own.mkdir()
    try:
        result = await run(
            dataclasses.replace(
                plan,
                command="producer" if peer.kind == "producer" else "pipeline",
                peer=peer.name,
                messages=messages,
                canonical=peer.canonical,
                aggregates=peer.aggregates,
                route=peer.route,
                tls_kinesis=plan.tls_kinesis or peer.tls,
            ),
            own,
            _Words(show),
        )
    finally:
        shutil.rmtree(own, ignore_errors=True)
    balance = result.balance
    if not result.good or balance.duplicates:
        raise Differs(
            f"{peer.name} stored something else than was sent: {balance.lost} of {balance.published} records are"
            f" missing, {balance.duplicates} came twice, {balance.foreign} are other ones; leave it out with --peer"
        )
    return result
