"""What a bench measures when it measures fastkin itself: `fastkin run`, with settings made from the plan."""

from __future__ import annotations

import json
import sys
import tomllib
from typing import TYPE_CHECKING, Any

from fastkin.bench.children import Child
from fastkin.bench.plan import EMULATOR, KEY
from fastkin.settings import load

if TYPE_CHECKING:
    from pathlib import Path

    from fastkin.bench.plan import Plan

_TABLES = ("broker", "broker.tls", "kinesis", "pipeline", "status")


def settings_text(plan: Plan) -> str:
    """The settings file of a run. `--set KEY=VALUE` is a key of each pipeline, `--set broker.KEY=VALUE` one of the
    broker's table, and so on."""
    tables: dict[str, dict[str, Any]] = {
        "broker": {"url": plan.broker_url, "client_id": "bench", "receive_maximum": plan.window},
        "broker.tls": {},
        "kinesis": {"stream": plan.stream, "region": plan.region},
        "pipeline": {"qos": plan.qos, "dead_letter": "none", **plan.forms().settings},
        "status": {},
    }
    if plan.endpoint_url:  # the intake alone has none
        tables["kinesis"]["endpoint_url"] = plan.endpoint_url
    if plan.endpoint == EMULATOR:
        tables["kinesis"] |= {"access_key": KEY, "secret_key": KEY}
    if plan.broker_ca:
        tables["broker.tls"]["ca"] = plan.broker_ca
    if plan.endpoint_ca:
        tables["kinesis"]["ca_bundle"] = plan.endpoint_ca
    for key, value in plan.option.items():
        table, _, name = key.rpartition(".")
        tables[table if table in _TABLES else "pipeline"][name if table in _TABLES else key] = value_of(value)
    lines = []
    for table, keys in tables.items():
        if table != "pipeline" and keys:
            lines += [f"[{table}]", *map(_line, keys.items()), ""]
    for at in range(plan.pipelines):
        lines += ["[[pipeline]]", _line(("id", f"bench-{at}")), *map(_line, tables["pipeline"].items()), ""]
    return "\n".join(lines)


def value_of(text: str) -> Any:
    """A value as TOML has it; what is none is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _line(item: tuple[str, Any]) -> str:
    # what JSON has for texts, numbers, flags and lists of them, TOML has too
    return f"{item[0]} = {json.dumps(item[1], ensure_ascii=False)}"


def check(plan: Plan) -> None:
    """Read the settings as the service will. SettingsError: what `--set` said cannot be used."""
    load(plan.path("bench.toml"), env={})


def fastkin_run(plan: Plan, folder: Path) -> Child:
    command = [sys.executable, "-m", "fastkin", "run", str(plan.path("bench.toml"))]
    return Child("fastkin run", command, folder, plan=plan, talks=False)
