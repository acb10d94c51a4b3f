"""What fastkin is compared with: which peers are installed, and how each is started."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from fastkin.bench.children import Child
from fastkin.bench.peers.binaries import COMMANDS

if TYPE_CHECKING:
    from pathlib import Path

    from fastkin.bench.plan import Plan

Kind = Literal["bridge", "producer"]


@dataclass(frozen=True, slots=True)
class Peer:
    """`weight`: how many times the messages of the slowest it is given, so that each is measured for long enough."""

    name: str
    kind: Kind
    needs: tuple[str, ...] = ()  # Python packages to import
    program: str = ""  # or a program on PATH
    module: str = ""  # of this package, that is run
    weight: int = 1
    canonical: bool = False  # it parses records and writes them anew
    aggregates: bool = False  # many records in one, as the KPL does it
    route: bool = False  # it wants to be told the true shard of each record
    tls: bool = False  # it speaks nothing else to Kinesis
    listens: bool = False  # machines publish to it: it is a broker itself
    says: str = ""

    @property
    def missing(self) -> str:
        """What is not installed; empty when it can be run."""
        if self.program:
            return "" if shutil.which(self.program) else f"{self.program} on PATH"
        return ", ".join(each for each in self.needs if importlib.util.find_spec(each) is None)


PEERS: Final = (
    Peer("fastkin", "bridge", weight=20, says="acknowledges after storing"),
    Peer("paho+boto3", "bridge", ("paho", "boto3"), module="paho_boto3", says="acknowledges before storing"),
    Peer(
        "gmqtt+aiobotocore", "bridge", ("gmqtt", "aiobotocore"), module="gmqtt_aiobotocore",
        says="acknowledges before storing",
    ),
    Peer(
        "gmqtt+aiobotocore, late", "bridge", ("gmqtt", "aiobotocore"), module="gmqtt_aiobotocore",
        says="acknowledges after storing",
    ),
    Peer("telegraf", "bridge", program="telegraf", weight=2, says="acknowledges when its output says so"),
    Peer(
        "fluent-bit", "bridge", program="fluent-bit", weight=5, canonical=True, tls=True, listens=True,
        says="acknowledges before parsing; TLS to Kinesis",
    ),
    Peer("fastkin", "producer", weight=10, says="an outcome for each record"),
    Peer("aiobotocore", "producer", ("aiobotocore",), says="full calls, eight at a time"),
    Peer("boto3", "producer", ("boto3",), says="full calls, eight threads"),
    Peer("capo-kinesis", "producer", ("capo_kinesis",), says="full calls, eight at a time"),
    Peer("aiokpl", "producer", ("aiokpl",), aggregates=True, route=True, says="aggregates; an outcome for each record"),
    Peer("async-kinesis", "producer", ("kinesis",), route=True, says="a queue, flushed at the end"),
)  # fmt: skip


def find(kind: Kind, name: str) -> Peer:
    return next(each for each in PEERS if (each.kind, each.name) == (kind, name))


def bridge(plan: Plan, folder: Path) -> Child:
    """The process of a bridge that is not fastkin."""
    peer = find("bridge", plan.peer)
    if peer.program:
        command = COMMANDS[peer.name](plan)
    else:
        command = [sys.executable, "-m", f"fastkin.bench.peers.{peer.module}", plan.text()]
    return Child(peer.name, command, folder, plan=plan, talks=False)
