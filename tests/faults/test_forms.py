"""The same storm over every form a pipeline can have: QoS 2, aggregates, WebSocket, TLS, reloads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from authority import Authority
from harness import Rig

if TYPE_CHECKING:
    from pathlib import Path

HOSTS = ("127.0.0.1", "localhost")


def storm(rig: Rig, *, reloads: bool = False) -> dict[str, int]:
    """Cuts on both ways, calls that fail and answers that are lost, and a SIGKILL in the middle."""
    faults = rig.kinesis.faults
    rig.flow(3000)
    rig.stored(200)
    rig.call(rig.broker_way.cut)
    rig.stored(500)
    rig.call(lambda: faults.cut("after", times=3))
    rig.stored(800)
    if reloads:
        rig.reload(linger_ms=20)
    rig.call(rig.broker_way.cut)
    rig.call(lambda: faults.call("InternalFailureException", times=3, stored=True))
    rig.stored(1100)
    rig.kill()
    rig.restart()
    rig.stored(1400)
    rig.call(rig.kinesis_way.cut)
    rig.call(lambda: faults.record("InternalFailure", probability=0.3, times=300, for_s=1.0))
    if reloads:
        rig.reload(linger_ms=5)
    rig.stored(1700)
    rig.call(rig.broker_way.cut)
    rig.settle()
    return rig.finish()


def authority(folder: Path) -> Authority:
    folder.mkdir()
    made = Authority(folder)
    made.show(*HOSTS)
    return made


FORMS: dict[str, dict[str, Any]] = {
    "qos-2": {"qos": 2},
    "kpl": {"pipeline": {"aggregation": "kpl"}},
    "kpl-qos-2": {"qos": 2, "pipeline": {"aggregation": "kpl"}},
    "3.1.1-qos-2": {"qos": 2, "broker": {"protocol": "3.1.1"}},
    "websocket": {"websocket": True},
    "websocket-qos-2": {"websocket": True, "qos": 2},
    "content": {"pipeline": {"partition_key": "content"}},
    "content-qos-2": {"qos": 2, "pipeline": {"partition_key": "content"}},
    "content-kpl": {"pipeline": {"partition_key": "content", "aggregation": "kpl"}},
    "window-1": {"broker": {"receive_maximum": 1}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_storm(tmp_path: Path, form: str) -> None:
    with Rig(tmp_path, persistence=True, **FORMS[form]) as rig:
        storm(rig)


def test_a_storm_over_tls_on_both_sides(tmp_path: Path) -> None:
    broker, kinesis = authority(tmp_path / "broker-ca"), authority(tmp_path / "kinesis-ca")
    with Rig(
        tmp_path, persistence=True, tls=broker.context, emulator={"ssl_context": kinesis.context},
        broker={"tls": {"ca": str(broker.path)}}, kinesis={"ca_bundle": str(kinesis.path)},
    ) as rig:  # fmt: skip
        storm(rig)


@pytest.mark.parametrize("qos", [1, 2])
def test_a_storm_with_reloads(tmp_path: Path, qos: int) -> None:
    with Rig(tmp_path, persistence=True, qos=qos) as rig:
        storm(rig, reloads=True)


@pytest.mark.parametrize("form", ["kpl", "qos-2"])
def test_a_storm_with_a_spool(tmp_path: Path, form: str) -> None:
    options = dict(FORMS[form])
    pipeline = options.pop("pipeline", {})
    spool = {"on_full": "spool", "spool": str(tmp_path / "spool"), "spool_after_s": 0.2}
    with Rig(tmp_path, persistence=True, spool=True, pipeline=pipeline | spool, **options) as rig:
        storm(rig)
