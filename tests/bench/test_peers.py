"""What fastkin is compared with: what is installed, and the settings that programs in other languages are given."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

from fastkin.bench.comparison import Contender, Group, rounds_csv
from fastkin.bench.peers import PEERS, Peer, binaries, find
from fastkin.bench.plan import Plan

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def plan(folder: Path) -> Plan:
    return Plan(
        command="pipeline", peer="telegraf", folder=str(folder), qos=1,
        broker_url="mqtt://127.0.0.1:1884", endpoint_url="https://127.0.0.1:4568",
    )  # fmt: skip


def program(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_telegraf_is_told_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = program(tmp_path, "telegraf")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find("bridge", "telegraf").missing == ""
    path, option, settings = binaries.telegraf(plan(tmp_path))
    assert (path, option) == (str(there), "--config")
    told = tomllib.loads((tmp_path / "telegraf.conf").read_text())
    assert settings == str(tmp_path / "telegraf.conf")
    (intake,), (output,) = told["inputs"]["mqtt_consumer"], told["outputs"]["kinesis"]
    assert (intake["servers"], intake["topics"], intake["qos"]) == (["tcp://127.0.0.1:1884"], ["plant/+/welder"], 1)
    assert (output["endpoint_url"], output["streamname"]) == ("https://127.0.0.1:4568", "bench")
    assert output["template"] == '{{ .Field "value" }}'


def test_fluent_bit_is_told_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = program(tmp_path, "fluent-bit")
    monkeypatch.setenv("PATH", str(tmp_path))
    peer = find("bridge", "fluent-bit")
    assert (peer.missing, peer.listens, peer.tls, peer.canonical) == ("", True, True, True)
    assert binaries.fluent_bit(plan(tmp_path))[0] == str(there)
    lines = [line.split() for line in (tmp_path / "fluent-bit.conf").read_text().splitlines()]
    assert ["listen", "127.0.0.1"] in lines
    assert ["port", "1884"] in lines
    assert ["endpoint", "127.0.0.1"] in lines
    assert ["port", "4568"] in lines
    assert ["stream", "bench"] in lines


def test_what_is_not_installed_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find("bridge", "telegraf").missing == "telegraf on PATH"
    assert Peer("p", "bridge", ("json", "no_such_package_1")).missing == "no_such_package_1"


def test_fastkin_comes_first_of_each_kind() -> None:
    """Ratios are to the first contender of a group."""
    for kind in ("bridge", "producer"):
        assert next(each.name for each in PEERS if each.kind == kind) == "fastkin"


def test_ratios_are_those_of_medians() -> None:
    ours, other = Contender("fastkin"), Contender("other", says="late")
    for mine, theirs in ((1.0, 30.0), (9.0, 20.0), (2.0, 10.0)):
        ours.add(mine, 1e6 / mine, 40.0)
        other.add(theirs, 1e6 / theirs, 60.0)
    group = Group("a title", [ours, other], [("telegraf", "telegraf on PATH")])
    mine, theirs = group.rows()
    assert (mine["cpu_us"], theirs["cpu_us"], theirs["ratio"], theirs["rss_mb"]) == (2.0, 20.0, 10.0, 60.0)
    assert "telegraf: left out, needs telegraf on PATH" in group.table()
    assert rounds_csv([group]).splitlines()[1] == "a title,fastkin,1,1.0,1000000.0,40.0"
